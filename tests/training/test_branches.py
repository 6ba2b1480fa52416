"""Models with branches: objective, the task in the loop, evaluation."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from branched_model import Branched
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.loss import create_classification_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qna_timm.training import loop
from qna_timm.training.branch_loss import branch_losses, decorrelation
from qna_timm.training.evaluation import evaluate
from qna_timm.training.flags.recipe import parse_train_args
from qna_timm.training.gramian_task import GramianTask
from qna_timm.training.observers import BranchCounts
from qna_timm.training.precision import Precision
from qna_timm.training.processes.distributed import Processes

DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")
GOLDEN = json.loads((DATA / "gramian_objective.json").read_text())
# case of the golden file: arguments of timm's loss, whether targets are soft
LOSSES = {
    "a_label_smoothing_ce_0.1": ("ce", {"smoothing": 0.1}, False),
    "b_bce_smoothing_0.1_hard": ("bce", {"smoothing": 0.1}, False),
    "c_bce_soft_mixup": ("bce", {"smoothing": 0.1, "soft_targets": True}, True),
    "c2_soft_ce_mixup": ("ce", {"smoothing": 0.1, "soft_targets": True}, True),
    "d_plain_ce": ("ce", {"smoothing": 0.0}, False),
}


def golden_logits(dtype: torch.dtype) -> Tensor:
    """[B, M, classes]; the file's rule is head-major."""
    logits = np.random.RandomState(3).standard_normal((5, 8, 10))
    return torch.from_numpy(logits).to(dtype).transpose(0, 1)


def golden_target(soft: bool, dtype: torch.dtype) -> Tensor:
    if soft:
        return torch.tensor(GOLDEN["soft_targets"], dtype=dtype)
    return torch.tensor(GOLDEN["targets"])


class TestObjective:
    @pytest.mark.parametrize("lam", ["-0.8", "-0.4", "0.0"])
    @pytest.mark.parametrize("case", GOLDEN["cases"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_golden(self, case: str, lam: str, dtype: torch.dtype) -> None:
        expected = GOLDEN["cases"][case][lam]
        name, kwargs, soft = LOSSES[case]
        logits = golden_logits(dtype).requires_grad_()
        criterion = create_classification_loss(name, **kwargs)
        parts = branch_losses(logits, golden_target(soft, dtype), criterion, float(lam))
        total = sum(parts.values())
        total.backward()
        assert total.item() == pytest.approx(expected["total_f64"], rel=1e-6)
        assert parts["class"].item() == pytest.approx(expected["task_sum"], rel=1e-6)
        decorrelated = float(lam) * expected["kl_sum"]
        assert parts["decorrelation"].item() == pytest.approx(decorrelated, rel=1e-6, abs=1e-12)
        assert logits.grad.norm().item() == pytest.approx(expected["grad_norm"], rel=1e-6)
        # relative to the gradient's size: single values may be close to zero
        own = torch.tensor(expected["grad_head0_sample0"], dtype=dtype)
        assert (logits.grad[0, 0] - own).abs().max() <= 1e-6 * own.abs().max()

    def test_divergence_is_none_of_its_neighbours(self) -> None:
        found = decorrelation(golden_logits(torch.float64)).item()
        for name, value in GOLDEN["discriminators"].items():
            same = name == "official_mean_over_B_times_C"
            assert (found == pytest.approx(value, rel=1e-6)) == same, name

    def test_anchor_is_a_constant(self) -> None:
        logits = golden_logits(torch.float64).requires_grad_()
        decorrelation(logits).backward()
        batch, _, classes = logits.shape
        anchor = logits.detach().mean(1, keepdim=True).softmax(-1)
        expected = (logits.detach().softmax(-1) - anchor) / (batch * classes)
        torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize(
        "name, kwargs",
        [
            ("jsd", {"smoothing": 0.1, "jsd_splits": 2}),
            ("poly", {"smoothing": 0.1, "poly_epsilon": 2.0}),
            ("bce", {"smoothing": 0.1, "bce_sum": True, "bce_target_thresh": 0.2}),
        ],
    )
    def test_any_loss_is_summed_over_branches(self, name: str, kwargs: dict) -> None:
        criterion = create_classification_loss(name, **kwargs)
        logits, target = golden_logits(torch.float64), golden_target(False, torch.float64)
        together = branch_losses(logits, target, criterion, 0.0)["class"]
        apart = sum(criterion(branch, target) for branch in logits.unbind(1))
        assert together.item() == pytest.approx(apart.item(), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_logits_are_taken_in_float32(self, dtype: torch.dtype) -> None:
        logits, target = golden_logits(torch.float32).to(dtype), golden_target(True, torch.float32)
        criterion = create_classification_loss("bce", soft_targets=True)
        expected = branch_losses(logits.float(), target, criterion, -0.8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = branch_losses(logits, target.to(dtype), criterion, -0.8)
        assert parts["decorrelation"].dtype == torch.float32
        assert parts["decorrelation"].item() == expected["decorrelation"].item()
        assert parts["class"].item() == pytest.approx(expected["class"].item(), rel=1e-2)

    def test_finite_for_huge_logits(self) -> None:
        logits = (1e4 * golden_logits(torch.float32)).requires_grad_()
        parts = branch_losses(logits, golden_target(False, CPU), nn.CrossEntropyLoss(), -0.8)
        sum(parts.values()).backward()
        assert all(part.isfinite() for part in parts.values()) and logits.grad.isfinite().all()

    def test_logits_without_branches_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"found \[4, 10\].*set_branch_outputs"):
            branch_losses(torch.zeros(4, 10), torch.zeros(4).long(), nn.CrossEntropyLoss(), 0.0)


def trainer_for(model: nn.Module, *argv: str) -> loop.Trainer:
    args = parse_train_args(["--dataset", "sklearn/digits", "--device", "cpu", *argv])
    task = GramianTask(model, nn.CrossEntropyLoss(), ga_lam=args.ga_lam, device=CPU, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision(args, CPU)
    return loop.Trainer(
        task, optimizer, None, args=args, processes=Processes(CPU), precision=precision
    )


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, 16, 16, generator=generator),
            torch.randint(5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def branched(seed: int = 0) -> Branched:
    torch.manual_seed(seed)
    return Branched(num_classes=5)


def test_accumulation_is_one_large_batch() -> None:
    data, model, expected = batches(7), branched(), branched()
    trainer = trainer_for(model, "--grad-accumulation", "4", "--GA_lam", "-0.8")
    metrics = trainer.train_epoch(data, 0, "train")
    expected.set_branch_outputs()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    sums = {"class": 0.0, "decorrelation": 0.0}
    for group in (data[:4], data[4:]):
        images, labels = (torch.cat(tensors) for tensors in zip(*group, strict=True))
        optimizer.zero_grad()
        parts = branch_losses(expected(images), labels, nn.CrossEntropyLoss(), -0.8)
        sum(parts.values()).backward()
        optimizer.step()
        for name, part in parts.items():
            sums[name] += part.item() * len(images) / 28
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert metrics["loss_class"] == pytest.approx(sums["class"], rel=1e-5)
    assert metrics["loss_decorrelation"] == pytest.approx(sums["decorrelation"], rel=1e-5)
    assert metrics["loss"] == pytest.approx(sum(sums.values()), rel=1e-5)


def test_averaged_weights_return_branches_too() -> None:
    model = branched()
    trainer = trainer_for(model)
    trainer.task.setup_ema(decay=0.5)
    trainer.train_epoch(batches(2), 0, "train")
    for ema in (False, True):
        logits = trainer.task.get_eval_model(ema=ema)(batches(1)[0][0])
        assert logits.shape == (4, 3, 5)
    model.set_branch_outputs(False)
    assert model(batches(1)[0][0]).shape == (4, 5)
    assert not any("branch" in name for name in model.state_dict())


def test_the_head_is_exempt_from_adaptive_clipping() -> None:
    model = branched()
    task = trainer_for(model).task
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert clipped == {id(p) for p in model.stem.parameters()}


SAMPLES, BRANCHES, CLASSES = 23, 4, 7


class Rows(DataLoader):
    """A loader of random branch logits and labels; the model is the identity."""

    def __init__(self, batch_size: int = 5, samples: int = SAMPLES, **kwargs: object) -> None:
        generator = torch.Generator().manual_seed(3)
        shared = torch.randn(samples, 1, CLASSES, generator=generator)
        own = torch.randn(samples, BRANCHES, CLASSES, generator=generator)
        self.logits = shared + 0.7 * own
        self.labels = torch.randint(CLASSES, (samples,), generator=generator)
        super().__init__(TensorDataset(self.logits, self.labels), batch_size, **kwargs)


def expected_metrics(loader: Rows) -> dict[str, float]:
    logits, labels = loader.logits.double().numpy(), loader.labels.numpy()
    best = logits.argmax(-1)  # [samples, branches]
    top1 = {f"branch_{m}_top1": 100 * (best[:, m] == labels).mean() for m in range(BRANCHES)}
    pairs = itertools.combinations(range(BRANCHES), 2)
    agreement = 100 * np.mean([(best[:, i] == best[:, j]).mean() for i, j in pairs])
    together = 100 * (logits.mean(1).argmax(-1) == labels).mean()
    return {"top1": together, **top1, "agreement": agreement}


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_branch_metrics(batch_size: int) -> None:
    loader = Rows(batch_size)
    counts = BranchCounts(BRANCHES, CPU)
    metrics = evaluate(nn.Identity(), loader, device=CPU, branch_counts=counts)
    assert list(metrics)[:3] == ["loss", "top1", "top5"]
    expected = expected_metrics(loader)
    assert 0 < expected["agreement"] < 100
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    plain = evaluate(MeanOfBranches(), loader, device=CPU)
    assert plain == pytest.approx({name: metrics[name] for name in plain}, rel=1e-6)


class MeanOfBranches(nn.Module):
    """What a model returns that is not asked for its branches."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.mean(1)


def test_valid_labels_and_a_single_branch() -> None:
    loader, valid = Rows(), torch.tensor([2, 4, 6])
    data = DataLoader(TensorDataset(loader.logits[:, :1], loader.labels % 3), 5)
    counts = BranchCounts(1, CPU)
    metrics = evaluate(nn.Identity(), data, device=CPU, valid_labels=valid, branch_counts=counts)
    best = loader.logits[:, 0, [2, 4, 6]].argmax(-1)
    assert metrics["top1"] == pytest.approx(
        100 * (best == loader.labels % 3).double().mean().item()
    )
    assert set(metrics) == {"loss", "top1", "top5"}, "one branch has nothing to agree with"


def _evaluate_as_rank(rank: int, address: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = []
    for samples in (SAMPLES, 1):  # with one sample the second process has only padding
        loader = Rows(4, samples)
        loader = Rows(4, samples, sampler=OrderedDistributedSampler(loader.dataset))
        counts = BranchCounts(BRANCHES, CPU)
        results.append(evaluate(nn.Identity(), loader, device=CPU, branch_counts=counts))
    Path(out, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    args = (str(tmp_path / "store"), str(tmp_path))
    mp.start_processes(_evaluate_as_rank, args, nprocs=2, start_method="fork")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    for metrics, samples in zip(ranks[0], (SAMPLES, 1), strict=True):
        expected = expected_metrics(Rows(4, samples))
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
