"""The public functions: check the arguments, choose an implementation, fix the dtype of computation and result.

Shapes and symbols as in docs/method.md. All of them take every trained tensor in units of `embed_scale`.
"""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..availability import resolve
from ..common.checks import check_activation, check_scale
from ..common.dtypes import at_least_fp32, cast, widest
from ..common.operators import Calls
from . import eager, reference
from .arguments import Settings, Stack, Text, TextWeights, Weights
from .checks import (
    check_id_values,
    check_ids,
    check_mask,
    check_no_stack,
    check_positions,
    check_prompt,
    check_stack,
    check_stack_values,
    check_start,
    check_start_values,
    check_text,
)

__all__ = ["prompt_embed", "prompt_embed_inputs", "reconstruct_prompt", "text_update"]


def prompt_embed(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    embedding_weight: Tensor,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    *,
    scale: float,
    embed_scale: float = 1.0,
    token_down: Tensor | None = None,
    token_up: Tensor | None = None,
    activation: str = "silu",
    prompt_start: int | Tensor = 0,
    lowrank_update: bool = True,
    fusion: bool = True,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    text_positions: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns the backbone's input [batch, s + L, d]: the reconstructed prompt P* and the updated embeddings of the text.

        X[b, j] = E[id] + e·c·A[p]·B + e·σ(E[id]/e·Dᵀ)·W        p = text tokens before j in row b
        P*      = e·(P + softmax(P·Cᵀ/√d)·C + Σ_k w[:, k]·σ(P·U_kᵀ)·V_k),  w = softmax(P·Gᵀ),  C = c·A·B

    Parts that are switched off are passed as None: `lowrank_a` with `lowrank_b` (update and fusion), the three space
    tensors together, `token_down` with `token_up`.

    A prompt of three dimensions is a stack of several adapters' constants, for inference: P* as it goes into X
    [adapters, S, d], A [adapters, N, r] and B [adapters, r, d], D and W [adapters, q, d]. `lowrank_a` without `lowrank_b` is
    the update e·c·A·B itself [adapters, N, d]. Each row has its own adapter, whatever their number. U, V and G are in P* already.

    Args:
        input_ids: [batch, L] int64 or int32. L may be 0.
        attention_mask: [batch, L] bool or integer, nonzero on text; None where there is no padding. Padding may stand
            anywhere in a row; it gets its embedding and no update.
        embedding_weight: E [vocab, d], a constant here: it receives no gradient. Its dtype is the result's.
        prompt: P [s, d].
        lowrank_a, lowrank_b: A [N, r], B [r, d].
        space_down, space_up, gate_weight: U [K, h, d], V [K, h, d], G [K, d].
        scale: c. embed_scale: e.
        token_down, token_up: D [q, d], W [q, d].
        activation: σ, one of "silu", "relu", "gelu", "identity".
        prompt_start: the text column, 0 … L, at which P* stands: a number, or [batch] integers.
        lowrank_update, fusion: False leaves the text update or the fusion out while A and B serve the other.
        adapter_index: [batch] integers, the adapter of each row in a stack; None: its only one.
        prompt_lengths: [adapters] integers, how many of the S rows are an adapter's prompt, all of them from S on; None: all.
            Shorter rows of X end with zeros.
        text_positions: [batch, L] integers in the mask's place, beside a stack: p of each token, -1 on padding. A text that
            goes on after a cached one has them; its stack may have no prompt, S = 0.
        impl: "reference" (the specification), "torch", "triton", or "auto" (Triton where it can run, else torch).

    Returns:
        [batch, s + L, d] in E's dtype. Trained tensors may have another dtype than E (fp32 beside a bf16 backbone);
        "torch" and "triton" compute half-precision inputs in fp32 and round once; autocast does not reach inside.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value; the message names it.
        IndexError: an id lies outside the vocabulary, or an index names no adapter (checked on CPU, where it costs nothing;
            on a GPU such a row is NaN with "triton").
        RuntimeError: a stack's gradient was asked of "triton"; "auto" takes "torch" for that.
    """
    table = embedding_weight.detach() if embedding_weight.requires_grad else embedding_weight
    return _input_of_backbone(
        Text(input_ids, table, attention_mask, _starts(prompt_start)),
        Weights(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up),
        Settings(scale, embed_scale, activation, _start(prompt_start), lowrank_update, fusion),
        Rows(adapter_index, prompt_lengths, text_positions),
        impl,
    )


def prompt_embed_inputs(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    *,
    scale: float,
    embed_scale: float = 1.0,
    token_down: Tensor | None = None,
    token_up: Tensor | None = None,
    activation: str = "silu",
    prompt_start: int | Tensor = 0,
    lowrank_update: bool = True,
    fusion: bool = True,
    adapter_index: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    text_positions: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns what `prompt_embed` does, for embeddings [batch, L, d] from elsewhere (scaled, quantised, computed).

    The result has the dtype of `inputs_embeds`, which also receives a gradient when it asks for one.
    Everything else is as in `prompt_embed`.
    """
    return _input_of_backbone(
        Text(None, inputs_embeds, attention_mask, _starts(prompt_start)),
        Weights(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up),
        Settings(scale, embed_scale, activation, _start(prompt_start), lowrank_update, fusion),
        Rows(adapter_index, prompt_lengths, text_positions),
        impl,
    )


def reconstruct_prompt(
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    *,
    scale: float,
    embed_scale: float = 1.0,
    activation: str = "silu",
    fusion: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns P* [s, d] and the gate's weights [s, K], both in the prompt's dtype. Arguments as in `prompt_embed`."""
    weights = Weights(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight)
    settings = Settings(scale, embed_scale, activation, lowrank_update=False, fusion=fusion)
    check_prompt(weights, settings)
    impl = resolve(impl, prompt.device)
    if impl == "triton":
        from . import triton_op

        text = Text(None, prompt.new_empty(1, 0, prompt.shape[1]), None)
        out, gate = triton_op.prompt_embed_with_gate(text, weights, settings)
        return out[0], gate
    with torch.autocast(prompt.device.type, enabled=False):
        dtype = _compute_dtype(impl, *weights)
        prompt_star, gate = _functions(impl).reconstruct_prompt(cast(weights, dtype), settings)
    return prompt_star.to(prompt.dtype), gate.to(prompt.dtype)


def text_update(
    inputs_embeds: Tensor,
    text_positions: Tensor | None,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    *,
    scale: float,
    embed_scale: float = 1.0,
    token_down: Tensor | None = None,
    token_up: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """Returns the text's embeddings [batch, L, d] with both updates and without a prompt, which a decoding step needs.

    `text_positions` [batch, L] int64 says p for each token, -1 on padding: the tokens of a cached prefix count. None is
    text without padding that starts at 0.
    Computed in torch; returns [batch, L, d] in the dtype of `inputs_embeds`.
    """
    weights = TextWeights(lowrank_a, lowrank_b, token_down, token_up)
    settings = Settings(scale, embed_scale, activation)
    check_text(Text(None, inputs_embeds, None), inputs_embeds.shape[-1], weights, activation)
    check_positions(text_positions, inputs_embeds.shape)
    with torch.autocast(inputs_embeds.device.type, enabled=False):
        dtype = _compute_dtype("torch", inputs_embeds, *weights)
        x = eager.text_update(inputs_embeds.to(dtype), text_positions, cast(weights, dtype), settings)
    return x.to(inputs_embeds.dtype)


class Rows(NamedTuple):
    """What a stack has for each row, or for each adapter: see Stack."""

    adapter_index: Tensor | None
    lengths: Tensor | None
    positions: Tensor | None


def _starts(prompt_start: int | Tensor) -> Tensor | None:
    return prompt_start if isinstance(prompt_start, Tensor) else None


def _start(prompt_start: int | Tensor) -> int:
    return 0 if isinstance(prompt_start, Tensor) else prompt_start


def _input_of_backbone(text: Text, weights: Weights, settings: Settings, rows: Rows, impl: str) -> Tensor:
    """P* joined with the updated text, [batch, s + L, d] in the dtype of the text's source."""
    if weights.prompt.dim() == 3:
        return _input_of_stack(text, weights, settings, rows, impl)
    check_no_stack(*rows)
    impl = resolve(impl, weights.prompt.device)
    call = _calls.checked((*text, *weights), settings, text, weights, settings)
    if text.ids is not None:
        check_id_values(text.ids, len(text.source))
    check_start_values(text)
    updates_by_position = settings.lowrank_update and weights.lowrank_a is not None
    if not updates_by_position and weights.token_down is None:
        text = text._replace(mask=None)  # nothing asks where the text stands
    if impl == "triton":
        from . import triton_op

        return triton_op.prompt_embed(text, weights, settings, call)
    of_text = weights.of_text(settings.lowrank_update)
    functions, source_dtype = _functions(impl), text.source.dtype
    with torch.autocast(text.source.device.type, enabled=False):
        if impl == "torch" and of_text.lowrank_a is not None:
            of_text = of_text._replace(lowrank_a=of_text.lowrank_a[: text.shape[1]])  # no position lies beyond the text
        dtype = _compute_dtype(impl, text.source, *weights)
        prompt_star, _ = functions.reconstruct_prompt(cast(weights, dtype), settings)
        embeds = text.source if text.ids is None else F.embedding(text.ids, text.source)
        embeds = functions.text_update(embeds.to(dtype), _positions(text, impl), cast(of_text, dtype), settings)
        start = settings.prompt_start if text.starts is None else text.starts
        return functions.insert_prompt(prompt_star.to(source_dtype), embeds.to(source_dtype), start)


def _input_of_stack(text: Text, weights: Weights, settings: Settings, rows: Rows, impl: str) -> Tensor:
    """The same where `weights` are constants of several adapters, [adapters, …] each."""
    lowrank_a, lowrank_b = (weights.lowrank_a, weights.lowrank_b) if settings.lowrank_update else (None, None)
    stack = Stack(weights.prompt, lowrank_a, lowrank_b, weights.token_down, weights.token_up, *rows)
    call = _stack_calls.checked((*text, *stack, *weights[3:6]), settings, text, stack, weights, settings)
    if text.ids is not None:
        check_id_values(text.ids, len(text.source))
    check_stack_values(stack)
    check_start_values(text)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (text.source, *stack))
    if impl == "triton" and trained:
        raise RuntimeError('a stack has no gradient with impl="triton": use impl="torch", or torch.no_grad()')
    impl = "torch" if impl == "auto" and trained else resolve(impl, text.source.device)
    if stack.lowrank_a is None and stack.token_down is None:
        text, stack = text._replace(mask=None), stack._replace(positions=None)  # nothing asks where the text stands
    if impl == "triton":
        from . import triton_op

        return triton_op.prompt_embed_by_row(text, stack, settings, call)
    source_dtype = text.source.dtype
    with torch.autocast(text.source.device.type, enabled=False):
        start = settings.prompt_start if text.starts is None else text.starts
        embeds = text.source if text.ids is None else F.embedding(text.ids, text.source)
        positions = stack.positions if text.mask is None else reference.text_positions(text.mask)
        dtype = _compute_dtype(impl, text.source, *stack[:5])
        if impl == "torch":
            return eager.prompt_embed_by_row(embeds, positions, stack, start, settings, dtype)
        if positions is None:
            positions = torch.arange(text.shape[1], device=embeds.device).expand(text.shape[:2])
        wide = cast(stack, dtype)._replace(adapter_index=stack.adapter_index, lengths=stack.lengths)
        return reference.prompt_embed_by_row(embeds.to(dtype), positions, wide, start, settings).to(source_dtype)


def _check(text: Text, weights: Weights, settings: Settings) -> None:
    """All arguments, but for the ids' values."""
    if text.ids is not None:
        check_ids(text.ids, text.source)
    check_prompt(weights, settings)
    check_text(text, weights.prompt.shape[1], weights.of_text(lowrank_update=True), settings.activation)
    check_mask(text)
    check_start(settings.prompt_start, text)


_calls = Calls(_check)


def _check_stack(text: Text, stack: Stack, weights: Weights, settings: Settings) -> None:
    """All arguments beside a stack, but for the values of ids and of what the rows say."""
    if text.ids is not None:
        check_ids(text.ids, text.source)
    check_stack(text, stack, weights)
    check_scale("embed_scale", settings.embed_scale, "the RMS of the embeddings' entries")
    check_activation(settings.activation)
    check_mask(text)
    check_start(settings.prompt_start, text)


_stack_calls = Calls(_check_stack)


def _positions(text: Text, impl: str) -> Tensor | None:
    """Text tokens before each token [batch, L], -1 on padding; None for text without padding, where that will do."""
    if text.mask is not None:
        return reference.text_positions(text.mask)
    if impl == "torch":
        return None
    batch, length, _ = text.shape
    return torch.arange(length, device=text.source.device).expand(batch, -1)


def _functions(impl: str) -> ModuleType:
    return reference if impl == "reference" else eager


def _compute_dtype(impl: str, *tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among the tensors; at least fp32 in the implementations that are not the specification."""
    dtype = widest(*tensors)
    return dtype if impl == "reference" else at_least_fp32(dtype)
