"""Gramian heads, all branches at once, against branches written one by one."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from gramian_reference import ReferenceHead
from timm.models import create_feature_extractor
from torch import Tensor, func, nn

from qna_timm.layers.batch_norm import SmallBatchNorm2d
from qna_timm.layers.gram_layer import BranchDropPath
from qna_timm.layers.gramian_head import GramianHead
from qna_timm.ops.gramian import gram_triangle, triangle_index

BRANCHES, FEATURES, CLASSES = 3, 32, 7
SETTINGS = {
    "convnext": dict(gram_layer="convnext", gram_dim=12, embed_groups=2, mlp_groups=4),
    "cswin": dict(gram_layer="cswin", gram_dim=12, gram_split_size=3, proj_groups=4),
    "cswin-groups": dict(
        gram_layer="cswin", gram_dim=24, gram_split_size=2, gram_mlp_groups=2, mlp_groups=2
    ),
    "none": dict(gram_layer=None, gram_dim=15, embed_groups=8, mlp_groups=1, attn_dim=24),
}
for _settings in SETTINGS.values():
    _settings.setdefault("embed_groups", 2)
    _settings.setdefault("num_heads", 4)
SIZES = [(6, 6), (5, 7), (1, 4), (1, 1)]


def build(name: str, num_classes: int = CLASSES, **kwargs) -> GramianHead:
    """A head with all parameters and statistics away from where they start."""
    torch.manual_seed(0)
    head = GramianHead(FEATURES, num_classes, BRANCHES, **{**SETTINGS[name], **kwargs})
    with torch.no_grad():
        for tensor_name, tensor in head.state_dict().items():
            if tensor_name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.normal_(0.0, 0.3)
    head.branch_outputs = True
    return head


def reference_of(head: GramianHead, name: str, **kwargs) -> ReferenceHead:
    """The same function, branch by branch."""
    reference = ReferenceHead(FEATURES, CLASSES, BRANCHES, **{**SETTINGS[name], **kwargs})
    reference.load_stacked(head.state_dict())
    return reference.to(next(head.parameters()).dtype)


def maps(size: tuple[int, int] = (5, 7), batch: int = 4) -> Tensor:
    """Input with gradient."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, FEATURES, *size, generator=generator).requires_grad_()


def error(value: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted magnitude."""
    wanted = wanted.double()
    return ((value.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


def gradients(module: nn.Module, x: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that tells branches and classes apart; '' is the input's."""
    weights = torch.linspace(-1.0, 1.0, logits.numel(), dtype=logits.dtype).view(logits.shape)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad((logits * weights).sum() + logits.square().sum(), [x, *parameters])
    return dict(zip(["", *names], grads, strict=True))


def compare_gradients(
    head: GramianHead, x: Tensor, reference: ReferenceHead, y: Tensor, limit: float
) -> None:
    """Our gradients of x against a reference's of y, every tensor."""
    ours = gradients(head, x, head(x))
    theirs = gradients(reference, y, torch.stack(reference(y), dim=1))
    assert error(ours.pop(""), theirs.pop("")) < limit
    wanted = {
        name: torch.stack([theirs[f"branches.{i}.{name}"] for i in range(BRANCHES)]).view_as(grad)
        for name, grad in ours.items()
    }
    for name, grad in ours.items():
        # a bias before a batch norm has none in exact arithmetic: its weight's tells the scale
        beside = wanted.get(name.replace(".bias", ".weight"), wanted[name])
        scale = max(wanted[name].abs().max().item(), beside.abs().max().item())
        assert (grad - wanted[name]).abs().max().item() < limit * scale, name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_branch_by_branch(name: str, size: tuple[int, int], training: bool) -> None:
    head = build(name).double().train(training)
    reference = reference_of(head, name).train(training)
    x = maps(size).detach().double().requires_grad_()
    compare_gradients(head, x, copy.deepcopy(reference), x, 1e-5)
    wanted = torch.stack(reference(x), dim=1)
    before = build(name).double().train(training)
    assert error(before(x), wanted) < 1e-10
    state = before.state_dict()  # statistics moved likewise
    for i, part in enumerate(reference.branches):
        for norm in ("gram_proj_norm", "gram_embed_norm"):
            moved = state[f"{norm}.running_var"].unflatten(0, (BRANCHES, -1))[i]
            torch.testing.assert_close(moved, part[norm].running_var)


@pytest.mark.parametrize("name", SETTINGS)
def test_float32(name: str) -> None:
    """Outputs to 1e-4 and gradients to 1e-3 of the float64 reference."""
    head = build(name)
    reference = reference_of(copy.deepcopy(head).double(), name)
    x = maps((14, 14), batch=6)
    y = x.detach().double().requires_grad_()
    assert error(head(x), torch.stack(copy.deepcopy(reference)(y), dim=1)) < 1e-4
    compare_gradients(build(name), x, reference, y, 1e-3)


def test_mean_of_branches() -> None:
    """One tensor of logits in both modes unless branches are asked for."""
    head = build("convnext").eval()
    x = maps()
    branches = head(x)
    assert branches.shape == (4, BRANCHES, CLASSES)
    head.branch_outputs = False
    torch.testing.assert_close(head(x), branches.mean(dim=1))
    assert head.train()(x).shape == (4, CLASSES)
    head.branch_outputs = True
    assert head(x).shape == (4, BRANCHES, CLASSES)
    assert not any("branch_outputs" in key for key in head.state_dict())


def test_pre_logits_are_the_tokens() -> None:
    head = build("cswin").eval()
    x = maps()
    tokens = head(x, pre_logits=True)
    assert tokens.shape == (4, BRANCHES * FEATURES) and head.num_features == tokens.shape[1]
    logits = head.fc(tokens.unflatten(1, (BRANCHES, FEATURES)).transpose(0, 1))
    torch.testing.assert_close(logits.transpose(0, 1), head(x))
    head.reset(0)
    torch.testing.assert_close(head(x), tokens)


def test_reset() -> None:
    head = build("convnext").eval()
    head.reset(11)
    assert head.fc.weight.shape == (BRANCHES, 11, FEATURES) and not head.fc.training
    assert head(maps()).shape == (4, BRANCHES, 11)
    head.reset(0, "")
    x = maps()
    assert head(x) is x and head.num_features == FEATURES
    assert not list(head.parameters())
    head.reset(5, "gram")  # branches are back, fresh
    assert head(x).shape == (4, BRANCHES, 5) and head.num_features == BRANCHES * FEATURES
    assert not any(module.training for module in head.modules())
    half = build("convnext").to(torch.bfloat16)
    half.reset(3)
    assert half.fc.weight.dtype == torch.bfloat16


def test_state_dict_layout() -> None:
    """Branches are stacked on the first axis, vectors are vectors, the index is not stored."""
    state = GramianHead(64, 10, 5, gram_dim=24, proj_groups=4, embed_groups=4).state_dict()
    shapes = {
        "gram_proj.weight": [5 * 24, 16, 1, 1],
        "gram_layer.gamma": [5 * 24],
        "gram_layer.mlp.fc1.weight": [5 * 96, 24],
        "gram_embed.weight": [5 * 64, 75],
        "block.norm1.weight": [5 * 64],
        "block.k.weight": [5 * 16, 64],
        "block.ls1.gamma": [5 * 64],
        "block.mlp.fc2.weight": [5 * 64, 64],
        "fc.weight": [5, 10, 64],
        "fc.bias": [5, 10],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes
    assert not any(tensor.dtype == torch.int64 and tensor.ndim for tensor in state.values())


@pytest.mark.parametrize("name", SETTINGS)
def test_layouts_of_the_input(name: str) -> None:
    head = build(name).eval()
    x = maps().detach()
    wanted = head(x)
    torch.testing.assert_close(head(x.contiguous(memory_format=torch.channels_last)), wanted)
    torch.testing.assert_close(head(x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)), wanted)
    wide = torch.zeros(4, FEATURES, 9, 9)
    wide[..., 2:7, 1:8] = x
    torch.testing.assert_close(head(wide[..., 2:7, 1:8]), wanted)


@pytest.mark.parametrize("size", [(5, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_one_image_trains(name: str, size: tuple[int, int]) -> None:
    head = build(name)
    running = head.gram_embed_norm.running_mean.clone()
    head(maps(size, batch=1)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert torch.equal(head.gram_embed_norm.running_mean, running)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_small_batch_norm(momentum: float | None) -> None:
    """PyTorch's but for a single value per channel, which it normalises as in evaluation."""
    ours, theirs = SmallBatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(3, 4, 2, 1)
        assert torch.equal(ours(x), theirs(x))
        one = torch.randn(1, 4, 1, 1)
        assert torch.equal(ours(one), copy.deepcopy(theirs).eval()(one))
    for value, wanted in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(value, wanted)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_drop_path_is_independent() -> None:
    """Some branches of an image are dropped, others of it are not; the mean stays."""
    torch.manual_seed(0)
    y = BranchDropPath(0.5)(torch.ones(8, 64 * 3, 2), 64).view(8, 64, 3, 2)
    kept = y[..., 0, 0]
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(y, kept[..., None, None].expand_as(y))
    mixed = (kept > 0).float().mean(dim=0)
    assert ((mixed > 0) & (mixed < 1)).float().mean() > 0.9
    assert abs(kept.mean().item() - 1) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """At most twice the error of the plain formulation under the same autocast."""
    worst = []
    for seed in range(4):
        head = build(name).eval()
        reference = reference_of(head, name).eval()
        x = maps((6, 6), batch=8).detach() + 0.1 * seed
        exact = torch.stack(reference_of(copy.deepcopy(head).double(), name).eval()(x.double()), 1)
        with torch.autocast("cpu", dtype):
            ours, theirs = head(x), torch.stack(reference(x), dim=1)
        worst.append((error(ours, exact), error(theirs, exact)))
        ours.float().mean().backward()
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in head.parameters())
    assert max(ours for ours, _ in worst) < 2 * max(theirs for _, theirs in worst) + 1e-3


@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_is_float32(autocast: torch.dtype) -> None:
    index = triangle_index(8)
    x = torch.randn(2, 3, 50, 8)
    wanted = gram_triangle(x.double(), index, 5)
    with torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
        triangle = gram_triangle(x, index, 5)
    assert triangle.dtype == torch.float32 and error(triangle, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_large_values(name: str, dtype: torch.dtype) -> None:
    """Maps and scores of 1e4, in whole models of each type: finite logits and gradients."""
    head = build(name)
    with torch.no_grad():
        head.block.q.weight.mul_(1e4 / head.block.q.weight.abs().max())
        head.block.ls1.gamma.fill_(1e-4)
    head = head.to(dtype)
    for training in (True, False):
        x = (1e4 * maps().detach().clamp(-1, 1)).to(dtype).requires_grad_()
        logits = head.train(training)(x)
        assert logits.dtype == dtype and logits.isfinite().all()
        logits.float().mean().backward()
        assert x.grad.isfinite().all()


def _feature_extractor(module: nn.Module) -> Callable[[Tensor], Tensor]:
    extractor = create_feature_extractor(module, {"head": "out"})
    return lambda x: extractor(x)["out"]


def _compile(module: nn.Module) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, backend="eager")


class Network(nn.Module):
    """A model with nothing but a head."""

    def __init__(self, head: GramianHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(
            (name, how)
            for name in ("convnext", "cswin", "none")
            for how in (torch.jit.script, _feature_extractor)
        ),
        ("convnext", _compile),
        *(pytest.param(x, _compile, marks=pytest.mark.thorough) for x in ("cswin", "none")),
    ],
)
def test_captured(name: str, how: Callable) -> None:
    """Scripted, traced by FX and compiled in one graph: same logits, every parameter trains."""
    model = Network(build(name))
    x = maps()
    wanted = copy.deepcopy(model)(x)
    torch.testing.assert_close(how(copy.deepcopy(model))(x), wanted)
    how(model)(x).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["convnext", "cswin", "none"])
def test_traces_can_be_saved(name: str) -> None:
    model = Network(build(name)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, maps())
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        for loaded in (torch.jit.load(file), torch.jit.freeze(traced)):
            torch.testing.assert_close(loaded(maps()), model(maps()))


@pytest.mark.parametrize("name", ["convnext", "none"])
def test_function_transforms(name: str) -> None:
    """Several heads and gradients of each image at once; tangents, against differences."""
    models = [Network(build(name)).double().eval() for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    x = maps().detach().double()
    parameters, buffers = func.stack_module_state(models)

    def call(parameters: dict, buffers: dict, x: Tensor) -> Tensor:
        return func.functional_call(models[0], (parameters, buffers), (x,))

    found = func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))

    def loss(x: Tensor) -> Tensor:
        return models[0](x[None]).square().sum()

    wanted = torch.stack([func.grad(loss)(image) for image in x])
    torch.testing.assert_close(func.vmap(func.grad(loss))(x), wanted)
    tangent = torch.randn_like(x)
    _, found = func.jvp(models[0], (x,), (tangent,))
    difference = models[0](x + 1e-6 * tangent) - models[0](x - 1e-6 * tangent)
    torch.testing.assert_close(found, difference / 2e-6, rtol=1e-5, atol=1e-8)


def test_index_without_values() -> None:
    """PyTorch would gather anything by an index on the meta device."""
    head = build("none").eval()
    with torch.device("meta"):
        other = build("none")
    other.load_state_dict(head.state_dict(), assign=True)
    other.eval()
    with pytest.raises(ValueError, match=r"index is on meta, the map on cpu"):
        other(maps())
    other.init_non_persistent_buffers()
    torch.testing.assert_close(other(maps()), head(maps()))


@pytest.mark.parametrize("name", ["convnext", "none"])
def test_export_of_any_size(name: str) -> None:
    model = Network(build(name)).eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model, (maps().detach(),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    x = maps((8, 4), batch=2).detach()
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("scheme", ["trunc_normal", "default"])
def test_meta_device(name: str, scheme: str) -> None:
    """Made without memory; after to_empty, init_weights leaves nothing unset."""
    with torch.device("meta"):
        head = GramianHead(FEATURES, CLASSES, BRANCHES, **SETTINGS[name])
    assert head(torch.empty(2, FEATURES, 5, 7, device="meta")).shape == (2, CLASSES)
    head = head.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 10**6)
    head.init_weights(scheme)
    torch.manual_seed(0)
    fresh = GramianHead(FEATURES, CLASSES, BRANCHES, **SETTINGS[name])
    for value, wanted in zip(head.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(value, wanted)
    assert head(maps()).isfinite().all()


def test_initialisation() -> None:
    """Spec, section 7: truncated normal everywhere, or PyTorch's own for the convolutions."""
    head = GramianHead(64, 10, 5, gram_dim=24, embed_groups=4)
    for name, parameter in head.named_parameters():
        if parameter.ndim > 1 and not name.endswith("fc.bias"):
            assert 0.017 < parameter.std().item() < 0.023, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    assert (head.gram_layer.gamma == 1e-6).all() and (head.block.ls2.gamma == 1e-4).all()

    head = GramianHead(64, 10, 5, gram_dim=24, embed_groups=4, gram_layer="cswin")
    head.init_weights("default")
    for name in ("gram_proj", "gram_embed", "block.mlp.fc1", "block.mlp.fc2"):
        layer = head.get_submodule(name)
        bound = layer.weight[0].numel() ** -0.5
        assert 0.95 * bound < layer.weight.abs().max().item() <= bound, name
        assert 0.9 * bound < layer.bias.abs().max().item() <= bound, name
    for name in ("gram_layer.qkv", "gram_layer.mlp.fc1", "block.q", "block.proj", "fc"):
        assert 0.017 < head.get_submodule(name).weight.std().item() < 0.023, name
    with pytest.raises(ValueError, match="conv_init must be one of"):
        head.init_weights("kaiming")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(num_branches=0), "num_branches must be at least 1, got 0"),
        (dict(gram_dim=0), "gram_dim must be at least 1, got 0"),
        (dict(proj_groups=5), "proj_groups .*in_features=64 and gram_dim=24: one of 1, 2, 4, 8;"),
        (dict(embed_groups=8), "embed_groups .*triangle=300 and in_features=64: one of 1, 2, 4;"),
        (dict(mlp_groups=3), "mlp_groups must divide in_features=64"),
        (dict(attn_dim=20), "num_heads must divide attn_dim=20: one of 1, 2, 4, 5, 10, 20; got 8"),
        (dict(gram_layer="resnet"), "gram_layer must be one of"),
        (dict(num_heads=0), "num_heads must be at least 1, got 0"),
        (dict(num_heads=32), "num_heads must be 1 to 16 for in_features=64, or attn_dim be given"),
        (dict(attn_dim=-8), "attn_dim must be at least 1, got -8"),
        (
            dict(gram_layer="cswin", gram_num_heads=3),
            "gram_num_heads must be a multiple of 2 and divide gram_dim=24: one of 2, 4, 6, 8, 12,",
        ),
        (dict(gram_layer="cswin", gram_num_heads=10), "divide gram_dim=24: .*; got 10"),
        (
            dict(gram_layer="cswin", gram_dim=15),
            "gram_num_heads must .* divide gram_dim=15: nothing does; got 6",
        ),
        (dict(gram_layer="cswin", gram_mlp_groups=5), "gram_mlp_groups must divide gram_dim=24"),
        (dict(gram_layer="cswin", gram_split_size=0), "gram_split_size must be at least 1"),
        (dict(global_pool="avg"), "global_pool must be 'gram' or ''"),
        (dict(global_pool=""), "global_pool='' needs num_classes=0"),
    ],
)
def test_settings_that_do_not_fit(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        GramianHead(64, 10, **{"gram_dim": 24, "embed_groups": 4, **kwargs})
    assert "\n" not in str(caught.value)
