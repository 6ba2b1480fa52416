"""The released PyTorch checkpoints of the Gramian networks through the converter's command."""

from argparse import Namespace
from pathlib import Path

import golden
import numpy as np
import pytest
import timm
import torch
from test_convert import convert

from qna_timm.training.errors import UsageError
from qna_timm.training.storage.checkpoint import read_metadata

NAME = "ga_convnext_tiny_688"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the authors' train.py, an older timm's, writes it."""
    path = tmp_path_factory.mktemp("released") / "model_best.pth.tar"
    content = {
        "epoch": 299,
        "arch": NAME,
        "state_dict": golden.released_gramian(NAME),
        "optimizer": {"state": {}, "param_groups": []},
        "version": 2,
        "args": Namespace(GA_lam=-0.8),
        "metric": 83.2,
    }
    torch.save(content, path)
    return path


def test_released_file_to_logits(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """Converted, loaded as published weights, and equal to the golden logits."""
    out = tmp_path / "ga.safetensors"
    convert(checkpoint, "--model", "ga_convnext_tiny", "--out", out)
    assert "47,8" in capsys.readouterr().out
    metadata = read_metadata(out)
    assert metadata["arch"] == "ga_convnext_tiny"
    assert metadata["num_classes"] == 1000
    model = timm.create_model(
        "ga_convnext_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(out)}
    ).eval()
    model.set_branch_outputs(True)
    with torch.no_grad():
        logits = model(golden.images(0, 2, 3, 224, 224)).transpose(0, 1).numpy()
    wanted = golden.arrays("gramian")[f"{NAME}/logits"]
    assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_other_number_of_classes(checkpoint: Path, tmp_path: Path, capsys, caplog) -> None:
    """The trunk stays, the classifier is left out, and both are said."""
    out = tmp_path / "trunk.safetensors"
    convert(checkpoint, "--model", NAME, "--out", out, "--num-classes", 10)
    assert "the file has 1000 classes, 10 were asked for" in capsys.readouterr().out
    model = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay={"file": str(out)}, num_classes=10
    )
    assert "checkpoint has no classes, the model 10: the classifier is fresh" in caplog.text
    weight = golden.released_gramian(NAME)["gram_contraction.4.0.weight"]
    torch.testing.assert_close(model.head.gram_proj.weight.chunk(5)[4], weight)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "ga_convnext_tiny_768"], "not one of ga_convnext_tiny_768: wrong shape"),
        (["--model", "ga_convnext_small"], "not one of ga_convnext_small: missing"),
        (["--model", "ga_convnext_tniy"], "did you mean 'ga_convnext_tiny"),
        (["--model", "qna_vit_tiny"], r"tar: is a PyTorch file; .* are Flax msgpack"),
        (["--model", "qna_vit_tiny", "--use-ema"], "--use-ema: qna_vit_tiny's checkpoints"),
        (["--model", NAME, "--model-kwargs", "num_branches=3"], "wrong shape"),
        (["--model", NAME, "--model-kwargs", "num_branch=3"], "num_branch"),
    ],
)
def test_files_that_do_not_fit(
    argv: list[str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    """One line, and nothing written."""
    with pytest.raises(UsageError, match=message) as error:
        convert(checkpoint, *argv, "--out", tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_damaged_file(checkpoint: Path, tmp_path: Path) -> None:
    """Truncated: one line that names it."""
    damaged = tmp_path / "damaged.pth.tar"
    damaged.write_bytes(checkpoint.read_bytes()[:1_000_000])
    with pytest.raises(UsageError, match=r"damaged\.pth\.tar: not a readable checkpoint"):
        convert(damaged, "--model", NAME, "--out", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
