"""Layers whose weight we read: what others put in their place, or hook on them, is called."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.models import create_feature_extractor, get_graph_node_names
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune

from qna_timm.layers import LearnedQueryAttention, LearnedQueryPool, SpanAttention
from qna_timm.layers.branches import BranchMlp
from qna_timm.layers.gramian_head import BranchClassAttention


class ClassAttention(nn.Module):
    """Class attention of a map, whose first tokens are the branches' own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BranchClassAttention(8, 3, attn_dim=6, num_heads=2, init_values=1.0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[:, :3].transpose(0, 1), x[:, 3:])


LAYERS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "attention": (lambda: LearnedQueryAttention(8, 2, pos_embed="absolute"), "k", (2, 5, 6, 8)),
    "pool": (lambda: LearnedQueryPool(8, 2, 5), "k", (2, 4, 6, 8)),
    "spans": (lambda: SpanAttention(8, 8, 2, adaptive=True, max_span=2), "qkv", (2, 8, 5, 6)),
    "token's keys": (ClassAttention, "block.k", (2, 9, 8)),
    "token's values": (ClassAttention, "block.v", (2, 9, 8)),
    "branches' MLP": (lambda: BranchMlp(8, 16, 3, in_turn=True), "fc1", (3, 7, 8)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str) -> tuple[nn.Module, str, Tensor]:
    """A layer, the name of the one inside it that is read, and its input."""
    torch.manual_seed(0)
    build, inner, shape = LAYERS[name]
    return build(), inner, torch.randn(shape)


class Adapter(nn.Module):
    """A layer and something small beside it, as fine-tuning adds it."""

    def __init__(self, base: nn.Module, change: float) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.tensor(change))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.scale * y.square()


class AdapterWithWeight(Adapter):
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


@every_layer
@pytest.mark.parametrize("adapter", [Adapter, AdapterWithWeight])
def test_adapters(name: str, adapter: type[Adapter]) -> None:
    layer, inner, x = make(name)
    wanted = layer(x)
    layer.set_submodule(inner, adapter(layer.get_submodule(inner), 0.0))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.get_submodule(inner).scale.fill_(5.0)
    found = layer(x)
    assert (found - wanted).abs().max() > 1e-3
    found.square().sum().backward()
    assert layer.get_submodule(inner).scale.grad != 0


def test_keys_of_another_width() -> None:
    layer, _, x = make("attention")
    layer.k = Adapter(nn.Linear(8, 6), 0.0)
    with pytest.raises(ValueError, match=r"^key must be .* \[B, H, W, 8\], got \[2, 5, 6, 6\]$"):
        layer(x)


@every_layer
def test_hooks(name: str) -> None:
    layer, inner, x = make(name)
    wanted, seen = layer(x), []
    hook = layer.get_submodule(inner).register_forward_hook(lambda *_: seen.append("forward"))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    hook.remove()
    layer.get_submodule(inner).register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(x.requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]
    layer, inner, _ = make(name)
    of_class = layer.get_submodule(inner).forward
    layer.get_submodule(inner).forward = lambda x: (seen.append("own"), of_class(x))[1]
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert seen[-1] == "own"


@every_layer
def test_pruning(name: str) -> None:
    """Weights are masked anew in every step, and the ones that training changed."""
    layer, inner, x = make(name)
    prune.l1_unstructured(layer.get_submodule(inner), "weight", 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        layer(x).square().mean().backward()
        optimizer.step()
    found = layer(x)
    prune.remove(layer.get_submodule(inner), "weight")
    torch.testing.assert_close(layer(x), found, rtol=1e-5, atol=1e-6)


@every_layer
@pytest.mark.parametrize(
    "norm",
    [torch.nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_normed_weights_train(name: str, norm: Callable) -> None:
    layer, inner, x = make(name)
    norm(layer.get_submodule(inner))
    layer(x).square().mean().backward()
    assert all(p.grad is not None for p in layer.get_submodule(inner).parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["attention", "pool"])
def test_quantized(name: str) -> None:
    layer, _, x = make(name)
    found = quantize_dynamic(copy.deepcopy(layer), {nn.Linear})(x)
    assert (found - layer(x)).abs().max() < 0.05 * layer(x).abs().max()


@every_layer
def test_called_in_other_types(name: str) -> None:
    """To rounding in float64; under autocast as good as its keys; compiled."""
    layer, inner, x = make(name)
    adapted = copy.deepcopy(layer)
    adapted.set_submodule(inner, Adapter(adapted.get_submodule(inner), 0.0))
    torch.testing.assert_close(
        copy.deepcopy(adapted).double()(x.double()), copy.deepcopy(layer).double()(x.double())
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = adapted(x)
    assert (found.float() - layer(x)).abs().max() < 0.05 * layer(x).abs().max()
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_norm_before_folded_attention() -> None:
    """The norm's map is folded into keys and values, so it is called where it is hooked."""
    layer, _, x = make("token's keys")
    wanted, seen = layer(x), []
    layer.block.norm1.register_forward_hook(lambda *_: seen.append("norm"))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert seen == ["norm"]


class Quantized(Tensor):
    """As weights of torchao or DTensors: a tensor that layers know, and nothing else."""

    kept: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> "Quantized":
        own = Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)
        own.kept = data
        return own

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["kept"], None

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple, kwargs=None) -> Tensor:
        if func in (nn.functional.linear, torch.conv2d):
            return func(*[arg.kept if isinstance(arg, cls) else arg for arg in args])
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, *_: object) -> Tensor:
        raise NotImplementedError(func)


@pytest.mark.parametrize("name", ["attention", "pool", "spans"])
def test_weights_of_another_kind(name: str) -> None:
    layer, inner, x = make(name)
    layer.requires_grad_(False)
    wanted = layer(x)
    module = layer.get_submodule(inner)
    weight = Quantized(module.weight.data)
    del module.weight
    module.weight = weight
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "folded", "called"),
    [
        ("attention", "learned_query_scores", "scores_of_keys"),
        ("token's keys", "class_attention", "attend_by_keys"),
    ],
)
def test_symbolic_traces(name: str, folded: str, called: str) -> None:
    """Fold what is plain, where a weight is no tensor, and call what is hooked."""
    layer, inner, x = make(name)
    wanted = layer.eval()(x)
    for hooked, one, other in ((False, folded, called), (True, called, folded)):
        if hooked:
            layer.get_submodule(inner).register_forward_hook(lambda *_: None)
        nodes = get_graph_node_names(layer)[1]
        assert any(one in node for node in nodes) and not any(other in node for node in nodes)
        traced = create_feature_extractor(layer, {nodes[-1]: "out"}).eval()
        torch.testing.assert_close(traced(x)["out"], wanted, rtol=1e-5, atol=1e-6)
