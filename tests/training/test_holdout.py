"""A held-out part of the training split: which one, how it is seen, and that no other is opened."""

import hashlib
import importlib.util
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from qna_timm.training.data import datasets
from qna_timm.training.data.digits import Digits
from qna_timm.training.data.holdout import split_indices
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args, parse_validate_args

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CONFIG = {
    "input_size": (3, 8, 8),
    "interpolation": "nearest",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
RUN = "--model test_vit --img-size 32 -b 16 -j 0 --device cpu --opt adamw --lr 1e-3"
RUN += " --warmup-epochs 1 --epochs 3 --max-steps 2 --val-num-samples 64"


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    modules = {}
    for name in ("train", "validate"):
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


def training_only(init: Callable[[Digits, bool], None]) -> Callable[[Digits, bool], None]:
    """A constructor of digits that refuses their validation part, which is the test part here."""

    def checked(self: Digits, is_validation: bool) -> None:
        assert not is_validation, "the test part was opened"
        init(self, is_validation)

    return checked


def digits_args(*argv: str) -> Namespace:
    return parse_train_args(
        [
            "--dataset",
            "sklearn/digits",
            "--device",
            "cpu",
            "-j",
            "0",
            "--val-fraction",
            "0.1",
            *argv,
        ]
    )


def pixels(dataset: torch.utils.data.Dataset) -> list[bytes]:
    return [image.tobytes() for image, _ in dataset]


def result(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.split("--result\n")[-1])


class TestSplit:
    @pytest.mark.parametrize(
        "count, fraction, held", [(50000, 0.1, 5000), (7, 0.5, 4), (3, 0.2, 1)]
    )
    def test_parts_share_nothing_and_leave_nothing(
        self, count: int, fraction: float, held: int
    ) -> None:
        train, held_out = split_indices(count, fraction, 42)
        assert len(held_out) == held
        assert sorted([*train, *held_out]) == list(range(count))
        assert np.all(np.diff(train) > 0) and np.all(np.diff(held_out) > 0)

    def test_it_is_the_same_for_ever(self) -> None:
        """A change would make results incomparable and let resumed runs cheat."""
        _, held_out = split_indices(50000, 0.1, 42)
        assert held_out[:4].tolist() == [4, 49, 62, 71]
        digest = hashlib.sha256(held_out.astype("<i8").tobytes()).hexdigest()
        assert digest.startswith("640395c866c54d0e")

    def test_seeds_choose_other_parts_at_random(self) -> None:
        """Two independent tenths share a tenth of their members: 500, deviation about 20."""
        _, first = split_indices(50000, 0.1, 42)
        _, second = split_indices(50000, 0.1, 43)
        assert abs(len(np.intersect1d(first, second)) - 500) < 100
        assert abs(first.mean() - 25000) < 1000

    @pytest.mark.parametrize("count, fraction", [(4, 0.1), (4, 0.9), (1, 0.5)])
    def test_a_part_without_images(self, count: int, fraction: float) -> None:
        with pytest.raises(UsageError, match=rf"of {count} training images.*at least one"):
            split_indices(count, fraction, 0)


class TestData:
    def test_both_parts_are_of_the_training_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Digits, "__init__", training_only(Digits.__init__))
        train, held_out = datasets.open_datasets(digits_args())
        assert (len(train), len(held_out)) == (1294, 144)
        assert sorted(pixels(train) + pixels(held_out)) == sorted(
            Image.fromarray(image).convert("RGB").tobytes() for image in Digits(False).images
        )
        assert datasets.dataset_classes(held_out) == (10, list("0123456789"))

    def test_it_depends_on_its_own_seed_alone(self) -> None:
        held_out = [
            pixels(datasets.open_datasets(digits_args(*argv))[1])
            for argv in ((), ("--seed", "7", "--train-num-samples", "50"), ("--val-seed", "7"))
        ]
        assert held_out[0] == held_out[1] != held_out[2]

    def test_few_samples_are_of_the_same_parts(self) -> None:
        whole = datasets.open_datasets(digits_args())
        few = datasets.open_datasets(
            digits_args("--train-num-samples", "30", "--val-num-samples", "20")
        )
        assert [len(part) for part in few] == [30, 20]
        for part, of in zip(few, whole, strict=True):
            assert set(pixels(part)) <= set(pixels(of))

    def test_held_out_images_are_not_augmented(self) -> None:
        """The release scores its validation part with random crops and flips."""
        args = digits_args("-b", "144", "--train-crop-mode", "padded")
        train, held_out = datasets.open_datasets(args)
        evaluation = datasets.create_eval_loader(held_out, args, CONFIG, device=CPU, batch_size=144)
        datasets.create_train_loader(train, args, CONFIG, device=CPU)  # shares the images beneath
        plain = np.stack([np.asarray(image.convert("RGB")) for image, _ in Digits(False)])[
            held_out.indices
        ]
        for _ in range(2):
            ((inputs, _),) = evaluation
            seen = (inputs.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
            assert np.array_equal(seen.numpy(), plain)

    def test_folders(self, tmp_path: Path) -> None:
        for name, grey in (("ant", 10), ("bee", 20)):
            (tmp_path / "train" / name).mkdir(parents=True)
            for index in range(10):
                image = Image.new("RGB", (8, 8), (grey, index, 0))
                image.save(tmp_path / "train" / name / f"{index}.png")
        args = parse_train_args(
            ["--data-dir", str(tmp_path), "--device", "cpu", "--val-fraction", "0.25"]
        )
        train, held_out = datasets.open_datasets(args)  # there is no validation folder at all
        assert (len(train), len(held_out)) == (15, 5)
        assert (
            datasets.dataset_classes(train)
            == datasets.dataset_classes(held_out)
            == (2, ["ant", "bee"])
        )
        for part in (train, held_out):
            assert all(image.getpixel((0, 0))[0] == 10 * (1 + label) for image, label in part)
        assert len(set(pixels(train)) | set(pixels(held_out))) == 20

    def test_streams_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stream(IterableDataset):
            def __iter__(self) -> Iterator:
                return iter(())

        monkeypatch.setattr(datasets, "open_reader", lambda *args: Stream())
        args = parse_train_args(
            ["--dataset", "wds/x", "--data-dir", "x", "--device", "cpu", "--val-fraction", "0.1"]
        )
        with pytest.raises(UsageError, match=r"--val-fraction: this dataset is a stream"):
            datasets.open_datasets(args)


class TestFlags:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--val-fraction", "0"], "above 0 and below 1, found 0"),
            (["--val-fraction", "1"], "above 0 and below 1, found 1"),
            (["--val-fraction", "-0.1"], "above 0 and below 1, found -0.1"),
            (["--val-fraction", "0.1", "--val-seed", "-1"], "between 0 and 4294967295"),
            (["--val-seed", "1"], "--val-seed: needs --val-fraction"),
            (
                ["--val-fraction", "0.1", "--val-split", "test"],
                "--val-split 'test'.*one of the two",
            ),
        ],
    )
    def test_of_training(self, argv: list[str], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu", *argv])

    def test_default_seed_is_written_down(self) -> None:
        assert digits_args().val_seed == 42
        assert parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu"]).val_seed is None

    @pytest.mark.parametrize(("flag", "value"), [("--val-fraction", "0.5"), ("--val-seed", "1")])
    def test_of_validation(self, flag: str, value: str) -> None:
        with pytest.raises(UsageError, match=f"{flag}: needs --split train-holdout"):
            parse_validate_args(["--dataset", "sklearn/digits", "--device", "cpu", flag, value])


class TestRuns:
    def test_whole_runs(
        self,
        scripts: dict[str, ModuleType],
        tmp_path: Path,
        capsys: pytest.CaptureFixture,
    ) -> None:
        """Train and resume without the test part; then validate on both parts."""
        train, validate = scripts["train"], scripts["validate"]
        argv = ["--dataset", "sklearn/digits", "--val-fraction", "0.1", *RUN.split()]
        argv += ["--output", str(tmp_path), "--experiment", "a", "--eval-metric", "loss"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Digits, "__init__", training_only(Digits.__init__))
            assert train.main([*argv, "--stop-epoch", "2"]) == 0
            with pytest.raises(
                UsageError, match=r"0\.1 held out by seed 42, this run .* by seed 3"
            ):
                train.main(
                    ["--resume", str(tmp_path / "a"), "--val-fraction", "0.1", "--val-seed", "3"]
                )
            capsys.readouterr()
            assert train.main(["--resume", str(tmp_path / "a")]) == 0
        run = capsys.readouterr()
        best = json.loads(run.out.split("--result\n")[-1])["best"]["model"]["metric"]
        assert "validating on 144 of the 1438 images of split 'train'" in run.err

        common = ["--device", "cpu", "-j", "0", "--checkpoint", str(tmp_path / "a")]
        validate.main([*common, "--split", "train-holdout"])
        found = result(capsys)
        assert found["images"] == 64 and found["loss"] == pytest.approx(best, rel=1e-4)
        named = [*common, "--dataset", "sklearn/digits", "--split", "train-holdout"]
        validate.main(named)
        assert result(capsys)["images"] == 144
        validate.main([*named, "--val-fraction", "0.25", "--val-seed", "1"])
        assert result(capsys)["images"] == 360
        validate.main([*common, "--num-samples", "400"])
        output = capsys.readouterr()
        assert json.loads(output.out.split("--result\n")[-1])["images"] == 359
        assert "validated on --split train-holdout" in output.err

    def test_weights_that_do_not_say(self, scripts: dict[str, ModuleType]) -> None:
        argv = ["--device", "cpu", "-j", "0", "--model", "test_vit", "--dataset", "sklearn/digits"]
        with pytest.raises(UsageError, match=r"does not say what its run held out"):
            scripts["validate"].main([*argv, "--split", "train-holdout"])
