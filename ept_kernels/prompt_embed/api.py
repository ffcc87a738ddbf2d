"""The public functions: check the arguments, choose an implementation, fix the dtype of computation and result.

Shapes and symbols as in docs/method.md. All of them take every trained tensor in units of `embed_scale`.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..availability import resolve
from ..common.dtypes import at_least_fp32, cast, widest
from ..common.operators import Calls
from . import eager, reference
from .arguments import Settings, Text, TextWeights, Weights
from .checks import check_id_values, check_ids, check_mask, check_positions, check_prompt, check_start, check_text

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
    prompt_start: int = 0,
    lowrank_update: bool = True,
    fusion: bool = True,
    impl: str = "auto",
) -> Tensor:
    """The backbone's input: the reconstructed prompt P* joined with the updated embeddings of the text.

        X[b, j] = E[id] + e·c·A[p]·B + e·σ(E[id]/e·Dᵀ)·W        p = text tokens before j in row b
        P*      = e·(P + softmax(P·Cᵀ/√d)·C + Σ_k w[:, k]·σ(P·U_kᵀ)·V_k),  w = softmax(P·Gᵀ),  C = c·A·B

    Parts that are switched off are passed as None: `lowrank_a` with `lowrank_b` (update and fusion), the three space
    tensors together, `token_down` with `token_up`.

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
        prompt_start: the text column, 0 … L, at which P* stands.
        lowrank_update, fusion: False leaves the text update or the fusion out while A and B serve the other.
        impl: "reference" (the specification), "torch", "triton", or "auto" (Triton where it can run, else torch).

    Returns:
        [batch, s + L, d] in E's dtype. Trained tensors may have another dtype than E (fp32 beside a bf16 backbone);
        "torch" and "triton" compute half-precision inputs in fp32 and round once; autocast does not reach inside.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value; the message names it.
        IndexError: an id lies outside the vocabulary (checked on CPU, where it costs nothing).
    """
    table = embedding_weight.detach() if embedding_weight.requires_grad else embedding_weight
    return _input_of_backbone(
        Text(input_ids, table, attention_mask),
        Weights(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up),
        Settings(scale, embed_scale, activation, prompt_start, lowrank_update, fusion),
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
    prompt_start: int = 0,
    lowrank_update: bool = True,
    fusion: bool = True,
    impl: str = "auto",
) -> Tensor:
    """`prompt_embed` for embeddings that come from elsewhere (scaled, quantised, computed): [batch, L, d].

    The result has the dtype of `inputs_embeds`, which also receives a gradient when it asks for one.
    Everything else is as in `prompt_embed`.
    """
    return _input_of_backbone(
        Text(None, inputs_embeds, attention_mask),
        Weights(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up),
        Settings(scale, embed_scale, activation, prompt_start, lowrank_update, fusion),
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
    """P* [s, d] and the gate's weights [s, K], both in the prompt's dtype. Arguments as in `prompt_embed`."""
    weights = Weights(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight)
    settings = Settings(scale, embed_scale, activation, lowrank_update=False, fusion=fusion)
    check_prompt(weights, settings)
    impl = resolve(impl, prompt.device)
    if impl == "triton":
        from . import triton_op

        out, gate = triton_op.prompt_embed(Text(None, prompt.new_empty(1, 0, prompt.shape[1]), None), weights, settings)
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
    """The text's embeddings [batch, L, d] with both updates and without a prompt: what a decoding step needs.

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


def _input_of_backbone(text: Text, weights: Weights, settings: Settings, impl: str) -> Tensor:
    """P* joined with the updated text, [batch, s + L, d] in the dtype of the text's source."""
    impl = resolve(impl, weights.prompt.device)
    call = _calls.checked((*text, *weights), settings, text, weights, settings)
    if text.ids is not None:
        check_id_values(text.ids, len(text.source))
    updates_by_position = settings.lowrank_update and weights.lowrank_a is not None
    if not updates_by_position and weights.token_down is None:
        text = text._replace(mask=None)  # nothing asks where the text stands
    if impl == "triton":
        from . import triton_op

        out, _ = triton_op.prompt_embed(text, weights, settings, call)
        return out
    of_text = weights.of_text(settings.lowrank_update)
    functions, source_dtype = _functions(impl), text.source.dtype
    with torch.autocast(text.source.device.type, enabled=False):
        if impl == "torch" and of_text.lowrank_a is not None:
            of_text = of_text._replace(lowrank_a=of_text.lowrank_a[: text.shape[1]])  # no position lies beyond the text
        dtype = _compute_dtype(impl, text.source, *weights)
        prompt_star, _ = functions.reconstruct_prompt(cast(weights, dtype), settings)
        embeds = text.source if text.ids is None else F.embedding(text.ids, text.source)
        embeds = functions.text_update(embeds.to(dtype), _positions(text, impl), cast(of_text, dtype), settings)
        return reference.insert_prompt(prompt_star.to(source_dtype), embeds.to(source_dtype), settings.prompt_start)


def _check(text: Text, weights: Weights, settings: Settings) -> None:
    """All arguments, but for the ids' values."""
    if text.ids is not None:
        check_ids(text.ids, text.source)
    check_prompt(weights, settings)
    check_text(text, weights.prompt.shape[1], weights.of_text(lowrank_update=True), settings.activation)
    check_mask(text)
    check_start(settings.prompt_start, text.shape[1])


_calls = Calls(_check)


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
