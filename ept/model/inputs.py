"""The tensors that a caller gives for a batch of texts, checked once and moved together."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ept.backbone.traits import Traits
from ept.model.columns import taken

__all__ = ["Inputs", "check_inputs", "mask_by_last_token"]


@dataclass(frozen=True)
class Inputs:
    """One batch of texts: ids or embeddings, and what belongs to their columns.

    Attributes:
        input_ids: [batch, L] integers. inputs_embeds: [batch, L, d] in their place.
        attention_mask: [batch, L], nonzero on text; beside a cache as long as the cached and the new text.
        token_type_ids, position_ids: [batch, L] or [1, L] integers.
        labels: [batch, L] per token, or what the wrapped model's head takes.
    """

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None

    @property
    def text(self) -> Tensor:
        """The text as it was given: ids [batch, L] or embeddings [batch, L, d]."""
        text = self.inputs_embeds if self.input_ids is None else self.input_ids
        if text is None:
            raise ValueError("pass either input_ids or inputs_embeds")
        return text

    @property
    def batch(self) -> int:
        return self.text.shape[0]

    @property
    def length(self) -> int:
        return self.text.shape[1]

    @property
    def device(self) -> torch.device:
        return self.text.device

    def present(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def with_(self, **tensors: Tensor | None) -> "Inputs":
        """The inputs with some tensors in place of their own."""
        return replace(self, **tensors)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The inputs with each tensor changed."""
        return replace(self, **{name: change(value) for name, value in self.present().items()})

    def expanded(self) -> "Inputs":
        """Token types and positions of one row for all rows, written out as [batch, L]."""
        rows = {
            name: value.expand(self.batch, -1)
            for name, value in self.present().items()
            if name in ("token_type_ids", "position_ids")
        }
        return replace(self, **rows)

    def rows(self, index: Tensor) -> "Inputs":
        """The rows [n] of every tensor."""
        return self.expanded().map(lambda tensor: tensor.index_select(0, index))

    def columns(self, order: Tensor, *, labels: bool) -> "Inputs":
        """Every tensor's columns in the order [batch, L]; the labels' too where they belong to columns."""
        moved = self.expanded().present()
        kept = {} if labels or self.labels is None else {"labels": moved.pop("labels")}
        return Inputs(**{name: taken(value, order) for name, value in moved.items()} | kept)


def check_inputs(traits: Traits, inputs: Inputs, arguments: dict[str, Any]) -> None:
    """Raises TypeError or ValueError where the inputs do not fit each other or the backbone.

    Args:
        traits: of the backbone.
        inputs: the caller's.
        arguments: the other keyword arguments of the call.
    """
    encoded = arguments.get("encoder_outputs") is not None
    if (inputs.input_ids is None) == (inputs.inputs_embeds is None) and not encoded:
        raise ValueError("pass either input_ids or inputs_embeds")
    if inputs.input_ids is not None and inputs.input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, length], not {tuple(inputs.input_ids.shape)}")
    mask = inputs.attention_mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, length], 1 on text, not {shape}: a mask of another form does not say "
            "which columns each prompt belongs to; for several examples in a row give position_ids that restart"
        )
    if arguments.get("start_positions") is not None or arguments.get("end_positions") is not None:
        raise ValueError("question answering is not supported: its positions would have to be moved")
    if inputs.position_ids is not None and "position_ids" not in traits.accepts:
        raise ValueError(f"{traits.name} takes no position_ids: leave them out")
    types = inputs.token_type_ids
    if types is not None and "token_type_ids" not in traits.accepts and types.any():
        raise ValueError(f"{traits.name} has no token types: leave token_type_ids out")
    if not encoded:
        _check_columns(traits, inputs)


def _check_columns(traits: Traits, inputs: Inputs) -> None:
    """Raises TypeError or ValueError where a tensor has not one integer for each text token."""
    batch, length = inputs.batch, inputs.length
    per_token = inputs.with_(input_ids=None, inputs_embeds=None).present()
    if traits.kind.caches and inputs.attention_mask is not None and inputs.attention_mask.shape[1] > length:
        del per_token["attention_mask"]  # it covers a cached text, too
    if inputs.labels is not None and not traits.labels_are_per_token(inputs.labels):
        del per_token["labels"]
    for name, tensor in per_token.items():
        if tensor.is_floating_point():
            raise TypeError(f"{name} must hold integers, not {tensor.dtype}")
        rows = (batch, 1) if name in ("token_type_ids", "position_ids") else (batch,)
        if tensor.dim() != 2 or tensor.shape[0] not in rows or tensor.shape[1] != length:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but the text is {(batch, length)}: give one entry per text token, "
                "none for the prompt"
            )


def mask_by_last_token(input_ids: Tensor, pad: int | None) -> Tensor | None:
    """[batch, L] true up to each row's last token that is not padding; None without a padding id.

    Without a mask, transformers' pooled causal models find the last token so.
    """
    if pad is None:
        return None
    return (input_ids != pad).flip(1).cumsum(1).flip(1) > 0
