"""The kernels as operators that autograd, torch.compile and opcheck know.

    ept_kernels::prompt_embed             triton_forward.forward
    ept_kernels::prompt_embed_backward    triton_backward.backward
    ept_kernels::prompt_embed_by_row      triton_by_row.forward, which has no backward

torch.library wants flat arguments, which only this file packs and unpacks. An ordinary eager call goes past the
operators, to the same functions and the same formula of autograd: the dispatcher would take longer than the kernels.

Saved for the backward beside the inputs, in bytes (4 per number, 8 in float64): (batch·L + batch) for the slots where
there is a mask, batch·L·q for the token-conditioned update, s·(2·(r + K·h) + K + 2) for the prompt.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..common.operators import Call, apply, is_eager, schema_of, unflatten
from ..common.triton_launch import launch_mode
from ..common.triton_repeat import repeat
from . import triton_backward, triton_by_row, triton_forward
from .arguments import Settings, Stack, Text, Weights
from .triton_forward import Kept

FORWARD = (Text, Weights, Settings)
BACKWARD = (Text, Weights, Kept, Settings)
Flat = tuple[Tensor, ...]

SAVE = dict(save=bool)
GRADS = dict(input_grad=bool, grad_out=Tensor, grad_gate=Tensor | None)


def _flat_results(results: triton_forward.Results) -> Flat:
    return results.out, results.gate, *results.kept


@torch.library.custom_op(
    "ept_kernels::prompt_embed", mutates_args=(),
    schema=schema_of(*FORWARD, returns=2 + len(Kept._fields), **SAVE),
)  # fmt: skip
def prompt_embed_op(*flat: Any) -> Flat:
    """X, the gate and what is kept, for the fields of FORWARD and `save`."""
    return _flat_results(triton_forward.forward(*unflatten(flat, *FORWARD)))


@prompt_embed_op.register_fake
def _(*flat: Any) -> Flat:
    return _flat_results(triton_forward.empty_results(*unflatten(flat, *FORWARD)))


@torch.library.custom_op(
    "ept_kernels::prompt_embed_backward", mutates_args=(),
    schema=schema_of(*BACKWARD, returns=len(Weights._fields) + 1, **GRADS),
)  # fmt: skip
def prompt_embed_backward_op(*flat: Any) -> Flat:
    """The gradients of the weights and of the source, for the fields of BACKWARD and those of GRADS."""
    text, weights, kept, settings, input_grad, grad_out, grad_gate = unflatten(flat, *BACKWARD)
    return triton_backward.backward(grad_out, grad_gate, text, weights, kept, settings, input_grad).flat


@prompt_embed_backward_op.register_fake
def _(*flat: Any) -> Flat:
    text, weights, _, _, input_grad, *_ = unflatten(flat, *BACKWARD)
    return triton_backward.empty_grads(text, weights, input_grad).flat


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Flat) -> None:
    text, weights, settings, _ = unflatten(inputs, *FORWARD)
    out, _, *kept = output
    ctx.mark_non_differentiable(*kept)
    _keep(ctx, (*text, *weights), kept, settings, out.shape, None)


def _keep(
    ctx: Any,
    tensors: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    settings: Settings,
    out_shape: torch.Size,
    call: Call | None,
) -> None:
    """`tensors` are the fields of Text and of Weights."""
    ids, source, _, _, *weights = tensors
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ids, source, *weights, *kept)
    ctx.settings, ctx.out_shape, ctx.call = settings, out_shape, call


def _backward(ctx: Any, grad_out: Tensor | None, grad_gate: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the operator's arguments, for those that need one."""
    ids, source, *tensors = ctx.saved_tensors
    grad_out = source.new_zeros(ctx.out_shape) if grad_out is None else grad_out.contiguous()
    grad_gate = None if grad_gate is None else grad_gate.contiguous()
    _, input_grad, _, _, *needed = ctx.needs_input_grad
    *weight_grads, source_grad = prompt_embed_backward_op(
        ids, source, None, None, *tensors, *ctx.settings, input_grad, grad_out, grad_gate
    )
    of_weights = [grad if need else None for grad, need in zip(weight_grads, needed, strict=False)]
    return None, source_grad if input_grad else None, None, None, *of_weights, *_REST


_REST = (None,) * (len(Settings._fields) + len(SAVE))  # of the operator's arguments


def _refuse_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError('impl="triton" has no second derivative: use impl="torch" for a backward through the backward')


prompt_embed_op.register_autograd(_backward, setup_context=_setup_context)
prompt_embed_backward_op.register_autograd(_refuse_double_backward)


class PromptEmbed(torch.autograd.Function):
    """X alone of prompt_embed_op for eager calls: the fields of Text and of Weights, then settings and Call."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, settings, call = args
        out, *kept = _forward_launch(tensors, settings, True, call)
        _keep(ctx, tensors, kept, settings, out.shape, call)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad_out,) = grads
        # Where somebody means to go backward through this, the operator is what refuses it.
        if grad_out is None or torch.is_grad_enabled() or not is_eager(grad_out):
            return *_backward(ctx, grad_out, None)[: -len(_REST)], None, None
        tensors = (grad_out.contiguous(), *ctx.saved_tensors)
        return _backward_launches(tensors, ctx.settings, ctx.needs_input_grad[1], ctx.call)


def _forward_launch(tensors: Sequence[Tensor | None], settings: Settings, save: bool, call: Call) -> Sequence[Tensor]:
    """X and what is kept. `tensors` are the fields of Text and of Weights."""

    def function(*tensors: Any) -> Sequence[Tensor]:
        text, weights = unflatten(tensors, Text, Weights)
        out, _, kept = triton_forward.forward(text, weights, settings, save)
        return out, *kept

    return repeat(call, ("forward", save, launch_mode()), function, tensors)


def _backward_launches(
    tensors: Sequence[Any], settings: Settings, input_grad: bool, call: Call
) -> Sequence[Tensor | None]:
    """The gradients of PromptEmbed's arguments for that of X and what `_keep` saved."""

    def function(*tensors: Any) -> Sequence[Tensor | None]:
        grad_out, ids, source, *rest = tensors
        weights, kept = unflatten(rest, Weights, Kept)
        grads = triton_backward.backward(grad_out, None, Text(ids, source, None), weights, kept, settings, input_grad)
        of_weights = [None if weight is None else grad for weight, grad in zip(weights, grads.weights, strict=True)]
        return None, grads.source if input_grad else None, None, None, *of_weights, None, None

    # What is saved may have been packed and unpacked, and come back with other strides.
    return repeat(call, ("backward", tensors[2].stride(), input_grad), function, tensors)


def prompt_embed(text: Text, weights: Weights, settings: Settings, call: Call | None = None) -> Tensor:
    """X [batch, s + L, d]. `call` is that of the public function. Without it the tensors go through the operator."""
    if call is None:
        return prompt_embed_with_gate(text, weights, settings)[0]
    if not call.contiguous:
        text, weights = _row_major(text), weights.contiguous()
    tensors = (*text, *weights)
    if torch.is_grad_enabled() and _asks_for_gradients(text.source, weights):
        return apply(PromptEmbed, *tensors, settings, call)
    return _forward_launch(tensors, settings, False, call)[0]


def prompt_embed_with_gate(text: Text, weights: Weights, settings: Settings) -> tuple[Tensor, Tensor]:
    """X [batch, s + L, d] and the gate [s, K]."""
    text, weights = _row_major(text), weights.contiguous()
    save = torch.is_grad_enabled() and _asks_for_gradients(text.source, weights)
    out, gate, *_ = prompt_embed_op(*text, *weights, *settings, save)
    return out, gate


def _row_major(text: Text) -> Text:
    ids, source, mask, starts = text
    if ids is None or source.stride(-1) != 1:
        source = source.contiguous()
    ids, mask, starts = (None if t is None else t.contiguous() for t in (ids, mask, starts))
    return Text(ids, source, mask, starts)


def _asks_for_gradients(source: Tensor, weights: Weights) -> bool:
    for t in (source, *weights):  # noqa: SIM110  any(…) takes twice the time
        if t is not None and t.requires_grad:
            return True
    return False


@torch.library.custom_op(
    "ept_kernels::prompt_embed_by_row", mutates_args=(), schema=schema_of(Text, Stack, Settings, returns=1)
)  # fmt: skip
def prompt_embed_by_row_op(*flat: Any) -> Tensor:
    """X for the fields of Text, Stack and Settings."""
    return triton_by_row.forward(*unflatten(flat, Text, Stack, Settings))


@prompt_embed_by_row_op.register_fake
def _(*flat: Any) -> Tensor:
    text, stack, _ = unflatten(flat, Text, Stack, Settings)
    return triton_by_row.empty_result(text, stack)


def prompt_embed_by_row(text: Text, stack: Stack, settings: Settings, call: Call | None = None) -> Tensor:
    """X [batch, S + L, d] of rows of several adapters; without gradients. `call` as for `prompt_embed`."""
    if call is None or not call.contiguous:
        text = _row_major(text)
        prompt, *others = stack
        if prompt.stride()[1:] != (prompt.shape[2], 1):  # a longer stack's first or last rows are taken as they are
            prompt = prompt.contiguous()
        stack = Stack(prompt, *(None if t is None else t.contiguous() for t in others))
    if call is None:
        return prompt_embed_by_row_op(*text, *stack, *settings)

    def function(*tensors: Any) -> Sequence[Tensor]:
        text, stack = unflatten(tensors, Text, Stack)
        return (triton_by_row.forward(text, stack, settings),)

    return repeat(call, "by row", function, (*text, *stack))[0]
