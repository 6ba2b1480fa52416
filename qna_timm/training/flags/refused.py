"""timm's flags of train.py that we read only at their defaults, and why.

They are known so that timm's command lines and saved args.yaml files can be read, and answered with
a reason where they ask for what is not here.
"""

from qna_timm.training.flags.declaration import Flag

_NO_DISTILLATION = "distillation is not supported: train with timm's own script for it"
_NO_MULTILABEL = "multi-label training is not supported: train with timm's own script for it"
_NO_CLASS_WEIGHTS = "per-class loss weights are not supported: --bce-pos-weight takes one for all"
_NO_NAFLEX = "NaFlex loading (images of varying length) is not supported"
_NO_SIZES = "scheduled image sizes are not supported: one --img-size serves the whole run"
_NO_EPOCH_LENGTH = "a fixed number of batches is not supported: --epoch-repeats stretches epochs"
_NO_SWEEP = "timm's sweep.py is not supported: start one run per setting"
_NO_FUSER = "TorchScript fusers are gone from PyTorch: use --torchcompile"


def _refuse(names: str, kind: type, default: object, why: str, inert: bool = False) -> Flag:
    nargs = "+" if isinstance(default, list) else None
    return Flag(names, kind, default, "", nargs, refusal=why, inert=inert)


def _refuse_list(names: str, kind: type, why: str) -> Flag:
    return Flag(names, kind, None, "", "+", refusal=why)


_DISTILLATION = (
    _refuse("--kd-model-name", str, None, _NO_DISTILLATION),
    _refuse("--kd-distill-type", str, "logit", _NO_DISTILLATION),
    _refuse("--kd-loss-type", str, "kl", _NO_DISTILLATION),
    _refuse("--kd-token-distill-type", str, "soft", _NO_DISTILLATION),
    _refuse("--kd-temperature", float, 4.0, _NO_DISTILLATION),
    _refuse("--kd-student-feature-dim", int, None, _NO_DISTILLATION),
    _refuse("--kd-teacher-feature-dim", int, None, _NO_DISTILLATION),
    _refuse("--distill-loss-weight", float, None, _NO_DISTILLATION),
    _refuse("--task-loss-weight", float, None, _NO_DISTILLATION),
)

# Settings of the multi-label task and its losses do nothing without these, which are refused; so
# an args.yaml may hold any value of them. Their defaults are those of timm.loss.
_MULTILABEL = (
    _refuse("--task", str, "classification", _NO_MULTILABEL),
    _refuse("--target-format", str, None, _NO_MULTILABEL, inert=True),
    _refuse("--multilabel-threshold", float, None, _NO_MULTILABEL, inert=True),
    _refuse("--poly-gamma", float, 0.0, _NO_MULTILABEL, inert=True),
    _refuse("--poly-alpha", float, None, _NO_MULTILABEL, inert=True),
    _refuse("--asl-gamma-pos", float, 1.0, _NO_MULTILABEL, inert=True),
    _refuse("--asl-gamma-neg", float, 4.0, _NO_MULTILABEL, inert=True),
    _refuse("--asl-clip", float, 0.05, _NO_MULTILABEL, inert=True),
    _refuse("--asl-reduction", str, "batchmean", _NO_MULTILABEL, inert=True),
    _refuse("--twoway-tp", float, 4.0, _NO_MULTILABEL, inert=True),
    _refuse("--twoway-tn", float, 1.0, _NO_MULTILABEL, inert=True),
    _refuse("--db-neg-scale", float, 2.0, _NO_MULTILABEL, inert=True),
    _refuse("--db-init-bias", float, 0.05, _NO_MULTILABEL, inert=True),
    _refuse("--db-focal-gamma", float, 2.0, _NO_MULTILABEL, inert=True),
    _refuse("--loss-class-weight", str, None, _NO_CLASS_WEIGHTS),
    _refuse("--class-stats", str, None, _NO_CLASS_WEIGHTS),
    _refuse("--loss-weight-power", float, 1.0, _NO_CLASS_WEIGHTS, inert=True),
)

_LOADING = (
    _refuse_list("--train-img-sizes", int, _NO_SIZES),
    _refuse_list("--train-batch-sizes", int, _NO_SIZES),
    _refuse_list("--train-size-probs", float, _NO_SIZES),
    _refuse("--train-size-schedule", str, "constant", _NO_SIZES),
    _refuse("--train-size-schedule-spread", float, 0.65, _NO_SIZES),
    _refuse("--train-size-random-mix", float, 0.1, _NO_SIZES),
    _refuse("--variable-batch-loss-scale", str, "none", _NO_SIZES),
    _refuse("--train-batches-per-epoch --train-steps-per-epoch", int, None, _NO_EPOCH_LENGTH),
    _refuse("--naflex-loader", bool, False, _NO_NAFLEX),
    _refuse("--naflex-train-seq-lens", int, [128, 256, 576, 784, 1024], _NO_NAFLEX),
    _refuse("--naflex-max-seq-len", int, 576, _NO_NAFLEX),
    _refuse_list("--naflex-patch-sizes", int, _NO_NAFLEX),
    _refuse_list("--naflex-patch-size-probs", float, _NO_NAFLEX),
    _refuse("--naflex-loss-scale", str, "linear", _NO_NAFLEX),
    _refuse("--naflex-patchify-channels-first", bool, False, _NO_NAFLEX),
)

_OTHER = (
    _refuse("--drop-connect", float, None, "timm reads it and never uses it: use --drop-path"),
    _refuse("--fuser", str, "", _NO_FUSER),
    _refuse("--sweep-attempt", int, None, _NO_SWEEP),
    _refuse("--sweep-locks", str, None, _NO_SWEEP),
)

REFUSED_FLAGS = (*_DISTILLATION, *_MULTILABEL, *_LOADING, *_OTHER)
