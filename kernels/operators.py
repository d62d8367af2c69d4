"""Operator: a PyTorch custom operator that eager code calls without its detour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """A function of tensors as `torch.ops.hgprompt.<name>`: for `torch.compile`, export and all else that traces.

    Plain eager calls go to the function itself, through an `autograd.Function` where a gradient is wanted: the way
    through the dispatcher and back into Python may take the host longer, for one prompt and a small batch, than the
    GPU computes.

    Args:
        name, schema: of the operator, without its namespace. launch: the function, which is not differentiated.
        fake: outputs of the right shapes, strides and dtypes for the same arguments.
        backward, setup: (ctx, *gradients) → a gradient for each input, and (ctx, inputs, outputs), as for
            `torch.library.register_autograd`; None: not differentiable.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        launch: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        backward: Callable[..., Any] | None = None,
        setup: Callable[..., Any] | None = None,
    ) -> None:
        made = torch.library.custom_op(f"hgprompt::{name}", launch, mutates_args=(), schema=schema)
        made.register_fake(fake)
        self._launch, self._direct = launch, launch
        if backward is not None and setup is not None:
            torch.library.register_autograd(f"hgprompt::{name}", backward, setup_context=setup)
            self._direct = _differentiable(launch, setup, backward)
        self._op = getattr(torch.ops.hgprompt, name).default

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_traced(inputs):
            return self._op(*inputs)
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        return self._direct(*inputs) if wanted else self._launch(*inputs)


def _differentiable(
    launch: Callable[..., Any], setup: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = launch(*inputs)
            setup(ctx, inputs, outputs)
            return outputs

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    apply: Callable[..., Any] = Direct.apply
    return apply


def _is_traced(inputs: tuple[Any, ...]) -> bool:
    """Whether somebody watches what operators are called: a mode, a tensor of another kind, a function transform."""
    return (
        any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in inputs)
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )
