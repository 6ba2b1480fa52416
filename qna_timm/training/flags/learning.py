"""Flags of train.py that settle how a model learns: optimizer to moving average."""

from qna_timm.training.data.padded_crop import DEFAULT_PADDING, PADDED
from qna_timm.training.flags.declaration import (
    BELOW_ONE,
    INTERPOLATIONS,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Flag,
)

MULTILABEL_LOSSES = ("asl", "twoway", "zlpr", "db")
"""timm's losses for several labels an image, which are not supported."""

OPTIMIZER_FLAGS = (
    Flag("--opt", str, "sgd", "Optimizer of timm, such as adamw, sgd, lamb or lookahead_adamw."),
    Flag("--opt-eps", float, None, "Epsilon of the optimizer.", rule=NOT_NEGATIVE),
    Flag("--opt-betas", float, None, "Betas of the optimizer.", "+", rule=PROBABILITY),
    Flag("--momentum", float, 0.9, "Momentum, where the optimizer has one.", rule=NOT_NEGATIVE),
    Flag("--weight-decay", float, 2e-5, "Weight decay.", rule=NOT_NEGATIVE),
    Flag("--clip-grad", float, None, "Clip gradients at this.", rule=POSITIVE),
    Flag(
        "--clip-mode",
        str,
        "norm",
        "norm: of all gradients; value: each number; agc: by norms of weights, no classifiers.",
        choices=("norm", "value", "agc"),
    ),
    Flag(
        "--layer-decay",
        float,
        None,
        "Learning-rate factor from layer to layer, downwards.",
        rule=POSITIVE,
    ),
    Flag("--layer-decay-min-scale", float, 0.0, "Least such factor.", rule=NOT_NEGATIVE),
    Flag(
        "--layer-decay-no-opt-scale",
        float,
        None,
        "Layers below this factor are not trained.",
        rule=NOT_NEGATIVE,
    ),
    Flag("--opt-kwargs", dict, {}, "More arguments of timm's optimizer factory."),
)

SCHEDULE_FLAGS = (
    Flag(
        "--sched",
        str,
        "cosine",
        "Learning-rate schedule.",
        choices=(
            "cosine",
            "tanh",
            "step",
            "multistep",
            "poly",
            "plateau",
            "wsd",
            "rsqrt",
            "constant",
            "none",
        ),
    ),
    Flag("--sched-on-updates", bool, False, "Move along the schedule at each update, not epoch."),
    Flag(
        "--lr", float, None, "Learning rate; --lr-base is used when not given.", rule=NOT_NEGATIVE
    ),
    Flag(
        "--lr-base",
        float,
        0.1,
        "Learning rate for a global batch of --lr-base-size, scaled to the one used.",
        rule=NOT_NEGATIVE,
    ),
    Flag("--lr-base-size", int, 256, "Batch size that --lr-base is meant for.", rule=POSITIVE),
    Flag(
        "--lr-base-scale",
        str,
        "",
        "Scaling of --lr-base with the batch; when not given sqrt for "
        "adaptive optimizers, else linear.",
        choices=("", "linear", "sqrt"),
    ),
    Flag(
        "--lr-noise",
        float,
        None,
        "Share(s) of training from (and to) which noise is added to the learning rate.",
        "+",
        rule=PROBABILITY,
    ),
    Flag("--lr-noise-pct", float, 0.67, "Largest noise, as a share.", rule=NOT_NEGATIVE),
    Flag("--lr-noise-std", float, 1.0, "Deviation of the noise.", rule=NOT_NEGATIVE),
    Flag("--lr-cycle-mul", float, 1.0, "Factor on the length of each cycle.", rule=POSITIVE),
    Flag("--lr-cycle-decay", float, 0.5, "Factor on the height of each cycle.", rule=NOT_NEGATIVE),
    Flag("--lr-cycle-limit", int, 1, "Number of cycles.", rule=POSITIVE),
    Flag("--lr-k-decay", float, 1.0, "Exponent of cosine's and poly's progress.", rule=POSITIVE),
    Flag(
        "--lr-decay-fn",
        str,
        None,
        "Shape of wsd's and rsqrt's last phase.",
        choices=("linear", "1-sqrt", "cosine", "power", "exp"),
    ),
    Flag("--lr-stable-timescale", float, None, "Time scale of rsqrt, in epochs.", rule=POSITIVE),
    Flag("--warmup-lr", float, 1e-5, "Learning rate that warm-up starts at.", rule=NOT_NEGATIVE),
    Flag("--min-lr", float, 0.0, "Least learning rate.", rule=NOT_NEGATIVE),
    Flag("--epochs", int, 300, "Epochs to train.", rule=POSITIVE),
    Flag(
        "--epoch-repeats",
        float,
        0.0,
        "Times the data is gone through in an epoch (in timm of streams alone).",
        rule=NOT_NEGATIVE,
    ),
    Flag("--start-epoch", int, None, "Number of the first epoch, from 0.", rule=NOT_NEGATIVE),
    Flag(
        "--stop-epoch",
        int,
        None,
        "Stop after this many epochs, the schedule unchanged.",
        rule=POSITIVE,
    ),
    Flag(
        "--early-stop-epochs",
        int,
        None,
        "Stop once --eval-metric has not got better for more than this many epochs; 0 for never "
        "(not in timm).",
        rule=NOT_NEGATIVE,
    ),
    Flag(
        "--decay-milestones",
        int,
        [90, 180, 270],
        "Epochs at which multistep decays.",
        "+",
        rule=POSITIVE,
    ),
    Flag(
        "--decay-epochs",
        float,
        None,
        "Epochs between decays of step (90 when not given); epochs, or share below 1, of wsd's and "
        "rsqrt's last phase (0.2).",
        rule=POSITIVE,
    ),
    Flag("--warmup-epochs", int, 5, "Epochs of warm-up.", rule=NOT_NEGATIVE),
    Flag("--warmup-prefix", bool, False, "Count warm-up on top of --epochs."),
    Flag("--cooldown-epochs", int, 0, "Epochs at --min-lr on top of --epochs.", rule=NOT_NEGATIVE),
    Flag(
        "--patience-epochs",
        int,
        10,
        "Epochs without gain before plateau decays.",
        rule=NOT_NEGATIVE,
    ),
    Flag("--decay-rate --dr", float, 0.1, "Factor of a decay; power of poly.", rule=POSITIVE),
)

AUGMENTATION_FLAGS = (
    Flag("--no-aug", bool, False, "No augmentation of images, whatever else is given, but mixing."),
    Flag(
        "--train-crop-mode",
        str,
        None,
        "Crop: random resized, keeping the ratio with centre or random position, or (not in timm) "
        "of the image with zeros around it, for small images.",
        choices=("rrc", "rkrc", "rkrr", PADDED),
    ),
    Flag(
        "--crop-padding",
        int,
        None,
        f"Pixels of zeros on each side for the padded crop; {DEFAULT_PADDING} when not given (not "
        "in timm).",
        rule=NOT_NEGATIVE,
    ),
    Flag(
        "--scale",
        float,
        [0.08, 1.0],
        "Least and largest share of the area cropped.",
        2,
        rule=POSITIVE,
    ),
    Flag(
        "--ratio",
        float,
        [3 / 4, 4 / 3],
        "Least and largest width by height of a crop.",
        2,
        rule=POSITIVE,
    ),
    Flag("--hflip", float, 0.5, "Probability of mirroring left-right.", rule=PROBABILITY),
    Flag("--vflip", float, 0.0, "Probability of mirroring top-bottom.", rule=PROBABILITY),
    Flag(
        "--color-jitter",
        float,
        0.4,
        "Strength of colour jitter; of policies of --aa used with 3a alone.",
        rule=NOT_NEGATIVE,
    ),
    Flag("--color-jitter-prob", float, None, "Probability of it.", rule=PROBABILITY),
    Flag("--grayscale-prob", float, None, "Probability of grey images.", rule=PROBABILITY),
    Flag("--gaussian-blur-prob", float, None, "Probability of blur.", rule=PROBABILITY),
    Flag("--aa", str, None, "AutoAugment policy: rand-m9-mstd0.5, augmix-m5, original, v0, 3a ..."),
    Flag(
        "--aug-repeats",
        float,
        0.0,
        "Times each image is repeated, differently augmented, in a global batch.",
        rule=NOT_NEGATIVE,
    ),
    Flag(
        "--aug-splits",
        int,
        0,
        "Splits of a batch, the first clean; 0 or at least 2.",
        rule=NOT_NEGATIVE,
    ),
    Flag("--reprob", float, 0.0, "Probability of random erasing.", rule=PROBABILITY),
    Flag(
        "--remode",
        str,
        "pixel",
        "What erased patches are filled with.",
        choices=("const", "rand", "pixel"),
    ),
    Flag("--recount", int, 1, "Most patches erased.", rule=POSITIVE),
    Flag("--resplit", bool, False, "Do not erase in the first (clean) split."),
    Flag("--mixup", float, 0.0, "Mixup's alpha; 0 for none.", rule=NOT_NEGATIVE),
    Flag("--cutmix", float, 0.0, "CutMix's alpha; 0 for none.", rule=NOT_NEGATIVE),
    Flag(
        "--cutmix-minmax",
        float,
        None,
        "Least and largest share of the side cut; replaces CutMix's alpha.",
        2,
        rule=PROBABILITY,
    ),
    Flag("--mixup-prob", float, 1.0, "Probability of mixing at all.", rule=PROBABILITY),
    Flag(
        "--mixup-switch-prob",
        float,
        0.5,
        "Probability of CutMix where both are on.",
        rule=PROBABILITY,
    ),
    Flag(
        "--mixup-mode",
        str,
        "batch",
        "Who shares a mix: the batch, pairs, or no images.",
        choices=("batch", "pair", "elem"),
    ),
    Flag(
        "--mixup-off-epoch", int, 0, "No mixing from this epoch on; 0 for never.", rule=NOT_NEGATIVE
    ),
    Flag(
        "--train-interpolation",
        str,
        "random",
        "Resizing of training images.",
        choices=INTERPOLATIONS[1:],
    ),
    Flag("--drop", float, 0.0, "Dropout rate.", rule=BELOW_ONE),
    Flag("--drop-path", float, None, "Drop-path rate; the model's when not given.", rule=BELOW_ONE),
    Flag("--drop-block", float, None, "Drop-block rate, where the model has it.", rule=BELOW_ONE),
)

LOSS_FLAGS = (
    Flag(
        "--loss",
        str,
        None,
        "Loss; cross entropy when not given.",
        choices=("ce", "bce", "poly", "jsd", *MULTILABEL_LOSSES),
        unsupported=MULTILABEL_LOSSES,
    ),
    Flag("--smoothing", float, 0.1, "Label smoothing.", rule=BELOW_ONE),
    Flag("--jsd-loss", bool, False, "The same as --loss jsd; needs --aug-splits."),
    Flag("--bce-loss", bool, False, "The same as --loss bce."),
    Flag("--bce-sum", bool, False, "Sum bce over classes, not average."),
    Flag(
        "--bce-target-thresh",
        float,
        None,
        "Targets of bce above it count as 1, others as 0.",
        rule=PROBABILITY,
    ),
    Flag("--bce-pos-weight", float, None, "Weight of bce's positive term.", rule=POSITIVE),
    Flag(
        "--loss-pos-weight",
        float,
        None,
        "The same as --bce-pos-weight (timm also takes a file with one for each class).",
        rule=POSITIVE,
    ),
    Flag("--poly-epsilon", float, 2.0, "Coefficient of the poly loss."),
    Flag(
        "--ga-lam --GA_lam",
        float,
        0.0,
        "Weight of the decorrelation of branches, negative to drive them apart; for models with "
        "Gramian heads (not in timm).",
    ),
    Flag(
        "--span-penalty",
        float,
        None,
        "Weight of the sum of learned spans, fractions of their maximum, over layers and heads; "
        "0.001 for models with learned windows when not given (not in timm).",
        rule=NOT_NEGATIVE,
    ),
)

BATCH_NORM_FLAGS = (
    Flag("--bn-momentum", float, None, "Momentum of batch norm.", rule=PROBABILITY),
    Flag("--bn-eps", float, None, "Epsilon of batch norm.", rule=POSITIVE),
    Flag("--sync-bn", bool, False, "Batch statistics over all processes."),
    Flag(
        "--dist-bn",
        str,
        "reduce",
        "What is done with running statistics after an epoch.",
        choices=("broadcast", "reduce", ""),
    ),
    Flag("--split-bn", bool, False, "Separate batch norms for --aug-splits."),
)

EMA_FLAGS = (
    Flag("--model-ema", bool, False, "Keep an exponential moving average of the weights."),
    Flag("--model-ema-force-cpu", bool, False, "Keep it on the CPU, unvalidated."),
    Flag("--model-ema-decay", float, 0.9998, "Its decay at each update.", rule=PROBABILITY),
    Flag("--model-ema-warmup", bool, False, "Let the decay grow from 0: for short runs."),
)
