"""Where everything stands in the backbone's input: pure functions from the caller's tensors to an `InputPlan`.

`padded` lays out rows of one example, `continued` new tokens after a cache, `encoder` the text of an encoder-decoder;
`ept.model.packing` lays out rows of several examples. Rows whose adapters have prompts of several shapes are laid out
together: `Places` says what is each row's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ept.backbone.traits import IGNORE_INDEX, Traits
from ept.model.columns import Places, taken
from ept.model.inputs import Inputs, mask_by_last_token
from ept.model.routing import Routing
from ept_kernels import prompt_columns, text_positions
from ept_kernels.common.checks import has_readable_values
from ept_kernels.prompt_columns.arguments import Columns

__all__ = [
    "VISION_POSITIONS", "Embed", "InputPlan", "continued", "encoder", "longest_row", "mask_with_prompt", "padded",
    "with_vision_positions",
]  # fmt: skip

# Positions of the text's columns in images, [batch, L, axes], among an input's other arguments.
VISION_POSITIONS = "vision_positions"

# The backbone's input [batch, S + L, d] for a batch, its routing and the places of its prompts.
Embed = Callable[[Inputs, Routing, Places], Tensor]


@dataclass(frozen=True)
class InputPlan:
    """The backbone's arguments, and where the caller's columns are in its outputs.

    Attributes:
        arguments: for the wrapped model's forward.
        columns: where the caller's columns are: a slice, or what gives them as [batch, L]; None leaves outputs as they
            are. Pooled outputs never ask for them.
        length: L, the caller's columns.
        kept: the caller's `logits_to_keep`, where the backbone computes these logits alone.
        causal: whether every column of the outputs is one of the input: a causal model's.
    """

    arguments: dict[str, Any]
    columns: slice | Callable[[], Tensor] | None = None
    length: int = 0
    kept: int | Tensor | None = None
    causal: bool = False

    @property
    def width(self) -> int:
        """Columns of the backbone's input."""
        embeds = self.arguments.get("inputs_embeds")
        return (self.arguments["attention_mask"] if embeds is None else embeds).shape[1]

    def given(self) -> dict[str, Any]:
        """The arguments that are not None."""
        return {name: value for name, value in self.arguments.items() if value is not None}

    def with_arguments(self, **arguments: Any) -> "InputPlan":
        """The plan with more arguments for the backbone."""
        return replace(self, arguments=self.arguments | arguments)

    def indices(self) -> Tensor:
        """The caller's columns as [batch, L]."""
        if callable(self.columns):
            return self.columns()
        start = 0 if self.columns is None else self.columns.start
        some = next(value for value in self.arguments.values() if value is not None)
        return torch.arange(self.length, device=some.device).expand(len(some), -1) + start

    def keeping(self, kept: int | Tensor | None) -> "InputPlan":
        """The plan with `logits_to_keep`, which counts the caller's columns, as the backbone counts them."""
        if kept is None or (isinstance(kept, int) and kept == 0) or self.columns is None:
            return self if kept is None else self.with_arguments(logits_to_keep=kept)
        if isinstance(self.columns, slice):
            moved = kept
            if isinstance(kept, Tensor):  # of any form that picks columns: numbers, from the end too, or booleans
                moved = torch.arange(self.length, device=kept.device)[kept] + self.columns.start
            return replace(self, arguments=self.arguments | {"logits_to_keep": moved}, kept=kept)
        columns = self.columns()
        if len(columns) > 1:
            raise ValueError("logits_to_keep beside packed examples needs a batch of one row: leave it out")
        moved = columns[0, kept] if isinstance(kept, Tensor) else columns[0, -kept:]
        return replace(self, arguments=self.arguments | {"logits_to_keep": moved}, kept=moved)

    def bring_back(self, outputs: Any) -> Any:
        """Outputs of the backbone with token-level results in the caller's columns; the prompt's rows go."""
        if self.columns is None:
            return outputs
        columns = None
        for name in ("logits", "last_hidden_state"):
            value = outputs.get(name)
            if value is None or value.dim() != 3:
                continue
            if self.causal and self.kept is None and value.shape[1] != self.width:
                raise ValueError(
                    f"{name} has {value.shape[1]} columns for an input of {self.width}: where images bring columns of their own "
                    "it is not known which are the text's; leave them out"
                )
            if self.kept is not None and name == "logits":
                if not isinstance(self.kept, Tensor):
                    outputs[name] = value[:, -min(self.kept, self.length) :]
            elif isinstance(self.columns, slice):
                outputs[name] = value[:, self.columns]
            else:
                columns = self.columns() if columns is None else columns
                # Behind the text there may be columns of an image.
                outputs[name] = torch.cat([taken(value, columns), value[:, self.width :]], dim=1)
        return outputs


def padded(
    traits: Traits, inputs: Inputs, routing: Routing, embed: Embed, pad_token_id: int | None = None
) -> InputPlan:
    """Lays out rows of one example each, with padding on any side.

    Args:
        traits: of the backbone.
        inputs: the caller's.
        routing: the rows by adapter.
        embed: makes the backbone's input.
        pad_token_id: by which a pooled causal model finds a row's end where there is no mask.
    """
    if inputs.attention_mask is None and traits.kind.text_moves_to == "end" and inputs.input_ids is not None:
        inputs = inputs.with_(attention_mask=mask_by_last_token(inputs.input_ids, pad_token_id))
    places = routing.places(prompt_last=traits.kind.causal)
    if inputs.attention_mask is None and places.lengths is not None:
        ones = torch.ones(inputs.batch, inputs.length, dtype=torch.int64, device=inputs.device)
        inputs = inputs.with_(attention_mask=ones)
    per_token = inputs.labels is not None and traits.labels_are_per_token(inputs.labels)
    order: Tensor | None = None
    if inputs.attention_mask is not None and traits.kind.text_moves_to is not None:
        is_text = inputs.attention_mask != 0
        order = torch.argsort(is_text if traits.kind.text_moves_to == "end" else ~is_text, dim=1, stable=True)
        inputs = inputs.columns(order, labels=per_token)
    inputs = inputs.expanded()
    batch, length, device, mask = inputs.batch, inputs.length, inputs.device, inputs.attention_mask
    check_length(traits, places, length, mask)
    if mask is None and inputs.position_ids is not None and traits.kind.causal:
        # Without a mask transformers takes a gap between positions for the start of another example.
        mask = torch.ones(batch, length, dtype=torch.int64, device=device)
    columns = None
    if mask is not None and traits.kind.causal:
        columns, places = _behind_the_padding(traits, places, mask, inputs.labels if per_token else None, routing.impl)
    arguments: dict[str, Any] = {"inputs_embeds": embed(inputs, routing, places)}
    if columns is not None:
        arguments["attention_mask"] = columns.mask
    else:
        arguments["attention_mask"] = None if mask is None else places.insert(mask, 1)
    if inputs.token_type_ids is not None and "token_type_ids" in traits.accepts:
        arguments["token_type_ids"] = places.insert(inputs.token_type_ids, 0)
    for name, others in inputs.others.items():
        arguments[name] = _with_prompts(traits, places, name, others, mask)
    if inputs.position_ids is not None:
        _check_positions(traits, places, inputs.position_ids)
        arguments["position_ids"] = places.insert_positions(inputs.position_ids, mask)
    elif columns is not None and "position_ids" in traits.accepts:
        arguments["position_ids"] = columns.positions
    labels = inputs.labels
    if labels is not None and per_token:
        labels = _with_prompt(traits, places, labels) if columns is None else columns.labels
    arguments["labels"] = labels
    if traits.pools_mean and "pooling_mask" not in arguments:
        text = torch.ones(batch, length, dtype=torch.int64, device=device) if mask is None else mask
        arguments["pooling_mask"] = places.insert(text, 0)
    causal = traits.kind.causal
    if order is None and (causal or places.start == 0):
        return InputPlan(arguments, slice(places.width, None), length, causal=causal)

    def callers() -> Tensor:
        text = torch.arange(length, device=device) if order is None else torch.argsort(order, dim=1)
        return places.text_columns(text).expand(batch, -1)

    return InputPlan(arguments, callers, length, causal=causal)


def _with_prompts(traits: Traits, places: Places, name: str, columns: Tensor, mask: Tensor | None) -> Tensor:
    """An argument [batch, L, …] with an entry for each column, with the prompt's put in."""
    if name == VISION_POSITIONS:
        own = places.width if places.lengths is None else places.lengths.view(-1, 1, 1)
        number = torch.arange(places.width, device=columns.device)[None, :, None]
        prompt = number - (places.width - own) if places.prompt_last else number
        return places.insert(columns + own, prompt.expand(len(columns), -1, columns.shape[2]).to(columns.dtype))
    value = traits.prompt_value(name)
    return places.insert_first(columns, mask) if value is None else places.insert(columns, value)


def with_vision_positions(plan: InputPlan) -> InputPlan:
    """The plan with `VISION_POSITIONS` as the backbone takes them: [1 + axes, batch, columns], the text's count first."""
    arguments = dict(plan.arguments)
    vision = arguments.pop(VISION_POSITIONS, None)
    if vision is None:
        return plan
    arguments["position_ids"] = torch.cat([arguments["position_ids"][None], vision.permute(2, 0, 1)])
    return replace(plan, arguments=arguments)


def _behind_the_padding(
    traits: Traits, places: Places, attention_mask: Tensor, labels: Tensor | None, impl: str
) -> tuple[Columns, Places]:
    """A causal model's columns with each row's prompt directly before its text, and the places of these prompts.

    Nothing waits for the device to say whether there is padding on the left at all.
    """
    columns = prompt_columns(
        attention_mask, places.width, prompt_lengths=places.lengths, labels=labels, first_position=traits.first_position,
        ignore_index=IGNORE_INDEX, drops_first_label=traits.shifts_labels, impl=impl,
    )  # fmt: skip
    if "position_ids" not in traits.accepts and not traits.moved_text_is_same:
        if places.lengths is not None or bool(columns.starts.any()):
            _refuse_moved_text(traits)
        return columns, places
    if has_readable_values(columns.starts) and not columns.starts.any():
        return columns, places  # asked where that costs less than columns that move
    return columns, places.behind(columns.starts)


def _with_prompt(traits: Traits, places: Places, labels: Tensor) -> Tensor:
    """Labels [batch, L] with the prompt's put in, which do not count: each stands where `bring_back` finds its logits."""
    if traits.shifts_labels:
        labels = labels.clone()
        labels[:, :1] = IGNORE_INDEX  # the first token is predicted by the prompt, whose logits nobody sees
    return places.insert(labels, IGNORE_INDEX, IGNORE_INDEX)


def encoder(traits: Traits, inputs: Inputs, routing: Routing, embed: Embed, *, encoded: int | None) -> InputPlan:
    """Lays out the encoder's text of an encoder-decoder; `encoded`: the columns of its outputs where it has run already."""
    if encoded is None:
        plan = padded(traits, inputs.with_(labels=None), routing, embed)
        return InputPlan(plan.arguments | {"labels": inputs.labels})
    mask, places = inputs.attention_mask, routing.places(prompt_last=False)
    if mask is None:
        if places.lengths is not None:
            raise ValueError("encoder_outputs of prompts of several lengths need the text's attention_mask")
        return InputPlan({"labels": inputs.labels})
    expected = mask.shape[1] + places.width
    if encoded != expected:
        raise ValueError(
            f"encoder_outputs have {encoded} columns, where a call of this model gives {expected}, the prompt's "
            f"{places.width} and the text's: take them from such a call, the wrapped encoder's lack the adapter"
        )
    text_first = mask.sort(dim=1, descending=True, stable=True).values
    return InputPlan({"attention_mask": places.insert(text_first, 1), "labels": inputs.labels})


def continued(
    traits: Traits, inputs: Inputs, routing: Routing, embeds: Tensor, kept: Tensor | None, cache: Any
) -> InputPlan:
    """Lays out new tokens after a cached prefix that holds the prompt: the text's count p goes on.

    Args:
        inputs: the new tokens; the mask [batch, cached and new text] covers both.
        embeds: [batch, new, d] the new tokens' embeddings.
        kept: [batch, new] which of them are placeholders of images and stay as they are; None: none.
        cache: the key-value cache.
    """
    if not traits.kind.caches:
        raise ValueError("past_key_values is supported for causal language models only")
    places = routing.places(prompt_last=True)
    width, cached = places.width, int(cache.get_seq_length())
    batch, new = embeds.shape[:2]
    text_length = cached - width + new
    if text_length < new:
        raise ValueError(
            f"the cache holds {cached} columns, fewer than the prompt's {width}: it was filled without EPT"
        )
    mask = inputs.attention_mask
    if mask is None:
        mask = torch.ones(batch, text_length, dtype=torch.int64, device=embeds.device)
    if mask.shape[1] != text_length:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, but the cached and new text has {text_length}")
    check_length(traits, places, text_length, mask)
    positions = text_positions(mask)[:, -new:]
    updated = routing.steps().embed(None, None, embeds, positions)
    arguments = dict(
        inputs_embeds=updated if kept is None else torch.where(kept.unsqueeze(-1), embeds, updated),
        attention_mask=mask_with_prompt(routing, mask),
        past_key_values=cache,
        labels=inputs.labels,
        **inputs.others,
    )
    if inputs.token_type_ids is not None and "token_type_ids" in traits.accepts:
        arguments["token_type_ids"] = inputs.token_type_ids
    if "position_ids" in traits.accepts:
        text = positions + traits.first_position if inputs.position_ids is None else inputs.position_ids
        arguments["position_ids"] = text.clamp(min=0) + (
            width if places.lengths is None else places.lengths.unsqueeze(1)
        )
    return InputPlan(arguments)


def mask_with_prompt(routing: Routing, attention_mask: Tensor) -> Tensor:
    """[batch, prompt width + L]: a causal model's mask with each row's prompt directly before its text."""
    places = routing.places(prompt_last=True)
    return prompt_columns(attention_mask, places.width, prompt_lengths=places.lengths, impl=routing.impl).mask


def check_length(traits: Traits, places: Places, length: int, attention_mask: Tensor | None) -> None:
    """ValueError if a row of `length` columns with its prompt exceeds the backbone's positions."""
    limit = traits.max_positions
    if limit is None or length + places.width <= limit:
        return
    longest, own = length, places.width
    if attention_mask is not None and traits.kind.caches:  # padding takes no positions
        longest, own = longest_row(places, attention_mask)
    if longest + own > limit:
        room = limit - own
        raise ValueError(
            f"a row of {longest} tokens with {own} prompt rows exceeds the backbone's {limit} positions: "
            f"truncate the text to {room} tokens (tokenizer(..., max_length={room}, truncation=True))"
        )


def longest_row(places: Places, attention_mask: Tensor) -> tuple[int, int]:
    """Text tokens and prompt rows of the row that has most of both. Waits for the device."""
    tokens = (attention_mask != 0).sum(1)
    if places.lengths is None:
        return int(tokens.max()), places.width
    row = (tokens + places.lengths).argmax()
    return int(tokens[row]), int(places.lengths[row])


def _check_positions(traits: Traits, places: Places, position_ids: Tensor) -> None:
    if traits.max_positions is None or position_ids.numel() == 0:
        return
    own = places.width if places.lengths is None else places.lengths.unsqueeze(1)
    highest = int((position_ids + own).max()) - traits.first_position
    if highest >= traits.max_positions:
        raise ValueError(
            f"position_ids with the prompt reach {highest}, but the backbone has positions 0 … {traits.max_positions - 1}"
        )


def _refuse_moved_text(traits: Traits) -> None:
    """ValueError if text that starts after padding would get other positions than the row alone."""
    if not traits.moved_text_is_same:
        remedy = "batch rows of one length" if traits.kind.text_moves_to == "end" else "pad on the right"
        raise ValueError(
            f"{traits.name} takes no position_ids, so text after padding would get the wrong positions: {remedy}, "
            "with prompts of one length"
        )
