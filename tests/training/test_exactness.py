"""What keeps a resumed run from going on exactly, how it is told, and what may change."""

import copy
import logging
import os
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import AugMixDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import FakeData, ImageFolder

from qna_timm.ops.compiled import compiled_attention
from qna_timm.training.data.datasets import open_datasets
from qna_timm.training.data.shards import ShardPlan
from qna_timm.training.data.views import ImageView, LabelTable
from qna_timm.training.errors import UsageError
from qna_timm.training.exactness import check_exact, differences, fingerprint, versions
from qna_timm.training.flags import exact
from qna_timm.training.flags.declaration import all_flags
from qna_timm.training.flags.recipe import as_yaml_dict, parse_train_args
from qna_timm.training.flags.train import TRAIN_FLAGS
from qna_timm.training.storage.packing import pack, unpack

CLASSES = ("EXACT", "OPTIMIZER", "SCHEDULE", "DATA_PLACE", "PLAN", "ASKED", "FREE")
CPU = torch.device("cpu")


def parse(*argv):
    return parse_train_args(["--model", "test_resnet", "--device", "cpu", *map(str, argv)])


def identity(data):
    return {"data": data, "versions": versions(CPU)}


def saved_state(args, data, shards=1):
    """A state as it comes back from a file."""
    plan = ShardPlan(args.batch_size, shards, 9)._asdict()
    tensors = {}
    return unpack(pack({"args": as_yaml_dict(args), "plan": plan, **identity(data)}, tensors), {})


def make_images(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def digits():
    return fingerprint(*open_datasets(parse()))


def refusal(state, args, data):
    with pytest.raises(UsageError) as error:
        check_exact("out/a", state, args, identity(data))
    message = str(error.value)
    assert "\n" not in message and message.startswith("--resume out/a: cannot go on exactly: ")
    return message.removeprefix("--resume out/a: cannot go on exactly: ")


def test_every_flag_is_of_one_class():
    """A flag that is new has to be put into a class of flags/exact.py."""
    classes = [getattr(exact, name) for name in CLASSES]
    for flag in all_flags(TRAIN_FLAGS):
        found = sum(flag.key in keys for keys in classes)
        assert found == (0 if flag.refusal else 1), f"--{flag.key}: in {found} classes"
    keys = {flag.key for flag in all_flags(TRAIN_FLAGS)}
    assert all(names <= keys for names in classes)


def test_unchanged_run_goes_on_without_a_word(digits, caplog):
    caplog.set_level(logging.INFO)
    args = parse("--model-kwargs", "a=(1, 2)", "--opt-betas", "0.9", "0.99")
    state = saved_state(args, digits)
    check_exact("out/a", state, args, identity(digits))
    assert not caplog.records


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--batch-size", "16"], "--batch-size 128 -> 16"),
        (["--seed", "1"], "--seed 42 -> 1"),
        (["--model", "test_vit"], "--model test_resnet -> test_vit"),
        (["--opt", "adamw"], "--opt sgd -> adamw"),
        (["--amp"], "--amp off -> on"),
        (["--mixup", "0.5"], "--mixup 0.0 -> 0.5"),
        (["--aa", "rand-m9"], "--aa none -> rand-m9"),
        (["--scale", "0.5", "1"], "--scale 0.08 1.0 -> 0.5 1.0"),
        (["--model-kwargs", "act_layer=relu"], "--model-kwargs none -> act_layer=relu"),
        (["--val-interval", "2", "--save-epochs", "3"], "--val-interval 1 -> 2, --save-epochs"),
        (["--grad-accum-steps", "2"], "--grad-accum-steps 1 -> 2"),
        (["--clip-grad", "1"], "--clip-grad none -> 1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_settings_are_refused(digits, argv, told):
    message = refusal(saved_state(parse(), digits), parse(*argv), digits)
    assert message.startswith(told)
    afresh = "; --no-resume-opt starts the optimizer afresh"
    assert message.endswith(afresh if "--opt" in argv else "; --resume-anyway goes on all the same")


def test_all_that_differs_is_told_at_once(digits):
    state = saved_state(parse("-b", "8"), digits)
    state["versions"]["torch"] = "2.14"
    state["data"]["training"]["images"] = 40
    data = copy.deepcopy(digits)
    data["training"]["images"] = 41
    assert refusal(state, parse("-b", "16"), data) == (
        f"--batch-size 8 -> 16, torch 2.14 -> {torch.__version__}, 40 training images -> 41; "
        "--resume-anyway goes on all the same"
    )


def test_resume_anyway_warns_in_the_same_words(digits, caplog):
    state = saved_state(parse(), digits)
    args = parse("--seed", "1", "--resume-anyway")
    check_exact("out/a", state, args, identity(digits))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "--resume out/a: does not go on exactly: --seed 42 -> 1"


@pytest.mark.parametrize(
    "argv",
    ["-j 1 --log-interval 3 --checkpoint-hist 2 --checkpoint-interval 5 --stop-epoch 9",
     "--output x --experiment y --pin-mem --on-nonfinite skip --strict-data --dist-timeout 9",
     "--lr 0.3 --lr-base 0.2", "--save-epochs 3"],
)  # fmt: skip
def test_harmless_changes_are_silent(digits, caplog, argv):
    caplog.set_level(logging.INFO)
    state = saved_state(parse(), digits)
    check_exact("a", state, parse(*argv.split()), identity(digits))
    assert not caplog.records


def test_changes_of_the_schedule_are_logged(digits, caplog):
    caplog.set_level(logging.INFO)
    args = parse("--lr", "1", "--epochs", "400", "--sched", "step", "--min-lr", "1e-5")
    state = saved_state(parse(), digits)
    check_exact("a", state, args, identity(digits))
    assert [record.getMessage() for record in caplog.records] == [
        "changed since the state was saved: --sched cosine -> step, --min-lr 0.0 -> 1e-05, "
        "--epochs 300 -> 400"
    ]


def test_flags_that_ask_for_another_run_are_enough(digits, caplog):
    state = saved_state(parse(), digits)
    args = parse("--no-resume-opt", "--opt", "adamw", "--start-epoch", "3")
    check_exact("a", state, args, identity(digits))
    (record,) = caplog.records
    assert record.getMessage() == (
        "--resume a: does not go on exactly: --start-epoch 3, --no-resume-opt, --opt sgd -> adamw"
    )
    assert "--seed 42 -> 1" in refusal(state, parse("--no-resume-opt", "--seed", "1"), digits)


def test_the_plan_counts_not_the_processes(digits, caplog):
    """Two processes became one, whose accumulation makes up for it."""
    caplog.set_level(logging.INFO)
    state = saved_state(parse(), digits, shards=2)
    state["versions"]["processes"] = "2"
    check_exact("a", state, parse("--grad-accum-steps", "2"), identity(digits))
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().startswith("saved by 2 process(es), goes on with 1: every update")
    message = refusal(state, parse("--grad-accum-steps", "4"), digits)
    assert message.startswith("--grad-accum-steps 1 -> 4, processes 2 -> 1;")
    state["plan"] = None  # a stream
    assert refusal(state, parse(), digits).startswith("processes 2 -> 1;")


def test_versions_that_differ():
    now = versions(CPU)
    was = {**now, "pillow": "1.0", "device": "cuda", "libjpeg": "9"}
    assert differences({}, {}, None, None, was, now) == [
        f"pillow 1.0 -> {now['pillow']}", "device cuda -> cpu", "libjpeg 9 -> none"
    ]  # fmt: skip


def test_other_hardware_is_told(digits, caplog):
    caplog.set_level(logging.INFO)
    state = saved_state(parse(), digits)
    state["versions"]["hardware"] = "cpu AVX2, 64 threads"
    check_exact("a", state, parse(), identity(digits))
    (record,) = caplog.records
    assert record.levelname == "INFO" and "cpu AVX2, 64 threads, goes on with cpu" in record.message
    assert f"({compiled_attention()})" in record.message or not compiled_attention()


NAMES = ["train/a/1.png", "train/a/2.png", "train/b/3.png", "val/a/4.png", "val/b/5.png"]


def folder_print(root, *argv):
    return fingerprint(*open_datasets(parse("--data-dir", root, "--val-split", "val", *argv)))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda root: os.remove(root / NAMES[0]), "3 training images -> 2"),
        (lambda root: os.rename(root / NAMES[0], root / "train/a/9.png"), "other names, labels"),
        (lambda root: os.rename(root / NAMES[0], root / "train/b/1.png"), "other names, labels"),
        (lambda root: os.rename(root / "val/a/4.png", root / "val/a/7.png"), "validation images"),
        (lambda root: os.rename(root / "train/b", root / "train/c"), "other class names of the tr"),
    ],
    ids=["fewer", "renamed", "relabelled", "validation", "classes"],
)
def test_changed_folders_are_noticed(tmp_path, change, told):
    root = make_images(tmp_path, NAMES)
    before = folder_print(root)
    assert before == folder_print(root)
    change(root)
    if (root / "train/c").exists():
        os.rename(root / "val/b", root / "val/c")
    assert told in ", ".join(differences({}, {}, before, folder_print(root), None, None))


def test_copies_of_the_data_are_the_same_data(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    one, two = make_images(tmp_path / "one", NAMES), make_images(tmp_path / "o/two", NAMES)
    data = folder_print(f"{one}/")
    assert data == folder_print(two)
    state = saved_state(parse("--data-dir", one), data)
    check_exact("a", state, parse("--data-dir", two), identity(data))
    assert [record.getMessage() for record in caplog.records] == [
        f"changed since the state was saved: --data-dir {one} -> {two}"
    ]
    nameless = copy.deepcopy(data)
    nameless["training"]["samples"] = None
    state = saved_state(parse("--data-dir", one), nameless)
    assert f"--data-dir {one} -> {two}" in refusal(state, parse("--data-dir", two), nameless)


def test_holdouts_subsets_and_labels_are_told_apart(tmp_path):
    root = make_images(tmp_path, NAMES)
    argv = ["--data-dir", root, "--val-fraction", 0.34, "--val-seed"]
    prints = [fingerprint(*open_datasets(parse(*argv, seed))) for seed in (0, 1, 2)]
    assert len({part["training"]["samples"] for part in prints}) > 1
    assert prints[0]["training"]["samples"] != prints[0]["validation"]["samples"]

    source = create_dataset("", root=root / "train")
    views = [
        ImageView(source),
        ImageView(source, indices=[2, 1, 0]),
        Subset(source, [0, 1]),
        ImageFolder(root / "train"),
        AugMixDataset(ImageView(source, indices=[0, 1, 2]), 2),
    ]
    digests = [fingerprint(view, view)["training"]["samples"] for view in views]
    assert digests[1] != digests[0] == digests[3] == digests[4] != digests[2]
    assert fingerprint(source, source)["training"]["samples"] == digests[3]
    views[0].target_transform = LabelTable({0: 1, 1: 0})
    assert fingerprint(views[0], source)["training"]["samples"] != digests[0]


def test_tar_and_label_only_data(tmp_path):
    root = make_images(tmp_path / "data", NAMES)
    for count in (3, 2):
        with tarfile.open(tmp_path / f"{count}.tar", "w") as file:
            for name in NAMES[:count]:
                file.add(root / name, name)
    both = [create_dataset("", root=tmp_path / f"{count}.tar") for count in (3, 2)]
    first, second = (fingerprint(one, one)["training"] for one in both)
    assert (first["images"], second["images"]) == (3, 2) and first["samples"] != second["samples"]

    class Labelled(Dataset):
        def __init__(self, labels):
            self.targets = labels

        def __len__(self):
            return len(self.targets)

    prints = [Labelled(labels) for labels in ([1, 2], torch.tensor([1, 2]), [2, 1])]
    digests = [fingerprint(one, one)["training"]["samples"] for one in prints]
    assert digests[0] == digests[1] != digests[2]
    assert fingerprint(FakeData(3), FakeData(4))["validation"] == {
        "images": 4, "samples": None, "classes": None, "stream": False
    }  # fmt: skip


def test_streams_have_no_names_and_need_their_workers():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ()

    data = fingerprint(Stream(), Stream())
    assert data["training"] == {"images": None, "samples": None, "classes": None, "stream": True}
    assert differences({"workers": 2}, {"workers": 3}, data, data, None, None) == [
        "--workers 2 -> 3"
    ]


def test_names_of_any_bytes_and_a_million_are_quick():
    class Folder(Dataset):
        def __init__(self, names):
            self.root = "/data/train"
            self.samples = [(f"{self.root}/{name}", 0) for name in names]

        def __len__(self):
            return len(self.samples)

    odd = [Folder([os.fsdecode(name)]) for name in (b"a\xff.png", b"a\xfe.png")]
    assert len({fingerprint(one, one)["training"]["samples"] for one in odd}) == 2
    many = Folder([f"n{index:08}/ILSVRC2012_val_{index:08}.JPEG" for index in range(100_000)])
    start = time.perf_counter()
    fingerprint(many, odd[0])
    assert time.perf_counter() - start < 1.0  # 0.05 s where nothing else runs


def test_states_hold_plain_values(digits):
    state = saved_state(parse(), digits)
    assert state["versions"]["torch"] == torch.__version__ and state["data"] == digits
    assert all(type(value) is str for value in state["versions"].values())
