"""The specification of steps 1 to 7 in plain torch: docs/method.md, line by line, in any dtype up to float64.

Nothing here is there for speed. Every other implementation is held against these functions in float64.
Symbols as in docs/method.md: s prompt rows, N positions, rank r, K spaces of width h, token rank q, width d.
"""

import math

import torch
from torch import Tensor

from ..common.reference import bottleneck
from .arguments import Settings, Stack, TextWeights, Weights


def text_positions(attention_mask: Tensor) -> Tensor:
    """Counts the text tokens before each token of a mask [batch, L]; returns [batch, L] int64 with -1 on padding."""
    text = attention_mask != 0
    return text.cumsum(1) * text - 1


def lowrank_update(text_positions: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, scale: float) -> Tensor:
    """Step 1, the addend in units of e: c·A[p]·B, zero on padding and for p >= N. Returns [batch, L, d]."""
    update = scale * lowrank_a @ lowrank_b
    covered = (text_positions >= 0) & (text_positions < len(lowrank_a))
    return update[text_positions.where(covered, 0)] * covered.unsqueeze(-1).to(update.dtype)


def token_update(
    inputs_embeds: Tensor, text_positions: Tensor, token_down: Tensor, token_up: Tensor, activation: str
) -> Tensor:
    """Step 2, the addend in units of e: σ(x·Dᵀ)·W for x in units of e, zero on padding. Returns [batch, L, d]."""
    update = bottleneck(inputs_embeds, token_down, token_up, activation)
    return update * (text_positions >= 0).unsqueeze(-1).to(update.dtype)


def prompt_fusion(prompt: Tensor, lowrank_a: Tensor, lowrank_b: Tensor, scale: float) -> Tensor:
    """Step 3: softmax(P·Cᵀ/√d)·C over all N rows of C = c·A·B. Returns [s, d]."""
    c = scale * lowrank_a @ lowrank_b
    return torch.softmax(prompt @ c.T / math.sqrt(prompt.shape[1]), dim=1) @ c


def gate_weights(prompt: Tensor, gate_weight: Tensor) -> Tensor:
    """Step 5: softmax(P·Gᵀ) over the spaces. Returns [s, K]."""
    return torch.softmax(prompt @ gate_weight.T, dim=1)


def spaces(prompt: Tensor, space_down: Tensor, space_up: Tensor, gate: Tensor, activation: str) -> Tensor:
    """Steps 4 and 6: Σ_k w[:, k]·σ(P·U_kᵀ)·V_k. Returns [s, d]."""
    total = torch.zeros_like(prompt)
    for k in range(len(space_down)):
        total = total + gate[:, k, None] * bottleneck(prompt, space_down[k], space_up[k], activation)
    return total


def reconstruct_prompt(weights: Weights, settings: Settings) -> tuple[Tensor, Tensor]:
    """Steps 3 to 6: P* = e·(P + F + Σ_k w[:, k]·Z_k). Returns P* [s, d] and the gate [s, K]."""
    prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, *_ = weights
    total = prompt
    if lowrank_a is not None and lowrank_b is not None and settings.fusion:
        total = total + prompt_fusion(prompt, lowrank_a, lowrank_b, settings.scale)
    gate = prompt.new_zeros(len(prompt), 0)
    if space_down is not None and space_up is not None and gate_weight is not None:
        gate = gate_weights(prompt, gate_weight)
        total = total + spaces(prompt, space_down, space_up, gate, settings.activation)
    return settings.embed_scale * total, gate


def text_update(inputs_embeds: Tensor, text_positions: Tensor, weights: TextWeights, settings: Settings) -> Tensor:
    """Steps 1 and 2: inputs_embeds [batch, L, d] plus both updates."""
    lowrank_a, lowrank_b, token_down, token_up = weights
    embed_scale = settings.embed_scale
    total = inputs_embeds
    if lowrank_a is not None and lowrank_b is not None:
        total = total + embed_scale * lowrank_update(text_positions, lowrank_a, lowrank_b, settings.scale)
    if token_down is not None and token_up is not None:
        update = token_update(inputs_embeds / embed_scale, text_positions, token_down, token_up, settings.activation)
        total = total + embed_scale * update
    return total


def insert_prompt(prompt_star: Tensor, text: Tensor, prompt_start: int | Tensor) -> Tensor:
    """Puts P* [s, d] at column `prompt_start` of text [batch, L, d], a number or one for each row [batch] (step 7).

    Returns [batch, s + L, d].
    """
    if isinstance(prompt_start, Tensor):
        starts = prompt_start.tolist()
        rows = [insert_prompt(prompt_star, row[None], start) for row, start in zip(text, starts, strict=True)]
        return torch.cat(rows) if rows else text.new_empty(0, len(prompt_star) + text.shape[1], text.shape[2])
    prompts = prompt_star.expand(len(text), -1, -1)
    return torch.cat([text[:, :prompt_start], prompts, text[:, prompt_start:]], dim=1)


def prompt_embed_by_row(
    inputs_embeds: Tensor, text_positions: Tensor, stack: Stack, prompt_start: int | Tensor, settings: Settings
) -> Tensor:
    """Steps 1, 2 and 7 of each row of inputs_embeds [batch, L, d] with its own adapter's constants.

    Rows with a shorter prompt than the stack's end with columns of zeros. Returns [batch, S + L, d].
    """
    batch, length, d = inputs_embeds.shape
    out = inputs_embeds.new_zeros(batch, stack.prompt.shape[1] + length, d)
    for row in range(batch):
        adapter = 0 if stack.adapter_index is None else int(stack.adapter_index[row])
        start = int(prompt_start[row]) if isinstance(prompt_start, Tensor) else prompt_start
        prompt = stack.prompt[adapter]
        if stack.lengths is not None:
            prompt = prompt[: int(stack.lengths[adapter])]
        one = slice(row, row + 1)
        text = text_update(inputs_embeds[one], text_positions[one], stack.of(adapter), settings)
        if stack.kind == "table" and stack.lowrank_a is not None:
            table, position = stack.lowrank_a[adapter], text_positions[row]
            covered = (position >= 0) & (position < len(table))
            text = text + table[position.where(covered, 0)] * covered.unsqueeze(-1).to(table.dtype)
        out[row, : len(prompt) + length] = insert_prompt(prompt, text, start)[0]
    return out
