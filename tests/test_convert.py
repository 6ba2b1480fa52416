"""The released Flax checkpoints: reading, conversion, and what is said of files that do not fit."""

import ast
import importlib.util
import os
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import timm
import torch
from golden import arrays, flax_params, images, info, relative_error

from qna_timm.convert import ConversionError, read_flax_checkpoint
from qna_timm.training.errors import UsageError

ROOT = Path(__file__).parent.parent
SMALL_KWARGS = [
    "embed_dim=32",
    "qna_depths=1,1,1,0",
    "window_depths=0,0,1,1",
    "qna_num_heads=4,8,16,32",
    "window_num_heads=1,2,4,8",
    "window_size=4,4,2,2",
]
SHAPES = info()["small_models"]["cases"]["base"]["params"]


def load_script(name: str):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(*argv: object) -> None:
    load_script("convert_checkpoint").main([str(arg) for arg in argv])


def pack_array(array: np.ndarray, dtype: str | None = None) -> msgpack.ExtType:
    """An array as Flax packs it: (shape, dtype name, bytes) in extension type 1."""
    content = (list(array.shape), dtype or array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))


def nest(flat: dict[str, object]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def write_flax(path: Path, params: dict[str, np.ndarray], **others: object) -> Path:
    """A file as the released training script leaves it, optimizer state and all."""
    tree = {
        "step": pack_array(np.asarray(4, np.int32)),
        "params": nest({name: pack_array(array) for name, array in params.items()}),
        "opt_state": {
            "0": {},
            "1": {"inner_state": {"0": {"mu": nest({name: {} for name in params})}}},
        },
        "batch_stats": None,
        "dynamic_scale": None,
        **others,
    }
    path.write_bytes(msgpack.packb(tree, use_bin_type=True))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints; the newer one holds the golden weights."""
    path = tmp_path_factory.mktemp("flax")
    stale = {name: np.zeros_like(value) for name, value in flax_params(SHAPES).items()}
    write_flax(path / "checkpoint_9", stale)
    write_flax(path / "checkpoint_10", flax_params(SHAPES))
    (path / "checkpoint_10.tmp").write_bytes(b"")
    return path


def test_folder_to_logits(folder: Path, tmp_path: Path, capsys) -> None:
    """Folder -> safetensors -> timm -> the released code's logits."""
    out = tmp_path / "small.safetensors"
    convert(folder, "--model", "qna_vit_tiny", "--out", out, "--model-kwargs", *SMALL_KWARGS)
    assert "2,140,902 values, 10 classes" in capsys.readouterr().out
    from qna_timm.training.storage.checkpoint import read_metadata

    metadata = read_metadata(out)
    assert metadata["arch"] == "qna_vit_tiny" and metadata["num_classes"] == 10
    model = timm.create_model(
        "qna_vit_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(out)},
        num_classes=metadata["num_classes"],
        **metadata["model_kwargs"],
    ).eval()
    x = images(2, 2, 64, 64, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert relative_error(model(x), arrays()["small/base/logits"]) < 1e-4


def test_every_value_arrives_once(folder: Path, tmp_path: Path) -> None:
    """The converted file holds the file's values, each exactly once."""
    from safetensors.torch import load_file

    out = tmp_path / "small.safetensors"
    convert(folder, "--model", "qna_vit_tiny", "--out", out, "--model-kwargs", *SMALL_KWARGS)
    found = np.sort(np.concatenate([t.numpy().ravel() for t in load_file(out).values()]))
    wanted = np.sort(np.concatenate([a.ravel() for a in flax_params(SHAPES).values()]))
    np.testing.assert_array_equal(found, wanted)


def test_other_number_of_classes(folder: Path, tmp_path: Path, capsys, caplog) -> None:
    """The trunk is kept, the classifier is left out, and both steps say so."""
    out = tmp_path / "trunk.safetensors"
    convert(
        folder,
        "--model",
        "qna_vit_tiny",
        "--out",
        out,
        "--num-classes",
        7,
        "--model-kwargs",
        *SMALL_KWARGS,
    )
    said = capsys.readouterr().out
    assert "the file has 10 classes, 7 were asked for" in said and "fresh" in said
    from safetensors.torch import load_file

    assert not any(name.startswith("head.") for name in load_file(out))
    kwargs = dict(item.split("=") for item in SMALL_KWARGS)
    kwargs = {key: ast.literal_eval(value) for key, value in kwargs.items()}
    timm.create_model(
        "qna_vit_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(out)},
        num_classes=7,
        **kwargs,
    )
    assert "checkpoint has no classes, the model 7: the classifier is fresh" in caplog.text


def test_array_encodings(tmp_path: Path) -> None:
    """Chunks, bfloat16 and scalars, as Flax writes them."""
    whole = np.arange(10, dtype=np.float32)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 5},
        "chunks": {"0": pack_array(whole[:6]), "1": pack_array(whole[6:])},
    }
    half = np.array([1.5, -2.0], np.float32)
    bits = (half.view(np.uint32) >> 16).astype(np.uint16)
    tree = {"params": {"a": chunked, "b": {"c": pack_array(bits, "bfloat16")}}}
    path = tmp_path / "checkpoint_1"
    path.write_bytes(msgpack.packb(tree, use_bin_type=True))
    read = read_flax_checkpoint(path)
    np.testing.assert_array_equal(read["a"], whole.reshape(2, 5))
    np.testing.assert_array_equal(read["b/c"], half)


def test_batch_statistics_are_read(tmp_path: Path) -> None:
    stats = nest({"StemBlock_0/BatchNorm_0/mean": pack_array(np.ones(3, np.float32))})
    path = write_flax(tmp_path / "checkpoint_1", {"a": np.ones(2, np.float32)}, batch_stats=stats)
    assert set(read_flax_checkpoint(path)) == {"a", "StemBlock_0/BatchNorm_0/mean"}


def damage(kind: str, folder: Path, tmp_path: Path) -> Path:
    params = flax_params(SHAPES)
    path = tmp_path / "checkpoint_1"
    if kind == "truncated":
        path.write_bytes((folder / "checkpoint_10").read_bytes()[:100_000])
    elif kind == "text":
        path.write_text("not a checkpoint\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no params":
        path.write_bytes(msgpack.packb({"step": 1}))
    elif kind == "object array":
        path.write_bytes(
            msgpack.packb({"params": {"a": pack_array(np.zeros(1), "object")}}, use_bin_type=True)
        )
    elif kind == "missing":
        del params["QnAStage_1/QnA_Block_1/FusedKQnA_0/query"]
        write_flax(path, params)
    elif kind == "extra":
        write_flax(path, {**params, "QnAStage_0/Other_0/kernel": np.zeros((2, 2), np.float32)})
    elif kind == "half a classifier":
        del params["ClassificationHead_0/head_logits/kernel"]
        write_flax(path, params)
    elif kind == "classifier":
        params["ClassificationHead_0/head_logits/kernel"] = np.zeros((99, 10), np.float32)
        write_flax(path, params)
    elif kind == "stem":
        params["StemBlock_0/conv_1x1/kernel"] = np.zeros((7, 7, 3, 32), np.float32)
        write_flax(path, params)
    elif kind == "kernel size":
        name = "QnAStage_0/QnA_Block_1/FusedKQnA_0/rpe_bias"
        params[name] = np.zeros((49, params[name].shape[1]), np.float32)
        write_flax(path, params)
    elif kind == "no table":
        params["QnAStage_0/QnA_Block_1/FusedKQnA_0/rpe_bias"] = np.zeros((), np.float32)
        write_flax(path, params)
    elif kind == "integers":
        params["ClassificationHead_0/LayerNorm_0/scale"] = np.zeros(256, np.int32)
        write_flax(path, params)
    elif kind == "shape":
        params["ClassificationHead_0/LayerNorm_0/scale"] = np.zeros(7, np.float32)
        write_flax(path, params)
    else:
        return tmp_path / kind
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "not a whole Flax msgpack checkpoint"),
        ("text", "not a whole Flax msgpack checkpoint"),
        ("empty", "not a whole Flax msgpack checkpoint"),
        ("no params", "without a 'params' entry"),
        ("object array", "array of type object"),
        ("missing", "missing: 1 (stages.1.blocks.0.attn.query)"),
        ("extra", "1 (QnAStage_0/Other_0/kernel) tensors unknown"),
        ("shape", "wrong shape: 1 (norm.weight (7,) for (256,))"),
        ("half a classifier", "missing: 1 (head.fc.weight)"),
        ("classifier", "wrong shape: 1 (head.fc.weight (10, 99) for (10, 256))"),
        ("stem", "wrong shape: 1 (stem.conv.weight (32, 3, 7, 7) for (32, 3, 4, 4))"),
        ("kernel size", "stages.0.blocks.0.attn.rel_pos_bias (49, 2, 4) for (9, 2, 4)"),
        ("no table", "stages.0.blocks.0.attn.rel_pos_bias () for (9, 2, 4)"),
        ("integers", "LayerNorm_0/scale holds torch.int32, not floating-point numbers"),
        ("nowhere", "no such file or folder"),
    ],
)
def test_files_that_do_not_fit(kind: str, message: str, folder: Path, tmp_path: Path) -> None:
    """One line that says what is wrong; nothing written."""
    out = tmp_path / "out.safetensors"
    source = damage(kind, folder, tmp_path)
    with pytest.raises(UsageError) as caught:
        convert(source, "--model", "qna_vit_tiny", "--out", out, "--model-kwargs", *SMALL_KWARGS)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    assert str(caught.value).count(source.name) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "qna_vit_tiny"], "the checkpoint is not one of qna_vit_tiny: missing: "),
        (["--model", "qna_vit_tin"], "did you mean 'qna_vit_tiny'"),
        (["--model", "qna_vit_tiny", "--model-kwargs", "qna_num_heads=1,2"], "qna_num_heads must"),
        (["--model", "qna_vit_tiny", "--model-kwargs", "act_layer=foo"], "--model-kwargs {'act_"),
        (["--model", "resnet50"], "no converter for this model, only for qna_vit_*, ga_*, cs"),
        (["--model", "qna_vit_tiny", "--num-classes", "-1"], "--num-classes -1: must be 0 or more"),
        (["--model", "qna_vit_tiny", "--model-kwargs", "embed_dm=3"], "did you mean 'embed_dim'"),
    ],
)
def test_bad_command_lines(argv: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        convert(folder, *argv, "--out", tmp_path / "out.safetensors")
    assert message in str(caught.value)


def test_command_line_errors_are_usage_errors(tmp_path: Path) -> None:
    for argv, message in (
        ([], "required: checkpoint, --model, --out"),
        (["a.pth", "--model", "qna_vit_tiny", "--out", "o.safetensors", "--ema"], "--ema"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(*argv)


@pytest.mark.parametrize("out", ["weights.pth", "nowhere/weights.safetensors"])
def test_bad_output(out: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--out .*(\.safetensors|no such folder)"):
        convert(folder, "--model", "qna_vit_tiny", "--out", tmp_path / out)


def test_without_msgpack(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises((UsageError, ConversionError), match=r"pip install msgpack .*\[convert\]"):
        convert(folder, "--model", "qna_vit_tiny", "--out", tmp_path / "o.safetensors")


SAMPLE = ROOT.parent / "shared" / "golden" / "qna"


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the 6 MB sample file is not in the repository")
def test_sample_written_by_the_release(tmp_path: Path) -> None:
    out = tmp_path / "sample.safetensors"
    kwargs = ["embed_dim=16", "qna_num_heads=2,4,8,16", "window_num_heads=1,1,2,4"]
    kwargs += ["qna_depths=1,1,1,0", "window_depths=0,0,1,1", "window_size=4,4,2,2"]
    convert(
        SAMPLE / "ckpt_small", "--model", "qna_vit_tiny", "--out", out, "--model-kwargs", *kwargs
    )
    model = timm.create_model(
        "qna_vit_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"file": os.fspath(out)},
        num_classes=10,
        **{key: ast.literal_eval(value) for key, value in (item.split("=") for item in kwargs)},
    ).eval()
    with np.load(SAMPLE / "ckpt_small_golden.npz") as golden, torch.no_grad():
        logits = model(images(12, 2, 64, 64, 3).permute(0, 3, 1, 2))
        assert relative_error(logits, golden["logits"]) < 1e-4
