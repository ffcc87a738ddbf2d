"""The kernels as operators that autograd, torch.compile and opcheck know.

    ept_kernels::layer_update             triton_forward.forward
    ept_kernels::layer_update_backward    triton_backward.backward

torch.library wants flat arguments, which only this file packs and unpacks. An ordinary eager call goes past the
operators, to the same functions and the same formula of autograd: the dispatcher would take longer than the kernels.

Saved for the backward beside the inputs: z, q numbers of 4 bytes for each token (8 in float64).
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..common.operators import Call, apply, is_eager, schema_of, unflatten
from ..common.triton_repeat import repeat
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
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, update, output[1], settings, None)


def _keep(ctx: Any, update: Update, z: Tensor, settings: Settings, call: Call | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*update, z)
    ctx.settings, ctx.call = settings, call


def _gradients(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of hidden, down and up, for the arguments that need one."""
    if grad_out is None:
        return None, None, None
    *tensors, z = ctx.saved_tensors
    update, settings, grad_out = Update(*tensors), ctx.settings, grad_out.contiguous()
    needs_hidden, needs_down, needs_up, *_ = ctx.needs_input_grad
    wanted = (needs_hidden, needs_down or needs_up)
    # Where somebody means to go backward through this, the operator is what refuses it.
    if not torch.is_grad_enabled() and is_eager(grad_out):
        grads = _backward_launches(update, z, grad_out, settings, wanted, ctx.call)
    else:
        grads = layer_update_backward_op(*update, *settings, *wanted, grad_out, z)
    hidden, down, up = grads
    return hidden if needs_hidden else None, down if needs_down else None, up if needs_up else None


def _backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, *grads), *_REST


_REST = (None,) * (len(Update._fields) + len(Settings._fields) + len(SAVE) - 3)  # of the operator's arguments


def _refuse_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError('impl="triton" has no second derivative: use impl="torch" for a backward through the backward')


layer_update_op.register_autograd(_backward, setup_context=_setup_context)
layer_update_backward_op.register_autograd(_refuse_double_backward)


class LayerUpdate(torch.autograd.Function):
    """layer_update_op for eager calls: the fields of Update, then settings and Call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, settings, call = args
        update = Update(*tensors)
        out, z = _forward_launch(update, settings, True, call)
        _keep(ctx, update, z, settings, call)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_gradients(ctx, *grads), None, None, None, None


def _forward_launch(update: Update, settings: Settings, save: bool, call: Call) -> Sequence[Tensor]:
    def function(*tensors: Any) -> Sequence[Tensor]:
        return triton_forward.forward(Update(*tensors), settings, save)

    return repeat(call, ("forward", save), function, update)


def _backward_launches(
    update: Update, z: Tensor, grad_out: Tensor, settings: Settings, wanted: tuple[bool, bool], call: Call | None
) -> Sequence[Tensor]:
    def function(*tensors: Any) -> Sequence[Tensor]:
        grad_out, z, *rest = tensors
        return triton_backward.backward(grad_out, Update(*rest), z, settings, *wanted)

    if call is None:
        return function(grad_out, z, *update)
    # What is saved may have been packed and unpacked, and come back with other strides.
    return repeat(call, ("backward", update.hidden.stride(), wanted), function, (grad_out, z, *update))


def layer_update(update: Update, settings: Settings, call: Call | None = None) -> Tensor:
    """The updated hidden states [batch, columns, d].

    `call` is that of the public function. Without it the tensors go through the operator.
    """
    if call is None or not call.contiguous:
        update = _row_major(update)
    hidden, down, up, *_ = update
    save = torch.is_grad_enabled() and (hidden.requires_grad or down.requires_grad or up.requires_grad)
    if call is None:
        return layer_update_op(*update, *settings, save)[0]
    if save:
        return apply(LayerUpdate, *update, settings, call)
    return _forward_launch(update, settings, False, call)[0]


def _row_major(update: Update) -> Update:
    """All tensors in row-major order but for hidden, of which the last axis alone has to be."""
    hidden, down, up, index, scales = update
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    index = None if index is None else index.contiguous()
    return Update(hidden, down.contiguous(), up.contiguous(), index, None if scales is None else scales.contiguous())
