"""Writes tests/data/qna.npz and qna.json from the golden files of the released code.

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


def main(golden: Path) -> None:
    """Collect the QnA cases."""
    qna = golden / "qna"
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

    out = Path(__file__).parent / "data"
    out.mkdir(exist_ok=True)
    np.savez_compressed(out / "qna.npz", **arrays)
    (out / "qna.json").write_text(json.dumps(info, separators=(",", ":")))
    print(f"{len(arrays)} arrays, {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
