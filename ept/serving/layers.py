"""What the plugin adds to vLLM's decoder layers: rows by position before the first, an update before each.

Both are LoRA layers to vLLM, which hands them A and B of a slot (`served_dir` says what these hold) and knows the slot of
each token. With one adapter for all requests there is one slot, and no index.

A token's position says what it is: rows of the prompt stand at positions 0 … s − 1 of every request, text follows. So the
ids that hold the prompt's place have no meaning, none is reserved, and decoding, chunks of a prompt and a request that is
computed anew after preemption need nothing of their own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA

import ept_kernels
from ept.serving.served_dir import ROWS, UPDATE
from ept_kernels.availability import resolve
from ept_kernels.common.reference import ACTIVATIONS

__all__ = ["Rows", "Update", "before_first_layer", "before_layer"]


class _SlotLayer(BaseLayerWithLoRA):
    """Tensors of every slot, beside a layer of the backbone.

    Attributes:
        by_token: whether tokens have slots of their own; otherwise all are in slot 0.
    """

    embedding_modules: Mapping[str, str] = {ROWS: "", UPDATE: ""}  # names that vLLM then expects in adapters' files

    def __init__(self, *, by_token: bool):
        super().__init__()
        self.by_token = by_token

    @property
    def lora_a_stacked(self) -> tuple[Tensor, ...]:
        """What vLLM makes the warm-up's adapters of: tensors whose last size is A's."""
        return (self.a,)

    @property
    def lora_b_stacked(self) -> tuple[Tensor, ...]:
        """As `lora_a_stacked`; the last size but one is B's."""
        return (self.b,)

    def slots(self, tokens: int) -> Tensor | None:
        """[tokens] the slot of each, -1 where a request has none; None with one adapter for all.

        vLLM's buffer holds anything behind the step's tokens, also what is no slot.
        """
        return self.punica_wrapper._token_lora_indices[:tokens] if self.by_token else None


class Update(_SlotLayer):
    """Step 8 of docs/method.md on the residual stream: D and W of every slot.

    Args:
        slots, rank, width: how many, q at most, d.
        activation: σ.
        by_token: as in `_SlotLayer`.
    """

    down: Tensor
    up: Tensor
    owner: Tensor

    def __init__(self, slots: int, rank: int, width: int, activation: str, *, by_token: bool):
        super().__init__(by_token=by_token)
        self.activation = activation
        for name in ("down", "up"):
            self.register_buffer(name, torch.zeros(slots, rank, width, dtype=torch.float32), persistent=False)
        self.register_buffer("owner", torch.arange(slots).repeat_interleave(rank), persistent=False)

    @property
    def a(self) -> Tensor:
        return self.down

    @property
    def b(self) -> Tensor:
        return self.up.mT

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Puts an adapter's D [q, d] and W, transposed [d, q], into a slot."""
        rank = self.down.shape[1]
        self.reset_lora(index)
        self.down[index, : len(lora_a)].copy_(lora_a[:rank])  # vLLM's warm-up hands in more rows, of zeros
        self.up[index, : len(lora_a)].copy_(lora_b.mT[:rank])

    def reset_lora(self, index: int) -> None:
        self.down[index].zero_()
        self.up[index].zero_()

    def forward(self, stream: Tensor, slots: Tensor | None) -> Tensor:
        """The addend σ(x·Dᵀ)·W [tokens, d] for the residual stream x [tokens, d], in its dtype."""
        if slots is None:
            return (
                ept_kernels.layer_update(stream[None], self.down[0], self.up[0], activation=self.activation)[0] - stream
            )
        if resolve("auto", stream.device) == "triton":
            index = torch.where((slots >= 0) & (slots < len(self.down)), slots, -1)
            updated = ept_kernels.layer_update(
                stream[:, None], self.down, self.up, activation=self.activation, adapter_index=index
            )
            return updated[:, 0] - stream
        return self._by_products(stream, slots)

    def _by_products(self, stream: Tensor, slots: Tensor) -> Tensor:
        """Two products for all slots at once: one column for each hidden unit of each slot, zero but in the token's own.

        Zeros are put in place of what the others' units hold: behind the step's tokens they may be infinite.
        """
        z = stream.to(self.down.dtype) @ self.down.flatten(0, 1).T
        z = torch.where(self.owner == slots[:, None], ACTIVATIONS[self.activation](z), 0)
        return (z @ self.up.flatten(0, 1)).to(stream.dtype)


class Rows(_SlotLayer):
    """What stands at a request's first positions: P*, and C which is added to the text behind it (steps 1 and 7).

    Args:
        slots, rows, width: how many, s + N at most, d.
        by_token: as in `_SlotLayer`.
    """

    rows: Tensor
    ends: Tensor

    def __init__(self, slots: int, rows: int, width: int, *, by_token: bool):
        super().__init__(by_token=by_token)
        self.register_buffer("rows", torch.zeros(slots, rows, width, dtype=torch.float32), persistent=False)
        # Of each slot: the positions at which the prompt, and at which C, end.
        self.register_buffer("ends", torch.zeros(slots, 2, dtype=torch.int64), persistent=False)

    @property
    def a(self) -> Tensor:
        return self.rows

    @property
    def b(self) -> Tensor:
        return self.rows.new_zeros(1, 1, 1)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Puts an adapter's P* and C [s + N, d] into a slot; s is the width of B."""
        self.reset_lora(index)
        count = min(len(lora_a), self.rows.shape[1])  # vLLM's warm-up hands in more rows, of zeros
        self.rows[index, :count].copy_(lora_a[:count])
        self.ends[index, 0].fill_(min(lora_b.shape[1], count))
        self.ends[index, 1].fill_(count)

    def reset_lora(self, index: int) -> None:
        self.rows[index].zero_()
        self.ends[index].zero_()

    def forward(self, hidden: Tensor, positions: Tensor, slots: Tensor | None, update: Update | None) -> Tensor:
        """What the first layer reads [tokens, d]: P* at the prompt's positions, else the embeddings updated and C added.

        Args:
            hidden: [tokens, d] embeddings.
            positions: [tokens] of the tokens in their requests.
            slots: [tokens], as `_SlotLayer.slots` gives them.
            update: the token-conditioned update of the input, where there is one.
        """
        count, length, _ = self.rows.shape
        if slots is None:
            slot, has_slot = torch.zeros_like(positions), torch.ones_like(positions, dtype=torch.bool)
        else:
            has_slot = (slots >= 0) & (slots < count)
            slot = torch.where(has_slot, slots, 0)
        ends = self.ends[slot]
        is_prompt = has_slot & (positions < ends[:, 0])
        is_row = has_slot & (positions < ends[:, 1])
        text = hidden.to(self.rows.dtype)
        if update is not None:
            text = text + update(text, slots)
        row = self.rows[slot, positions.clamp(max=length - 1)]
        text = torch.where(is_prompt[:, None], 0, text)
        return (text + torch.where(is_row[:, None], row, 0)).to(hidden.dtype)


def before_first_layer(layer: nn.Module, inputs: tuple) -> tuple:
    """Forward pre-hook of the first decoder layer: its inputs with the prompt's rows and the updated embeddings."""
    positions, hidden, residual, *others = inputs
    rows: Any = getattr(layer, ROWS)
    hidden = rows(hidden, positions, rows.slots(len(hidden)), getattr(layer, UPDATE, None))
    return (positions, hidden, residual, *others)


def before_layer(layer: nn.Module, inputs: tuple) -> tuple:
    """Forward pre-hook of a later decoder layer: its inputs with the update added to the residual stream.

    vLLM keeps the stream as two addends, which the layer's norm sums. The update goes onto the first; the second stays, so
    that an update of zeros changes no bit.
    """
    positions, hidden, residual, *others = inputs
    update: Any = getattr(layer, UPDATE)
    addend = update(hidden + residual, update.slots(len(hidden)))
    return (positions, hidden + addend, residual, *others)
