"""A GPU for tests where there is none: tensors of the CPU that say they are on cuda:0, and refuse to be mixed.

What a GPU would refuse is refused here too: an operation on tensors of both devices, an index or a generator of the
wrong one, a view of a GPU's memory as an array. Nothing else of a GPU is imitated, and plain functions stand in for
kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
_MARK = "_on_the_other_device"
_FACTORIES = {
    getattr(torch, name)
    for name in (
        "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like",
        "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
    )
}  # fmt: skip
_OF_ITS_ARGUMENT = ("_like", "as_tensor")
_TO_THE_HOST = {"numpy", "__array__"}
_ANYWHERE = {"copy_", "record_stream", "__set__", "__repr__", "__format__", "data_ptr", "untyped_storage"}
_STACKING = {"cat", "stack", "matmul", "mm", "bmm", "mv"}  # which take no number of another device either


def on_gpu(x: Any) -> bool:
    """Whether this is a tensor on the device that is not there."""
    return isinstance(x, Tensor) and _MARK in x.__dict__


@contextlib.contextmanager
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While the block runs, torch has a GPU."""
    from hgprompt.kernels import compiler, gram, mixture, moments

    class Nothing:
        """A stream, an event, a guard."""

        def __init__(self, *args: Any, **options: Any) -> None: ...
        def __enter__(self) -> Nothing:
            return self

        def __exit__(self, *error: object) -> None: ...
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **options: Nothing()

    for name in ("Stream", "stream", "current_stream", "Event", "device"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (60 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))  # before what kernels are written for
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    for module in (compiler, mixture):
        monkeypatch.setattr(module, "available", lambda device: False)
    for module in (gram, mixture, moments):
        monkeypatch.setattr(module, "takes", lambda *_: False)
    with _Mode():
        yield


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property
            found = getattr(getattr(func, "__self__", None), "__name__", "")
            if found in ("device", "is_cuda", "is_cpu"):
                there = on_gpu(args[0])
                return {"device": GPU if there else func(*args), "is_cuda": there, "is_cpu": not there}[found]
        if func in _FACTORIES or name.startswith("new_"):
            return _made(func, name, args, kwargs)
        if name in ("to", "cpu", "cuda", "pin_memory"):
            return _moved(func, name, args, kwargs)
        if name in _TO_THE_HOST and on_gpu(args[0]):
            raise TypeError(f"{name} of a tensor on {GPU}")
        if name in _ANYWHERE:
            return func(*args, **kwargs)
        tensors = list(_tensors((args, kwargs)))
        there = [on_gpu(x) for x in tensors]
        if name == "__getitem__":
            if any(there) and not there[0]:
                raise RuntimeError(f"an index on {GPU} into a tensor of the CPU")
            return _marked(func(*args, **kwargs), there[0])
        if name == "__setitem__":
            if any(there[1:]) and not there[0]:
                raise RuntimeError(f"an index or a value on {GPU} put into a tensor of the CPU")
            return func(*args, **kwargs)
        if any(there):
            strangers = [x for x, here in zip(tensors, there, strict=True) if not here]
            if any(x.ndim or name.strip("_") in _STACKING for x in strangers):
                shapes = [f"{list(x.shape)} on {'GPU' if t else 'CPU'}" for x, t in zip(tensors, there, strict=True)]
                raise RuntimeError(f"{name} of tensors on two devices: {', '.join(shapes)}")
        return _marked(func(*args, **kwargs), True) if any(there) else func(*args, **kwargs)


def _made(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    device = kwargs.pop("device", None)
    kwargs.pop("pin_memory", None)
    inherits = name.endswith(_OF_ITS_ARGUMENT) or name.startswith("new_")
    there = inherits and on_gpu(args[0]) if device is None else torch.device(device).type == "cuda"
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"a generator of the CPU for a tensor on {GPU}")
    made: Tensor = func(*args, **kwargs)
    return _marked(made, there)


def _moved(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x, there = args[0], on_gpu(args[0])
    if name == "pin_memory" and there:
        raise RuntimeError(f"memory of {GPU} cannot be pinned")
    dtype = kwargs.get("dtype")
    target = {"cpu": "cpu", "cuda": "cuda"}.get(name, kwargs.get("device"))
    for value in args[1:]:
        if isinstance(value, Tensor):
            dtype, target = value.dtype, GPU if on_gpu(value) else "cpu"
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (torch.device, str, int)) and not isinstance(value, bool):
            target = value
    goes = there if target is None else torch.device(target).type == "cuda"
    y = x if dtype is None or dtype == x.dtype else x.to(dtype)
    a_copy = goes != there or name == "pin_memory" or kwargs.get("copy")
    return _marked(y.clone() if y is x and a_copy else y, goes)


def _marked(x: Any, there: bool) -> Any:
    for tensor in _tensors(x):
        if there:
            setattr(tensor, _MARK, True)
        else:
            tensor.__dict__.pop(_MARK, None)
    return x


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, slice):
        yield from _tensors((x.start, x.stop, x.step))
    elif isinstance(x, dict):
        yield from _tensors(tuple(x.values()))
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from _tensors(part)
