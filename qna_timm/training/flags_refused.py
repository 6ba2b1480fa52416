"""Flags of timm's train.py that we read only at their defaults, and why."""

from .flags import Flag

_NO_DISTILLATION = "distillation is not supported: train with timm's own script for it"
_NO_MULTILABEL = "multi-label training is not supported: train with timm's own script for it"
_NO_NAFLEX = "NaFlex loading (variable aspect and length) is not supported"
_NO_SIZES = "scheduled image sizes are not supported: one --img-size serves the whole run"
_NO_SWEEP = "timm's sweep.py is not supported: start one run per setting"
_NO_FUSER = "TorchScript fusers are gone from PyTorch: use --torchcompile"


def _refused(kind: type, refusal: str, **defaults: object) -> tuple[Flag, ...]:
    return tuple(
        Flag(f"--{key.replace('_', '-')}", kind, default, "Not supported.", refusal=refusal)
        for key, default in defaults.items()
    )


def _refused_list(kind: type, refusal: str, **defaults: object) -> tuple[Flag, ...]:
    return tuple(
        Flag(f"--{key.replace('_', '-')}", kind, default, "Not supported.", "+", refusal=refusal)
        for key, default in defaults.items()
    )


REFUSED_FLAGS = (
    *_refused(str, _NO_FUSER, fuser=""),
    *_refused(
        str,
        _NO_DISTILLATION,
        kd_model_name=None,
        kd_distill_type="logit",
        kd_loss_type="kl",
        kd_token_distill_type="soft",
    ),
    *_refused(
        float, _NO_DISTILLATION, distill_loss_weight=None, task_loss_weight=None, kd_temperature=4.0
    ),
    *_refused(int, _NO_DISTILLATION, kd_student_feature_dim=None, kd_teacher_feature_dim=None),
    *_refused(
        str,
        _NO_MULTILABEL,
        task="classification",
        target_format=None,
        class_stats=None,
        loss_class_weight=None,
        loss_pos_weight=None,
    ),
    *_refused(
        float, _NO_MULTILABEL, multilabel_threshold=None, loss_weight_power=1.0, poly_gamma=0.0
    ),
    *_refused_list(int, _NO_SIZES, train_img_sizes=None, train_batch_sizes=None),
    *_refused_list(float, _NO_SIZES, train_size_probs=None),
    *_refused(str, _NO_SIZES, train_size_schedule="constant", variable_batch_loss_scale="none"),
    *_refused(float, _NO_SIZES, train_size_schedule_spread=0.65, train_size_random_mix=0.1),
    Flag(
        "--train-batches-per-epoch --train-steps-per-epoch",
        int,
        None,
        "Not supported.",
        refusal=_NO_SIZES,
    ),
    *_refused(bool, _NO_NAFLEX, naflex_loader=False, naflex_patchify_channels_first=False),
    *_refused_list(
        int, _NO_NAFLEX, naflex_train_seq_lens=[128, 256, 576, 784, 1024], naflex_patch_sizes=None
    ),
    *_refused_list(float, _NO_NAFLEX, naflex_patch_size_probs=None),
    *_refused(int, _NO_NAFLEX, naflex_max_seq_len=576),
    *_refused(str, _NO_NAFLEX, naflex_loss_scale="linear"),
    *_refused(int, _NO_SWEEP, sweep_attempt=None),
    *_refused(str, _NO_SWEEP, sweep_locks=None),
)
