"""EPTLayer: the trained tensors of EPT and the drop-in layer that makes a frozen backbone's input from them."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ept_kernels
from ept.config import EPTConfig
from ept.layer.base import AdapterLayer
from ept.layer.constants import Constants, LayerUpdates
from ept.parts import PARTS, tensors_of
from ept.sharding import whole

__all__ = ["EPTLayer", "decompose"]

# P, A, B, U, V, G; None for parts that are off.
PromptTensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class EPTLayer(AdapterLayer):
    """The EPT parameters for embeddings of width d, in fp32 and in units of `embed_scale`.

    Its tensors are those of `ept.parts` that the config has on; the others are None. What starts at zero (B, V, W) makes
    the layer start as a plain short soft prompt. P ~ N(0, 1) until `init_prompt` puts something better there. The D_l and
    W_l of the layers are in units of `deep_scale` [layers], the size of the hidden states that they update, which
    `get_ept_model` measures. In training mode the token-conditioned updates have dropout (`config.token_dropout`).

    Args:
        config: sizes and switches. `config.embed_scale` must be known here (None is measured by `get_ept_model`).
        embed_dim: d.
        prompt_start: text column of the prompt.
        layer_dim: d_layer, width of the layers that updates act in; None: as wide as the embeddings.
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
    trainable = True

    def __init__(self, config: EPTConfig, embed_dim: int, prompt_start: int = 0, layer_dim: int | None = None):
        if config.rank > embed_dim:
            raise ValueError(f"rank={config.rank} is larger than the embeddings' width {embed_dim}: lower rank")
        if config.has_spaces and config.space_dim > embed_dim:
            raise ValueError(f"space_dim={config.space_dim} is larger than the embeddings' width {embed_dim}: lower it")
        super().__init__(config, embed_dim, prompt_start, layer_dim)
        for tensor in (tensor for part in PARTS for tensor in part.tensors):
            self.register_parameter(tensor.name, None)
        for tensor in tensors_of(config):
            zeros = torch.zeros(self._shape(tensor), dtype=torch.float32)
            self.register_parameter(tensor.name, nn.Parameter(zeros))
        layers = config.known_deep_layers
        self.register_buffer("deep_scale", torch.ones(layers) if layers else None)
        self.decomposition_error: float | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start values of docs/method.md, from torch's global random numbers."""
        for tensor in tensors_of(self.config):
            parameter = self.get_parameter(tensor.name)
            if tensor.std is None:
                parameter.zero_()
            else:
                parameter.normal_(std=tensor.std(self.config, tensor.width(self.embed_dim, self.layer_dim)))

    @torch.no_grad()
    def close_to(self, directions: Tensor) -> None:
        """Gives D's rows the part −1/√d along directions [layers, d_layer] of length 1; where a direction is 0 nothing changes.

        For tokens that are many times h large: σ is then near 0 on them in every hidden unit, and so is its slope. With random
        parts half of the units would be filled by them.
        """
        if self.deep_down is not None:
            own = directions[: len(self.deep_down)].to(self.deep_down).unsqueeze(1)  # [layers, 1, d_layer]
            part = 0.0 if self.config.activation == "identity" else -1 / math.sqrt(own.shape[-1])
            self.deep_down.add_((part - (self.deep_down * own).sum(-1, keepdim=True)) * own)

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
        prompt_start: int | Tensor | None = None,
    ) -> Tensor:
        start = self.prompt_start if prompt_start is None else prompt_start
        settings: dict[str, Any] = dict(prompt_start=start, lowrank_update=self.config.lowrank_update)
        settings |= self._prompt_settings() | self._token_settings()
        if inputs_embeds is not None:
            return ept_kernels.prompt_embed_inputs(inputs_embeds, attention_mask, *self._prompt_tensors(), **settings)
        ids, table = self._ids_and_table(input_ids, embedding_weight)
        return ept_kernels.prompt_embed(ids, attention_mask, table, *self._prompt_tensors(), **settings)

    def constants(self, *, prompt: bool = True) -> Constants:
        rows = self.reconstruct()[0] if prompt else self.prompt[:0]
        a, b = (self.lowrank_a, self.lowrank_b) if self.config.lowrank_update else (None, None)
        token = self._token_settings()
        down, up = self._deep()
        return Constants.of_one(
            rows, a, b, token["token_down"], token["token_up"], down, up,
            self.config.scale, self.embed_scale, self.config.activation, self.config.impl,
        )  # fmt: skip

    def layer_updates(self) -> LayerUpdates | None:
        down, up = self._deep()
        if down is None or up is None:
            return None
        # Unbound, as the gradient of an indexed tensor would be as large as all of them.
        return LayerUpdates(down.unbind(), up.unbind(), self.config.activation, self.config.impl)

    def _deep(self) -> tuple[Tensor | None, Tensor | None]:
        """D/h and W·h [layers, q, d_layer], for all layers at once."""
        if self.deep_down is None or self.deep_up is None or self.deep_scale is None:
            return None, None
        size = self.deep_scale[:, None, None]
        return self.deep_down / size, self._with_dropout(self.deep_up) * size

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
        up = None if self.token_up is None else self._with_dropout(self.token_up)
        return dict(token_down=self.token_down, token_up=up, activation=self.config.activation)

    def _with_dropout(self, up: Tensor) -> Tensor:
        """W [..., q, d] with hidden units left out in training mode.

        One mask serves the batch: as a factor on W's rows it costs q numbers, and the kernels need not know of it.
        """
        if not (self.training and self.config.token_dropout):
            return up
        return up * F.dropout(up.new_ones(*up.shape[:-1], 1), self.config.token_dropout)

    def extra_repr(self) -> str:
        parts = self.parameters_by_part()
        return ", ".join(f"{part}: {count:,}" for part, count in parts.items())


def decompose(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Splits a matrix [m, d] into A [m, r] and B [r, d], its best rank-r approximation, √Σ on both sides (truncated SVD).

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
