"""Step 8 arranged for speed in eager torch; also what runs where Triton cannot.

Three operations beside casts: x·Dᵀ, σ, and a product that is added onto x. h goes into D and W, which are small. For
h = 1 nothing is done, so a caller with many layers can make D/h and W·h of all of them at once and pass 1.

The arithmetic is fp32 at least. A half-precision hidden state is kept for the backward as it is, not in fp32.
"""

from typing import Any

import torch
from torch import Tensor

from ..common.dtypes import at_least_fp32, widest
from ..common.eager import add_bottleneck, multiply_onto
from ..common.operators import is_traced
from ..common.reference import ACTIVATIONS


def layer_update(
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    hidden_scale: float | Tensor,
    activation: str,
    adapter_index: Tensor | None,
) -> Tensor:
    """reference.layer_update, or reference.layer_update_by_row with an index, in the dtype of `hidden`."""
    dtype = at_least_fp32(widest(hidden, down, up))
    down, up = down.to(dtype), up.to(dtype)
    if isinstance(hidden_scale, Tensor):
        hidden_scale = hidden_scale.detach().to(dtype)
    if adapter_index is None:
        down, up = _scaled(down, up, hidden_scale)
        if down.dim() == 3:
            return _rounded_update(hidden, down, up, activation, None, dtype)
        return _rounded_update(hidden.flatten(0, 1), down, up, activation, None, dtype).view(hidden.shape)
    skipped = (adapter_index < 0).view(-1, 1, 1)
    rows = adapter_index.clamp(min=0).long()
    if isinstance(hidden_scale, Tensor) and hidden_scale.dim() == 1:
        hidden_scale = hidden_scale[rows].view(-1, 1, 1)
    down, up = _scaled(down[rows], up[rows], hidden_scale)
    # Zeros in place of D and W: an adapter that holds NaN must not reach rows that are not its own, in neither direction.
    return _rounded_update(hidden, down.masked_fill(skipped, 0), up.masked_fill(skipped, 0), activation, skipped, dtype)


def _scaled(down: Tensor, up: Tensor, hidden_scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """D/h and W·h."""
    if not isinstance(hidden_scale, Tensor) and hidden_scale == 1:
        return down, up
    return down / hidden_scale, up * hidden_scale


def _rounded_update(
    x: Tensor, down: Tensor, up: Tensor, activation: str, skipped: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`add_bottleneck` in `dtype`, rounded once to the dtype of x."""
    if x.dtype == dtype:
        return add_bottleneck(x, down, up, activation, skipped)
    if torch.is_grad_enabled() and not is_traced():
        return _RoundedUpdate.apply(x, down, up, activation, skipped)
    return add_bottleneck(x.to(dtype), down, up, activation, skipped).to(x.dtype)


class _RoundedUpdate(torch.autograd.Function):
    """`_rounded_update` that keeps x in its own dtype, and x·Dᵀ.

    With z = x·Dᵀ, Y = σ(z) and g the gradient of the result:
        dz = (g·Wᵀ) ∘ σ'(z)     dx = g + dz·D     dD = dzᵀ·x     dW = Yᵀ·g
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, activation: str, skipped: Tensor | None) -> Tensor:
        wide = x.to(down.dtype)
        z = _masked(wide @ down.mT, skipped)
        ctx.save_for_backward(x, down, up, z, skipped)
        ctx.activation = activation
        return multiply_onto(wide, ACTIVATIONS[activation](z), up).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, z, skipped = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():
            return _differentiable_grads(ctx, x, down, up, skipped, grad)
        needs_x, needs_down, needs_up, *_ = ctx.needs_input_grad
        grad = grad.to(down.dtype)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            inner = ACTIVATIONS[ctx.activation](z)
        (grad_z,) = torch.autograd.grad(inner, z, _masked(grad @ up.mT, skipped))
        return (
            multiply_onto(grad, grad_z, down).to(x.dtype) if needs_x else None,
            grad_z.mT @ x.to(down.dtype) if needs_down else None,
            _masked(inner.detach(), skipped).mT @ grad if needs_up else None,
            None,
            None,
        )


def _masked(inner: Tensor, skipped: Tensor | None) -> Tensor:
    return inner if skipped is None else inner.masked_fill(skipped, 0)


def _differentiable_grads(
    ctx: Any, x: Tensor, down: Tensor, up: Tensor, skipped: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph behind them, for a backward through the backward."""
    inputs = (x, down, up)
    needed = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    out = add_bottleneck(x.to(down.dtype), down, up, ctx.activation, skipped).to(x.dtype)
    made = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
    return (*(next(made) if need else None for need in ctx.needs_input_grad[:3]), None, None)
