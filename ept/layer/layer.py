"""EPTLayer: the trained tensors of EPT and the drop-in layer that makes a frozen backbone's input from them."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ept_kernels
from ept.config import EPTConfig
from ept.sharding import whole

__all__ = ["EPTLayer", "decompose"]

# P, A, B, U, V, G; None for parts that are off.
PromptTensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class EPTLayer(nn.Module):
    """The EPT parameters for embeddings of width d, in fp32 and in units of `embed_scale`.

    Args:
        config: sizes and switches. `config.embed_scale` must be known here (None is measured by `get_ept_model`).
        embed_dim: d.
        prompt_start: text column of the prompt.

    Tensors that belong to parts that are off are None. B, V and W start at zero, so that the layer starts as a plain
    short soft prompt; A ~ N(0, 1/√r), U, D, G ~ N(0, 1/√d) (second argument: standard deviation); P ~ N(0, 1) until
    `init_prompt` puts something better there. The D and W of deep updates, [layers, q, d] each, start alike; they are in
    units of `deep_scale` [layers], the size of the hidden states that they update, which `get_ept_model` measures. In
    training mode the token-conditioned updates have dropout (`config.token_dropout`).
    """

    prompt: nn.Parameter
    lowrank_a: nn.Parameter | None
    lowrank_b: nn.Parameter | None
    space_down: nn.Parameter | None
    space_up: nn.Parameter | None
    gate_weight: nn.Parameter | None
    token_down: nn.Parameter | None
    token_up: nn.Parameter | None
    deep_down: nn.Parameter | None
    deep_up: nn.Parameter | None
    deep_scale: Tensor | None

    def __init__(self, config: EPTConfig, embed_dim: int, prompt_start: int = 0):
        super().__init__()
        self.embed_scale = config.known_embed_scale
        if config.rank > embed_dim:
            raise ValueError(f"rank={config.rank} is larger than the embeddings' width {embed_dim}: lower rank")
        if config.has_spaces and config.space_dim > embed_dim:
            raise ValueError(f"space_dim={config.space_dim} is larger than the embeddings' width {embed_dim}: lower it")
        self.config, self.embed_dim, self.prompt_start = config, embed_dim, prompt_start
        deep = config.known_deep_layers
        shapes: dict[str, tuple[int, ...] | None] = {
            "prompt": (config.prompt_length, embed_dim),
            "lowrank_a": (config.max_text_length, config.rank) if config.has_lowrank else None,
            "lowrank_b": (config.rank, embed_dim) if config.has_lowrank else None,
            "space_down": (config.num_spaces, config.space_dim, embed_dim) if config.has_spaces else None,
            "space_up": (config.num_spaces, config.space_dim, embed_dim) if config.has_spaces else None,
            "gate_weight": (config.num_spaces, embed_dim) if config.has_spaces else None,
            "token_down": (config.token_rank, embed_dim) if config.has_token_update else None,
            "token_up": (config.token_rank, embed_dim) if config.has_token_update else None,
            "deep_down": (deep, config.token_rank, embed_dim) if deep else None,
            "deep_up": (deep, config.token_rank, embed_dim) if deep else None,
        }
        for name, shape in shapes.items():
            parameter = None if shape is None else nn.Parameter(torch.zeros(shape, dtype=torch.float32))
            self.register_parameter(name, parameter)
        self.register_buffer("deep_scale", torch.ones(deep) if deep else None)
        self.decomposition_error: float | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start values of docs/method.md, from torch's global random numbers."""
        self.prompt.normal_()
        if self.lowrank_a is not None and self.lowrank_b is not None:
            self.lowrank_a.normal_(std=1 / math.sqrt(self.config.rank))
            self.lowrank_b.zero_()
        if self.space_down is not None and self.space_up is not None and self.gate_weight is not None:
            self.space_down.normal_(std=1 / math.sqrt(self.embed_dim))
            self.space_up.zero_()
            self.gate_weight.normal_(std=1 / math.sqrt(self.embed_dim))
        if self.token_down is not None and self.token_up is not None:
            self.token_down.normal_(std=1 / math.sqrt(self.embed_dim))
            self.token_up.zero_()
        if self.deep_down is not None and self.deep_up is not None:
            self.deep_down.normal_(std=1 / math.sqrt(self.embed_dim))
            self.deep_up.zero_()

    @torch.no_grad()
    def init_prompt(self, rows: Tensor) -> None:
        """P from embeddings [n, d] in the backbone's own size: repeated or cut to s rows, put into units of e."""
        repeats = -(-self.config.prompt_length // len(rows))
        rows = rows.repeat(repeats, 1)[: self.config.prompt_length]
        self.prompt.copy_(rows.to(self.prompt) / self.embed_scale)

    @torch.no_grad()
    def init_decompose(self, soft_prompt: Tensor) -> float:
        """P and c·A·B from a trained soft prompt Q [m, d] in the backbone's own size; see `decompose`.

        Returns and keeps as `decomposition_error` the relative reconstruction error of Q[s:].
        """
        if soft_prompt.dim() != 2 or soft_prompt.shape[1] != self.embed_dim:
            raise ValueError(f"soft_prompt must be [m, {self.embed_dim}], not {tuple(soft_prompt.shape)}")
        s, covered = self.config.prompt_length, self.config.max_text_length
        if self.lowrank_a is None or self.lowrank_b is None:
            raise ValueError('init="decompose" needs the low-rank pair: give rank >= 1')
        if not s <= len(soft_prompt) <= s + covered:
            raise ValueError(
                f"a soft prompt of {len(soft_prompt)} rows does not fit: prompt_length={s} rows stay and at most "
                f"max_text_length={covered} more go into the low-rank pair"
            )
        if not soft_prompt.isfinite().all():
            raise ValueError("soft_prompt holds NaN or infinity")
        rows = soft_prompt.double() / self.embed_scale
        self.prompt.copy_(rows[:s])
        a, b, self.decomposition_error = decompose(rows[s:], self.config.rank)
        self.lowrank_a.zero_()
        self.lowrank_a[: len(a)] = a / math.sqrt(self.config.scale)
        self.lowrank_b.copy_(b / math.sqrt(self.config.scale))
        return self.decomposition_error

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        embedding_weight: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The backbone's input [batch, s + L, d] from `input_ids` and E, or from `inputs_embeds` [batch, L, d]."""
        settings: dict[str, Any] = dict(prompt_start=self.prompt_start, lowrank_update=self.config.lowrank_update)
        settings |= self._prompt_settings() | self._token_settings()
        if inputs_embeds is not None:
            return ept_kernels.prompt_embed_inputs(inputs_embeds, attention_mask, *self._prompt_tensors(), **settings)
        if input_ids is None or embedding_weight is None:
            raise ValueError("give input_ids with embedding_weight, or inputs_embeds")
        return ept_kernels.prompt_embed(
            input_ids, attention_mask, embedding_weight, *self._prompt_tensors(), **settings
        )

    def continue_text(self, inputs_embeds: Tensor, text_positions: Tensor) -> Tensor:
        """[batch, n, d] embeddings of text that follows a cached prefix, updated for their positions [batch, n]."""
        a, b = (self.lowrank_a, self.lowrank_b) if self.config.lowrank_update else (None, None)
        return ept_kernels.text_update(
            inputs_embeds, text_positions, a, b,
            scale=self.config.scale, embed_scale=self.embed_scale, **self._token_settings(),
        )  # fmt: skip

    def deep_tensors(self, number: int) -> tuple[Tensor, Tensor]:
        """D and W, [q, d] each, of the layer `number` after the first, in its hidden states' own size."""
        assert self.deep_down is not None and self.deep_up is not None and self.deep_scale is not None
        return self.deep_down[number] / self.deep_scale[number], self.deep_up[number] * self.deep_scale[number]

    def draw_deep_dropout(self) -> Tensor | None:
        """[layers, q, 1] factors on the rows of every W for one pass; None where nothing is left out."""
        if self.deep_up is None or not self.training or not self.config.token_dropout:
            return None
        return F.dropout(self.deep_up.new_ones(*self.deep_up.shape[:2], 1), self.config.token_dropout)

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """P* [s, d] in the backbone's own size, and the gate's weights [s, K]; also where they are sharded."""
        prompt, *others = self._prompt_tensors()
        others = [t if t is None else whole(t) for t in others]
        return ept_kernels.reconstruct_prompt(whole(prompt), *others, **self._prompt_settings())

    def _prompt_tensors(self) -> PromptTensors:
        return (self.prompt, self.lowrank_a, self.lowrank_b, self.space_down, self.space_up, self.gate_weight)

    def _prompt_settings(self) -> dict[str, Any]:
        return dict(
            scale=self.config.scale, embed_scale=self.embed_scale, activation=self.config.activation,
            fusion=self.config.fusion, impl=self.config.impl,
        )  # fmt: skip

    def _token_settings(self) -> dict[str, Any]:
        up: Tensor | None = self.token_up
        if up is not None and self.training and self.config.token_dropout:
            # One mask for the batch: as W's rows it costs q numbers, and the kernels need not know of it.
            up = up * F.dropout(up.new_ones(len(up), 1), self.config.token_dropout)
        return dict(token_down=self.token_down, token_up=up, activation=self.config.activation)

    def extra_repr(self) -> str:
        parts = self.config.parameters_by_part(self.embed_dim)
        return ", ".join(f"{part}: {count:,}" for part, count in parts.items())


def decompose(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best rank-r approximation of a matrix [m, d] as A [m, r] times B [r, d], √Σ on both sides (truncated SVD).

    Returns A, B and the relative error ‖M − A·B‖ / ‖M‖, measured on the factors; by Eckart and Young it equals
    √(Σ of the discarded squared singular values / Σ of all).
    """
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = singular[:rank].sqrt()
    a = matrix.new_zeros(len(matrix), rank, dtype=torch.float64)
    b = matrix.new_zeros(rank, matrix.shape[1], dtype=torch.float64)
    a[:, : len(root)] = left[:, :rank] * root
    b[: len(root)] = root[:, None] * right[:rank]
    norm = torch.linalg.matrix_norm(matrix.double())
    error = torch.linalg.matrix_norm(matrix.double() - a @ b)
    return a, b, (error / norm).item() if norm > 0 else 0.0
