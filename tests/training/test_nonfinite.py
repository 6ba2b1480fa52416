"""Losses and gradients that are not finite: noticed, traced to where they begin, taken back."""

import json
import math
import random
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from preloaded import programs
from torch import nn

from qna_timm.training.diagnosis import NOT_SEEN_AGAIN, diagnose
from qna_timm.training.generators import seed_generators
from qna_timm.training.nonfinite import BufferKeeper, Fault, NonFinite, all_finite, bad_loss
from qna_timm.training.task import TrainTask

CPU = torch.device("cpu")
INF, NAN = math.inf, math.nan


def with_gradients(*gradients):
    parameters = []
    for gradient in gradients:
        gradient = torch.as_tensor(gradient)
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_bad_number_among_many_is_noticed(bad, dtype):
    gradients = [torch.randn(33, 7).to(dtype), torch.randn(5), torch.randn(1000).to(dtype)]
    assert all_finite(with_gradients(*gradients))
    gradients[2][999] = bad
    assert not all_finite(with_gradients(*gradients))
    assert not all_finite(with_gradients(gradients[1]), [torch.tensor(bad, dtype=dtype)])
    opposite = torch.tensor([INF, -INF, 1.0], dtype=dtype)
    assert not all_finite(with_gradients(opposite))


@pytest.mark.parametrize(
    "gradient",
    [
        torch.full((9,), 3e38),  # finite, their sum is not
        torch.full((70_000,), 9.0, dtype=torch.float16),
        torch.full((9,), 1e300, dtype=torch.float64),
        torch.full((9,), -1e4, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.arange(12.0).reshape(3, 4).t(),
    ],
    ids=["overflow", "half", "double", "bfloat16", "empty", "strided"],
)
def test_finite_gradients_of_any_kind(gradient):
    answer = all_finite(with_gradients(gradient, [1.0]), [torch.tensor(1e30)])
    assert answer.dtype == torch.bool and answer.ndim == 0 and answer


def test_sparse_and_missing_gradients():
    embedding = nn.Embedding(9, 3, sparse=True)
    embedding(torch.tensor([1, 1, 5])).sum().backward()
    missing = nn.Parameter(torch.zeros(3))
    assert embedding.weight.grad.is_sparse
    assert all_finite([embedding.weight, missing])
    embedding.weight.grad._values()[2, 0] = NAN
    assert not all_finite([embedding.weight, missing])
    assert all_finite([missing]) and all_finite([])
    assert not all_finite([missing], [torch.tensor(NAN)])


def test_on_an_accelerator_nothing_is_read():
    """The meta device has nothing to read, so that a look at it would raise."""
    meta = with_gradients(torch.empty(3, 4, device="meta"), torch.empty(2, device="meta"))
    assert all_finite(meta, [torch.empty((), device="meta")]).device.type == "meta"
    for bad in (1.0, NAN, INF, -INF):
        norms = torch._foreach_norm([torch.ones(3), torch.tensor([0.0, bad])], INF)
        assert bool(torch.stack(norms).isfinite().all()) == math.isfinite(bad)


def test_buffers_are_put_back_to_the_bit():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None))
    model.register_buffer("table", torch.arange(9))
    model(torch.randn(2, 3, 5, 5))
    keeper = BufferKeeper(model)
    keeper.keep()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.full((2, 3, 5, 5), NAN))
    assert model[1].running_mean.isnan().all() and model[2].num_batches_tracked == 2
    keeper.restore()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    nothing = BufferKeeper(nn.Linear(2, 2))
    nothing.keep()
    nothing.restore()


def test_buffers_of_one_type_are_copied_together(monkeypatch):
    """Lists of several types are copied one by one on a GPU."""
    copied, foreach = [], torch._foreach_copy_

    def copy(targets, sources):
        copied.append({tensor.dtype for tensor in [*targets, *sources]})
        foreach(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    keeper = BufferKeeper(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    keeper.keep()
    keeper.restore()
    assert copied == 2 * [{torch.float32}, {torch.int64}]


def test_which_loss_is_bad():
    good, bad = torch.tensor(1.0), torch.tensor(NAN)
    assert bad_loss({"loss": good, "loss_class": good}) is None
    assert bad_loss({"loss": bad, "loss_class": good, "loss_span": bad}) == "loss_span is nan"
    assert bad_loss({"loss": torch.tensor(INF)}) == "loss is inf"


class Overflowing(torch.autograd.Function):
    """The identity, whose gradient overflows."""

    @staticmethod
    def forward(ctx, input):
        return input.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1e30 * 1e30


class Middle(nn.Module):
    def forward(self, x):
        return Overflowing.apply(x)


class NanLoss(nn.Module):
    def forward(self, output, target):
        return output.sum() * NAN


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.middle = nn.Identity()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)
        self.num_classes = 5

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head(self.drop(self.middle(x).mean((2, 3))))


def prepared(seed=0):
    """A task with gradients, its input and target, and what computes a micro-batch."""
    torch.manual_seed(seed)
    task = TrainTask(Net(), nn.CrossEntropyLoss(), device=CPU, verbose=False)
    input, target = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])

    def compute():
        seed_generators(7)
        return task(input, target)

    return task, input, target, compute


def everything(task):
    model = task.get_trainable_module()
    tensors = [*model.parameters(), *model.buffers()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    hooks = [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    hooks += [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return [t.detach().clone() for t in tensors], states, hooks


@pytest.mark.parametrize("poison", ["", "input", "weight", "statistic", "loss", "gradient"])
def test_diagnosis_names_the_first_bad_tensor_and_changes_nothing(poison):
    task, input, target, compute = prepared()
    task(input, target)["loss"].backward()
    model = task.get_trainable_module()
    expected = {
        "": NOT_SEEN_AGAIN,
        "input": "input, inf at [2, 1, 0, 5] of [4, 3, 6, 6]",
        "weight": "norm output, nan at [0, 2, 0, 0] of [4, 4, 4, 4] (its weight is nan at [2] of "
        "[4])",
        "statistic": NOT_SEEN_AGAIN,
        "loss": "loss_class, nan",
        "gradient": "gradient of norm.weight, nan at [0] of [4]",  # inf - inf
    }
    with torch.no_grad():
        if poison == "input":
            input[2, 1, 0, 5] = INF
        elif poison == "weight":
            model.norm.weight[2] = NAN
        elif poison == "statistic":  # not used while training
            model.norm.running_mean[0] = NAN
        elif poison == "loss":
            task.criterion = NanLoss()
        elif poison == "gradient":
            model.middle = Middle()
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    before = everything(task)
    found = diagnose(task, compute, CPU)
    assert found == expected[poison]
    after = everything(task)
    for one, other in zip(before[0], after[0], strict=True):
        assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))
    assert before[1:] == after[1:]
    for parameter, (gradient, copy) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient and torch.equal(gradient, copy)
    assert task.get_trainable_module() is model


def test_diagnosis_reaches_into_blocks_of_a_real_model():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5, img_size=32)
    model.set_grad_checkpointing()
    task = TrainTask(model, nn.CrossEntropyLoss(), device=CPU, verbose=False)
    input, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    name = next(name for name, module in model.named_modules() if name.endswith("0.mlp.fc2"))
    with torch.no_grad():
        model.get_submodule(name).bias[3] = -INF
    found = diagnose(task, lambda: task(input, target), CPU)
    assert found.startswith(f"{name} output, -inf at [0, 0, 3] of [2, ") and "its bias is" in found


def test_diagnosis_sees_the_eager_model_behind_a_compiled_one():
    task, input, _, compute = prepared()
    compiled = torch.compile(task.trainable_module, backend="eager")
    task.trainable_module = compiled
    input[0, 0, 0, 0] = NAN
    assert diagnose(task, compute, CPU).startswith("input, nan at [0, 0, 0, 0]")
    assert task.trainable_module is compiled


def test_diagnosis_of_a_scripted_model():
    task, _, _, compute = prepared()
    with torch.no_grad():
        task.trainable_module.stem.weight[0, 0, 0, 0] = NAN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch will drop scripting
        task.trainable_module = torch.jit.script(task.trainable_module)
    assert diagnose(task, compute, CPU) == "loss_class, nan"


def test_diagnosis_in_low_precision_finds_the_overflow():
    """The mean, which is no module, sums up to more than there is."""
    task, input, target, _ = prepared()
    with torch.no_grad():
        task.trainable_module.norm.bias.fill_(3e37)

    def compute():
        seed_generators(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return task(input, target)

    assert diagnose(task, compute, CPU) == "drop input, inf at [0, 0] of [4, 4]"


def test_a_diagnosis_that_fails_says_so_and_leaves_no_hook():
    task, _, _, _ = prepared()
    before = everything(task)

    def compute():
        raise torch.OutOfMemoryError("no\nmemory")

    assert diagnose(task, compute, CPU) == "not found: OutOfMemoryError: no memory"
    assert everything(task)[2] == before[2]


PAIR = """
import os, sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[1:3]
from test_nonfinite import CPU, NAN, diagnose, nn, prepared
child = os.fork()  # imports take longer than all the rest
rank = 0 if child else 1
dist.init_process_group("gloo", f"file://{sys.argv[3]}", rank=rank, world_size=2)
task, input, target, compute = prepared()
task.prepare_distributed()
clean = input.clone()
if rank == 1:
    input[3, 2, 1, 0] = NAN
for step in range(2):
    task(input, target)["loss"].backward()
    if rank == 1:
        os.write(1, f"1 {diagnose(task, compute, CPU)}\\n".encode())
    input.copy_(clean)
finite = task.trainable_module.module.head.weight.grad.isfinite().any().item()
task.trainable_module = nn.SyncBatchNorm.convert_sync_batchnorm(task.trainable_module.module)
os.write(1, f"{rank} {finite} {diagnose(task, compute, CPU)}\\n".encode())
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_one_of_two_processes_diagnoses_alone(tmp_path):
    """The other is not waited for, and both go on together; synchronised batch norm included."""
    folders = (Path(__file__).parent, Path(__file__).parents[1])
    command = [programs() / "python", "-c", PAIR, *folders, tmp_path / "meet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"0 False {NOT_SEEN_AGAIN}",
        f"1 False {NOT_SEEN_AGAIN}",
        "1 input, nan at [3, 2, 1, 0] of [4, 3, 6, 6]",
        f"1 {NOT_SEEN_AGAIN}",
    ]


SAMPLES = [(17, "img/a.png"), (33, "img/b.png"), (4, "")]


def test_the_report_is_one_line():
    fault = Fault("loss is nan", 1, 5, SAMPLES, "stages.1.blocks.0.attn output, nan at [0, 2] of")
    bare = Fault("gradients are not finite", 0, 5, [(8, "c.png")], NOT_SEEN_AGAIN)
    for faults in ([bare, fault], [fault, bare]):
        assert str(NonFinite(2, 119, faults, 2)) == (
            "epoch 3, update 120: loss is nan on rank 1 (samples 17 img/a.png, 33 img/b.png, ...): "
            "first bad tensor stages.1.blocks.0.attn output, nan at [0, 2] of; weights are those "
            "before the update"
        )
    assert str(NonFinite(0, 0, [bare])) == (
        "epoch 1, update 1: gradients are not finite (samples 8 c.png): first bad tensor not "
        "found: all were finite when computed again; weights are those before the update"
    )
    found = Fault("gradients are not finite", 1, 5, (), "gradient of head.weight, inf at [0]")
    assert "on rank 1: first bad tensor gradient of head" in str(NonFinite(0, 0, [bare, found], 2))


def test_the_record_has_every_sample():
    record = NonFinite(2, 119, [Fault("loss is nan", 1, 5, SAMPLES, "input, nan")], 2).as_json()
    assert "\n" not in record
    assert json.loads(record) == {
        "epoch": 2,
        "update": 119,
        "faults": [
            {
                "what": "loss is nan",
                "rank": 1,
                "micro_batch": 5,
                "samples": [[17, "img/a.png"], [33, "img/b.png"], [4, ""]],
                "first_bad": "input, nan",
            }
        ],
    }
