"""Images that cannot be read: replaced by the same ones in every run, listed, or fatal."""

import errno
import io
import os
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from preloaded import programs
from timm.data import AugMixDataset
from torch import Tensor
from torch.utils.data import Dataset, Subset

from qna_timm.training.data import bad_images, datasets, image_loader, loaders
from qna_timm.training.data.bad_images import ReadableImages, merge_replaced, path_of
from qna_timm.training.data.image_loader import ImageLoader
from qna_timm.training.data.shards import plan_shards
from qna_timm.training.data.views import ImageView
from qna_timm.training.errors import RunFailed
from qna_timm.training.flags.recipe import parse_train_args

CPU = torch.device("cpu")
CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bilinear",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
STILL = ("--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0", "--color-jitter", "0")
PER_CLASS, BATCH = 20, 4
BAD = {"ant/03.png": "OSError", "bee/07.jpg": "OSError", "bee/11.jpg": "UnidentifiedImageError"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """40 images, one grey each: one PNG and one JPEG cut off, one that is text."""
    for split in ("train", "validation"):
        for label, (name, kind) in enumerate((("ant", "png"), ("bee", "jpg"))):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(PER_CLASS):
                grey = 5 * (PER_CLASS * label + number)
                image = Image.effect_noise((48, 48), 1).point(lambda _, grey=grey: grey)
                image.save(tmp_path / split / name / f"{number:02}.{kind}")
        for name in list(BAD)[:2]:
            path = tmp_path / split / name
            path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
        (tmp_path / split / list(BAD)[2]).write_text("not an image")
    return tmp_path


_opened: list[ImageLoader] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Else loaders that a caught error refers to wait for the garbage collector."""
    yield
    while _opened:
        _opened.pop().close()


def flags(root: Path, *argv: str) -> Namespace:
    words = ["--data-dir", str(root), "--device", "cpu", "-j", "0", "-b", str(BATCH), *STILL]
    return parse_train_args([*words, *argv])


def train_loader(root: Path, *argv: str, **kwargs: Any) -> ImageLoader:
    args = flags(root, *argv)
    train_set, splits = datasets.open_datasets(args)[0], args.aug_splits
    _opened.append(
        datasets.create_train_loader(
            train_set, args, CONFIG, device=CPU, num_aug_splits=splits, **kwargs
        )
    )
    return _opened[-1]


def batches(of: ImageLoader, epoch: int, start: int = 0) -> list[Tensor]:
    of.set_epoch(epoch, start)
    return [torch.cat([x.flatten(1), y[:, None]], dim=1) for x, y in of]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestTraining:
    @pytest.mark.parametrize(
        "argv",
        [
            (),
            ("--dataset", "torch/image_folder"),
            ("--aug-splits", "2", "--aa", "augmix-m3-w3"),
            ("--train-num-samples", "38"),
        ],
        ids=["folder", "torchvision", "augmix", "view"],
    )
    def test_replaced_and_listed_alike_however_loaded(
        self, root: Path, argv: tuple[str, ...], caplog: pytest.LogCaptureFixture
    ) -> None:
        alone = train_loader(root, *argv)
        whole = [batches(alone, epoch) for epoch in (0, 1)]
        listed = alone.replaced()
        for epoch in (0, 1):
            of_epoch = [entry for entry in listed if entry["epoch"] == epoch]
            names = {os.path.relpath(entry["path"], root / "train") for entry in of_epoch}
            assert names == set(BAD)
            for entry in of_epoch:
                name = os.path.relpath(entry["path"], root / "train")
                # of a PNG that is cut off Pillow tells in one of two ways
                assert entry["error"].startswith((BAD[name], "SyntaxError")), entry
        assert len([r for r in caplog.records if "stands in for it" in r.message]) == 3
        workers = train_loader(root, *argv, "-j", "2")
        for epoch in (0, 1):
            assert_same(batches(workers, epoch), whole[epoch])
        assert workers.replaced() == listed

    def test_replacement_has_its_own_label_and_pixels(self, root: Path) -> None:
        of = train_loader(root)
        for batch in batches(of, 0):
            greys = (batch[:, 0] * 255 / 5).round().long()
            assert torch.equal(greys // PER_CLASS, batch[:, -1].long())
        for entry in of.replaced():
            assert entry["index"] != entry["replacement"]

    def test_listed_is_what_has_been_trained_on(self, root: Path) -> None:
        """Workers read ahead; a run that is killed and resumed has the list of a straight one."""
        straight = train_loader(root, "-j", "2")
        for epoch in (0, 1):
            batches(straight, epoch)
        killed, resumed = train_loader(root, "-j", "2"), train_loader(root)
        batches(killed, 0)
        killed.set_epoch(1)
        for taken, _ in enumerate(killed, 1):
            if taken == 6:
                break
        saved = killed.replaced(before=(1, 4))  # two micro-batches after the last save
        batches(resumed, 1, 4)
        positions = [entry["position"] for entry in saved if entry["epoch"] == 1]
        assert all(position < 4 * BATCH for position in positions)
        assert merge_replaced(saved, resumed.replaced()) == straight.replaced()
        assert merge_replaced(killed.replaced(), resumed.replaced()) == straight.replaced()

    def test_listed_alike_on_any_number_of_processes(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_shards(2 * PER_CLASS, BATCH, 2)

        def listed(world_size: int, rank: int) -> list[dict[str, Any]]:
            for module in (loaders, image_loader):
                monkeypatch.setattr(module, "process_place", lambda: (rank, world_size))
            of = train_loader(root, plan=plan)
            batches(of, 0)
            return of.replaced()

        assert merge_replaced(listed(2, 1), listed(2, 0)) == listed(1, 0) != []

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_strict_data(self, root: Path, workers: str) -> None:
        of = train_loader(root, "--strict-data", "-j", workers)
        (first, *_) = (entry for entry in self.plain(root))
        with pytest.raises(RunFailed) as caught:
            batches(of, 0)
        message = str(caught.value)
        assert message.startswith(f"--strict-data: cannot read {first['path']} ("), message
        assert "\n" not in message and first["error"] in message

    def plain(self, root: Path) -> list[dict[str, Any]]:
        of = train_loader(root)
        batches(of, 0)
        return of.replaced()

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_nothing_readable(self, root: Path, workers: str) -> None:
        of = train_loader(root, "-j", workers)
        shutil.rmtree(root / "train")
        with pytest.raises(RunFailed, match=r"^cannot read 20 train image\(s\) in a row: /") as no:
            batches(of, 0)
        assert "FileNotFoundError" in str(no.value) and "\n" not in str(no.value)

    def test_vanished(self, root: Path) -> None:
        of = train_loader(root)
        (root / "train" / "ant" / "05.png").unlink()
        batches(of, 0)
        errors = {Path(entry["path"]).name: entry["error"] for entry in of.replaced()}
        assert errors["05.png"].startswith("FileNotFoundError")


class TestEvaluation:
    def loader(self, root: Path, *argv: str) -> ImageLoader:
        args = flags(root, *argv)
        dataset = datasets.open_datasets(args)[1]
        _opened.append(datasets.create_eval_loader(dataset, args, CONFIG, device=CPU, batch_size=7))
        return _opened[-1]

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_the_next_image_stands_in(self, root: Path, workers: str) -> None:
        of = self.loader(root, "-j", workers)
        twice = [torch.cat([x.flatten(1) for x, _ in of]) for _ in range(2)]
        assert torch.equal(*twice)
        greys = (twice[0].mean(1) * 255 / 5).round().long().tolist()
        expected = list(range(2 * PER_CLASS))
        for index in (3, 27, 31):
            expected[index] += 1
        assert greys == expected
        entries = of.replaced()
        assert [(e["split"], e["epoch"], e["index"], e["replacement"]) for e in entries] == [
            ("validation", None, index, index + 1) for index in (3, 27, 31)
        ]

    def test_strict_data(self, root: Path) -> None:
        with pytest.raises(RunFailed, match=r"--strict-data: cannot read .*validation/ant/03.png"):
            list(self.loader(root, "--strict-data"))

    def test_held_out(self, root: Path) -> None:
        args = flags(root, "--val-fraction", "0.5")
        train, held_out = datasets.open_datasets(args)
        of = datasets.create_eval_loader(held_out, args, CONFIG, device=CPU, batch_size=5)
        list(of)
        own = datasets.create_train_loader(train, args, CONFIG, device=CPU)
        batches(own, 0)
        listed = [Path(e["path"]).name for loader in (of, own) for e in loader.replaced()]
        assert sorted(listed) == sorted(Path(name).name for name in BAD)


class Raising(Dataset):
    """A dataset of numbers, some of which raise."""

    def __init__(self, count: int, errors: dict[int, BaseException]) -> None:
        self.count = count
        self.errors = errors
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.asked.append(index)
        if index in self.errors:
            raise self.errors[index]
        return index


class TestReading:
    @pytest.mark.parametrize("count", [2, 3, 10, 97])
    @pytest.mark.parametrize("seed", [0, 1, 5, 2**61 + 3])
    def test_candidates_are_all_different(self, count: int, seed: int) -> None:
        dataset = Raising(count, {i: OSError("broken") for i in range(count)})
        with pytest.raises(RunFailed, match=f"cannot read {min(20, count)} train"):
            ReadableImages(dataset, "train").read(1, seed)
        assert len(set(dataset.asked)) == len(dataset.asked) == min(20, count)

    def test_the_only_image(self) -> None:
        with pytest.raises(RunFailed, match=r"cannot read 1 train image\(s\) in a row: train imag"):
            ReadableImages(Raising(1, {0: OSError("broken")}), "train").read(0, 5)

    @pytest.mark.parametrize(
        "error", [ValueError("x"), SyntaxError("x"), EOFError(), KeyError("x"), RuntimeError("x")]
    )
    def test_whatever_readers_raise(self, error: Exception) -> None:
        sample, fault = ReadableImages(Raising(9, {4: error}), "train").read(4, 3)
        assert sample == fault.replacement != 4
        assert fault.error.startswith(type(error).__name__) and not fault.error.endswith(":")

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), KeyboardInterrupt(), OSError(errno.ENOMEM, "no memory"), RunFailed("x")],
    )
    def test_what_is_no_fault_of_the_image(self, error: BaseException) -> None:
        with pytest.raises(type(error)):
            ReadableImages(Raising(9, {4: error}), "train").read(4)

    def test_hiccups_of_a_file_system_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else a run's samples would depend on the state of its network."""
        dataset = Raising(9, {4: OSError(errno.ESTALE, "stale")})
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                dataset.errors.clear()

        monkeypatch.setattr(bad_images.time, "sleep", pause)
        begun: list[int] = []
        result = ReadableImages(dataset, "train").read(4, begin=lambda: begun.append(1))
        assert result == (4, None)
        assert len(begun) == len(pauses) + 1 == 3
        assert sum(bad_images._PAUSES) < 5

    def test_errors_are_told_without_addresses(self) -> None:
        reader = Raising(9, {4: OSError(f"cannot identify {io.BytesIO()!r}\nand more")})
        _, fault = ReadableImages(reader, "train").read(4)
        assert fault.error == "OSError: cannot identify <_io.BytesIO object> and more"

    def test_paths_that_are_no_text(self, tmp_path: Path) -> None:
        folder = tmp_path / "train" / "ant"
        folder.mkdir(parents=True)
        try:
            (folder / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
        except OSError:
            pytest.skip("the file system wants UTF-8")
        args = flags(tmp_path)
        dataset = datasets.open_dataset(args, "train", True)
        assert path_of(dataset, 0) == f"{folder}/\\xff.png"

    def test_paths_through_views(self, root: Path) -> None:
        plain = datasets.open_dataset(flags(root), "train", True)
        torchvision = datasets.open_dataset(
            flags(root, "--dataset", "torch/image_folder"), "train", True
        )
        last = str(root / "train" / "bee" / "19.jpg")
        view = ImageView(plain, None, indices=[5, 39])
        for dataset, index in (
            (plain, 39), (torchvision, 39), (view, 1), (Subset(view, [1]), 0),
            (AugMixDataset(view), 1),
        ):  # fmt: skip
            assert path_of(dataset, index) == last
        assert path_of(Raising(3, {}), 1) == ""


def test_the_command_line_tells_in_one_line() -> None:
    code = """
from qna_timm.training.errors import RunFailed, run_cli
def main():
    raise RunFailed("cannot read a.png (OSError: \\n cut off)")
run_cli(main)
"""
    done = subprocess.run([programs() / "python", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "-c: failed: cannot read a.png (OSError: cut off)\n"


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    # timm would say so where it takes a neighbour by itself
    assert not [record for record in caplog.records if "Skipped sample" in record.message]
