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
from .arguments import Settings, TextWeights, Weights


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
