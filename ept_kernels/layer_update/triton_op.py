"""The kernels as operators that autograd, torch.compile and opcheck know.

    ept_kernels::layer_update             triton_forward.forward
    ept_kernels::layer_update_backward    triton_backward.backward

torch.library wants flat arguments, which only this file packs and unpacks. An ordinary eager call goes past the
operators, to the same functions and the same formula of autograd: the dispatcher would take longer than the kernels.

Saved for the backward beside the inputs: z, q numbers of 4 bytes for each token (8 in float64).
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..common.operators import is_eager, schema_of, unflatten
from . import triton_backward, triton_forward
from .arguments import Settings, Update

FORWARD = (Update, Settings)
SAVE = dict(save=bool)
GRADS = dict(input_grad=bool, weight_grad=bool, grad_out=Tensor, z=Tensor)


@torch.library.custom_op(
    "ept_kernels::layer_update", mutates_args=(), schema=schema_of(*FORWARD, returns=2, **SAVE)
)  # fmt: skip
def layer_update_op(*flat: Any) -> tuple[Tensor, ...]:
    """The updated hidden states and z, for the fields of FORWARD and `save`."""
    return tuple(triton_forward.forward(*unflatten(flat, *FORWARD)))


@layer_update_op.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    update, _, save = unflatten(flat, *FORWARD)
    return tuple(triton_forward.empty_results(update, save))


@torch.library.custom_op(
    "ept_kernels::layer_update_backward", mutates_args=(), schema=schema_of(*FORWARD, returns=3, **GRADS)
)  # fmt: skip
def layer_update_backward_op(*flat: Any) -> tuple[Tensor, ...]:
    """The gradients of hidden, down and up, for the fields of FORWARD and those of GRADS."""
    update, settings, input_grad, weight_grad, grad_out, z = unflatten(flat, *FORWARD)
    return tuple(triton_backward.backward(grad_out, update, z, settings, input_grad, weight_grad))


@layer_update_backward_op.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    update, _, input_grad, weight_grad, *_ = unflatten(flat, *FORWARD)
    return tuple(triton_backward.empty_grads(update, input_grad, weight_grad))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    update, settings, _ = unflatten(inputs, *FORWARD)
    _, z = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z)
    ctx.save_for_backward(*update, z)
    ctx.settings = settings


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(Update._fields) + len(Settings._fields) + 1)
    if grad_out is None:
        return nothing
    update, z = unflatten(ctx.saved_tensors, Update)
    settings, grad_out = ctx.settings, grad_out.contiguous()
    needs_hidden, needs_down, needs_up, *_ = ctx.needs_input_grad
    wanted = (needs_hidden, needs_down or needs_up)
    # Where somebody means to go backward through this, the operator is what refuses it.
    if not torch.is_grad_enabled() and is_eager(grad_out):
        grads = tuple(triton_backward.backward(grad_out, update, z, settings, *wanted))
    else:
        grads = layer_update_backward_op(*update, *settings, *wanted, grad_out, z)
    needed = (needs_hidden, needs_down, needs_up)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *nothing[3:]


def _refuse_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError('impl="triton" has no second derivative: use impl="torch" for a backward through the backward')


layer_update_op.register_autograd(_backward, setup_context=_setup_context)
layer_update_backward_op.register_autograd(_refuse_double_backward)


class LayerUpdate(torch.autograd.Function):
    """layer_update_op for eager calls."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Tensor:
        output = triton_forward.forward(*unflatten(flat, *FORWARD))
        _setup_context(ctx, flat, output)
        return output.out

    backward = staticmethod(_backward)


def layer_update(update: Update, settings: Settings) -> Tensor:
    """The updated hidden states [batch, columns, d]."""
    hidden, down, up, index, scales = update
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    index = None if index is None else index.contiguous()
    scales = None if scales is None else scales.contiguous()
    update = Update(hidden, down.contiguous(), up.contiguous(), index, scales)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, down, up))
    if not is_eager(*update):
        return layer_update_op(*update, *settings, save)[0]
    if save:
        return LayerUpdate.apply(*update, *settings, save)
    return triton_forward.forward(update, settings, save).out
