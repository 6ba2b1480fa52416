"""Every flag of validate.py: timm's names, aliases, meanings and defaults, and a few of ours."""

from qna_timm.training.data.holdout import HOLDOUT_SPLIT
from qna_timm.training.flags.declaration import (
    CROP_SHARE,
    DTYPES,
    INSIDE_ZERO_ONE,
    INTERPOLATIONS,
    NOT_NEGATIVE,
    NUMPY_SEED,
    POSITIVE,
    Flag,
)

_NO_NAFLEX = "NaFlex loading (variable aspect and length) is not supported"
_NO_MULTILABEL = "multi-label evaluation is not supported: validate with timm's own script for it"

_DATASET = (
    Flag("data", str, None, "Folder of the data; the same as --data-dir."),
    Flag("--data-dir", str, None, "Folder of the data."),
    Flag(
        "--dataset",
        str,
        "",
        "Kind and name, KIND/NAME with KIND torch, hfds, hfids, tfds or "
        "wds; empty for a folder or tar file; tiny_imagenet and sklearn/digits (not in timm).",
    ),
    Flag(
        "--split",
        str,
        "validation",
        f"Name of the split; {HOLDOUT_SPLIT} (not in timm) is what train.py's --val-fraction held "
        "out.",
    ),
    Flag(
        "--val-fraction",
        float,
        None,
        f"Share that was held out, for --split {HOLDOUT_SPLIT}; the run's when not given (not in "
        "timm).",
        rule=INSIDE_ZERO_ONE,
    ),
    Flag(
        "--val-seed",
        int,
        None,
        "Seed that chose it; the run's when not given (not in timm).",
        rule=NUMPY_SEED,
    ),
    Flag("--num-samples", int, None, "Images of a streamed set.", rule=POSITIVE),
    Flag("--dataset-download", bool, False, "Download the set if it is not there."),
    Flag("--class-map", str, "", "Text file with one class name per line, in the order of labels."),
    Flag("--input-key", str, None, "Field of the set that holds the image."),
    Flag("--input-img-mode", str, None, "PIL mode images are converted to, such as RGB or L."),
    Flag("--target-key", str, None, "Field of the set that holds the label."),
    Flag("--dataset-trust-remote-code", bool, False, "Let Hugging Face sets run their own code."),
    Flag("--real-labels", str, "", "JSON file of ImageNet's reassessed labels."),
    Flag("--valid-labels", str, "", "Text file of the label numbers that count."),
)

_MODEL = (
    Flag(
        "-m --model",
        str,
        "qna_vit_tiny",
        "Model name; also a comma list, a pattern (qna_*), "
        "'all' or a text file of names; the checkpoint's when not given (timm: dpn92).",
    ),
    Flag("--checkpoint", str, "", "Weights: a file, a run folder or a folder of files."),
    Flag("--pretrained", bool, False, "Use the published weights."),
    Flag("--use-ema", bool, False, "Use the moving average of the weights, if it is there."),
    Flag(
        "--num-classes",
        int,
        None,
        "Classes of the model; the checkpoint's or the data's when not given.",
        rule=POSITIVE,
    ),
    Flag(
        "--gp", str, None, "Global pooling: fast, avg, max, avgmax, catavgmax or the model's own."
    ),
    Flag("--in-chans", int, None, "Channels of the input; the model's, mostly 3.", rule=POSITIVE),
    Flag("--model-kwargs", dict, {}, "More arguments of the model's constructor."),
    Flag("--test-pool", bool, False, "Pool over larger images at test time, where the model can."),
    Flag("--reparam", bool, False, "Fold training-time branches together."),
    Flag("--fast-norm", bool, False, "Normalise in low precision where timm can."),
    Flag("--torchcompile", str, None, "Compile with this backend.", "?", const="inductor"),
    Flag("--torchcompile-mode", str, None, "Mode of torch.compile, such as max-autotune."),
    Flag("--torchscript", bool, False, "Compile with torch.jit.script."),
)

_INPUT = (
    Flag("-b --batch-size", int, 256, "Images per process and step.", rule=POSITIVE),
    Flag(
        "-j --workers",
        int,
        4,
        "Loader processes per process; when not given no more than cores.",
        rule=NOT_NEGATIVE,
    ),
    Flag("--img-size", int, None, "Side of the square input, in pixels.", rule=POSITIVE),
    Flag("--input-size", int, None, "Channels, height and width of the input.", 3, rule=POSITIVE),
    Flag("--use-train-size", bool, False, "Use the model's training size, not its test size."),
    Flag("--crop-pct", float, None, "Share of the side kept by the centre crop.", rule=CROP_SHARE),
    Flag("--crop-mode", str, None, "Kind of crop.", choices=("squash", "border", "center")),
    Flag("--crop-border-pixels", int, None, "Pixels cut off all around first.", rule=NOT_NEGATIVE),
    Flag("--mean", float, None, "Mean of each channel, for pixels of 0 to 1.", "+"),
    Flag("--std", float, None, "Deviation of each channel.", "+", rule=POSITIVE),
    Flag("--interpolation", str, "", "Resizing of images.", choices=INTERPOLATIONS),
    Flag("--no-prefetcher", bool, False, "Do not normalise and copy ahead on the device."),
    Flag("--pin-mem", bool, False, "Pin the loader's memory."),
)

_DEVICE = (
    Flag(
        "--device",
        str,
        None,
        "cuda, cpu, mps, xpu or another; the best one present when not given (timm: cuda).",
    ),
    Flag(
        "--device-modules",
        str,
        None,
        "Python modules to import first: device backends, or plugins with models (not in timm).",
        "+",
    ),
    Flag("--channels-last", bool, False, "Keep maps in channels-last memory."),
    Flag("--amp", bool, False, "Run in mixed precision."),
    Flag("--amp-dtype", str, "float16", "Low precision of --amp.", choices=DTYPES[1:]),
    Flag("--model-dtype", str, None, "Precision of the weights, without --amp.", choices=DTYPES),
    Flag("--retry", bool, False, "Try again with smaller batches when memory runs out."),
    Flag("--seed", int, 42, "Seed of all randomness.", rule=NUMPY_SEED),
)

_RESULTS = (
    Flag("--log-freq", int, 10, "Batches between log lines.", rule=POSITIVE),
    Flag("--results-file", str, "", "Write the results here."),
    Flag(
        "--results-format",
        str,
        "csv",
        "Its format; a .csv or .json ending decides when not given.",
        choices=("csv", "json"),
    ),
    Flag(
        "--metrics-avg",
        str,
        None,
        "Also precision, recall and F1, averaged like this.",
        choices=("micro", "macro", "weighted"),
    ),
    Flag(
        "--per-class",
        str,
        None,
        "Also a table of every class, to a CSV file if one is named (not in timm).",
        "?",
        const="-",
    ),
    Flag(
        "--branches",
        bool,
        False,
        "Also each branch's top-1 and how much branches agree, for models with Gramian heads (not "
        "in timm).",
    ),
    Flag(
        "--confusion-matrix",
        str,
        None,
        "Also draw the confusion matrix to this PNG file (not in timm).",
    ),
)


def _refused(names: str, kind: type, default: object, refusal: str) -> Flag:
    return Flag(names, kind, default, "", refusal=refusal)


_REFUSED = (
    _refused("--num-gpu", int, 1, "several GPUs are used through torchrun --nproc_per_node=N"),
    _refused("--fuser", str, "", "TorchScript fusers are gone from PyTorch: use --torchcompile"),
    _refused("--aot-autograd", bool, False, "functorch's compiler is gone: use --torchcompile"),
    _refused("--tf-preprocessing", bool, False, "TensorFlow's preprocessing is not supported"),
    _refused("--naflex-loader", bool, False, _NO_NAFLEX),
    _refused("--naflex-max-seq-len", int, 576, _NO_NAFLEX),
    _refused("--task", str, "classification", _NO_MULTILABEL),
    _refused("--target-format", str, None, _NO_MULTILABEL),
    _refused("--multilabel-threshold", float, None, _NO_MULTILABEL),
)

VALIDATE_FLAGS = {
    "Dataset": _DATASET,
    "Model": _MODEL,
    "Input": _INPUT,
    "Device and precision": _DEVICE,
    "Results": _RESULTS,
    "timm's, not supported: read at their defaults only": _REFUSED,
}
"""validate.py's flags by the group they are shown in."""
