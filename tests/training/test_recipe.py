"""Flags, YAML recipes and their checks."""

import ast
import csv
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from qna_timm.training.errors import UsageError
from qna_timm.training.flags import checks
from qna_timm.training.flags.intervals import Interval, parse_duration, parse_interval
from qna_timm.training.flags.recipe import (
    as_recipe,
    as_yaml_dict,
    parse_train_args,
    parse_validate_args,
)
from qna_timm.training.names import expand_model_names

DATA = Path(__file__).parents[1] / "data"


def train(*argv, model="test_resnet"):
    return parse_train_args(["--model", model, *map(str, argv)])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_spellings_short_flags_and_negative_numbers():
    args = train("-b16", "-vb", "8", "-j0", "--head_init_bias", "-6.9e-1", "--local-rank=0")
    assert args.batch_size == 16
    assert args.validation_batch_size == 8
    assert args.workers == 0
    assert args.head_init_bias == -0.69
    assert train("--model_kwargs", "a=1", "b=relu", "c=(1, 2)").model_kwargs == {
        "a": 1,
        "b": "relu",
        "c": (1, 2),
    }
    assert train("--torchcompile").torchcompile == "inductor"
    assert train("--torchcompile", "eager").torchcompile == "eager"


def test_switches_turn_off(tmp_path):
    recipe = write(tmp_path / "r.yaml", "amp: true\nno_aug: true\n")
    assert train("-c", recipe).amp is True
    args = train("-c", recipe, "--no-amp", "--aug")
    assert args.amp is False and args.no_aug is False


def test_precedence_and_given(tmp_path):
    recipe = write(tmp_path / "r.yaml", "batch-size: 32\nlr: 3e-4\nepochs: 7\n")
    quickstart = write(tmp_path / "q.yaml", "epochs: 5\nopt: adamw\nlr: 1.0\n")
    args = parse_train_args(["--model", "test_resnet", "-c", str(recipe), "--lr", "2"], quickstart)
    assert (args.lr, args.batch_size, args.epochs, args.opt) == (2.0, 32, 7, "adamw")
    assert args.momentum == 0.9
    assert args.builtin_data and args.dataset == "sklearn/digits"
    assert args.given == {
        "batch_size": 32,
        "lr": 2.0,
        "epochs": 7,
        "model": "test_resnet",
        "config": str(recipe),
    }


def test_the_last_word_on_the_size(tmp_path):
    """Of two ways to give it the one that ranks higher, a recipe's or the quickstart's aside."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("img_size: 224\n")
    data = ["--data-dir", str(tmp_path)]
    args = parse_train_args(["-c", str(recipe), *data, "--input-size", "3", "96", "64"])
    assert (args.img_size, args.input_size) == (None, [3, 96, 64])
    recipe.write_text("input_size: [3, 96, 64]\n")
    args = parse_train_args(["-c", str(recipe), *data, "--img-size", "32"])
    assert (args.img_size, args.input_size) == (32, None)
    recipe.write_text("img_size: 64\ninput_size: [3, 64, 64]\n")
    args = parse_train_args(["-c", str(recipe), *data])
    assert (args.img_size, args.input_size) == (64, [3, 64, 64])


def test_one_session_is_not_the_next(tmp_path):
    """What was asked of one start is not asked of those that resume the run."""
    words = ["--resume-anyway", "--start-epoch", "2", "--stop-epoch", "3", "--no-resume-opt"]
    saved = as_recipe(parse_train_args(["--dataset", "sklearn/digits", *words]))
    of_one = ("resume_anyway", "start_epoch", "stop_epoch", "no_resume_opt")
    assert not any(saved.get(key) for key in of_one)


def test_another_choice_drops_what_the_quickstart_ties_to_its_own():
    """lamb takes no `fused`, vgg no `drop_path`, plateau no updates: all must run with no data."""
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    own = parse_train_args([], quickstart)
    assert own.opt_kwargs == {"fused": True} and own.drop_path and own.sched_on_updates
    args = parse_train_args(["--opt", "lamb", "--sched", "plateau", "--model", "vgg11"], quickstart)
    assert args.opt_kwargs == {} and args.drop_path is None and not args.sched_on_updates
    assert (args.epochs, args.img_size) == (own.epochs, 32)
    args = parse_train_args(["--opt", "lamb", "--drop-path", "0.2", "--model", "vgg11"], quickstart)
    assert args.drop_path == 0.2


@pytest.mark.parametrize("parse", [train, parse_validate_args])
def test_unknown_compiler(parse):
    argv = ["--torchcompile", "inducter"]
    with pytest.raises(UsageError, match=r"no backend 'inducter'.* did you mean 'inductor'"):
        parse(*argv) if parse is train else parse(argv)
    argv = ["--torchcompile", "--torchcompile-mode", "fast"]
    with pytest.raises(UsageError, match=r"--torchcompile-mode: .*mode=fast.*max-autotune"):
        parse(*argv) if parse is train else parse(argv)


def test_folder_beside_the_builtin_data_is_refused(tmp_path):
    recipe = write(tmp_path / "r.yaml", "dataset: sklearn/digits\n")
    with pytest.raises(UsageError, match=r"--data-dir: '.*' would not be read"):
        train("-c", recipe, "--data-dir", tmp_path)
    with pytest.raises(UsageError, match=r"DATA .*: '.*' would not be read"):
        parse_validate_args([str(tmp_path), "--dataset", "sklearn/digits"])


def test_named_data_leaves_the_quickstart_out(tmp_path):
    quickstart = write(tmp_path / "q.yaml", "epochs: 5\n")
    for argv in ([str(tmp_path)], ["--data-dir", str(tmp_path)], ["--dataset", "sklearn/digits"]):
        args = parse_train_args(["--model", "test_resnet", *argv], quickstart)
        assert args.epochs == 300 and not args.builtin_data
        assert not hasattr(args, "data")
    assert args.dataset == "sklearn/digits" and args.data_dir is None
    assert train(tmp_path).data_dir == str(tmp_path)


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m9-mstd0.5-n2-p0.5-inc1",
        "rand-mmax20-tweights",
        "augmix-m5-w4-d2-b1",
        "3a-mstd1",
        "v0",
    ],
)
def test_policies_that_timm_reads(policy):
    assert train("--aa", policy).aa == policy


def test_defaults_are_not_shared():
    train("--save-epochs", "2").decay_milestones.append(1000)
    assert train().decay_milestones == [90, 180, 270]


def test_yaml_types(tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        "lr: '3e-4'\nepochs: '10'\nmean: ['0.5', 0.4, 1]\ninput_size: [3, 32, 32]\n"
        "checkpoint_interval: 5\n"
        "torchcompile: true\namp: yes\ndrop_path: null\nmodel_kwargs: {act_layer: relu}\n"
        "save_epochs: [4, 8]\nstop_epoch:\ndecay_milestones: null\nopt: adam\n"
        "opt_kwargs: {eps: 1e-8}\nbatch_size: 16.0\n",
    )
    args = train("-c", recipe)
    assert args.lr == 3e-4 and args.epochs == 10 and args.mean == [0.5, 0.4, 1.0]
    assert args.input_size == [3, 32, 32] and args.checkpoint_interval == "5" and args.amp
    assert args.torchcompile == "inductor" and args.drop_path is None
    assert args.model_kwargs == {"act_layer": "relu"} and args.save_epochs == [4, 8]
    assert args.stop_epoch is None and args.decay_milestones == [90, 180, 270]
    assert args.opt_kwargs == {"eps": 1e-8} and args.batch_size == 16


def test_data_of_the_command_line_goes_before_a_recipes(tmp_path):
    recipe = write(tmp_path / "r.yaml", f"data_dir: {tmp_path}\n")
    (tmp_path / "other").mkdir()
    other = str(tmp_path / "other")
    assert train("-c", recipe).data_dir == str(tmp_path)
    assert train(other, "-c", recipe).data_dir == train("--data-dir", other, "-c", recipe).data_dir
    assert train(other, "-c", recipe).data_dir == other
    write(recipe, "data: /no/such/folder\n")
    with pytest.raises(UsageError, match=r"r\.yaml: key 'data_dir': there is no .*/no/such"):
        train("-c", recipe)


@pytest.mark.parametrize(
    "text, fragments",
    [
        ("weigth_decay: 0.1", ["unknown key 'weigth_decay'", "'weight_decay'"]),
        ("1: 2", ["unknown key '1'"]),
        ("config: a.yaml", ["unknown key 'config'"]),
        ("lr: fast", ["key 'lr'", "a number", "'fast'"]),
        ("lr: true", ["key 'lr'", "a number", "true"]),
        ("lr: .nan", ["key 'lr'", "a number"]),
        ("lr: '1e999'", ["key 'lr'", "a number"]),
        ("epochs: .inf", ["key 'epochs'", "a whole number"]),
        ("lr: 1\nlr: 2", ["line 2", "'lr' is there twice"]),
        ("batch_size: 1\nbatch-size: 2", ["'batch-size' is there twice"]),
        ("epochs: 1.5", ["key 'epochs'", "a whole number", "1.5"]),
        ("mean: 0.5", ["key 'mean'", "a list", "0.5"]),
        ("input_size: [3, 224]", ["key 'input_size'", "3 values", "found 2"]),
        ("decay_milestones: [1, x]", ["key 'decay_milestones'", "'x'"]),
        ("amp: 3", ["key 'amp'", "true or false", "3"]),
        ("model: [a]", ["key 'model'", "a string"]),
        ("experiment: 1.10", ["key 'experiment'", "a string", "1.1; put it in quotes"]),
        ("data: a\ndata_dir: b", ["key 'data_dir'", "'b' and, by key 'data', 'a'; give one"]),
        ("model_kwargs: 3", ["key 'model_kwargs'", "name=value"]),
        ("loss: bse", ["key 'loss'", "'bse'", "did you mean 'bce'"]),
        ("batch_size: 0", ["key 'batch_size'", "positive", "0"]),
        ("- a", ["key: value", "list"]),
        ("a: [1", ["line 2", "not YAML"]),
        ("task: multilabel", ["key 'task'", "multi-label"]),
        ("!!python/object/apply:os.getcwd []", ["not YAML"]),
    ],
)
def test_yaml_errors_name_file_key_and_value(tmp_path, text, fragments):
    path = write(tmp_path / "recipe.yaml", text + "\n")
    with pytest.raises(UsageError) as error:
        train("-c", path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_yaml_that_cannot_be_read(tmp_path):
    (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name, reason in (("gone.yaml", "No such file"), (".", "directory"), ("noise.yaml", "text")):
        with pytest.raises(UsageError, match=reason):
            train("-c", tmp_path / name)


BAD_TRAIN = [
    (["--model", "resnet5"], ["--model", "unknown model 'resnet5'", "'resnet50'"]),
    (["--model", "qna_vit_*"], ["--model", "'qna_vit_*'", "qna_vit_base, qna_vit_small, qna_vit"]),
    (["--model", "*"], ["--model", "a pattern, name one model: ", " more"]),
    (["--model", "qan_*"], ["--model", "no model fits the pattern 'qan_*'"]),
    (["--model", "resnet18.a9_in1k"], ["resnet18", "a9_in1k", "resnet18.a1_in1k"]),
    (["--opt", "adamv"], ["--opt", "'adamv'", "'adam'"]),
    (["--opt", "adamw", "--opt-kwargs", "foo=1"], ["--opt-kwargs", "foo"]),
    (["--opt-kwargs", "lr=5"], ["--opt-kwargs", "'lr' is for --lr to say"]),
    (["--opt-eps", "1e-7", "--opt-kwargs", "eps=1"], ["--opt-kwargs", "'eps' is for --opt-eps"]),
    (["--opt", "adamw", "--opt-betas", ".9"], ["--opt-betas", "take [0.9]: it needs more than 1"]),
    (["--seed", "4294967296"], ["--seed", "between 0 and 4294967295", "4294967296"]),
    (["--img-size", "32", "--input-size", "3", "40", "24"], ["40 x 24 pixels", "--img-size 32"]),
    (["--no-aug", "--aug-splits", "2"], ["--aug-splits", "--no-aug"]),
    (["--sched", "step", "--cooldown-epochs", "5", "--stop-epoch", "301"], ["the run's 300"]),
    (["--opt", "adamw", "--opt-betas", ".9", "1"], ["--opt-betas", "adamw", "[0.9, 1.0]"]),
    (["--clip-grad", "0"], ["--clip-grad", "positive", "0"]),
    (["--sched", "cosin"], ["--sched", "'cosin'", "'cosine'"]),
    (["--sched", "wsd", "--epochs", "3"], ["--sched", "warmup_epochs"]),
    (["--sched", "plateau", "--sched-on-updates"], ["--sched-on-updates", "plateau"]),
    (["--lr-noise", ".1", ".2", ".3"], ["--lr-noise", "found 3"]),
    (["--dataset", "torch/cifar11"], ["--dataset", "torch/cifar11", "'torch/cifar10'"]),
    (["--dataset", "digits"], ["--dataset", "'digits'", "'sklearn/digits'"]),
    (["--dataset", ""], ["--dataset", "--data-dir"]),
    (["--dataset", "torch/cifar10"], ["torch/cifar10", "folder"]),
    (["/no/such/folder"], ["DATA (the argument without a flag)", "/no/such/folder"]),
    (["-b", "8", "8"], ["DATA (the argument without a flag)", "'8'"]),
    (["--data-dir", "a", "8"], ["--data-dir", "'a'", "DATA (the argument without a flag), '8'"]),
    (["--data-dir", "/no/such/folder"], ["--data-dir", "/no/such/folder"]),
    (["--bach-size", "3"], ["--bach-size", "'--batch-size'"]),
    (["--batch", "3"], ["--batch"]),
    (["a", "b"], ["unexpected argument 'b'"]),
    (["--lr"], ["--lr", "expected one argument"]),
    (["--lr", "fast"], ["--lr", "a number", "'fast'"]),
    (["--lr", "nan"], ["--lr", "a number"]),
    (["--input-size", "3", "224"], ["--input-size", "3"]),
    (["--amp-dtype", "half"], ["--amp-dtype", "'half'", "'float16'"]),
    (["--amp-dtype", "float16", "--amp", "--model-dtype", "bfloat16"], ["--model-dtype", "--amp"]),
    (["--clip-mode", "nrm"], ["--clip-mode", "'norm'"]),
    (["--eval-metric", "top2"], ["--eval-metric", "'top1'"]),
    (["--eval-metric", "map"], ["--eval-metric", "'top1', 'top5', 'loss'"]),
    (["--smoothing", "1.5"], ["--smoothing", "below 1"]),
    (["--reprob", "1.5"], ["--reprob", "between 0 and 1"]),
    (["--model-ema-decay", "1.1"], ["--model-ema-decay", "between 0 and 1"]),
    (["--scale", "1", ".5"], ["--scale", "lesser value first"]),
    (["--decay-milestones", "30", "20"], ["--decay-milestones", "grow"]),
    (["--aa", "rond-m9"], ["--aa", "rond-m9", "'rond'", "did you mean 'rand'"]),
    (["--aa", "rand-m9-x5"], ["--aa", "rand-m9-x5", "'x5'", "m, n, p, mstd, mmax, inc, t"]),
    (["--aa", "rand-m9-foo"], ["--aa", "'foo'", "m, n, p, mstd, mmax, inc, t"]),
    (["--aa", "rand-m9-inc"], ["--aa", "'inc'"]),
    (["--aa", "augmix-m5-n2"], ["--aa", "'n2'", "m, w, d, a, b, mstd"]),
    (["--aa", "original-m9"], ["--aa", "'m9'", "mstd"]),
    (["--crop-pct", "95"], ["--crop-pct", "at most 2", "95"]),
    (["--mixup", ".1", "-b", "3"], ["--batch-size", "even", "3"]),
    (["--aug-splits", "1"], ["--aug-splits", "at least 2"]),
    (["--aug-splits", "3", "--mixup", ".1"], ["--mixup", "--aug-splits"]),
    (["--split-bn"], ["--split-bn", "--aug-splits"]),
    (["--jsd-loss"], ["--jsd-loss", "--aug-splits"]),
    (["--jsd-loss", "--bce-loss", "--aug-splits", "2"], ["bce and jsd"]),
    (["--loss", "ce", "--bce-loss"], ["bce and ce"]),
    (["--loss", "asl"], ["--loss", "multi-label"]),
    (["--loss", "bec"], ["valid are 'ce', 'bce', 'poly', 'jsd'; did you mean 'bce'"]),
    (["--bce-target-thresh", ".2"], ["--bce-target-thresh", "--bce-loss"]),
    (["--in-chans", "1", "--input-size", "3", "32", "32"], ["--input-size", "--in-chans is 1"]),
    (["--std", "1", "1"], ["--std", "1 or 3", "found 2"]),
    (["--resume", "auto"], ["--resume", "--experiment"]),
    (["--resume", "/no/such/run"], ["--resume", "/no/such/run"]),
    (["--initial-checkpoint", "/no/such"], ["--initial-checkpoint", "/no/such"]),
    (["--pretrained-path", "/no/such"], ["--pretrained-path", "/no/such"]),
    (["--experiment", "../up"], ["--experiment", "../up"]),
    (["--stop-epoch", "301"], ["--stop-epoch", "300 epochs"]),
    (["--device", "cdua"], ["--device", "'cdua'", "'cuda'"]),
    (["--device-modules", "no_such_module_x"], ["--device-modules", "no_such_module_x"]),
    (["--model-kwargs", "depth"], ["--model-kwargs", "name=value", "'depth'"]),
    (["--checkpoint-interval", "10 min"], ["--checkpoint-interval", "updates", "'10 min'"]),
    (["--recovery-interval", "-5"], ["--checkpoint-interval", "updates", "'-5'"]),
    (["--checkpoint-interval", "1.5"], ["--checkpoint-interval", "updates", "'1.5'"]),
    (["--chekpoint-interval", "5"], ["--chekpoint-interval", "'--checkpoint-interval'"]),
    (["--on-nonfinite", "skp"], ["--on-nonfinite", "'skip'"]),
    (["--dist-timeout", "0"], ["--dist-timeout", "above 0", "'0'"]),
    (["--dist-timeout", "soon"], ["--dist-timeout", "10m", "'soon'"]),
    (["--kd-model-name", "resnet50"], ["--kd-model-name", "distillation"]),
    (["--naflex-loader"], ["--naflex-loader", "NaFlex"]),
    (["--fuser", "te"], ["--fuser", "--torchcompile"]),
    (["--train-img-sizes", "96", "128"], ["--train-img-sizes", "--img-size"]),
    (["--poly-gamma", "2"], ["--poly-gamma", "multi-label"]),
]


@pytest.mark.parametrize("argv, fragments", BAD_TRAIN, ids=lambda value: " ".join(value)[:40])
def test_bad_train_values_are_one_line(argv, fragments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        parse_train_args([*([] if "--model" in argv else ["--model", "test_resnet"]), *argv])
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key",
    [
        "batch_size", "validation_batch_size", "epochs", "img_size", "num_classes", "in_chans",
        "grad_accum_steps", "checkpoint_hist", "log_interval", "val_interval", "max_steps",
    ],
)  # fmt: skip
def test_sizes_are_positive(key):
    for value in (0, -1):
        with pytest.raises(UsageError, match=f"positive, found {value}"):
            train("--" + key.replace("_", "-"), value)


def test_devices(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device: 'cuda' asked for"):
        train("--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train("--device", "cuda:1").device == "cuda:1"
    with pytest.raises(UsageError, match="--device: 'cuda:2'"):
        train("--device", "cuda:2")
    monkeypatch.setattr(checks, "choose_device", lambda: "mps")
    assert train().device == "mps"


@pytest.mark.parametrize(
    "argv, loss",
    [
        ([], "ce"),
        (["--bce-loss"], "bce"),
        (["--loss", "bce", "--bce-pos-weight", "2"], "bce"),
        (["--loss", "jsd", "--aug-splits", "2"], "jsd"),
        (["--jsd-loss", "--aug-splits", "3"], "jsd"),
        (["--loss", "poly"], "poly"),
    ],
)
def test_one_loss_is_settled(argv, loss):
    args = train(*argv)
    assert (args.loss, args.bce_loss, args.jsd_loss) == (loss, loss == "bce", loss == "jsd")
    assert train("--loss", "bce", "--loss-pos-weight", "2").bce_pos_weight == 2


def test_intervals_in_yaml_under_both_names(tmp_path):
    recipe = write(tmp_path / "r.yaml", "checkpoint_interval: 50\ndist_timeout: 90\n")
    args = train("-c", recipe)
    assert (args.checkpoint_interval, args.dist_timeout) == ("50", "90")
    recipe = write(tmp_path / "r.yaml", "recovery_interval: 0\non_nonfinite: rewind\n")
    args = train("-c", recipe, "--strict-data")
    assert args.checkpoint_interval == "0" and args.on_nonfinite == "rewind" and args.strict_data
    assert train("--recovery-interval", "1.5h").checkpoint_interval == "1.5h"
    assert (train().checkpoint_interval, train().dist_timeout) == ("10m", "30m")


@pytest.mark.parametrize(
    "text, interval",
    [
        ("50", Interval(updates=50)),
        ("0", Interval()),
        ("90s", Interval(seconds=90)),
        ("10m", Interval(seconds=600)),
        ("1.5h", Interval(seconds=5400)),
        ("2D", Interval(seconds=172800)),
        ("0m", Interval()),
    ],
)
def test_intervals(text, interval):
    assert parse_interval(text) == interval
    if interval.seconds:
        assert parse_duration(text) == timedelta(seconds=interval.seconds)


@pytest.mark.parametrize(
    "text", ["", "m", "1.5", "-1", "1 0", "1e3", "inf", "nan", "10min", "\u0663", "1h30m", "9" * 99]
)
def test_no_intervals(text):
    with pytest.raises(ValueError, match="updates"):
        parse_interval(text)


def test_durations():
    assert parse_duration("90") == timedelta(seconds=90)
    assert parse_duration("0.5") == timedelta(seconds=0.5)
    for text in ("", "x", "-1", "nan", "1e999", "9" * 99 + "d"):
        with pytest.raises(ValueError, match="seconds"):
            parse_duration(text)


def test_arguments_reload(tmp_path):
    argv = [tmp_path, "--lr", "1e-3", "--bce-loss", "--model-kwargs", "act_layer=relu", "--amp"]
    argv += ["--checkpoint-interval", "7", "--dist-timeout", "45", "--on-nonfinite", "skip"]
    args = train(*argv, "--save-epochs", "2", "3")
    saved = as_yaml_dict(args)
    path = write(tmp_path / "args.yaml", yaml.safe_dump(saved))
    again = parse_train_args(["--config", str(path)])
    assert as_yaml_dict(again) == saved
    assert again.model_kwargs == {"act_layer": "relu"} and again.loss == "bce"
    # The device was chosen, not asked for: another machine may have another.
    assert saved["device"] is None and args.device is not None
    assert as_yaml_dict(train("--device", "cpu"))["device"] == "cpu"


def test_arguments_saved_by_timm_load(tmp_path):
    with open(DATA / "timm_train_flags.csv", newline="") as file:
        saved = {
            row["flag"].lstrip("-").replace("-", "_"): ast.literal_eval(row["default"])
            for row in csv.DictReader(file)
            if row["flag"].startswith("--") or row["flag"] == "data"
        }
    # What a later timm adds: inert settings of other losses.
    saved |= {
        "data_dir": str(tmp_path),
        "device": "cpu",
        "multilabel_threshold": 0.5,
        "asl_clip": 0,
    }
    path = write(tmp_path / "args.yaml", yaml.safe_dump(saved))
    args = parse_train_args(["--config", str(path)])
    assert args.model == "resnet50" and args.opt == "sgd" and args.data_dir == str(tmp_path)


def test_smoke_shrinks_and_keeps_the_rest(tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        "model: test_vit\nbatch_size: 256\nimg_size: 384\nepochs: 300\nmixup: 0.8\nopt: lamb\n"
        "pretrained: true\npretrained_path: weights/none.safetensors\nnum_classes: 1000\n"
        "model_kwargs: {img_size: 384}\ngrad_accum_steps: 16\n",
    )
    args = parse_train_args(["-c", str(recipe), "--smoke"])
    assert args.dataset == "sklearn/digits" and args.data_dir is None
    assert args.batch_size <= 8 and args.max_steps == 2 and args.workers == 0
    assert args.img_size == 64 and args.model_kwargs == {"img_size": 64}
    assert args.pretrained is False and args.pretrained_path is None
    assert (args.epochs, args.stop_epoch) == (300, 1)
    assert (args.mixup, args.opt, args.num_classes) == (0.8, "lamb", None)
    with pytest.raises(UsageError, match="--pretrained-path"):
        parse_train_args(["-c", str(recipe), "--smoke", "--pretrained-path", "no/such"])


BAD_VALIDATE = [
    (["--model", "resnet5"], ["--model", "'resnet50'"]),
    (["--model", "resnet18,resnet5"], ["--model", "'resnet5'"]),
    (["--model", "no_such_*"], ["--model", "no_such_*"]),
    (["--checkpoint", "/no/such"], ["--checkpoint", "/no/such"]),
    (["--confusion-matrix", "a.jpg"], ["--confusion-matrix", ".png", "a.jpg"]),
    (["--real-labels", "/no/such"], ["--real-labels", "/no/such"]),
    (["--chekpoint", "a"], ["--chekpoint", "'--checkpoint'"]),
    (["--config", "a"], ["--config"]),
    (["--num-gpu", "2"], ["--num-gpu", "torchrun"]),
    (["--metrics-avg", "mean"], ["--metrics-avg", "'micro'"]),
    (["-b", "0"], ["--batch-size", "positive"]),
]


@pytest.mark.parametrize("argv, fragments", BAD_VALIDATE, ids=lambda value: " ".join(value))
def test_bad_validate_values_are_one_line(argv, fragments):
    with pytest.raises(UsageError) as error:
        parse_validate_args(argv)
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_validate_values(tmp_path):
    args = parse_validate_args(["-m", "test_resnet", "--per-class", "--results-file", "a/r.json"])
    assert args.results_format == "json" and args.per_class == "-"
    assert args.builtin_data and args.dataset == "" and args.device is not None
    both = ["--results-file", "r.json", "--results-format", "csv"]
    assert parse_validate_args(both).results_format == "csv"
    assert parse_validate_args([str(tmp_path)]).data_dir == str(tmp_path)


def test_model_lists(tmp_path):
    names = write(tmp_path / "names.txt", "test_vit\n\ntest_resnet \n")
    assert expand_model_names(str(names)) == ["test_vit", "test_resnet"]
    assert expand_model_names("test_vit, test_resnet,test_vit") == ["test_vit", "test_resnet"]
    assert "qna_vit_tiny" in expand_model_names("qna_vit_*")
    assert expand_model_names("hf-hub:timm/resnet18") == ["hf-hub:timm/resnet18"]
    with pytest.raises(UsageError, match="names no model"):
        expand_model_names(str(write(tmp_path / "empty.txt", "\n")))
