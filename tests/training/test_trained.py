"""Loading what a run has trained."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from qna_timm.training import load_run
from qna_timm.training.errors import UsageError
from qna_timm.training.storage.checkpoint import save_weights


def save_run(folder: Path, name: str = "test_vit") -> nn.Module:
    """A run folder with the best weights and, of another model, averaged ones."""
    folder.mkdir()
    for file in ("best.safetensors", "best_ema.safetensors"):
        model = timm.create_model(name, num_classes=2, in_chans=3, drop_rate=0.1).eval()
        about = {
            "arch": name,
            "num_classes": 2,
            "in_chans": 3,
            "model_kwargs": {"drop_rate": 0.1},
            "data_config": timm.data.resolve_data_config({"img_size": 160}, model=model),
            "class_names": ["cat", "dog"],
        }
        save_weights(folder / file, model, about)
    return model


def test_a_run_folder(tmp_path: Path) -> None:
    averaged = save_run(tmp_path / "run")
    model, transform, class_names = load_run(tmp_path / "run")
    assert not model.training and class_names == ["cat", "dog"]
    image = transform(Image.new("RGB", (200, 180))).unsqueeze(0)
    assert image.shape[2:] == (160, 160)
    with torch.no_grad():
        assert model(image).shape == (1, 2)
        assert not torch.equal(model(image), averaged(image))
        assert torch.equal(load_run(tmp_path / "run", use_ema=True).model(image), averaged(image))


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such checkpoint file or folder"):
        load_run(tmp_path / "run")
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    with pytest.raises(UsageError, match="does not describe its model"):
        load_run(path)
