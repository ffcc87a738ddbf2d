"""The formulas of reference.py arranged for speed in eager torch; also what runs where Triton cannot.

What does not depend on the batch is computed once, C = c·A·B has no more rows than the text reaches, the fusion
goes through the rank, and all spaces are one product. Half-precision inputs are computed in fp32 and rounded once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import ACTIVATIONS, insert_prompt

__all__ = ["insert_prompt", "reconstruct_prompt", "text_update"]


def reconstruct_prompt(
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    *,
    scale: float,
    embed_scale: float,
    activation: str,
    fusion: bool,
) -> tuple[Tensor, Tensor]:
    """reference.reconstruct_prompt with the fusion computed through the rank and the spaces as one product."""
    total = prompt
    if lowrank_a is not None and lowrank_b is not None and fusion:
        # An error in a score becomes a relative error of the same size in its probability, so the scores, the one
        # small product where that can hurt, are taken in float64 (Apple's MPS has none).
        exact = prompt.dtype if prompt.device.type == "mps" else torch.float64
        score = (prompt.to(exact) @ lowrank_b.to(exact).T) @ lowrank_a.to(exact).T
        attention = torch.softmax(score * (scale / math.sqrt(prompt.shape[1])), dim=1).to(prompt.dtype)
        total = total + ((attention @ lowrank_a) * scale) @ lowrank_b
    gate = prompt.new_zeros(len(prompt), 0)
    if space_down is not None and space_up is not None and gate_weight is not None:
        num_spaces, space_dim, _ = space_down.shape
        gate = torch.softmax(prompt @ gate_weight.T, dim=1)
        inner = ACTIVATIONS[activation](prompt @ space_down.flatten(0, 1).T).view(-1, num_spaces, space_dim)
        total = total + (inner * gate.unsqueeze(2)).flatten(1) @ space_up.flatten(0, 1)
    return embed_scale * total, gate


def text_update(
    inputs_embeds: Tensor,
    text_positions: Tensor | None,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    *,
    scale: float,
    embed_scale: float,
    token_down: Tensor | None,
    token_up: Tensor | None,
    activation: str,
) -> Tensor:
    """reference.text_update; `text_positions` may be None for text without padding that starts at position 0."""
    length = inputs_embeds.shape[1]
    total = inputs_embeds
    if token_down is not None and token_up is not None:
        inner = ACTIVATIONS[activation](inputs_embeds @ (token_down / embed_scale).T)
        if text_positions is not None:
            inner = inner * (text_positions >= 0).unsqueeze(-1)
        total = total + inner @ (token_up * embed_scale)
    if lowrank_a is None or lowrank_b is None:
        return total
    if text_positions is None:
        count = min(len(lowrank_a), length)
        update = (lowrank_a[:count] * (scale * embed_scale)) @ lowrank_b
        return total + F.pad(update, (0, 0, 0, length - count))
    # One more row, of zeros, stands for padding and for positions that the update does not cover.
    covered = (text_positions >= 0) & (text_positions < len(lowrank_a))
    index = text_positions.where(covered, len(lowrank_a))
    rows = F.pad(lowrank_a * (scale * embed_scale), (0, 0, 0, 1))
    if index.numel() < len(lowrank_a):  # decoding: a few tokens need a few rows of C
        return total + F.embedding(index, rows) @ lowrank_b
    return total + F.embedding(index, rows @ lowrank_b)
