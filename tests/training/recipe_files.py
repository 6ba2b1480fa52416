"""The recipes of the papers, and what the papers report, for the tests of recipes and scripts."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RECIPES = {
    # every family has its digits
    f"{path.parent.name}_digits" if path.stem == "digits" else path.stem: path
    for path in sorted((ROOT / "configs").glob("*/*.yaml"))
}
QNA = [name for name in RECIPES if name.startswith("qna_")]
GRAMIAN = [name for name in RECIPES if name.startswith(("ga_", "ablation_"))]
SPAN = [name for name in RECIPES if name.startswith("sa_resnet_")]
ABLATIONS = [name for name in GRAMIAN if name.startswith("ablation_")]
FINETUNE = "qna_vit_base_384_finetune"

PAPER_TOP1 = {
    "qna_vit_tiny": "81.7",
    "qna_vit_tiny_7x7": "82.0",
    "qna_vit_small": "83.2",
    "qna_vit_base": "83.9",
    "ga_resnet50": "82.5",
    "ga_vit_small": "80.9",
    "ga_vit_medium": "82.6",
    "ga_convnext_tiny": "83.2",
    "ga_convnext_small": "83.9",
    "ga_convnext_base": "84.3",
    "ga_cswin_tiny": "84.1",
    "ga_cswin_small": "84.7",
}


def settings_of(name):
    return yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))


def header(name):
    """The comment a recipe opens with."""
    lines = RECIPES[name].read_text(encoding="utf-8").split("\n")
    return "\n".join(line.removeprefix("#") for line in lines[: lines.index("")])
