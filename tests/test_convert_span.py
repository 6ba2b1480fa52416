"""The released adaptive-span checkpoints: every variant, and what is said of unfit files."""

from pathlib import Path

import pytest
import timm
import torch
from golden import arrays, images, info, relative_error, released_span
from safetensors.torch import load_file
from test_convert import convert
from torch import Tensor

from qna_timm.convert import span_state_dict
from qna_timm.training.errors import UsageError

GOLDEN = info("sa_resnet")
LAYER = "layers.0.0.conv2.0"
VARIANTS = {
    "small_cnn": ("sa_resnet_small_cnn", []),
    "small_local_k3": ("sa_resnet_small_local", ["kernel_size=3"]),
    "small_local_k5": ("sa_resnet_small_local", []),
    "small_local_k5_groups1": ("sa_resnet_small_local", ["num_heads=1"]),
    "small_adaptive_R3": ("sa_resnet_small_adaptive", ["span_ramp=3"]),
    "small_augconv_k3": ("sa_resnet_small_augmented", []),
    "medium_adaptive_R2": ("sa_resnet_medium_adaptive", []),
}


def write(path: Path, state: dict[str, Tensor], zip_file: bool = True) -> Path:
    """A file as the released main.py leaves it: weights of a DataParallel model and the rest."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], 0.1, momentum=0.9)
    content = {
        "epoch": 57,
        "arch": "ResNet26",
        "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "best_acc": 61.25,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"T_max": 100, "last_epoch": 47},
        "parameters": 424_560,
    }
    torch.save(content, path, _use_new_zipfile_serialization=zip_file)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "legacy"])
def test_checkpoint_to_logits(variant: str, zip_file: bool, tmp_path: Path, capsys) -> None:
    """The script's file, and the authors' file itself, through timm to the released logits."""
    model, kwargs = VARIANTS[variant]
    source = write(
        tmp_path / "x_model_CIFAR100_ResNet26_ckpt.tar", released_span(variant), zip_file
    )
    out = tmp_path / "out.safetensors"
    convert(source, "--model", model, "--out", out, "--model-kwargs", *kwargs)
    assert f"{model}, " in capsys.readouterr().out
    numbers = {name: int(value) for name, value in (item.split("=") for item in kwargs)}
    for file in (source, out):
        loaded = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **numbers
        ).eval()
        with torch.no_grad():
            logits = loaded(images(0, 2, 3, 32, 32))
        assert relative_error(logits, arrays("sa_resnet")[f"{variant}/logits"]) < 1e-4


@pytest.mark.parametrize("variant", GOLDEN["entries"])
def test_every_value_arrives_once(variant: str) -> None:
    """All but the mask's constant, and the spans that nothing reads."""
    size, kind = variant.split("_")[:2]
    args = GOLDEN["args"][variant]
    kwargs = {} if "adaptive" in kind else {"kernel_size": args["attention_kernel"]}
    kind = "augmented" if kind == "augconv" else kind
    name = f"sa_resnet_{size}_{kind}"
    model = timm.create_model(name, num_heads=args["groups"], device="meta", **kwargs)
    released = released_span(variant)
    dropped = ("mask_template",) if kind == "adaptive" else ("mask_template", "current_val")
    wanted = torch.cat([t.flatten() for n, t in released.items() if not n.endswith(dropped)])
    found = torch.cat([t.flatten() for t in span_state_dict(released, model, exact=True).values()])
    assert torch.equal(found.sort()[0], wanted.sort()[0])


def test_own_names_pass_through() -> None:
    model = timm.create_model("sa_resnet_small_adaptive")
    state = model.state_dict()
    again = span_state_dict({"state_dict": state}, model, exact=True)
    assert again.keys() == state.keys() and all(again[name] is state[name] for name in state)


def test_relative_vectors_of_augmented_convolutions() -> None:
    """Never on in the release, whose layer has them: read all the same."""
    model = timm.create_model("sa_resnet_small_augmented", relative=True)
    released = released_span("small_augconv_k3")
    for i in range(3):
        for axis in "hw":
            released[f"layers.{i}.0.conv2.0.key_rel_{axis}"] = torch.randn(63, 10)
    model.load_state_dict(span_state_dict(released, model, exact=True))
    assert torch.equal(
        model.stages[2][0].spatial.rel_pos_h, released["layers.2.0.conv2.0.key_rel_h"]
    )


def test_other_number_of_classes(tmp_path: Path, capsys, caplog) -> None:
    source = write(tmp_path / "x_ckpt.tar", released_span("small_cnn"))
    out = tmp_path / "trunk.safetensors"
    convert(source, "--model", "sa_resnet_small_cnn", "--out", out, "--num-classes", 7)
    assert "the file has 100 classes, 7 were asked for" in capsys.readouterr().out
    assert not any(name.startswith("head.") for name in load_file(out))
    overlay = {"file": str(source)}
    timm.create_model(
        "sa_resnet_small_cnn", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7
    )
    assert "checkpoint has 100 classes, the model 7: the classifier is fresh" in caplog.text


def damage(kind: str, path: Path) -> Path:
    """A file that does not fit sa_resnet_small_adaptive."""
    state = released_span("small_adaptive_R2")
    if kind in GOLDEN["entries"]:
        state = released_span(kind)
    elif kind == "no keys":
        del state[f"{LAYER}.key_conv.weight"]
    elif kind == "no span":
        del state[f"{LAYER}.adaptive_mask.current_val"]
    elif kind == "other keys":
        state[f"{LAYER}.key_conv.weight"] = torch.zeros(32, 16, 1, 1)
    elif kind == "extra":
        state["layers.0.0.conv4.0.weight"] = torch.zeros(3)
    elif kind == "heads":
        state[f"{LAYER}.adaptive_mask.current_val"] = torch.zeros(8, 1)
    elif kind == "shape":
        state["layers.1.0.conv2.1.weight"] = torch.zeros(7)
    elif kind == "half a classifier":
        del state["dense.bias"]
    elif kind == "empty":
        state = {}
    if kind == "text":
        path.write_text("not a checkpoint\n")
        return path
    write(path, state)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("small_local_k3", "has 3x3 windows (a _local model with kernel_size=3), other than the"),
        ("small_cnn", "missing: 12 (stages.0.0.spatial.rel_pos_h, "),
        ("small_augconv_k3", "unknown: 15 (stages.0.0.spatial.conv.weight, "),
        ("medium_adaptive_R2", "unknown: 26 (stages.3.0.conv1.conv.weight, "),
        ("no keys", f"missing: 1 ({LAYER}.key_conv.weight)"),
        ("no span", "missing: 1 (stages.0.0.spatial.span_mask.span)"),
        ("other keys", f"{LAYER}.query_conv.weight: other than keys and values in shape"),
        ("extra", "1 (layers.0.0.conv4.0.weight) tensors unknown to it"),
        ("heads", "the checkpoint has num_heads=8, the model 4"),
        ("shape", "wrong shape: 1 (stages.1.0.norm2.weight (7,) for (64,))"),
        ("half a classifier", "missing: 1 (head.fc.bias)"),
        ("empty", "not a checkpoint (no dictionary of tensors inside)"),
        ("text", "not a"),
        ("truncated", "not a"),
    ],
)
def test_files_that_do_not_fit(kind: str, message: str, tmp_path: Path) -> None:
    """One line that says what is wrong; nothing written."""
    out = tmp_path / "out.safetensors"
    source = damage(kind, tmp_path / "x_ckpt.tar")
    with pytest.raises(UsageError) as caught:
        convert(source, "--model", "sa_resnet_small_adaptive", "--out", out)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    "variant, argv, message",
    [
        ("small_local_k5_groups1", [], "the checkpoint has num_heads=1, the model 4"),
        ("small_local_k3", [], "a _local model with kernel_size=3"),
        ("small_adaptive_R2", [], "has learned windows (an _adaptive model), other than the model"),
        ("small_local_k5", ["--model-kwargs", "stem_type=conv7_pool"], "stem.conv.weight (32, 3, "),
    ],
)
def test_arguments_that_do_not_fit(
    variant: str, argv: list[str], message: str, tmp_path: Path
) -> None:
    """Also where no tensor's shape would tell: heads of fixed windows."""
    source, out = write(tmp_path / "x_ckpt.tar", released_span(variant)), tmp_path / "o.safetensors"
    with pytest.raises(UsageError) as caught:
        convert(source, "--model", "sa_resnet_small_local", "--out", out, *argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_spans_are_fractions_of_the_same_pixels(tmp_path: Path) -> None:
    source = write(tmp_path / "x_ckpt.tar", released_span("small_adaptive_R2"))
    argv = ["--model", "sa_resnet_small_adaptive", "--model-kwargs", "max_span=9"]
    with pytest.raises(UsageError, match="fractions of max_span=5, the model has max_span=9"):
        convert(source, *argv, "--out", tmp_path / "o.safetensors")


def test_numbers_that_are_not_finite_are_told(tmp_path: Path, capsys) -> None:
    """A run that diverged leaves such a file; it converts, for those who want to look at it."""
    state = dict(released_span("small_adaptive_R3"))
    name = next(iter(state))
    state[name] = torch.full_like(state[name], torch.nan)
    source = write(tmp_path / "x_ckpt.tar", state, True)
    words = ["--model", "sa_resnet_small_adaptive", "--model-kwargs", "span_ramp=3"]
    convert(source, *words, "--out", tmp_path / "out.safetensors")
    assert "numbers that are not finite in 1 (" in capsys.readouterr().err
