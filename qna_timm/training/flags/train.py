"""Every flag of train.py: timm's names, aliases, meanings and defaults, and a few of ours.

Where a default or meaning differs from timm's, the help says so.
"""

from qna_timm.training.data.holdout import DEFAULT_SEED
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
from qna_timm.training.flags.intervals import DURATION, INTERVAL
from qna_timm.training.flags.learning import (
    AUGMENTATION_FLAGS,
    BATCH_NORM_FLAGS,
    EMA_FLAGS,
    LOSS_FLAGS,
    OPTIMIZER_FLAGS,
    SCHEDULE_FLAGS,
)
from qna_timm.training.flags.refused import REFUSED_FLAGS

METRICS = ("top1", "top5", "loss")

_RECIPE = (
    Flag(
        "-c --config",
        str,
        None,
        "YAML file of these flags' values; the command line goes before it.",
        yaml=False,
    ),
    Flag(
        "--smoke",
        bool,
        False,
        "Try the recipe in seconds: two updates of at most 4 small images a process "
        "of sklearn/digits, everything else as it is (not in timm).",
    ),
)

_DATASET = (
    Flag("data", str, None, "Folder of the data; the same as --data-dir."),
    Flag("--data-dir", str, None, "Folder of the data: train/ and validation/ with class folders."),
    Flag(
        "--dataset",
        str,
        "",
        "Kind and name, KIND/NAME with KIND torch, hfds, hfids, tfds or wds; empty for a folder or "
        "tar file; tiny_imagenet (not in timm) for that archive as it unpacks; sklearn/digits (not "
        "in timm) is built in and used when no data is named.",
    ),
    Flag("--train-split", str, "train", "Name of the training split."),
    Flag("--val-split", str, "validation", "Name of the validation split."),
    Flag(
        "--val-fraction",
        float,
        None,
        "Validate on this random share of the training split, which is not trained on, and leave "
        "the validation split alone (not in timm).",
        rule=INSIDE_ZERO_ONE,
    ),
    Flag(
        "--val-seed",
        int,
        None,
        f"Seed that chooses that share; {DEFAULT_SEED} when not given, whatever --seed is (not in "
        "timm).",
        rule=NUMPY_SEED,
    ),
    Flag("--train-num-samples", int, None, "Training images of a streamed set.", rule=POSITIVE),
    Flag("--val-num-samples", int, None, "Validation images of a streamed set.", rule=POSITIVE),
    Flag("--dataset-download", bool, False, "Download the set if it is not there."),
    Flag("--class-map", str, "", "Text file with one class name per line, in the order of labels."),
    Flag("--input-img-mode", str, None, "PIL mode images are converted to, such as RGB or L."),
    Flag("--input-key", str, None, "Field of the set that holds the image."),
    Flag("--target-key", str, None, "Field of the set that holds the label."),
    Flag("--dataset-trust-remote-code", bool, False, "Let Hugging Face sets run their own code."),
)

_MODEL = (
    Flag("--model", str, "qna_vit_tiny", "Model name (timm's default is resnet50)."),
    Flag("--pretrained", bool, False, "Start from the published weights of the model."),
    Flag("--pretrained-path", str, None, "Start from this file as if it were published weights."),
    Flag("--pretrained-cfg-overlay", dict, {}, "Entries to replace in the model's pretrained cfg."),
    Flag("--initial-checkpoint", str, "", "Load this file into the model, all keys matching."),
    Flag(
        "--backbone-checkpoint",
        str,
        "",
        "Load the trunk of a model with Gramian heads from this: a file with ImageNet weights of "
        "its backbone, timm's name of them, or a run folder (not in timm).",
    ),
    Flag(
        "--num-classes",
        int,
        None,
        "Classes of the model; those of the data when not given (timm: the model's own).",
        rule=POSITIVE,
    ),
    Flag(
        "--gp", str, None, "Global pooling: fast, avg, max, avgmax, catavgmax or the model's own."
    ),
    Flag("--img-size", int, None, "Side of the square input, in pixels.", rule=POSITIVE),
    Flag("--in-chans", int, None, "Channels of the input; the model's, mostly 3.", rule=POSITIVE),
    Flag("--input-size", int, None, "Channels, height and width of the input.", 3, rule=POSITIVE),
    Flag(
        "--crop-pct",
        float,
        None,
        "Share of the side kept by the centre crop of validation images.",
        rule=CROP_SHARE,
    ),
    Flag("--mean", float, None, "Mean of each channel, for pixels of 0 to 1.", "+"),
    Flag("--std", float, None, "Deviation of each channel.", "+", rule=POSITIVE),
    Flag("--interpolation", str, "", "Resizing of images.", choices=INTERPOLATIONS),
    Flag("-b --batch-size", int, 128, "Images per process and step.", rule=POSITIVE),
    Flag("-vb --validation-batch-size", int, None, "The same in validation.", rule=POSITIVE),
    Flag("--channels-last", bool, False, "Keep maps in channels-last memory."),
    Flag(
        "--grad-accum-steps --grad-accumulation",
        int,
        1,
        "Batches per optimizer update.",
        rule=POSITIVE,
    ),
    Flag("--grad-checkpointing", bool, False, "Recompute activations in backward, saving memory."),
    Flag("--fast-norm", bool, False, "Normalise in low precision where timm can."),
    Flag("--model-kwargs", dict, {}, "More arguments of the model's constructor."),
    Flag("--head-init-scale", float, None, "Factor on the classifier, loaded or not."),
    Flag("--head-init-bias", float, None, "Value of the classifier's biases."),
    Flag("--torchcompile", str, None, "Compile with this backend.", "?", const="inductor"),
    Flag("--torchcompile-mode", str, None, "Mode of torch.compile, such as max-autotune."),
    Flag("--torchscript", bool, False, "Compile with torch.jit.script."),
)

_DEVICE = (
    Flag(
        "--device",
        str,
        None,
        "cuda, cpu, mps, xpu or another; the best one present when not given (timm: cuda).",
    ),
    Flag("--amp", bool, False, "Train in mixed precision."),
    Flag("--amp-dtype", str, "float16", "Low precision of --amp.", choices=DTYPES[1:]),
    Flag("--model-dtype", str, None, "Precision of the weights, without --amp.", choices=DTYPES),
    Flag("--no-ddp-bb", bool, False, "Do not broadcast buffers between processes at each step."),
    Flag("--synchronize-step", bool, False, "Wait for the device after each step."),
    Flag(
        "--local-rank",
        int,
        0,
        "Set by old launchers and not used: torchrun sets LOCAL_RANK.",
        rule=NOT_NEGATIVE,
    ),
    Flag(
        "--device-modules",
        str,
        None,
        "Python modules to import first: device backends, or plugins with models.",
        "+",
    ),
)

_RUN = (
    Flag("--output", str, "./output/train", "Folder of run folders."),
    Flag("--experiment", str, "", "Name of the run folder; date, model and size when not given."),
    Flag("--seed", int, 42, "Seed of all randomness.", rule=NUMPY_SEED),
    Flag("--worker-seeding", str, "all", "What loader workers seed.", choices=("all", "part")),
    Flag(
        "-j --workers",
        int,
        4,
        "Loader processes per training process; when not given no more than cores.",
        rule=NOT_NEGATIVE,
    ),
    Flag("--pin-mem", bool, False, "Pin the loader's memory."),
    Flag("--no-prefetcher", bool, False, "Do not normalise and copy ahead on the device."),
    Flag("--use-multi-epochs-loader", bool, False, "Keep loader workers from epoch to epoch."),
    Flag("--log-interval", int, 50, "Steps between log lines.", rule=POSITIVE),
    Flag("--val-interval", int, 1, "Epochs between validations.", rule=POSITIVE),
    Flag("--eval-metric", str, "top1", "Metric of the best epoch.", choices=METRICS),
    Flag("--tta", int, 0, "Validate on this many augmented copies, averaged.", rule=NOT_NEGATIVE),
    Flag(
        "--checkpoint-hist",
        int,
        10,
        "Checkpoints kept, the best: by the averaged weights if they are evaluated.",
        rule=POSITIVE,
    ),
    Flag(
        "--save-epochs",
        int,
        None,
        "Numbers of epochs after which a checkpoint is kept for good.",
        "+",
        rule=POSITIVE,
    ),
    Flag("--save-images", bool, False, "Save an input batch at each log line."),
    Flag("--log-tensorboard", bool, False, "Log to TensorBoard in the run folder (not in timm)."),
    Flag("--log-wandb", bool, False, "Log to Weights & Biases."),
    Flag("--wandb-project", str, None, "Its project."),
    Flag("--wandb-tags", str, [], "Its tags.", "+"),
    Flag("--wandb-resume-id", str, "", "Its run to go on with."),
    Flag(
        "--max-steps", int, None, "At most this many updates an epoch (not in timm).", rule=POSITIVE
    ),
)

_RESUME = (
    Flag(
        "--resume",
        str,
        "",
        "Go on from a run folder or state file, or 'auto': from this --experiment if it has begun.",
    ),
    Flag("--no-resume-opt", bool, False, "Resume weights alone, with a fresh optimizer."),
    Flag(
        "--resume-anyway",
        bool,
        False,
        "Resume even where the run cannot go on exactly: with other settings, data or versions "
        "(not in timm).",
    ),
    Flag(
        "--checkpoint-interval --recovery-interval",
        str,
        "10m",
        "Save the state inside an epoch after so many updates (50) or so much time (90s, 10m, 1h); "
        "0 only after epochs (timm: updates, 0).",
        rule=INTERVAL,
    ),
    Flag(
        "--on-nonfinite",
        str,
        "stop",
        "When a loss or gradient is not finite: stop before the update, skip the update, or rewind "
        "to the last saved weights and go on behind it (not in timm).",
        choices=("stop", "skip", "rewind"),
    ),
    Flag(
        "--strict-data",
        bool,
        False,
        "Stop at an image that cannot be read; otherwise another takes its place and the run's "
        "report lists it (not in timm).",
    ),
    Flag(
        "--deterministic",
        bool,
        False,
        "Only kernels that give the same bits each time, so that on a GPU a resumed run equals one "
        "that was never stopped; some are slower, a layer without one ends the run (not in timm).",
    ),
    Flag(
        "--dist-timeout",
        str,
        "30m",
        "How long to wait for the other processes before giving them up as lost: seconds, or a "
        "time such as 90s, 10m or 1h (not in timm).",
        rule=DURATION,
    ),
)


TRAIN_FLAGS = {
    "Recipe": _RECIPE,
    "Dataset": _DATASET,
    "Model": _MODEL,
    "Device and precision": _DEVICE,
    "Optimizer": OPTIMIZER_FLAGS,
    "Learning-rate schedule": SCHEDULE_FLAGS,
    "Augmentation and regularisation": AUGMENTATION_FLAGS,
    "Loss": LOSS_FLAGS,
    "Batch norm": BATCH_NORM_FLAGS,
    "Exponential moving average": EMA_FLAGS,
    "Run": _RUN,
    "Resuming and faults": _RESUME,
    "timm's, not supported: read at their defaults only": REFUSED_FLAGS,
}
"""train.py's flags by the group they are shown in."""
