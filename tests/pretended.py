"""A GPU that is pretended: its tensors lie on the processor, marked by their storage, and what a real one refuses is refused: operators on
tensors of two devices, numbers drawn by a generator of the processor, arrays of its tensors. What would wait for it is counted by the line of
`compress` that does. Streams, pinned memory and what its kernels compute are not pretended.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compress import files

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ATEN = torch.ops.aten
_WAITS = {
    ATEN._local_scalar_dense.default,
    ATEN._linalg_check_errors.default,
    ATEN.nonzero.default,
    ATEN.equal.default,
    ATEN.masked_select.default,
    ATEN._unique2.default,
}
_BOTH = {ATEN.copy_.default, ATEN._copy_from.default, ATEN.set_.source_Tensor}
"""Operators that take tensors of two devices."""
_INDEXING = {
    ATEN.index.Tensor,
    ATEN.index_put.default,
    ATEN.index_put_.default,
    ATEN._index_put_impl_.default,
    ATEN._unsafe_index.Tensor,
}

_DRAWING = {
    Tensor.random_, Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.bernoulli_, torch.bernoulli, torch.multinomial,
}  # fmt: skip


def is_on_gpu(tensor: Tensor) -> bool:
    try:
        return getattr(tensor.untyped_storage(), "on_gpu", False)
    except (NotImplementedError, RuntimeError):
        return False


def _put(tensor: Any, on_gpu: bool) -> Any:
    if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
        tensor.untyped_storage().on_gpu = on_gpu
    return tensor


def _device(given: Any) -> torch.device | None:
    if isinstance(given, torch.device):
        return given
    if isinstance(given, str):
        return torch.device(given)
    if isinstance(given, Tensor):
        return GPU if is_on_gpu(given) else given.device
    return None


class _Operators(TorchDispatchMode):
    """Refuses operators on tensors of two devices; results lie where the operands do."""

    def __init__(self, owner: Pretended) -> None:
        super().__init__()
        self._owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in given if is_on_gpu(x)]
        here = [x for x in given if not is_on_gpu(x) and x.device.type == "cpu"]
        if there and here and func not in _BOTH:
            if func in _INDEXING:
                fine = is_on_gpu(args[0]) and all(x.ndim == 0 for x in here if any(x is y for y in args[2:]))
            else:  # (a number of the processor is an operand like a Python number, and no place for a result)
                written = func._schema.is_mutable and isinstance(args[0], Tensor) and not is_on_gpu(args[0])
                fine = all(x.ndim == 0 for x in here) and not written
            if not fine:
                shapes = [[tuple(x.shape) for x in tensors] for tensors in (there, here)]
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {func}, cuda {shapes[0]}, cpu {shapes[1]}"
                )
        if there:
            self._owner.ran[str(func)] += 1
            by_mask = func in _INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
            if func in _WAITS or by_mask:
                self._owner.wait(str(func))
        found = func(*args, **kwargs)
        if func in _BOTH:
            return found
        if there or not given:
            for x in pytree.tree_leaves(found):
                if isinstance(x, Tensor) and there:
                    _put(x, True)
        return found


class Pretended(TorchFunctionMode):
    """Inside, tensors can be put on a GPU that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.ran: Counter[str] = Counter()
        self._operators = _Operators(self)

    def wait(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            if "/compress/" in frame.filename and "/tests/" not in frame.filename:
                place = frame.filename.rpartition("/compress/")[2]
                self.waits[f"{what} {place}:{frame.lineno} {frame.line}"] += 1
                return
        self.waits[what] += 1

    def __enter__(self) -> Pretended:
        self._operators.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        super().__exit__(*what)
        self._operators.__exit__(*what)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return GPU if is_on_gpu(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return is_on_gpu(args[0])
        if func == Tensor.is_cpu.__get__:
            return not is_on_gpu(args[0]) and func(*args)
        if func in (Tensor.numpy, Tensor.__array__) and is_on_gpu(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.tolist and is_on_gpu(args[0]):
            self.wait("tolist")
        if func is Tensor.cpu:
            return self._moved(args[0], CPU, args[0])
        if func is Tensor.cuda:
            return self._moved(args[0], GPU, args[0])
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.mm and "out_dtype" in kwargs:  # which processors have not
            if not is_on_gpu(args[0]):
                raise NotImplementedError("torch.mm(out_dtype=...) on a processor")
            return torch.mm(*(x.to(kwargs["out_dtype"]) for x in args))
        target = _device(kwargs.get("device"))
        if target is not None and target.type == "cuda":
            kwargs["device"] = CPU
        generator = kwargs.get("generator")
        if generator is not None and target is not None and target.type == "cuda":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if func in _DRAWING and generator is not None and is_on_gpu(args[0]):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        found = func(*args, **kwargs)
        if target is not None:
            for x in pytree.tree_leaves(found):
                if isinstance(x, Tensor) and x.device.type == "cpu":
                    storage = x.untyped_storage()._cdata
                    if any(isinstance(a, Tensor) and a.untyped_storage()._cdata == storage for a in args):
                        continue
                    _put(x, target.type == "cuda")
        return found

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        target = _device(kwargs.get("device"))
        given = []
        for x in args:
            if isinstance(x, (torch.device, str)):
                target = _device(x)
                given.append(CPU if target.type == "cuda" else x)
            elif isinstance(x, Tensor):
                target = _device(x)
                given.append(x)
            else:
                given.append(x)
        if target is not None and "device" in kwargs and target.type == "cuda":
            kwargs["device"] = CPU
        found = tensor.to(*given, **kwargs)
        if target is None:
            return found
        return self._moved(found, target, tensor)

    def _moved(self, found: Tensor, target: torch.device, tensor: Tensor) -> Tensor:
        if target.type == "meta" or found.device.type == "meta":
            return found
        wanted = target.type == "cuda"
        if is_on_gpu(found) == wanted:
            return found
        if wanted is False:
            self.wait("to cpu")
        if found.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            found = _Copied.apply(found) if found.requires_grad and torch.is_grad_enabled() else found.clone()
        return _put(found, wanted)


class _Files:
    """A safetensors file that is read to the GPU."""

    def __init__(self, path: Any, **how: Any) -> None:
        self._file = safe_open(path, **{**how, "device": "cpu"})
        self._there = str(how.get("device", "cpu")).startswith("cuda")

    def __enter__(self) -> _Files:
        self._file = self._file.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self._file.__exit__(*what)

    def get_tensor(self, name: str) -> Tensor:
        return _put(self._file.get_tensor(name), self._there)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return slopes[0]


@contextlib.contextmanager
def pretended(patch: pytest.MonkeyPatch, memory: int = 80 << 30) -> Iterator[Pretended]:
    """Everything inside sees one GPU of so many bytes."""
    autocast = torch.autocast

    class Autocast(autocast):  # type: ignore[misc,valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(files, "safe_open", _Files)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "a pretended GPU",
        "mem_get_info": (memory, memory),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "is_bf16_supported": True,
        "_lazy_init": None,
    }.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    with Pretended() as mode:
        yield mode
