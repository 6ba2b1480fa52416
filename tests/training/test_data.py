"""Datasets, their order, and loaders."""

import hashlib
import itertools
import os
import random
import shutil
import tarfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import FastCollateMixup
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from qna_timm.training.data import datasets, loaders, posterize
from qna_timm.training.data.sampling import EpochSampler, KeyedCollate, KeyedDataset
from qna_timm.training.data.shards import plan_shards
from qna_timm.training.errors import UsageError
from qna_timm.training.flags.recipe import parse_train_args, parse_validate_args

CPU = torch.device("cpu")
CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
CLASSES = ("ant", "bee", "cat")


def train_args(*argv: str) -> Namespace:
    return parse_train_args(["--device", "cpu", "-j", "0", *argv])


def digits_args(*argv: str) -> Namespace:
    return train_args("--dataset", "sklearn/digits", "-b", "64", *argv)


def write_images(folder: Path, counts: dict[str, int], size: int = 20) -> None:
    """Images of one grey per class, so that pixels tell the class: ant 10, bee 20, cat 30, ..."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        grey = 10 * (1 + (*CLASSES, "dog").index(name))
        for index in range(count):
            Image.new("RGB", (size, size), (grey,) * 3).save(folder / name / f"{index}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder dataset with three classes; validation calls its folder `val` and lacks `ant`."""
    write_images(tmp_path / "train", dict.fromkeys(CLASSES, 4))
    write_images(tmp_path / "val", {"bee": 2, "cat": 3})
    return tmp_path


def batches(loader: loaders.ImageLoader, epoch: int) -> list[torch.Tensor]:
    loader.set_epoch(epoch)
    return [torch.cat([x.flatten(1), y[:, None]], dim=1) for x, y in loader]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestDigits:
    def test_split_is_fixed_stratified_and_disjoint(self) -> None:
        train, val = datasets.open_datasets(digits_args())
        assert (len(train), len(val)) == (1438, 359)
        labels = [np.bincount([y for _, y in split], minlength=10) for split in (train, val)]
        share = labels[1] / (labels[0] + labels[1])
        assert np.all(np.abs(share - 0.2) < 0.005)
        images = [{image.tobytes() for image, _ in split} for split in (train, val)]
        assert not images[0] & images[1]
        # the split of the first release; a change would make results incomparable
        digest = hashlib.sha256(val.dataset.images.tobytes()).hexdigest()
        assert digest.startswith("2f5eb12f1dfec8a2")
        assert datasets.dataset_classes(train) == (10, list("0123456789"))

    @pytest.mark.parametrize(("flags", "mode"), [((), "RGB"), (("--in-chans", "1"), "L")])
    def test_image_mode_follows_channels(self, flags: tuple[str, ...], mode: str) -> None:
        image, _ = datasets.open_datasets(digits_args(*flags))[0][0]
        assert (image.mode, image.size) == (mode, (8, 8))
        assert image.getextrema() != (0, 0)

    def test_models_own_channels_win_over_the_default(self) -> None:
        args = digits_args()
        dataset, _ = datasets.open_datasets(args)
        config = {**CONFIG, "input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}
        inputs, _ = next(iter(datasets.create_train_loader(dataset, args, config, device=CPU)))
        assert inputs.shape == (64, 1, 16, 16)

    def test_few_samples_keep_all_classes(self) -> None:
        args = digits_args("--train-num-samples", "40", "--val-num-samples", "20")
        train, val = datasets.open_datasets(args)
        assert (len(train), len(val)) == (40, 20)
        assert len({label for _, label in train}) == 10

    def test_misspelt_split(self) -> None:
        with pytest.raises(UsageError, match=r"--val-split 'validaton'.*did you mean 'validation'"):
            datasets.open_datasets(digits_args("--val-split", "validaton"))


class TestOrder:
    def keys(self, processes: int, batch: int, epoch: int = 0, **kwargs: float) -> list[list]:
        """Steps of an epoch; each is the list of (index, seed) over all processes."""
        per_rank = []
        for rank in range(processes):
            plan = plan_shards(53, batch, processes, 1, kwargs.get("epoch_repeats", 0))
            repeats = kwargs.get("aug_repeats", 0)
            sampler = EpochSampler(
                53, plan, seed=7, rank=rank, world_size=processes, aug_repeats=repeats
            )
            sampler.set_epoch(epoch)
            keys = [(key.index, key.seed) for key in sampler]
            assert len(keys) == len(sampler)
            per_rank.append([keys[i : i + batch] for i in range(0, len(keys), batch)])
        return [list(itertools.chain(*step)) for step in zip(*per_rank, strict=True)]

    def test_steps_do_not_depend_on_the_number_of_processes(self) -> None:
        alone = self.keys(1, 12)
        assert len(alone) == 53 // 12
        for processes in (2, 3, 4):
            shared = self.keys(processes, 12 // processes)
            assert [sorted(step) for step in shared] == [sorted(step) for step in alone]

    def test_every_sample_once_and_epochs_differ(self) -> None:
        first, second = (list(itertools.chain(*self.keys(1, 53, epoch))) for epoch in (0, 1))
        assert sorted(index for index, _ in first) == list(range(53))
        assert [i for i, _ in first] != [i for i, _ in second]
        assert not {seed for _, seed in first} & {seed for _, seed in second}

    def test_neighbouring_seeds_and_epochs_are_unrelated(self) -> None:
        orders = set()
        for seed, epoch in ((7, 1), (8, 0), (1, 7)):
            sampler = EpochSampler(53, plan_shards(53, 53, 1), seed=seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(key.index for key in sampler))
        assert len(orders) == 3

    def test_repeated_augmentation(self) -> None:
        keys = list(itertools.chain(*self.keys(1, 6, aug_repeats=3)))
        indices = [index for index, _ in keys]
        assert indices[0::3] == indices[1::3] == indices[2::3]
        assert len(set(indices)) == len(indices) // 3
        assert len({seed for _, seed in keys}) == len(keys)  # each copy augmented differently
        ranks = self.keys(3, 2, aug_repeats=3)[0]
        assert ranks[0][0] == ranks[2][0] == ranks[4][0]  # copies go to different processes

    def test_epoch_repeats(self) -> None:
        keys = itertools.chain(*self.keys(1, 53, epoch_repeats=2.0))
        indices = [index for index, _ in keys]
        assert sorted(indices) == sorted([*range(53), *range(53)])


class TestTrainLoader:
    FLAGS = ("--aa", "rand-m9-mstd0.5", "--reprob", "0.5", "--color-jitter", "0.4")

    def loader(self, *argv: str) -> loaders.ImageLoader:
        args = digits_args("--train-num-samples", "200", *self.FLAGS, *argv)
        dataset, _ = datasets.open_datasets(args)
        return datasets.create_train_loader(dataset, args, CONFIG, device=CPU)

    def test_augmentations_depend_on_epoch_and_seed_only(self) -> None:
        loader = self.loader()
        epochs = [batches(loader, epoch) for epoch in (0, 1)]
        assert not torch.equal(epochs[0][0], epochs[1][0])
        assert_same(batches(self.loader(), 1), epochs[1])  # a resumed run begins with epoch 1
        workers = self.loader("-j", "2")
        for epoch in (0, 1):
            assert_same(batches(workers, epoch), epochs[epoch])
        assert not torch.equal(batches(self.loader("--seed", "43"), 0)[0], epochs[0][0])

    @pytest.mark.filterwarnings("ignore:This DataLoader will create")
    def test_unchosen_workers_are_no_more_than_the_cores(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """timm's default of 4 would make PyTorch warn in every run on a small machine."""
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        args = digits_args()
        args.given.pop("workers", None)
        args.workers = 4
        dataset, _ = datasets.open_datasets(args)
        assert (
            datasets.create_train_loader(dataset, args, CONFIG, device=CPU)._inner.num_workers == 1
        )
        loader = datasets.create_eval_loader(dataset, args, CONFIG, device=CPU, batch_size=8)
        assert loader._inner.num_workers == 1
        args.given["workers"] = args.workers = 2
        assert (
            datasets.create_train_loader(dataset, args, CONFIG, device=CPU)._inner.num_workers == 2
        )

    def test_batch_larger_than_a_stream(self) -> None:
        """Streams repeat themselves to fill a batch, so their length has to be asked for."""

        class Stream(IterableDataset):
            reader = Namespace(num_samples=36)

            def __iter__(self) -> Iterator:
                return iter(())

        args = digits_args("-b", "37")
        with pytest.raises(UsageError, match=r"--batch-size 37 is larger .* 36 images"):
            datasets.create_train_loader(Stream(), args, CONFIG, device=CPU)

    def test_multi_epochs_loader_keeps_the_order_also_when_left_early(self) -> None:
        plain, multi = self.loader(), self.loader("--use-multi-epochs-loader", "-j", "1")
        for epoch in (3, 4):
            assert_same(batches(multi, epoch), batches(plain, epoch))
        multi.set_epoch(5)
        next(iter(multi))
        assert_same(batches(multi, 6), batches(plain, 6))

    def test_loading_leaves_the_global_generators_alone(self) -> None:
        loader = self.loader()
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        expected = torch.rand(2).tolist(), random.random(), np.random.rand()
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        batches(loader, 0)
        assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected

    def test_augmentation_splits(self) -> None:
        args = digits_args("--aug-splits", "2", "--aa", "augmix-m3-w3")
        dataset, _ = datasets.open_datasets(args)
        loader = datasets.create_train_loader(dataset, args, CONFIG, device=CPU, num_aug_splits=2)
        inputs, target = next(iter(loader))
        assert inputs.shape == (128, 3, 16, 16)
        assert torch.equal(target[:64], target[64:])
        assert not torch.equal(inputs[:64], inputs[64:])

    @pytest.mark.parametrize("prefetched", [False, True])
    def test_first_split_is_not_erased(
        self, prefetched: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if prefetched:
            monkeypatch.setattr(loaders, "_PREFETCH_DEVICES", ("cpu",))
        still = ("--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0", "--color-jitter", "0")
        batch = {}
        for probability in ("0", "1"):
            args = digits_args("--aug-splits", "2", "--resplit", "--reprob", probability, *still)
            args.train_interpolation = "bilinear"
            dataset, _ = datasets.open_datasets(args)
            loader = datasets.create_train_loader(
                dataset, args, CONFIG, device=CPU, num_aug_splits=2
            )
            batch[probability], _ = next(iter(loader))
        erased = (batch["0"] != batch["1"]).flatten(1).any(dim=1)
        assert erased.tolist() == [False] * 64 + [True] * 64

    def test_step_larger_than_the_dataset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UsageError, match=r"--batch-size 1439 is larger .* 1438 images"):
            args = train_args("--dataset", "sklearn/digits", "-b", "1439")
            datasets.create_train_loader(datasets.open_datasets(args)[0], args, CONFIG, device=CPU)
        monkeypatch.setattr(loaders, "process_place", lambda: (1, 4))
        expected = "800 x 4 processes = 3200 images a step.* --batch-size 359 or less"
        with pytest.raises(UsageError, match=expected):
            args = train_args("--dataset", "sklearn/digits", "-b", "800")
            datasets.create_train_loader(datasets.open_datasets(args)[0], args, CONFIG, device=CPU)

    def test_mixing_in_the_loader_stops_in_persistent_workers(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loaders, "_PREFETCH_DEVICES", ("cpu",))
        args = digits_args("--train-num-samples", "128", "-j", "1")
        dataset, _ = datasets.open_datasets(args)
        mixup = FastCollateMixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=10)
        loader = datasets.create_train_loader(
            dataset, args, CONFIG, device=CPU, mixup_collate=mixup
        )
        assert isinstance(loader.loader, PrefetchLoader)
        assert loader.mixup_enabled
        mixed = [target for _, target in loader]
        assert all(((t > 0) & (t < 1)).any() for t in mixed)
        loader.mixup_enabled = False
        loader.set_epoch(1)
        assert all(set(target.unique().tolist()) == {0.0, 1.0} for _, target in loader)

    def test_mixing_is_reproducible(self) -> None:
        class Grey(Dataset):
            def __len__(self) -> int:
                return 8

            def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
                return np.full((3, 4, 4), 10 * index, dtype=np.uint8), index

        def one_epoch() -> torch.Tensor:
            collate = KeyedCollate(FastCollateMixup(mixup_alpha=1.0, num_classes=8))
            sampler = EpochSampler(8, plan_shards(8, 4, 1), seed=0)
            loader = DataLoader(KeyedDataset(Grey()), 4, sampler=sampler, collate_fn=collate)
            return torch.cat([collated.batch[1] for collated in loader])

        first = one_epoch()
        np.random.rand(5)
        assert torch.equal(first, one_epoch())

    def test_bad_augmentation_value(self) -> None:
        args = digits_args()
        args.remode = "nosuch"
        args.reprob = 0.5
        with pytest.raises(UsageError, match="--remode nosuch"):
            datasets.create_train_loader(datasets.open_datasets(args)[0], args, CONFIG, device=CPU)


class TestFolders:
    def open(self, root: Path, *argv: str) -> tuple[Dataset, Dataset]:
        return datasets.open_datasets(train_args("--data-dir", str(root), *argv))

    def test_validation_labels_are_those_of_training(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        train, val = self.open(root)
        assert (
            datasets.dataset_classes(train) == datasets.dataset_classes(val) == (3, list(CLASSES))
        )
        for split in (train, val):
            assert all(image.getpixel((0, 0))[0] == 10 * (1 + label) for image, label in split)
        assert "no image of 1 of the 3 classes: ant" in caplog.text

    def test_class_that_training_lacks(self, root: Path) -> None:
        write_images(root / "val", {"dog": 1})
        with pytest.raises(UsageError, match="split 'validation' has the class 'dog'"):
            self.open(root)

    def test_missing_split_is_not_the_root(self, root: Path) -> None:
        with pytest.raises(UsageError, match=r"--val-split 'tset'.*holds train, val") as caught:
            self.open(root, "--val-split", "tset")
        assert "\n" not in str(caught.value)
        shutil.rmtree(root / "val")
        with pytest.raises(UsageError, match="--val-split 'validation': no such folder"):
            self.open(root)

    def test_one_split_in_place_of_the_folder(self, root: Path) -> None:
        with pytest.raises(UsageError, match=rf"all of them, {root}\)$") as caught:
            self.open(root / "train")
        assert "reads" not in str(caught.value)

    def test_flat_folder_is_no_training_set(self, root: Path) -> None:
        flat = shutil.copytree(root / "train", root / "pictures")
        with pytest.raises(UsageError, match=r"--train-split 'train'.*ant, bee, cat"):
            self.open(flat)

    def test_folder_without_images_is_told(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (root / "train" / "dog").mkdir()
        (root / "train" / "dog" / "1.webp").touch()
        train, _ = self.open(root)
        assert datasets.dataset_classes(train) == (3, list(CLASSES))
        assert "folders without images (.png .jpg .jpeg) make no class: dog" in caplog.text

    def test_same_class_name_in_two_places(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_images(root / "train" / "more", {"bee": 1})
        train, _ = self.open(root)
        assert datasets.dataset_classes(train) == (3, list(CLASSES))
        assert "'bee' is the name of 2 folders" in caplog.text

    def test_validate_takes_a_flat_folder_only_by_default(self, root: Path) -> None:
        flat = shutil.copytree(root / "train", root / "pictures")
        args = parse_validate_args(["--data-dir", str(flat), "--device", "cpu"])
        assert len(datasets.open_dataset(args, args.split, False)) == 12
        args = parse_validate_args(["--data-dir", str(flat), "--split", "test", "--device", "cpu"])
        with pytest.raises(UsageError, match="--split 'test'"):
            datasets.open_dataset(args, args.split, False)
        flags = ["--data-dir", str(root / "val"), "--split", "validation"]
        args = parse_validate_args([*flags, "--device", "cpu"])
        assert len(datasets.open_dataset(args, args.split, False)) == 5  # named like its split

    def test_empty_and_unsorted_folders(self, root: Path) -> None:
        (root / "none" / "train").mkdir(parents=True)
        with pytest.raises(UsageError, match="0 images"):
            self.open(root / "none")
        Image.new("RGB", (8, 8)).save(root / "train" / "loose.png")
        with pytest.raises(UsageError, match="one folder per class"):
            self.open(root)

    def test_archives(self, root: Path) -> None:
        packed = root / "packed"
        packed.mkdir()
        for split in ("train", "val"):
            with tarfile.open(packed / f"{split}.tar", "w") as archive:
                archive.add(root / split, arcname=".")
        train, val = self.open(packed)
        assert (len(train), len(val)) == (12, 5)
        assert all(image.getpixel((0, 0))[0] == 10 * (1 + label) for image, label in val)
        with pytest.raises(UsageError, match="one archive, which holds one split"):
            self.open(packed / "train.tar")

    def test_class_map(self, root: Path) -> None:
        (root / "map.txt").write_text("cat\nbee\nant\n")
        train, _ = self.open(root, "--class-map", str(root / "map.txt"))
        assert datasets.dataset_classes(train) == (3, ["cat", "bee", "ant"])
        (root / "map.txt").write_text("eel\n")
        with pytest.raises(UsageError, match="are its folders named in --class-map"):
            self.open(root, "--class-map", str(root / "map.txt"))

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b"cat\n\nbee\nant\n", r"map.txt: line 2 is empty, expected a class name"),
            (b"cat\nbee\ncat\n", r"map.txt: 'cat' is in lines 1 and 3"),
            (b"caf\xe9\n", r"map.txt: is not UTF-8 text"),
        ],
    )
    def test_class_map_that_is_none(self, root: Path, content: bytes, told: str) -> None:
        (root / "map.txt").write_bytes(content)
        with pytest.raises(UsageError, match=f"^--class-map .*{told}"):
            self.open(root, "--class-map", str(root / "map.txt"))
        (root / "map.txt").rename(root / "map.pkl")
        for name, told in (("map.pkl", "expected a text file"), ("map.txt", "no such file, here")):
            with pytest.raises(UsageError, match=f"^--class-map .*{name}: .*{told}"):
                self.open(root, "--class-map", str(root / name))

    def test_class_that_the_map_does_not_have(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (root / "map.txt").write_text("cat\nbee\n")
        self.open(root, "--class-map", str(root / "map.txt"))
        assert "or that --class-map" in caplog.text and "make no class: ant" in caplog.text

    def test_16_bits_a_pixel(self, root: Path) -> None:
        """As 8, not as white."""
        for split in ("train", "val"):
            for path in (root / split).rglob("*.png"):
                level = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 256 + 7
                Image.fromarray(level).save(path)
        train, val = self.open(root)
        args = train_args("--data-dir", str(root), "-b", "12", "--color-jitter", "0")
        for loader in (
            datasets.create_train_loader(train, args, CONFIG, device=CPU),
            datasets.create_eval_loader(val, args, CONFIG, device=CPU, batch_size=12),
        ):
            images, labels = next(iter(loader))
            level = (images.mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 255
            torch.testing.assert_close(level, 10.0 * (1 + labels), atol=0.5, rtol=0.0)

    def test_hidden_folder_is_no_class(self, root: Path) -> None:
        shutil.copytree(root / "train" / "ant", root / "train" / ".ipynb_checkpoints")
        with pytest.raises(UsageError, match=r"hidden folder \.ipynb_checkpoints .* --class-map"):
            self.open(root)

    def test_images_of_other_kinds_are_told(
        self, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("1.webp", "2.webp", "3.tiff", "notes.txt"):
            (root / "train" / "ant" / name).touch()
        train, _ = self.open(root)
        assert len(train) == 12
        assert "only .jpeg .jpg .png are read; passed over: 1 .tiff, 2 .webp" in caplog.text

    def test_image_mode_that_does_not_fit(self, root: Path) -> None:
        with pytest.raises(UsageError, match=r"'rgb' is no image mode.*'RGB'"):
            self.open(root, "--input-img-mode", "rgb")
        with pytest.raises(UsageError, match=r"^--aa rand-m9: .* found --input-img-mode RGBA$"):
            self.open(root, "--input-img-mode", "RGBA", "--in-chans", "4", "--aa", "rand-m9")
        args = train_args("--data-dir", str(root), "--input-img-mode", "L", "-b", "2")
        with pytest.raises(UsageError, match="L gives 1 channels, but the model takes 3"):
            datasets.create_train_loader(datasets.open_datasets(args)[0], args, CONFIG, device=CPU)

    def test_torchvision_image_folder(self, root: Path) -> None:
        train, val = self.open(root, "--dataset", "torch/image_folder")
        assert (len(train), len(val)) == (12, 5)
        assert all(image.getpixel((0, 0))[0] == 10 * (1 + label) for image, label in val)


class TestOtherKinds:
    def test_not_downloaded(self, tmp_path: Path) -> None:
        args = train_args("--dataset", "torch/cifar10", "--data-dir", str(tmp_path))
        with pytest.raises(UsageError, match=r"torch/cifar10.*--dataset-download"):
            datasets.open_datasets(args)
        assert not list(tmp_path.iterdir())

    def test_misspelt_split_is_not_the_test_set(self, tmp_path: Path) -> None:
        args = train_args("--dataset", "torch/mnist", "--data-dir", str(tmp_path))
        with pytest.raises(UsageError, match="--train-split 'trian'"):
            datasets.open_dataset(args, "trian", True)

    def test_torchvision_images_get_the_models_channels(self, tmp_path: Path) -> None:
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for prefix, count in (("train", 3), ("t10k", 2)):
            pixels = bytes([0x00, 0x00, 0x08, 0x03]) + np.array([count, 28, 28], ">i4").tobytes()
            labels = bytes([0x00, 0x00, 0x08, 0x01]) + np.array([count], ">i4").tobytes()
            grey = np.full(count * 28 * 28, 90, np.uint8).tobytes()
            (raw / f"{prefix}-images-idx3-ubyte").write_bytes(pixels + grey)
            (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels + bytes(range(count)))
        flags = ("--dataset", "torch/MNIST", "--data-dir", str(tmp_path))
        train, val = datasets.open_datasets(train_args(*flags, "--val-split", "test"))
        assert (len(train), len(val)) == (3, 2)
        assert train[2][0].getpixel((5, 5)) == (90, 90, 90)
        assert train[2][1] == 2
        count, names = datasets.dataset_classes(train)
        assert count == 10
        assert names[3] == "3 - three"

    @pytest.mark.parametrize("kind", ["hfds", "tfds", "wds"])
    def test_missing_package(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UsageError, match=f"--dataset {kind}/x needs .*: pip install"):
            datasets.open_datasets(train_args("--dataset", f"{kind}/x", "--data-dir", "nowhere"))

    def test_missing_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
        with pytest.raises(UsageError, match=r"pip install scikit-learn .*\[train\]"):
            datasets.open_datasets(digits_args())


@pytest.mark.parametrize("splits", [0, 2])
def test_posterize_at_full_magnitude(splits: int) -> None:
    """Pillow 13 refuses the 0 bits that timm's policies may ask for; a run must not end by it."""
    args = digits_args("--aa", "rand-m10-n4-inc1", "-b", "60", "--aug-splits", str(splits))
    loader = datasets.create_train_loader(
        datasets.open_dataset(args, "train", True), args, CONFIG, device=CPU, num_aug_splits=splits
    )
    images, _ = next(iter(loader))
    assert images.isfinite().all()
    black = posterize.posterize(Image.new("RGB", (4, 4), (200, 10, 90)), 0)
    assert black.getextrema() == ((0, 0), (0, 0), (0, 0)) and black.mode == "RGB"
