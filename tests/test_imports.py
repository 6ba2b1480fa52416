"""Imports go down only, optional packages stay optional, and every module has one home."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qna_timm"
# what each layer of the house may import from this package
ALLOWED = {
    "ops": {"ops"},
    "convert": {"ops", "convert"},
    "layers": {"ops", "layers"},
    "models": {"ops", "layers", "models", "convert"},
    "training": {"ops", "layers", "models", "convert", "training", "version"},
}
# of `ops`: its folders know nothing of each other, and what they share nothing of them
OPERATORS = {"qna", "span"}
ABOVE_OPERATORS = {"__init__", "compiled"}
# of `training`: its folders, each with those below it, and the modules beside them that all may use
BELOW = {
    "storage": {"storage"},
    "processes": {"storage", "processes"},
    "data": {"storage", "processes", "data"},
    "flags": {"storage", "processes", "data", "flags"},
    "reporting": {"storage", "processes", "data", "flags", "reporting"},
}
BASE = {"errors", "generators", "names", "signals"}
CORE = {"torch", "torchvision", "timm", "einops", "yaml", "numpy", "PIL", "safetensors"}


@functools.cache
def imports(path: Path, top_level_only: bool) -> set[str]:
    """Dotted names that a file imports, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        assert getattr(node, "level", 0) == 0, f"{path}: relative import"
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file: Path) -> None:
    layer = file.parts[0].removesuffix(".py")
    for name in imports(PACKAGE / file, top_level_only=False):
        if name.startswith("qna_timm.") and layer in ALLOWED:
            assert name.split(".")[1] in ALLOWED[layer], f"{file} imports {name}"
        if layer == "ops":
            assert not name.startswith("timm"), f"{file} imports {name}"


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "ops"], ids=str)
def test_operators_know_nothing_of_each_other(file: Path) -> None:
    place = file.parts[1].removesuffix(".py")
    if place in ABOVE_OPERATORS:
        return
    for name in imports(PACKAGE / file, top_level_only=False):
        if name.startswith("qna_timm.ops."):
            assert name.split(".")[2] not in OPERATORS - {place}, f"{file} imports {name}"


@pytest.mark.parametrize("place", sorted(BASE | BELOW.keys()))
def test_imports_go_down_in_training(place: str) -> None:
    allowed = BASE | BELOW.get(place, set())
    files = [file for file in FILES if file.parts[0] == "training"]
    files = [file for file in files if file.parts[1].removesuffix(".py") == place]
    assert files
    for file in files:
        for name in imports(PACKAGE / file, top_level_only=False):
            if name.startswith("qna_timm.training."):
                assert name.split(".")[2] in allowed, f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_extras_are_imported_where_they_are_used(file: Path) -> None:
    """At the head of a file only core dependencies, which a plain install has.

    Files of Triton kernels need triton at their head, and are imported where they are used.
    """
    of_kernels = "triton" in file.parts
    allowed = CORE | {"qna_timm"} | sys.stdlib_module_names | ({"triton"} if of_kernels else set())
    for name in imports(PACKAGE / file, top_level_only=True):
        assert name.split(".")[0] in allowed, f"{file} imports {name}"
        assert of_kernels or ".triton" not in name, f"{file} imports {name}"


def test_cold_import_without_extras() -> None:
    """A plain install: none of the extras' packages, nor triton."""
    code = """
import sys
for name in ("msgpack", "sklearn", "matplotlib", "tensorboard", "tqdm", "wandb", "jax", "flax",
             "triton"):
    sys.modules[name] = None
import qna_timm, timm
assert len(timm.list_models("qna_vit_*")) == 4
assert not any(name.startswith("qna_timm.training") for name in sys.modules)
assert not any(".triton" in name for name in sys.modules if name.startswith("qna_timm"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_module_names_do_not_collide_with_timm() -> None:
    """timm's registry keys modules by their last name."""
    import timm.models

    theirs = {path.stem for path in Path(timm.models.__file__).parent.glob("*.py")}
    ours = {path.stem for path in (PACKAGE / "models").glob("*.py")} - {"__init__"}
    assert not ours & theirs
