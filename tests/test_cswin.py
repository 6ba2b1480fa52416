"""CSWin and GA-CSWin: a plain float64 reading of the paper, released names, any size.

timm's own per-model tests run besides these: scripts/timm_tests.sh.
"""

import logging
from pathlib import Path

import golden
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qna_timm  # noqa: F401 - registers the models
from qna_timm.convert import ConversionError
from qna_timm.convert.cswin import cswin_name
from qna_timm.layers.cswin_block import CSWinBlock
from qna_timm.layers.stripe_attn import StripeAttention
from qna_timm.models.cswin import checkpoint_filter_fn

SHARED = dict(dims=(8, 16, 24, 32), depths=(1, 2, 3, 1), split_sizes=(1, 2, 3, 3), num_classes=7)
HEADS = (2, 2, 4, 4)
SMALL = dict(SHARED, num_heads=HEADS)
GRAMIAN = dict(
    SHARED,
    trunk_num_heads=HEADS,
    gram_dim=16,
    gram_num_heads=2,
    fuse_num_heads=4,
    gram_split_size=3,
    fuse_split_size=3,
    proj_groups=4,
)


def small(name: str = "cswin_tiny", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    settings = GRAMIAN if name.startswith("ga_") else SMALL
    return timm.create_model(name, **{**settings, **kwargs}).eval()


def released_shapes(stem_type: str = "patch", **changes: object) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file of CSWin with the small settings."""
    settings = {**SMALL, **changes}
    dims, classes = settings["dims"], settings["num_classes"]
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    if stem_type == "patch":
        add("stage1_conv_embed.0", dims[0], 3, 7, 7)
        add("stage1_conv_embed.2", dims[0])
    else:
        for conv, norm, chans in ((0, 2, 3), (5, 7, dims[0]), (10, 12, dims[0])):
            add(f"stage1_conv_embed.{conv}", dims[0], chans, 3, 3, bias=False)
            add(f"stage1_conv_embed.{norm}", dims[0])
    for i, dim in enumerate(dims):
        if i > 0:
            add(f"merge{i}.conv", dim, dims[i - 1], 3, 3)
            add(f"merge{i}.norm", dim)
        for j in range(settings["depths"][i]):
            block = f"stage{i + 1}.{j}"
            branches = 1 if i == 3 else 2
            add(f"{block}.norm1", dim)
            add(f"{block}.qkv", 3 * dim, dim)
            for branch in range(branches):
                add(f"{block}.attns.{branch}.get_v", dim // branches, 1, 3, 3)
            add(f"{block}.proj", dim, dim)
            add(f"{block}.norm2", dim)
            add(f"{block}.mlp.fc1", 4 * dim, dim)
            add(f"{block}.mlp.fc2", dim, 4 * dim)
    add("norm", dims[3])
    add("head", classes, dims[3])
    return shapes


def released(stem_type: str = "patch", **changes: object) -> dict[str, Tensor]:
    """A released file with values by the golden files' rule."""
    shapes = released_shapes(stem_type, **changes)
    return {name: golden.torch_leaf(name, shape) for name, shape in shapes.items()}


def stripes(height: int, width: int, size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """The stripes that a map is cut into; the last ones are what is left of it."""
    rows, cols = size[0] or height, size[1] or width
    return [
        (slice(y, min(y + rows, height)), slice(x, min(x + cols, width)))
        for y in range(0, height, rows)
        for x in range(0, width, cols)
    ]


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lepe: tuple[Tensor, Tensor],
    heads: int,
    size: tuple[int, int],
) -> Tensor:
    """Stripe by stripe, head by head, [B, H, W, C]."""
    out = torch.zeros_like(q)
    for rows, cols in stripes(q.shape[1], q.shape[2], size):
        a, b, c = (t[:, rows, cols] for t in (q, k, v))
        y = F.conv2d(c.permute(0, 3, 1, 2), *lepe, padding=1, groups=c.shape[3])
        attended = []
        for qh, kh, vh in zip(*(t.chunk(heads, 3) for t in (a, b, c)), strict=True):
            scores = qh.flatten(1, 2) @ kh.flatten(1, 2).mT / qh.shape[3] ** 0.5
            attended.append((scores.softmax(2) @ vh.flatten(1, 2)).view(qh.shape))
        out[:, rows, cols] = torch.cat(attended, 3) + y.permute(0, 2, 3, 1)
    return out


def plain_cswin(file: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits of the small CSWin, from a released file."""

    def pair(name: str) -> tuple[Tensor, Tensor | None]:
        return file[f"{name}.weight"], file.get(f"{name}.bias")

    def conv(x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), *pair(name), stride, padding).permute(0, 2, 3, 1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[3:], *pair(name), 1e-5)

    x = x.permute(0, 2, 3, 1)
    if "stage1_conv_embed.5.weight" in file:
        x = F.gelu(norm(conv(x, "stage1_conv_embed.0", 2, 1), "stage1_conv_embed.2"))
        x = F.gelu(norm(conv(x, "stage1_conv_embed.5", 1, 1), "stage1_conv_embed.7"))
        x = norm(conv(x, "stage1_conv_embed.10", 2, 1), "stage1_conv_embed.12")
    else:
        x = norm(conv(x, "stage1_conv_embed.0", 4, 2), "stage1_conv_embed.2")
    for i, (depth, heads) in enumerate(zip(SMALL["depths"], SMALL["num_heads"], strict=True)):
        if i > 0:
            x = norm(conv(x, f"merge{i}.conv", 2, 1), f"merge{i}.norm")
        for j in range(depth):
            block, split = f"stage{i + 1}.{j}", SMALL["split_sizes"][i]
            sizes = [(0, 0)] if i == 3 else [(0, split), (split, 0)]
            q, k, v = F.linear(norm(x, f"{block}.norm1"), *pair(f"{block}.qkv")).chunk(3, 3)
            halves = zip(*(t.chunk(len(sizes), 3) for t in (q, k, v)), sizes, strict=True)
            attended = [
                plain_attention(*qkv, pair(f"{block}.attns.{n}.get_v"), heads // len(sizes), size)
                for n, (*qkv, size) in enumerate(halves)
            ]
            x = x + F.linear(torch.cat(attended, 3), *pair(f"{block}.proj"))
            hidden = F.gelu(F.linear(norm(x, f"{block}.norm2"), *pair(f"{block}.mlp.fc1")))
            x = x + F.linear(hidden, *pair(f"{block}.mlp.fc2"))
    return F.linear(norm(x, "norm").mean((1, 2)), *pair("head"))


@pytest.mark.parametrize("size", [(96, 96), (100, 68), (33, 47), (5, 3)], ids=str)
@pytest.mark.parametrize("stem_type", ["patch", "deep"])
def test_logits_and_gradients_of_a_released_file(stem_type: str, size: tuple[int, int]) -> None:
    """float32 against float64 read off the paper: outputs to 1e-4, every gradient to 1e-3."""
    file = released(stem_type)
    model = small(stem_type=stem_type)
    model.load_state_dict(checkpoint_filter_fn(file, model))
    x = golden.images(1, 2, 3, *size)
    logits = model(x)
    logits.square().sum().backward()

    exact = {name: t.double().requires_grad_() for name, t in file.items()}
    wanted = plain_cswin(exact, x.double())
    wanted.square().sum().backward()
    assert golden.relative_error(logits, wanted.detach().numpy()) < 1e-4
    found = dict(model.named_parameters())
    assert len(found) == len(exact)
    # the bias of keys shifts all of a query's scores alike: its gradient is rounding
    largest = max(t.grad.norm() for t in exact.values())
    for name, t in exact.items():
        difference = (found[cswin_name(name)].grad - t.grad).norm()
        assert difference < 1e-3 * t.grad.norm() + 1e-7 * largest, name


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "plain"])
@pytest.mark.parametrize("stripe_size", [(0, 7), (7, 0), (3, 2), (0, 0), (20, 1), (5, 30)], ids=str)
@pytest.mark.parametrize("size", [(14, 14), (9, 15), (1, 1), (16, 5)], ids=str)
def test_stripe_attention(size: tuple[int, int], stripe_size: tuple[int, int], fused: bool) -> None:
    """Stripes that divide the map, that do not, and longer ones; inputs of any strides."""
    torch.manual_seed(0)
    layer = StripeAttention(8, 2, stripe_size, dtype=torch.float64)
    layer.fused_attn = fused
    inputs = torch.randn(3, 2, 8, *size, dtype=torch.float64).permute(0, 1, 3, 4, 2)
    lepe = (layer.lepe.weight, layer.lepe.bias)
    found, wanted = [], []
    for results, function in (
        (found, layer),
        (wanted, lambda *qkv: plain_attention(*qkv, lepe, 2, stripe_size)),
    ):
        qkv = inputs.clone().requires_grad_()
        out = function(*qkv)
        results += [out, torch.autograd.grad((out * out.detach().cos()).sum(), qkv)[0]]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(6, 6), (5, 7)], ids=str)
def test_huge_scores(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Scores of +-1e4, also beside padding."""
    layer = StripeAttention(8, 2, (3, 0), dtype=dtype)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, *size, 8).sign() * torch.tensor([70.0, 70.0, 1.0]).view(
        3, 1, 1, 1, 1
    )
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    out = layer(q, k, v)
    out.float().square().sum().backward()
    for tensor in (out, q.grad, k.grad, v.grad):
        assert tensor.isfinite().all()


def test_padding_is_not_seen() -> None:
    """A map cut to its last, narrower stripe gives what that stripe gives in the whole map."""
    torch.manual_seed(0)
    layer = StripeAttention(8, 2, (0, 4))
    q, k, v = torch.randn(3, 1, 5, 10, 8)
    whole = layer(q, k, v)
    torch.testing.assert_close(whole[:, :, 8:], layer(q[:, :, 8:], k[:, :, 8:], v[:, :, 8:]))


def test_attention_dropout_only_trains() -> None:
    torch.manual_seed(0)
    block = CSWinBlock(8, 2, 2, attn_drop=0.5)
    x = torch.randn(1, 4, 4, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("cswin_tiny", 22_320_552, 4.32),
        *(
            pytest.param(*counts, marks=pytest.mark.thorough)
            for counts in (
                ("cswin_small", 34_643_304, 6.80),
                ("cswin_base", 77_382_184, 14.96),
                ("cswin_large", 173_262_664, 33.13),
            )
        ),
        ("ga_cswin_tiny", 41_989_000, 6.112),
        ("ga_cswin_small", 54_311_752, 8.588),
    ],
)
def test_parameters_and_macs(name: str, parameters: int, gmacs: float) -> None:
    """Parameters exact; the Gramian heads save 2 % of the released multiply-adds."""
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    found = counter.get_total_flops() / 2e9
    if name.startswith("ga_"):
        assert 0.97 * gmacs < found < gmacs
    else:
        assert found == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize("hooked", [False, True])
def test_trace_of_another_size(hooked: bool) -> None:
    """Stripes of the map of now, and a convolution that is called: its hook is in the trace."""
    model = small()
    if hooked:
        lepe = model.stages[0].blocks[0].attn[0].lepe
        lepe.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    traced = torch.jit.trace(model, torch.randn(2, 3, 64, 64))
    for batch, height, width in [(2, 64, 64), (3, 77, 57), (1, 96, 160)]:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cswin_tiny", "ga_cswin_tiny"])
@pytest.mark.parametrize("size", [(32, 32), (224, 96), (49, 31), (3, 3)], ids=str)
def test_any_size(name: str, size: tuple[int, int]) -> None:
    """Batch 1, channels-last and other strides; every parameter has a gradient in training."""
    model = small(name)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (1, 7) and logits.isfinite().all()
        torch.testing.assert_close(model(x.mT.contiguous().mT), logits, rtol=1e-4, atol=1e-5)
        cl = model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            cl(x.to(memory_format=torch.channels_last)), logits, rtol=1e-4, atol=1e-5
        )
    model.train()(x).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("ga_CSWin_64_12211_tiny_224", "ga_cswin_tiny"),
        ("ga_CSWin_64_24322_small_224", "ga_cswin_small"),
    ],
)
def test_names_of_the_papers_commands(command: str, name: str) -> None:
    """The same parameters and the same cfg."""
    models = [timm.create_model(n, device="meta") for n in (command, name)]
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    own = ("architecture", "tag")
    cfgs = [{k: v for k, v in m.pretrained_cfg.items() if k not in own} for m in models]
    assert cfgs[0] == cfgs[1]


def test_maps_of_all_stages() -> None:
    """Intermediate maps at the sizes the reductions say; the features are the normalised last."""
    model = small()
    x = torch.randn(2, 3, 96, 64)
    features, maps = model.forward_intermediates(x, output_fmt="NHWC", norm=True)
    assert [m.shape[1:] for m in maps] == [(24, 16, 8), (12, 8, 16), (6, 4, 24), (3, 2, 32)]
    torch.testing.assert_close(maps[-1], features)
    torch.testing.assert_close(features, model.forward_features(x))
    nhwc = small(features_only=True)(x)
    nchw = small(features_only=True, feature_cls="getter")(x)
    for a, b in zip(nhwc, nchw, strict=True):
        torch.testing.assert_close(a.permute(0, 3, 1, 2), b)


def test_three_stages() -> None:
    sizes = dict(dims=(8, 16, 32), depths=(1, 1, 1), num_heads=(2, 2, 4), split_sizes=(1, 2, 7))
    features = timm.create_model("cswin_tiny", features_only=True, **sizes)
    assert features.feature_info.reduction() == [4, 8, 16]
    assert [x.shape[1] for x in features(torch.randn(1, 3, 32, 32))] == [8, 4, 2]


def test_compile_export_and_script() -> None:
    """One graph; exported for any batch; scripted. The trunk within, which timm's tests script."""
    model = small("ga_cswin_tiny", depths=(1, 1, 2, 1))
    x, y = torch.randn(2, 3, 64, 40), torch.randn(3, 3, 64, 40)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(y), model(y), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(model)(y), model(y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cswin_tiny", "ga_cswin_tiny"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Autocast and converted weights, forward and backward."""
    model = small(name).train()
    x = torch.randn(2, 3, 64, 64)
    wanted = model(x).detach().numpy()
    with torch.autocast("cpu", dtype=dtype):
        out = model(x)
    assert golden.relative_error(out.float(), wanted) < 0.1
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and golden.relative_error(out.float(), wanted) < 0.2


@pytest.mark.parametrize("name", ["cswin_tiny", "ga_cswin_tiny"])
def test_gradient_checkpointing(name: str) -> None:
    """The same gradients."""
    x = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = small(name).train()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-7)


def test_initial_values() -> None:
    """Linear maps truncated normal 0.02; convolutions within PyTorch's bound; norms 1 and 0."""
    model = small("ga_cswin_tiny")
    grouped = ("head.gram_proj.", "head.gram_embed.", "head.block.mlp.")
    for name, p in model.named_parameters():
        is_conv = p.ndim == 4 or name.startswith(grouped)
        if p.ndim > 1 and is_conv:
            bound = p[0].numel() ** -0.5
            assert 0.8 * bound < p.abs().max() <= bound, name
        elif p.ndim > 1 and name.endswith("weight"):
            assert p.std().item() == pytest.approx(0.02, rel=0.25), name
        elif name.endswith("bias") and any(
            part in name for part in ("norm", "fc1.b", "qkv", "fc.")
        ):
            assert is_conv or not p.any(), name


def test_init_weights_after_to_empty() -> None:
    model = small(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan"))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_drop_path_rates() -> None:
    """Linear over the trunk's blocks; fusion and Gram layers have the last one's."""
    model = timm.create_model("ga_cswin_tiny", drop_path_rate=0.2, device="meta")
    blocks = [block for stage in model.trunk.stages for block in stage.blocks]
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 25), atol=1e-7)
    assert model.fuse.block.block.drop_path1.drop_prob == 0.2
    gram_layer = model.head.gram_layer
    assert gram_layer.drop_path1.drop_prob == gram_layer.drop_path2.drop_prob == 0.2


def test_layer_decay_reaches_every_parameter() -> None:
    model = small()
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.8)
    scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    ordered = (model.stem[0].conv, model.stages[0].blocks[0].qkv, model.stages[3].blocks[0].qkv)
    scales = [scale[id(module.weight)] for module in (*ordered, model.head.fc)]
    assert scales == sorted(set(scales)) and scales[-1] == 1.0


HEADS_OF_STAGES = {
    "cswin_tiny": (2, 4, 8, 16),
    "cswin_small": (2, 4, 8, 16),
    "cswin_base": (4, 8, 16, 32),
    "cswin_large": (6, 12, 24, 24),
}


@pytest.mark.parametrize("name", HEADS_OF_STAGES)
def test_what_counts_of_parameters_do_not_show(name: str) -> None:
    model = timm.create_model(name, device="meta")
    for stage, heads, split in zip(model.stages, HEADS_OF_STAGES[name], (1, 2, 7, 0), strict=True):
        for block in stage.blocks:
            assert sum(attn.num_heads for attn in block.attn) == heads
            assert {attn.stripe_size for attn in block.attn} == {(0, split), (split, 0)}
            assert block.norm1.eps == block.norm2.eps == 1e-5
    assert model.norm.eps == 1e-5


def test_layer_groups() -> None:
    """What leads into a stage belongs to its first block, the norm to the last."""
    model = timm.create_model("cswin_tiny", depths=(1, 1, 2, 1), device="meta")
    groups = list(group_parameters(model, model.group_matcher()).values())
    wanted = [
        ["stem"],
        ["stages.0.blocks.0"],
        ["stages.1.blocks.0", "stages.1.downsample"],
        ["stages.2.blocks.0", "stages.2.downsample"],
        ["stages.2.blocks.1"],
        ["norm", "stages.3.blocks.0", "stages.3.downsample"],
        ["head"],
    ]
    for group, places in zip(groups, wanted, strict=True):
        assert all(any(name.startswith(f"{place}.") for place in places) for name in group)
        assert all(any(name.startswith(f"{place}.") for name in group) for place in places)


@pytest.mark.parametrize("key", ["state_dict_ema", "state_dict", "model", None])
def test_released_files_load(key: str | None, tmp_path: Path) -> None:
    """As the repository writes them, through timm's way to load a local file."""
    file = released()
    torch.save({key: file} if key else file, tmp_path / "cswin_tiny_224.pth")
    overlay = {"file": str(tmp_path / "cswin_tiny_224.pth")}
    model = small(pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.head.fc.weight, file["head.weight"], rtol=0, atol=0)
    lepe = model.stages[2].blocks[1].attn[1].lepe.weight
    torch.testing.assert_close(lepe, file["stage3.1.attns.1.get_v.weight"], rtol=0, atol=0)


def test_other_classes_and_channels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The stem is adapted, the classifier fresh and said to be; our own names load too."""
    source = small()
    save_file(source.state_dict(), tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors")}
    with caplog.at_level(logging.WARNING):
        grey = small(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=3)
    assert "checkpoint has 7 classes, the model 3: the classifier is fresh" in caplog.text
    torch.testing.assert_close(
        grey.stem[0].conv.weight, source.stem[0].conv.weight.sum(1, keepdim=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"stage5.1.conv.weight": torch.zeros(1)}, r"unknown: 1 \(fuse\.block\.conv"),
        (lambda f: f | {"stage3.0.pos": torch.zeros(1)}, r"unknown: 1 \(stages\.2\.blocks\.0\.pos"),
        (lambda f: f | {"decoder": torch.zeros(1)}, r"1 \(decoder\) tensors unknown"),
        (lambda f: {k: v for k, v in f.items() if k != "norm.bias"}, r"missing: 1 \(norm\.bias\)"),
        (lambda f: f | {"norm.bias": torch.zeros(5)}, r"wrong shape: 1 \(norm\.bias \(5,\) for"),
    ],
)
def test_released_files_that_do_not_fit(change, message: str) -> None:
    model = small()
    with pytest.raises(ConversionError, match=message) as error:
        checkpoint_filter_fn(change(released()), model)
    assert "\n" not in str(error.value)


def test_every_released_name_is_known() -> None:
    """Of both stems, of the fusion; and no other."""
    names = {*released_shapes(), *released_shapes("deep")}
    assert None not in {cswin_name(name) for name in names}
    assert cswin_name("stage5.2.attns.0.get_v.bias") == "fuse.block.block.attn.0.lepe.bias"
    for name in (
        "stage6.0.qkv.weight",
        "stage5.0.x",
        "merge4.conv.bias",
        "stage1_conv_embed.1.bias",
    ):
        assert cswin_name(name) is None


@pytest.mark.parametrize("own_names", [False, True])
def test_backbone_weights_load_into_the_trunk(own_names: bool, tmp_path: Path) -> None:
    """All but the stem, which is of another kind, in one line; nothing fresh if it is not."""
    file = released()
    donor = small()
    donor.load_state_dict(checkpoint_filter_fn(file, donor))
    path = tmp_path / "cswin.pth"
    torch.save(donor.state_dict() if own_names else {"state_dict_ema": file}, path)
    model = small("ga_cswin_tiny")
    report = model.load_backbone(str(path))
    assert {name.split(".")[0] for name in report.fresh} == {"stem"}
    assert len(report.fresh) == 9 and "\n" not in str(report)
    for name, tensor in model.trunk.state_dict().items():
        if name not in report.fresh:
            assert torch.equal(tensor, donor.state_dict()[name]), name
    model = small("ga_cswin_tiny", stem_type="patch")
    assert model.load_backbone(str(path)).fresh == []
    x = torch.randn(1, 3, 64, 64)
    maps = donor.forward_intermediates(x, intermediates_only=True)
    taps = model.forward_taps(x)
    assert len(taps) == 5
    for tap, wanted in zip((taps[0], taps[1], taps[3], taps[4]), maps, strict=True):
        torch.testing.assert_close(tap, wanted)


def test_fusion_by_a_bottleneck() -> None:
    model = small("ga_cswin_tiny", fuse_type="bottleneck", gram_layer=None, num_taps=2)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert model.fuse.block.conv1.in_channels == 8 + 16 + 3 * 24 + 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StripeAttention(8, 3, (0, 1)), "num_heads must divide dim=8, got 3"),
        (lambda: StripeAttention(8, 2, (-1, 1)), "stripe_size must not be negative, got"),
        (lambda: CSWinBlock(8, 3, 1), "num_heads must be a multiple of 2, got 3"),
        (lambda: CSWinBlock(6, 4, 1), "num_heads must divide dim=6, got 4"),
        (lambda: CSWinBlock(8, 2, 0), "split_size must be at least 1, got 0"),
        (lambda: small(stem_type="conv"), "stem_type must be 'patch' or 'deep', got 'conv'"),
        (lambda: small(depths=(1, 1)), r"depths must be a number of at least 1 for each of 4"),
        (lambda: small(split_sizes=(0, 1, 1, 1)), "split_sizes must be a number of at least 1"),
        (lambda: small("ga_cswin_tiny", fuse_type="sum"), "fuse_type must be 'cswin' or 'bottle"),
        (lambda: small("ga_cswin_tiny", dims=(8, 16, 24)), "dims must have an entry for each of 4"),
        (lambda: small("ga_cswin_tiny", num_taps=3), "num_taps must be 0 to 2 for 3 blocks, got 3"),
        (
            lambda: small("ga_cswin_tiny", trunk_num_heads=(3, 2, 4, 8)),
            r"trunk_num_heads\[0\] must be a multiple of 2 and divide dims\[0\]=",
        ),
        (
            lambda: small("ga_cswin_tiny", trunk_num_heads=(2, 2, 4)),
            "trunk_num_heads must be a number of at least 1 for each of 4 stages",
        ),
        (lambda: small("ga_cswin_tiny", fuse_num_heads=3), "fuse_num_heads must .*; got 3"),
    ],
)
def test_bad_constructions(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
