"""README's examples, run as they stand; training runs are cut short by flags put after theirs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from golden import flax_params, info, released_gramian, released_span
from PIL import Image
from preloaded import programs
from safetensors.torch import save_file
from test_convert import write_flax

from qna_timm.training.storage.checkpoint import save_weights

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = "--epochs 1 --warmup-epochs 0 --max-steps 2 --batch-size 8 --val-num-samples 16 --workers 0"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def commands() -> list[str]:
    """Shell lines, but for the check that runs these tests."""
    lines = [
        line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()
    ]
    return [line for line in lines if line and line != "bash scripts/test.sh"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository, with the files that the examples name."""
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "output", "tests"):
            (folder / path.name).symlink_to(path)
    for split, count in (("train", 6), ("val", 2)):
        for label, shade in (("cat", 40), ("dog", 200)):
            (folder / "photos" / split / label).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (40, 30), (shade, shade + i, 90))
                image.save(folder / "photos" / split / label / f"{i}.jpg")
    shapes = info()["spec_qna_vit_tiny"]["params"]
    write_flax(folder / "checkpoint_375300", flax_params(shapes))
    state = released_gramian("ga_convnext_tiny_688")
    torch.save({"state_dict": state}, folder / "model_best.pth.tar")
    state = released_span("small_adaptive_R2")
    name = "best_small_model_CIFAR100_ResNet26_ckpt.tar"
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}}, folder / name
    )
    return folder


def save_trained(folder: Path) -> None:
    """What the fine-tuning example leaves, untrained."""
    folder.mkdir(parents=True)
    model = timm.create_model("qna_vit_tiny", num_classes=2)
    about = {
        "arch": "qna_vit_tiny",
        "num_classes": 2,
        "in_chans": 3,
        "model_kwargs": {},
        "data_config": timm.data.resolve_model_data_config(model),
        "class_names": ["cat", "dog"],
    }
    save_weights(folder / "best.safetensors", model, about)


def test_python_examples(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader would."""
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(workplace / "photos")
    save_trained(Path("output/train/photos"))
    save_file(timm.create_model("qna_vit_tiny").state_dict(), "qna_vit_tiny.safetensors")
    space: dict = {}
    with torch.no_grad():
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), space)
    assert space["logits"].shape == (1, 10) and space["out"].shape == (2, 30, 41, 64)
    assert space["mean"].shape == (1, 10) and space["branches"].shape == (1, 5, 10)
    assert space["heads"].num_branches == 3 and space["best"] in ("cat", "dog")
    assert [m.shape[1] for m in space["maps"]] == [64, 128, 256, 512]
    assert Path("qna_vit_tiny.pt2").stat().st_size > 1_000_000


@pytest.mark.timeout(900)
def test_shell_examples(workplace: Path, tmp_path: Path) -> None:
    """Conversion first, since a file it writes is fine-tuned; the rest in README's order."""
    environment = {
        "PATH": os.pathsep.join(
            map(str, (programs(), Path(sys.executable).parent, os.environ["PATH"]))
        ),
        "QNA_TIMM_VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
    }
    lines = sorted(commands(), key=lambda line: "convert_checkpoint" not in line)
    assert len(lines) >= 8
    for number, line in enumerate(lines):
        words = shlex.split(line)
        if "train.py" in line or "quickstart" in line:
            words += shlex.split(SHORT)
        log = tmp_path / f"{number}.log"
        with open(log, "w") as file:
            settings = {"cwd": workplace, "env": os.environ | environment, "timeout": 300}
            code = subprocess.run(words, stdout=file, stderr=file, **settings).returncode
        assert code == 0, f"{line}\n{log.read_text()[-3000:]}"
    assert (workplace / "output/train/photos/best.safetensors").is_file()
    assert (workplace / "confusion.png").is_file() and (workplace / "results.csv").is_file()


def test_every_file_that_readme_names_exists() -> None:
    bases = [ROOT, *(path.parent for path in ROOT.glob("qna_timm/**/*.py"))]
    for name in re.findall(r"`([\w./]+\.(?:py|sh|yaml|md))`", README):
        assert any((base / name).is_file() for base in bases), name
