"""The formulas of reference.py arranged for speed in eager torch; also what runs where Triton cannot.

What does not depend on the batch is computed once, C = c·A·B has no more rows than the text reaches, the fusion
goes through the rank, and all spaces are one product. Half-precision inputs arrive here in fp32 and are rounded once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.eager import add_bottleneck
from ..common.reference import ACTIVATIONS
from . import reference
from .arguments import Settings, Stack, TextWeights, Weights


def reconstruct_prompt(weights: Weights, settings: Settings) -> tuple[Tensor, Tensor]:
    """reference.reconstruct_prompt with the fusion computed through the rank and the spaces as one product."""
    prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, *_ = weights
    total = prompt
    if lowrank_a is not None and lowrank_b is not None and settings.fusion:
        # An error in a score becomes a relative error of the same size in its probability, so the scores, the one
        # small product where that can hurt, are taken in float64 (Apple's MPS has none).
        exact = prompt.dtype if prompt.device.type == "mps" else torch.float64
        score = (prompt.to(exact) @ lowrank_b.to(exact).T) @ lowrank_a.to(exact).T
        attention = torch.softmax(score * (settings.scale / math.sqrt(prompt.shape[1])), dim=1).to(prompt.dtype)
        total = total + ((attention @ lowrank_a) * settings.scale) @ lowrank_b
    gate = prompt.new_zeros(len(prompt), 0)
    if space_down is not None and space_up is not None and gate_weight is not None:
        num_spaces, space_dim, _ = space_down.shape
        gate = torch.softmax(prompt @ gate_weight.T, dim=1)
        inner = ACTIVATIONS[settings.activation](prompt @ space_down.flatten(0, 1).T).view(-1, num_spaces, space_dim)
        total = total + (inner * gate.unsqueeze(2)).flatten(1) @ space_up.flatten(0, 1)
    return settings.embed_scale * total, gate


def text_update(
    inputs_embeds: Tensor, text_positions: Tensor | None, weights: TextWeights, settings: Settings
) -> Tensor:
    """reference.text_update; `text_positions` may be None for text without padding that starts at position 0."""
    lowrank_a, lowrank_b, token_down, token_up = weights
    embed_scale, length = settings.embed_scale, inputs_embeds.shape[1]
    total = inputs_embeds
    if token_down is not None and token_up is not None:
        tokens = inputs_embeds.flatten(0, 1)
        padding = None if text_positions is None else (text_positions < 0).view(-1, 1)
        total = add_bottleneck(tokens, token_down / embed_scale, token_up * embed_scale, settings.activation, padding)
        total = total.view(inputs_embeds.shape)
    if lowrank_a is None or lowrank_b is None:
        return total
    scale = settings.scale * embed_scale
    if text_positions is None:
        count = min(len(lowrank_a), length)
        update = (lowrank_a[:count] * scale) @ lowrank_b
        return total + F.pad(update, (0, 0, 0, length - count))
    # One more row, of zeros, stands for padding and for positions that the update does not cover.
    covered = (text_positions >= 0) & (text_positions < len(lowrank_a))
    index = text_positions.where(covered, len(lowrank_a))
    rows = F.pad(lowrank_a * scale, (0, 0, 0, 1))
    if index.numel() < len(lowrank_a):  # decoding: a few tokens need a few rows of C
        return total + F.embedding(index, rows) @ lowrank_b
    return total + F.embedding(index, rows @ lowrank_b)


def insert_prompt(prompt_star: Tensor, text: Tensor, prompt_start: int | Tensor) -> Tensor:
    """reference.insert_prompt, for all rows at once where the columns differ."""
    if not isinstance(prompt_start, Tensor):
        return reference.insert_prompt(prompt_star, text, prompt_start)
    return insert_prompts(prompt_star.expand(len(text), -1, -1), text, prompt_start, None)


def insert_prompts(prompts: Tensor, text: Tensor, prompt_start: int | Tensor, lengths: Tensor | None) -> Tensor:
    """Each row's prompt [batch, S, d] in its text [batch, L, d]; `lengths` [batch] leaves the end of a prompt out.

    Returns [batch, S + L, d]; zeros stand behind a row that `lengths` makes shorter.
    """
    (batch, size, d), length = prompts.shape, text.shape[1]
    if not isinstance(prompt_start, Tensor) and lengths is None:
        return torch.cat([text[:, :prompt_start], prompts, text[:, prompt_start:]], dim=1)
    start = prompt_start.unsqueeze(1) if isinstance(prompt_start, Tensor) else prompt_start
    column = torch.arange(size + length, device=text.device)
    behind_start = column - start
    columns = torch.cat([prompts, text], dim=1)
    if lengths is None:  # the prompt and the text before it change places, the rest stays
        source = torch.where(behind_start < size, behind_start % (start + size), column)
    else:
        own = lengths.unsqueeze(1)
        source = torch.where(behind_start < own, behind_start % (start + size), column + (size - own))
        source = source.clamp(max=size + length)
        columns = F.pad(columns, (0, 0, 0, 1))  # zeros
    return columns.gather(1, source.expand(batch, -1).unsqueeze(2).expand(-1, -1, d))


def prompt_embed_by_row(
    inputs_embeds: Tensor,
    text_positions: Tensor | None,
    stack: Stack,
    prompt_start: int | Tensor,
    settings: Settings,
    dtype: torch.dtype,
) -> Tensor:
    """reference.prompt_embed_by_row in products over all rows, computed in `dtype`.

    Returns [batch, S + L, d] in the dtype of `inputs_embeds`.
    """
    total = inputs_embeds.to(dtype)
    index, unit = stack.adapter_index, settings.embed_scale

    def own(tensor: Tensor) -> Tensor:
        rows = tensor.expand(len(total), *tensor.shape[1:]) if index is None else tensor.index_select(0, index)
        return rows.to(dtype)

    if stack.token_down is not None and stack.token_up is not None:
        down, up = own(stack.token_down), own(stack.token_up)
        if unit != 1:
            down, up = down / unit, up * unit
        padding = None if text_positions is None else (text_positions < 0).unsqueeze(2)
        total = add_bottleneck(total, down, up, settings.activation, padding)
    if stack.lowrank_a is not None:
        total = _add_lowrank(total, text_positions, stack, settings.scale * unit, dtype)
    text = total.to(inputs_embeds.dtype)
    if stack.prompt.shape[1] == 0:
        return text
    prompts = own(stack.prompt).to(text.dtype)
    lengths = stack.lengths
    if lengths is not None:
        lengths = (lengths.expand(len(text)) if index is None else lengths.index_select(0, index)).clamp(
            max=prompts.shape[1]
        )
    return insert_prompts(prompts, text, prompt_start, lengths)


def _add_lowrank(
    total: Tensor, text_positions: Tensor | None, stack: Stack, scale: float, dtype: torch.dtype
) -> Tensor:
    """total [batch, L, d] + scale·A[p]·B of each row's adapter, nothing on padding and for p >= N."""
    rows, b = stack.lowrank_a, stack.lowrank_b
    assert rows is not None
    covered = rows.shape[1]
    length = total.shape[1]
    if text_positions is None:
        count = min(length, covered)
        own = (
            rows[:, :count].expand(len(total), -1, -1)
            if stack.adapter_index is None
            else rows[:, :count].index_select(0, stack.adapter_index)
        )
        own = F.pad(own.to(dtype), (0, 0, 0, length - count))
    else:
        # A row of zeros stands before each adapter's for padding, and one behind for positions that the update does not cover.
        place = text_positions.long().clamp(-1, covered).add_(1)  # narrow integers would wrap
        if stack.adapter_index is not None:
            place = torch.add(place, stack.adapter_index.unsqueeze(1), alpha=covered + 2)
        own = F.embedding(place, F.pad(rows, (0, 0, 1, 1)).flatten(0, 1)).to(dtype)
    if b is None:
        return total + own
    b = b.expand(len(total), -1, -1) if stack.adapter_index is None else b.index_select(0, stack.adapter_index)
    return torch.baddbmm(total, own, b.to(dtype), alpha=scale)
