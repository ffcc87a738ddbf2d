"""The tensors that a caller gives for a batch of texts, checked once and moved together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ept.backbone.traits import PER_TOKEN, Traits
from ept.model.columns import taken

__all__ = ["Inputs", "check_inputs", "first_token", "mask_by_last_token", "take_per_token"]

# Arguments that would have to be changed with the prompt, and are not.
UNSUPPORTED = {
    "lengths": "give attention_mask in its place",
    "perm_mask": "it says for each token which others it sees, and not for the prompt; leave it out",
    "target_mapping": "it counts columns without the prompt's; leave it out, and every column has its result",
    "mems": "they would not hold the prompt; leave them out",
    "input_mask": "give attention_mask in its place",
    "entity_ids": "its mentions are told by columns that the prompt moves; leave it out",
    "entity_position_ids": "it counts columns without the prompt's; leave it out",
    "image_text_alignment": "it counts columns without the prompt's; leave it out",
    "start_positions": "the positions of answers would have to be moved; question answering cannot be trained so",
    "end_positions": "the positions of answers would have to be moved; question answering cannot be trained so",
}
# Beginnings of arguments that belong to the decoder, to images or to sounds, to the pass as a whole, or that are read apart.
NOT_PER_TOKEN = (
    "decoder_", "pixel_", "image", "visual_", "video_", "audio_", "input_features", "feature_", "encoder_", "past_", "output_",
    "labels", "logits_to_keep", "num_items_in_batch", "cache_position", "position_ids", "cu_seq_lens_", "max_length_", "seq_idx",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """One batch of texts: ids or embeddings, and what belongs to their columns.

    Attributes:
        input_ids: [batch, L] integers. inputs_embeds: [batch, L, d] in their place.
        attention_mask: [batch, L], nonzero on text; beside a cache as long as the cached and the new text.
        token_type_ids, position_ids: [batch, L] or [1, L] integers.
        labels: [batch, L] per token, or what the wrapped model's head takes.
        others: more arguments of the wrapped model with an entry for each column, [batch, L, …], by name (`PER_TOKEN`).
    """

    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Inputs":
        """The inputs of tensors by name, as `present` gives them."""
        own = {name: value for name, value in tensors.items() if name in _FIELDS}
        return cls(**own, others={name: value for name, value in tensors.items() if name not in _FIELDS})

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
        values = {name: getattr(self, name) for name in _FIELDS}
        return {name: value for name, value in values.items() if value is not None} | dict(self.others)

    def with_(self, **tensors: Tensor | None) -> "Inputs":
        """The inputs with some tensors in place of their own."""
        return Inputs.of({name: value for name, value in (self.present() | tensors).items() if value is not None})

    def with_others(self, others: dict[str, Tensor]) -> "Inputs":
        """The inputs with more arguments that have an entry for each column."""
        return replace(self, others={**self.others, **others})

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The inputs with each tensor changed."""
        return Inputs.of({name: change(value) for name, value in self.present().items()})

    def expanded(self) -> "Inputs":
        """Token types and positions of one row for all rows, written out as [batch, L]."""
        rows = {
            name: value.expand(self.batch, *value.shape[1:])
            for name, value in self.present().items()
            if name in ("token_type_ids", "position_ids")
        }
        return self.with_(**rows)

    def rows(self, index: Tensor) -> "Inputs":
        """The rows [n] of every tensor."""
        return self.expanded().map(lambda tensor: tensor.index_select(0, index))

    def columns(self, order: Tensor, *, labels: bool) -> "Inputs":
        """Every tensor's columns in the order [batch, L]; the labels' too where they belong to columns."""
        moved = self.expanded().present()
        kept = {} if labels or self.labels is None else {"labels": moved.pop("labels")}
        return Inputs.of({name: taken(value, order) for name, value in moved.items()} | kept)


_FIELDS = tuple(each.name for each in fields(Inputs) if each.name != "others")


def take_per_token(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments of `PER_TOKEN` that are given as tensors; takes them out of `arguments`."""
    return {name: arguments.pop(name) for name in PER_TOKEN if isinstance(arguments.get(name), Tensor)}


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
    if not encoded and inputs.batch == 0:
        raise ValueError("the batch has no rows: leave it out")
    mask = inputs.attention_mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [batch, length], 1 on text, not {shape}: a mask of another form does not say "
            "which columns each prompt belongs to; for several examples in a row give position_ids that restart"
        )
    if inputs.position_ids is not None and "position_ids" not in traits.accepts:
        raise ValueError(f"{traits.name} takes no position_ids: leave them out")
    types = inputs.token_type_ids
    if types is not None and "token_type_ids" not in traits.accepts and types.any():
        raise ValueError(f"{traits.name} has no token types: leave token_type_ids out")
    for name, value in arguments.items():
        if name in UNSUPPORTED and value is not None:
            raise ValueError(f"{name} is not supported: {UNSUPPORTED[name]}")
    if not encoded:
        _check_columns(traits, inputs)
        for name, value in arguments.items():
            if _is_per_token(name, value, inputs):
                raise ValueError(
                    f"{name} is {tuple(value.shape)}, as if it had an entry for each of {(inputs.batch, inputs.length)} text "
                    "tokens, and it is not known what belongs in the prompt's columns: leave it out"
                )


def _is_per_token(name: str, value: Any, inputs: Inputs) -> bool:
    """Whether an argument that is not known looks like one with an entry for each text token, or for each pair of them."""
    if not isinstance(value, Tensor) or name.startswith(NOT_PER_TOKEN):
        return False
    columns = (inputs.batch, inputs.length)
    return value.shape[:2] == columns or (value.dim() > 2 and value.shape[-2:] == (inputs.length, inputs.length))


def _check_columns(traits: Traits, inputs: Inputs) -> None:
    """Raises TypeError or ValueError where a tensor has not one integer for each text token."""
    batch, length = inputs.batch, inputs.length
    per_token = inputs.with_(input_ids=None, inputs_embeds=None).present()
    if traits.kind.caches and inputs.attention_mask is not None and inputs.attention_mask.shape[1] > length:
        del per_token["attention_mask"]  # it covers a cached text, too
    if inputs.labels is not None and not traits.labels_are_per_token(inputs.labels):
        del per_token["labels"]
    for name, tensor in per_token.items():
        other = name in inputs.others
        if tensor.is_floating_point() and not other:
            raise TypeError(f"{name} must hold integers, not {tensor.dtype}")
        rows = (batch, 1) if name in ("token_type_ids", "position_ids") else (batch,)
        deeper = other or name == "token_type_ids"  # TAPAS has several types a token
        if (
            tensor.dim() < 2
            or (tensor.dim() > 2 and not deeper)
            or tensor.shape[0] not in rows
            or tensor.shape[1] != length
        ):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but the text is {(batch, length)}: give one entry per text token, "
                "none for the prompt"
            )


def first_token(inputs: Inputs) -> Tensor:
    """[batch, L] 1 at each row's first text token, else 0."""
    first = torch.zeros(inputs.batch, inputs.length, dtype=torch.int64, device=inputs.device)
    if inputs.attention_mask is None:
        first[:, 0] = 1
        return first
    text = inputs.attention_mask != 0
    return (text & (text.cumsum(1) == 1)).to(torch.int64)


def mask_by_last_token(input_ids: Tensor, pad: int | None) -> Tensor | None:
    """[batch, L] 1 up to each row's last token that is not padding, then 0; None without a padding id.

    Without a mask, transformers' pooled causal models find the last token so.
    """
    if pad is None:
        return None
    return ((input_ids != pad).flip(1).cumsum(1).flip(1) > 0).to(torch.int64)
