"""The scripts that reproduce the papers' tables: their rows, refusals, and a row of each run."""

import os
import re
import subprocess

import pytest
from preloaded import programs
from recipe_files import (
    ABLATIONS,
    FINETUNE,
    GRAMIAN,
    PAPER_TOP1,
    QNA,
    ROOT,
    SPAN,
    header,
    settings_of,
)

SCRIPTS = ("qna_table.sh", "gramian_table.sh", "gramian_ablation.sh")


def table_rows(script):
    """The paper's figures, and ours that are counted, by the name of the row."""
    text = (ROOT / "scripts" / script).read_text(encoding="utf-8")
    lines = re.search(r"TABLES='(.+?)'", text, flags=re.S)[1].split("\n")
    rows = {fields[0]: fields[1:] for fields in (line.split("|") for line in lines)}
    return {name: fields for name, fields in rows.items() if name in (*QNA, *GRAMIAN, *SPAN)}


def run_script(script, *argv, **env):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *map(str, argv)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": str(programs() / "python"), **env},
        capture_output=True,
        text=True,
        timeout=200,
    )


def run_table(*argv, **env):
    return run_script("qna_table.sh", *argv, **env)


def test_every_recipe_has_its_row():
    assert sorted(table_rows("qna_table.sh")) == QNA
    assert sorted(table_rows("span_table.sh")) == SPAN
    main, ablations = table_rows("gramian_table.sh"), table_rows("gramian_ablation.sh")
    assert sorted([*main, *ABLATIONS]) == sorted(GRAMIAN)
    assert set(ablations) - set(ABLATIONS) == {name for name in main if "cswin" not in name}
    assert set(ABLATIONS) <= set(ablations)


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_say_what_recipes_say(script):
    for name, fields in table_rows(script).items():
        text = header(name)
        top1 = fields[-1].replace("-", "unknown")
        assert f"Expected top-1: {top1} (" in text
        if name in GRAMIAN:
            parameters, gmacs = re.search(
                r"As we count: (\S+) M parameters, ([\d.]+) GMACs", text
            ).groups()
            assert f"{parameters}M" in fields and (name in ABLATIONS or gmacs in fields)
        if name in ABLATIONS:
            branches = settings_of(name).get("model_kwargs", {"num_branches": 5})["num_branches"]
            assert fields[2:4] == [str(branches), f"{settings_of(name)['ga_lam']:g}"]


def test_span_rows_say_what_recipes_say():
    for name, fields in table_rows("span_table.sh").items():
        window, parameters, gmacs = fields  # no figure of the paper
        counts = f"As we count: {parameters.removesuffix('M')} M parameters, {gmacs} GMACs"
        assert counts in header(name)
        side = settings_of(name)["model_kwargs"].get("kernel_size")
        assert window == ("learned" if side is None else "3x3 convolution" if side == 3 else "5x5")


@pytest.mark.parametrize(
    "argv, fragment",
    [
        ([], "train or eval"),
        (["test"], "'test'"),
        (["train"], "--data-dir"),
        (["train", "--data-dir", "/no/such"], "/no/such"),
        (["train", "--data-dir"], "needs a value"),
        (["train", "--smoke", "--fast"], "'--fast'"),
        (["train", "--smoke", "--nproc", "3"], "'3'"),
        (["train", "--smoke", "--rows", "qna_vit_huge"], "qna_vit_huge"),
        (["eval", "--smoke", "--rows", FINETUNE], FINETUNE),
    ],
)
def test_table_script_refuses(argv, fragment):
    result = run_table(*argv, PYTHON="false")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and fragment in result.stderr


def test_table_script_tells_failed_rows():
    result = run_table("train", "--smoke", "--rows", "qna_vit_tiny", PYTHON="false")
    assert result.returncode == 1
    assert re.search(r"qna_vit_tiny .* 81.7 \| +failed \|", result.stdout)


def test_table_script_tells_missing_weights(tmp_path):
    result = run_table("eval", "--data-dir", tmp_path, "--weights-dir", tmp_path, PYTHON="false")
    assert result.returncode == 0
    assert result.stdout.count("not run") == 4
    for name in QNA[:1] + QNA[2:]:
        top1 = PAPER_TOP1[name]
        assert re.search(rf"\| {name} +\| .* {top1} \| +not run \|", result.stdout)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_any_number_of_processes_keeps_the_global_batch(processes, tmp_path):
    """`echo` for a Python: the commands are told, the tables' last column is not a number."""
    for script, rows in (("qna_table.sh", "qna_vit_small"), ("gramian_table.sh", "ga_cswin_*")):
        argv = ["--rows", rows, "--data-dir", tmp_path, "--output", tmp_path]
        result = run_script(script, "train", *argv, "--nproc", processes, PYTHON="echo")
        commands = [line for line in result.stderr.splitlines() if "train.py" in line]
        assert len(commands) == (1 if script == "qna_table.sh" else 2)
        for command in commands:
            accumulation = int(re.search(r"--grad-accum-steps (\d)", command)[1])
            assert processes * 128 * accumulation == 1024
            assert (processes == 1) != (f"--nproc_per_node={processes} " in command)


@pytest.mark.parametrize("processes", [1, 2])
def test_span_rows_are_trained_on_a_part_and_scored_on_the_test_images(processes, tmp_path):
    """Batches of 50 in all, not accumulated; no figure of the paper beside ours."""
    name = "sa_resnet_medium_local"
    argv = ["--rows", name, "--data-dir", tmp_path, "--output", tmp_path, "--nproc", processes]
    result = run_script("span_table.sh", "train", *argv, PYTHON="echo")
    lines = result.stderr.splitlines()
    train, validate = (
        next(line for line in lines if script in line) for script in ("train.py", "validate.py")
    )
    assert lines.index(train) < lines.index(validate)
    assert "--grad-accum-steps 1 " in train and "--dataset-download" in train
    assert ("--batch-size" in train) == (processes == 2) == ("--batch-size 25" in train)
    assert f"--checkpoint {tmp_path}/{name}/best.safetensors" in validate
    assert "--dataset torch/cifar100 --split validation --dataset-download" in validate
    assert "--model-kwargs kernel_size=5 num_heads=4" in validate
    assert "the paper's accuracies are not known to us" in result.stdout
    assert "paper" not in result.stdout.splitlines()[0].lower()


@pytest.mark.parametrize(
    "script, row",
    [("qna_table.sh", "qna_vit_tiny"), ("span_table.sh", "sa_resnet_small_adaptive")],
)
def test_trained_rows_are_kept(script, row, tmp_path):
    weights = tmp_path / row / "best.safetensors"
    weights.parent.mkdir()
    weights.touch()
    argv = ["--rows", row, "--data-dir", tmp_path, "--output", tmp_path]
    result = run_script(script, "train", *argv, PYTHON="echo")
    assert "train.py" in result.stderr and weights.exists()


def test_span_table_refuses_processes_that_do_not_divide_its_batch():
    result = run_script("span_table.sh", "train", "--smoke", "--nproc", 4, PYTHON="false")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "one of 1 2" in result.stderr and "'4'" in result.stderr


def test_row_is_validated_as_its_recipe_says(tmp_path):
    name = "ablation_vit_small_branches1_lam0.4"
    (tmp_path / name).mkdir()
    (tmp_path / name / "best.safetensors").touch()
    argv = ["--data-dir", tmp_path, "--output", tmp_path, "--rows", "ablation_vit_small_*"]
    result = run_script("gramian_ablation.sh", "eval", *argv, PYTHON="echo")
    commands = [line for line in result.stderr.splitlines() if "validate.py" in line]
    assert len(commands) == 1
    for part in (
        f"--model ga_vit_small --checkpoint {tmp_path}/{name}/best.safetensors",
        "--model-kwargs num_branches=1",
        "--img-size 224 --crop-pct 0.9 --interpolation bicubic",
    ):
        assert part in commands[0]
    assert result.stdout.count("not run") == 5
    assert "ResNet50 |   CaiT" in result.stdout and "Table 3" not in result.stdout


@pytest.mark.parametrize(
    "script, row, known, mode",
    [
        ("qna_table.sh", "qna_vit_tiny", r"81\.7", "train"),
        pytest.param("qna_table.sh", "qna_vit_tiny", r"81\.7", "eval", marks=pytest.mark.thorough),
        pytest.param(
            "gramian_table.sh", "ga_vit_small", r"80\.9", "train", marks=pytest.mark.thorough
        ),
        ("gramian_ablation.sh", "ablation_vit_small_branches1_lam0.8", r"78\.2", "eval"),
        # validates what it has trained
        ("span_table.sh", "sa_resnet_small_adaptive", r"learned \| +0\.42M \| 0\.039", "train"),
    ],
)
def test_table_script_runs_a_row(script, row, known, mode):
    result = run_script(script, mode, "--smoke", "--rows", row)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"\| {row} +\| .*{known} \| +\d+\.\d\d \|", result.stdout)
