"""The kernels as operators that autograd, torch.compile and opcheck know.

    ept_kernels::prompt_embed             triton_forward.forward
    ept_kernels::prompt_embed_backward    triton_backward.backward

An ordinary eager call goes past the operators, whose way through the dispatcher takes longer than the kernels do, to
the same functions and the same formula of autograd.

Saved for the backward beside the inputs, in bytes (4 per number, 8 in float64): (batch·L + batch) for the slots where
there is a mask, batch·L·q for the token-conditioned update, s·(2·(r + K·h) + K + 2) for the prompt.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import triton_backward, triton_forward


@torch.library.custom_op("ept_kernels::prompt_embed", mutates_args=())
def prompt_embed_op(
    ids: Tensor | None,
    source: Tensor,
    mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    scale: float,
    embed_scale: float,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return triton_forward.forward(
        ids, source, mask, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up,
        scale, embed_scale, activation, prompt_start, lowrank_update, fusion, save,
    )  # fmt: skip


@prompt_embed_op.register_fake
def _(
    ids: Tensor | None,
    source: Tensor,
    mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    scale: float,
    embed_scale: float,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
    save: bool,
) -> triton_forward.Results:
    return triton_forward.empty_results(
        ids, source, mask, prompt, lowrank_a, lowrank_b, space_down, gate_weight, token_down, token_up, fusion, save
    )


@torch.library.custom_op("ept_kernels::prompt_embed_backward", mutates_args=())
def prompt_embed_backward_op(
    grad_out: Tensor,
    grad_gate: Tensor | None,
    ids: Tensor | None,
    source: Tensor,
    masked: bool,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    slots: Tensor,
    lengths: Tensor,
    inner: Tensor,
    down: Tensor,
    mix: Tensor,
    softmax: Tensor,
    scale: float,
    embed_scale: float,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
    input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return triton_backward.backward(
        grad_out, grad_gate, ids, source, masked, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight,
        token_down, token_up, slots, lengths, inner, down, mix, softmax,
        scale, embed_scale, activation, prompt_start, lowrank_update, fusion, input_grad,
    )  # fmt: skip


@prompt_embed_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_gate: Tensor | None,
    ids: Tensor | None,
    source: Tensor,
    masked: bool,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    slots: Tensor,
    lengths: Tensor,
    inner: Tensor,
    down: Tensor,
    mix: Tensor,
    softmax: Tensor,
    scale: float,
    embed_scale: float,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
    input_grad: bool,
) -> triton_backward.Gradients:
    return triton_backward.empty_grads(
        source, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up, input_grad
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: triton_forward.Results) -> None:
    ids, source, mask, *weights = inputs[:11]
    out, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(ids, source, *weights, *kept)
    ctx.masked, ctx.settings = mask is not None, inputs[11:17]
    ctx.out_shape = out.shape


def _backward(ctx: Any, grad_out: Tensor | None, grad_gate: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    ids, source, *tensors = ctx.saved_tensors
    weights, kept = tensors[:8], tensors[8:]
    if grad_out is None:
        grad_out = source.new_zeros(ctx.out_shape)
    if grad_gate is not None:
        grad_gate = grad_gate.contiguous()
    input_grad = ctx.needs_input_grad[1]
    # Where somebody means to go backward through this, the operator is what refuses it.
    direct = not torch.is_grad_enabled() and _is_eager(grad_out, grad_gate)
    run: Callable[..., Any] = triton_backward.backward if direct else prompt_embed_backward_op
    *weight_grads, source_grad = run(
        grad_out.contiguous(), grad_gate, ids, source, ctx.masked, *weights, *kept, *ctx.settings, input_grad
    )
    needed = ctx.needs_input_grad[3:11]
    weight_grads = [grad if need else None for grad, need in zip(weight_grads, needed, strict=True)]
    return None, source_grad if input_grad else None, None, *weight_grads, *[None] * 7


def _refuse_double_backward(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError('impl="triton" has no second derivative: use impl="torch" for a backward through the backward')


prompt_embed_op.register_autograd(_backward, setup_context=_setup_context)
prompt_embed_backward_op.register_autograd(_refuse_double_backward)


class PromptEmbed(torch.autograd.Function):
    """prompt_embed_op for eager calls."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = triton_forward.forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[:2]

    backward = staticmethod(_backward)


def _is_eager(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors, and nothing traces, transforms or intercepts what is done to them."""
    watched = (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )
    return not watched and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def prompt_embed(
    ids: Tensor | None,
    source: Tensor,
    mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    *,
    scale: float,
    embed_scale: float,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
) -> tuple[Tensor, Tensor]:
    """X [batch, s + L, d] and the gate [s, K]. `source` is E with `ids`, or inputs_embeds without."""
    if ids is None or source.stride(-1) != 1:
        source = source.contiguous()
    weights = [
        None if weight is None else weight.contiguous()
        for weight in (prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up)
    ]
    ids, mask = (None if t is None else t.contiguous() for t in (ids, mask))
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (source, *weights))
    run: Callable[..., Any] = prompt_embed_op
    if _is_eager(ids, source, mask, *weights):
        run = PromptEmbed.apply if save else triton_forward.forward
    out, gate, *_ = run(
        ids, source, mask, *weights, scale, embed_scale, activation, prompt_start, lowrank_update, fusion, save
    )
    return out, gate
