"""The flags themselves: timm's names, aliases, types and defaults, and the help."""

import ast
import csv
from pathlib import Path

import pytest

from qna_timm.training.flags.declaration import all_flags, flags_by_key, parse_command_line
from qna_timm.training.flags.recipe import parse_train_args, parse_validate_args
from qna_timm.training.flags.train import TRAIN_FLAGS
from qna_timm.training.flags.validate import VALIDATE_FLAGS

DATA = Path(__file__).parents[1] / "data"
TABLES = {"train": TRAIN_FLAGS, "validate": VALIDATE_FLAGS}

# Where our default differs from timm's on purpose (None: found out at run time).
OTHER_DEFAULTS = {
    "train": {
        "model": "qna_vit_tiny",
        "device": None,
        "output": "./output/train",
        "decay_epochs": None,  # timm's library then takes its 90, or wsd's own
        "recovery_interval": "10m",  # a second name of --checkpoint-interval, which takes times
    },
    "validate": {"model": "qna_vit_tiny", "device": None},
}
OTHER_KINDS = {"recovery_interval": str}


def timm_flags():
    """Script and row of each of timm's flags: flag, aliases, kind, nargs, default."""
    params = []
    for script in TABLES:
        with open(DATA / f"timm_{script}_flags.csv", newline="") as file:
            for row in csv.DictReader(file):
                params.append(pytest.param(script, row, id=f"{script}{row['flag']}"))
    return params


@pytest.mark.parametrize("script, row", timm_flags())
def test_flag_is_timms(script, row):
    key = row["flag"].lstrip("-").replace("-", "_")
    if row["flag"].startswith("-") and not row["flag"].startswith("--"):
        key = row["aliases"].lstrip("-").replace("-", "_")
    names = {name.replace("_", "-") for name in [row["flag"], *row["aliases"].split()]}
    (flag,) = (flag for flag in all_flags(TABLES[script]) if names <= set(flag.options))

    kinds = {"flag": bool, "str": str, "int": int, "float": float, "kwargs": dict}
    assert flag.kind is OTHER_KINDS.get(key, kinds[row["kind"]])

    default = ast.literal_eval(row["default"])
    assert flag.default == OTHER_DEFAULTS[script].get(key, default)

    if row["nargs"].isdigit() or row["nargs"] == "+":
        assert flag.is_list
    if row["nargs"] == "?" and row["flag"] != "data":
        assert flag.nargs == "?" and flag.const == "inductor"


@pytest.mark.parametrize("script, row", timm_flags())
def test_flag_is_read_from_the_command_line(script, row):
    if row["flag"] == "data":
        assert parse_command_line(TABLES[script], ["x"], "p", "d") == {"data": "x"}
        return
    values = {"flag": [], "str": ["x"], "int": ["3"], "float": ["0.5"], "kwargs": ["a=1"]}
    name = row["flag"].replace("_", "-")
    (flag,) = (flag for flag in all_flags(TABLES[script]) if name in flag.options)
    given = values[row["kind"]]
    if flag.choices:
        given = [flag.choices[-1]]
    if isinstance(flag.nargs, int):
        given = given * flag.nargs
    for name in [row["flag"], *row["aliases"].split()]:
        parsed = parse_command_line(TABLES[script], [name, *given], "p", "d")
        assert list(parsed) == [flag.key]


def test_flags_of_newer_timm_and_ours_are_there():
    keys = set(flags_by_key(TRAIN_FLAGS))
    newer = """task target_format multilabel_threshold loss loss_class_weight loss_pos_weight
        loss_weight_power class_stats poly_epsilon poly_gamma lr_decay_fn lr_stable_timescale
        stop_epoch save_epochs pretrained_cfg_overlay sweep_attempt sweep_locks"""
    ours = {"config", "smoke", "max_steps", "log_tensorboard", "checkpoint_interval"}
    ours |= {"on_nonfinite", "resume_anyway", "strict_data", "dist_timeout"}
    assert set(newer.split()) | ours <= keys
    assert {"per_class", "confusion_matrix", "device_modules"} <= set(flags_by_key(VALIDATE_FLAGS))


def test_flags_have_one_place_each():
    for table in TABLES.values():
        keys = [flag.key for flag in all_flags(table)]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("parse, table", [(parse_train_args, TRAIN_FLAGS),
                                          (parse_validate_args, VALIDATE_FLAGS)])  # fmt: skip
def test_help_groups_every_flag(parse, table, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for title, flags in table.items():
        assert f"\n{title}:\n" in text
        for flag in flags:
            assert flag.options[-1] in text
    if parse is parse_train_args:
        assert "--config" in text and "default: 128" in text
    assert "optional arguments" not in text
