"""Writes what tests/data has of the golden files of the released code.

    python tests/make_data.py ../shared/golden

Big outputs are thinned to about a thousand values (`thin`), which keeps the folder small and still
compares each of them in a thousand places.
"""

import json
import sys
from pathlib import Path

import numpy as np

KEEP = 1000


def thin(array: np.ndarray) -> np.ndarray:
    """Every n-th value in float32, n = size // 1000 (all of them below 2,000)."""
    return array.ravel()[:: max(1, array.size // KEEP)].astype(np.float32)


OUT = Path(__file__).parent / "data"


def write(name: str, arrays: dict[str, np.ndarray], info: dict[str, dict]) -> None:
    """One pair of files."""
    OUT.mkdir(exist_ok=True)
    np.savez_compressed(OUT / f"{name}.npz", **arrays)
    (OUT / f"{name}.json").write_text(json.dumps(info, separators=(",", ":")))
    print(f"{name}: {len(arrays)} arrays")


def collect_qna(qna: Path) -> None:
    """The QnA cases."""
    arrays: dict[str, np.ndarray] = {}
    info: dict[str, dict] = {}

    def take(file: str, prefix: str) -> None:
        with np.load(qna / file) as data:
            for name in data.files:
                if not name.startswith(("old/", "new/")):
                    whole = name.startswith("resize/") and name.endswith("/in")
                    arrays[f"{prefix}/{name}"] = data[name] if whole else thin(data[name])

    take("layers.npz", "layers")
    take("small_models.npz", "small")
    take("qna_vit_tiny.npz", "qna_vit_tiny")
    take("qna_vit_tiny_7x7.npz", "qna_vit_tiny_7x7")
    take("qna_vit_tiny_stages.npz", "qna_vit_tiny_stages")
    take("golden_finetune_resize.npz", "finetune_resize")
    take("golden_small_stem_resnet_train_bn.npz", "stem_resnet")
    for name in ("layers", "small_models", "verify", "golden_qna_vit_tiny_grads"):
        info[name] = json.loads((qna / f"{name}.json").read_text())
    keep = ("drop_path_", "init_stats_")
    info["verify"] = {k: v for k, v in info["verify"].items() if k.startswith(keep)}
    for model in ("qna_vit_tiny", "qna_vit_tiny_7x7", "qna_vit_small", "qna_vit_base"):
        info[f"spec_{model}"] = json.loads((qna / f"spec_{model}.json").read_text())

    write("qna", arrays, info)


def collect_gramian(gramian: Path) -> None:
    """The Gramian models: branch logits whole, inner maps thinned."""
    arrays: dict[str, np.ndarray] = {}
    info: dict[str, dict] = {}
    for model in ("ga_convnext_tiny_688", "ga_cswin_tiny"):
        with np.load(gramian / f"{model}.npz") as data:
            for name in data.files:
                if name == "logits_f64":
                    arrays[f"{model}/logits"] = data[name].astype(np.float32)
                elif name.endswith("_f64as32"):
                    arrays[f"{model}/{name.removesuffix('_f64as32')}"] = thin(data[name])
        entries = json.loads((gramian / f"{model}.statedict.json").read_text())["entries"]
        info[f"entries_{model}"] = entries
    norms = json.loads((gramian / "grad_norms_ga_convnext_tiny_688.json").read_text())
    info["grad_norms_ga_convnext_tiny_688"] = {
        mode: norms[mode] for mode in ("eval", "train_flag_bn_eval")
    }
    write("gramian", arrays, info)


def copy_span_rates(span: Path) -> None:
    """The learning rate of every epoch in the released span runs, in full precision."""
    runs = json.loads((span / "lr_schedule.json").read_text())
    key = "lr_per_epoch_1_to_100"
    rates = {name: {key: run[key]} for name, run in runs.items()}
    (OUT / "span_lr.json").write_text(json.dumps(rates, separators=(",", ":")))


def copy_span_steps(span: Path) -> None:
    """Four updates of each small span network in float64, and the released names and shapes."""
    results = json.loads((span / "golden_train_steps.json").read_text())["results"]
    networks = json.loads((span / "state_dicts.json").read_text())
    info = {
        name: {"shapes": {n: shape for n, shape, _ in networks[name]["entries"]}, **runs["fp64"]}
        for name, runs in results.items()
    }
    (OUT / "span_train_steps.json").write_text(json.dumps(info, separators=(",", ":")))


def collect_sa_resnet(span: Path) -> None:
    """The adaptive-span networks: logits, gradients (all norms, a few whole), names and shapes."""
    variants = json.loads((span / "state_dicts.json").read_text())
    keys = ("groups", "R", "attention_kernel", "z_init")
    info: dict[str, dict] = {
        "args": {name: {key: v["args"][key] for key in keys} for name, v in variants.items()},
        "entries": {
            name: {path: shape for path, shape, _ in v["entries"]}
            for name, v in variants.items()
            if "_z" not in name and "_R3" not in name
        },
        "grads": {},
    }
    with np.load(span / "logits_fp64.npz") as data:
        arrays = {f"{name}/logits": data[name].astype(np.float32) for name in data.files}
    grads = json.loads((span / "grads.json").read_text())
    for name in ("small_adaptive_R2", "small_local_k5"):
        info["grads"][name] = grads[name]["fp64"]
        with np.load(span / f"golden_grads_{name}.npz") as data:
            for path in data.files:
                in_layer = path.startswith("layers.0.0.conv2.0.") and "current_val" not in path
                if in_layer or path in ("input", "init.0.weight", "dense.bias"):
                    arrays[f"{name}/{path}"] = data[path]
    write("sa_resnet", arrays, info)


if __name__ == "__main__":
    golden = Path(sys.argv[1])
    collect_qna(golden / "qna")
    collect_gramian(golden / "gramian")
    copy_span_rates(golden / "span")
    copy_span_steps(golden / "span")
    collect_sa_resnet(golden / "span")
