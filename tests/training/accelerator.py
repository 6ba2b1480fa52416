"""An accelerator for machines without one: it computes on the host, and is strict as a GPU is.

    python tests/training/accelerator.py SCRIPT [ARGUMENTS]

runs a script where PyTorch finds a device ``emulated``. Its tensors do not mix with those of the
CPU, random numbers come from a generator of its own, it has autocast, autograd's threads, and
collective operations of its own name. Every operation gives the CPU's numbers. In the
end it prints how often the host has waited for the device, to read there.
"""

import atexit
import contextlib
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.backend_registration as registration
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "emulated"
# Only these take tensors of two devices; index tensors of the CPU serve on any.
_COPIES = ("aten::_to_copy", "aten::copy_")
_SHAPED_BY_VALUES = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::bincount")
_INDEXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")
# A selection of what CUDA's autocast casts, all that is computed here.
_LOWER = ("linear", "matmul", "bmm", "conv2d", "einsum", "scaled_dot_product_attention")
_FLOAT32 = ("layer_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss", "exp", "sum")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_libraries: list[torch.library.Library] = []  # what they register is gone with them


class Device(registration._DummyBackendModule):
    """``torch.emulated``: what PyTorch and scripts ask of ``torch.cuda``, for one device.

    Attributes:
        reads: How often the host has read what the device computed.
    """

    _initialized = True
    reads = 0
    generator = torch.Generator()

    def set_device(self, device: object) -> None:
        assert torch.device(device).index == 0, f"set_device({device})"

    def device(self, index: int) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self, device: object = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self, device: object = None) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        self.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class OnDevice(Tensor):
    """A tensor of the device.

    Attributes:
        host: Its numbers.
    """

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnDevice":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(KIND, 0),
        )
        tensor.host = host
        return tensor

    def __repr__(self) -> str:
        return f"OnDevice({self.host})"

    def tolist(self) -> Any:  # PyTorch refuses it for tensors of other classes
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(op, args, kwargs or {})


class Generator(torch.Generator):
    """A generator of the device is one of the host."""

    def __new__(cls, device: object = "cpu") -> "Generator":
        return super().__new__(cls, "cpu" if torch.device(device).type == KIND else device)


class _Interceptor(TorchDispatchMode):
    """Finds what concerns the device, tensors made there among it."""

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
        if tensors or _is_here(kwargs.get("device")):
            return _compute(op, args, kwargs)
        return op(*args, **kwargs)


def _on_host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, OnDevice) else leaf


def _is_here(device: object) -> bool:
    return device is not None and torch.device(device).type == KIND


def _compute(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation on the host's numbers, whose results are where the operation's are."""
    leaves = tree_leaves((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    if inputs:
        _check_devices(op, leaves)
    here = bool(inputs)
    if kwargs.get("device") is not None:
        here = _is_here(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif op._schema.name == "aten::copy_":
        here = isinstance(args[0], OnDevice)
    if inputs and (not here or _has_shape_of_values(op, args)):
        Device.reads += 1
    host_args, host_kwargs = tree_map(_on_host, (args, kwargs))
    with _drawing_here(op, host_kwargs) if here else contextlib.nullcontext():
        results = op(*host_args, **host_kwargs)
    for tensor in inputs:
        assert tensor.shape == tensor.host.shape, f"{op} changes a shape in place: not emulated"
    known = {id(tensor.host): tensor for tensor in inputs}

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, OnDevice) or not here:
            return leaf
        return known[id(leaf)] if id(leaf) in known else OnDevice(leaf)

    return tree_map(placed, results)


def _has_shape_of_values(op: Any, args: Sequence[Any]) -> bool:
    """Whether a result is a number, or a tensor whose shape hangs on values: the host waits."""
    masks = (torch.bool, torch.uint8)
    masked = op._schema.name in _INDEXED and any(
        isinstance(index, Tensor) and index.dtype in masks for index in args[1]
    )
    numbers = any(
        result.type.kind() in ("NumberType", "BoolType", "IntType", "FloatType")
        for result in op._schema.returns
    )
    return masked or numbers or op._schema.name in _SHAPED_BY_VALUES


def _check_devices(op: Any, leaves: Sequence[Any]) -> None:
    """As a GPU does: numbers of the CPU are taken, its tensors are not."""
    if op._schema.name in _COPIES or op._schema.name in _INDEXED:
        return
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.dim():
            raise RuntimeError(f"{op}: expected all tensors on {KIND}, found one on {leaf.device}")


@contextlib.contextmanager
def _drawing_here(op: Any, kwargs: Mapping[str, Any]) -> Any:
    """Random numbers come from the device's generator and not from the CPU's."""
    if torch.Tag.nondeterministic_seeded not in op.tags or kwargs.get("generator") is not None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(Device.generator.get_state())
        yield
        Device.generator.set_state(torch.random.get_rng_state())


def _autocast(op: Any, dtype: torch.dtype | None) -> Callable[..., Any]:
    """The operation with its arguments cast, to autocast's type when None is given."""

    def run(*args: Any, **kwargs: Any) -> Any:
        wanted = dtype or torch.get_autocast_dtype(KIND)

        def cast(leaf: Any) -> Any:
            eligible = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.to(wanted) if eligible and leaf.device.type == KIND else leaf

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            args, kwargs = tree_map(cast, (args, kwargs))
            return op(*args, **kwargs)

    return run


def _add_autocast() -> None:
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    for names, dtype in ((_LOWER, None), (_FLOAT32, torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(name, _autocast(op, dtype), "AutocastPrivateUse1")
    _libraries.extend((others, library))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _on_host(target).copy_(_on_host(source))
    return target


def _add_kernels() -> None:
    """What ``torch.tensor`` and others call in C++, past all that intercepts."""
    library = torch.library.Library("aten", "IMPL")
    for op in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):

        def run(*args: Any, op: Any = op, **kwargs: Any) -> OnDevice:
            return OnDevice(op(*args, **{**kwargs, "device": torch.device("cpu")}))

        library.impl(op, run, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _libraries.append(library)


def install() -> None:
    """From here on PyTorch has the device: for good, and before anything goes backward."""
    device = Device()
    registration._setup_privateuseone_for_python_backend(KIND, backend_module=device)
    _add_kernels()
    _add_autocast()
    torch.Generator = Generator
    torch.accelerator.synchronize = device.synchronize
    # c10d's operations, too, come by `_compute`, which has gloo do them on the host.
    dist.Backend.register_backend("emulated_ccl", dist.ProcessGroupGloo, devices=[KIND])
    _Interceptor().__enter__()


if __name__ == "__main__":
    if not (sys.argv[1:] and Path(sys.argv[1]).is_file()):
        found = " ".join(sys.argv[1:])
        print(
            f"accelerator.py: error: expected SCRIPT [ARGUMENTS], found '{found}'", file=sys.stderr
        )
        sys.exit(2)
    install()
    from qna_timm.training.data import loaders

    loaders._PREFETCH_DEVICES = (KIND,)  # as on a GPU, batches are made ready on the device
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    atexit.register(lambda: print("reads:", Device.reads))
    runpy.run_path(sys.argv[0], run_name="__main__")
