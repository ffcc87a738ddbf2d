"""Where everything stands in the backbone's input: pure functions from the caller's tensors to an `InputPlan`.

`padded` lays out rows of one example, `continued` new tokens after a cache, `encoder` the text of an encoder-decoder;
`ept.model.packing` lays out rows of several examples. Where the adapters of a batch have prompts of several shapes, each
adapter's rows are laid out alone and then brought to one width, so that the backbone runs once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ept.backbone.traits import IGNORE_INDEX, Traits
from ept.layer.base import PromptShape
from ept.model.columns import behind_padding, insert, insert_first, insert_positions, leading_padding, taken, widened
from ept.model.inputs import Inputs, mask_by_last_token
from ept.model.routing import OneAdapter, Routing
from ept_kernels import text_positions

__all__ = [
    "VISION_POSITIONS", "Embed", "InputPlan", "continued", "encoder", "mask_with_prompt", "padded", "with_vision_positions",
]  # fmt: skip

# Positions of the text's columns in images, [batch, L, axes], among an input's other arguments.
VISION_POSITIONS = "vision_positions"

# The backbone's input [batch, s + L, d] for a batch and its routing.
Embed = Callable[[Inputs, Routing], Tensor]


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
            moved = kept + self.columns.start if isinstance(kept, Tensor) else kept
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
    shape = routing.shared_shape
    if shape is not None:
        return _padded_around(shape, traits, inputs, routing, embed)
    if inputs.attention_mask is None and len({shape.length for shape in routing.prompt_shapes}) > 1:
        ones = torch.ones(inputs.batch, inputs.length, dtype=torch.int64, device=inputs.device)
        inputs = inputs.with_(attention_mask=ones)
    parts = {name: routing.split(tensor) for name, tensor in inputs.expanded().present().items()}
    plans = []
    for number, member in enumerate(routing.members):
        rows = Inputs.of({name: part[number] for name, part in parts.items()})
        plans.append(_padded_around(member.layer.prompt_shape, traits, rows, OneAdapter(member), embed))
    return _joined(traits, plans, routing, inputs.length)


def _padded_around(shape: PromptShape, traits: Traits, inputs: Inputs, routing: Routing, embed: Embed) -> InputPlan:
    """The plan of rows whose prompts all have one shape."""
    per_token = inputs.labels is not None and traits.labels_are_per_token(inputs.labels)
    order: Tensor | None = None
    if inputs.attention_mask is not None and traits.kind.text_moves_to is not None:
        is_text = inputs.attention_mask != 0
        order = torch.argsort(is_text if traits.kind.text_moves_to == "end" else ~is_text, dim=1, stable=True)
        inputs = inputs.columns(order, labels=per_token)
    batch, length, device = inputs.batch, inputs.length, inputs.device
    check_length(traits, shape, length, inputs.attention_mask)
    embeds = embed(inputs, routing)
    inputs = inputs.expanded()
    mask = inputs.attention_mask
    if mask is None and inputs.position_ids is not None and traits.kind.causal:
        # Without a mask transformers takes a gap between positions for the start of another example.
        mask = torch.ones(batch, length, dtype=torch.int64, device=device)
    arguments: dict[str, Any] = {
        "inputs_embeds": embeds,
        "attention_mask": None if mask is None else insert(shape, mask, 1),
    }
    if inputs.token_type_ids is not None and "token_type_ids" in traits.accepts:
        arguments["token_type_ids"] = insert(shape, inputs.token_type_ids, 0)
    for name, columns in inputs.others.items():
        arguments[name] = _with_prompts(traits, shape, name, columns, mask)
    if inputs.position_ids is not None:
        _check_positions(traits, shape, inputs.position_ids)
        arguments["position_ids"] = insert_positions(shape, inputs.position_ids, mask)
    if mask is not None and traits.kind.causal:
        arguments = _behind_the_padding(traits, shape, arguments, mask)
    labels = inputs.labels
    arguments["labels"] = labels if labels is None or not per_token else _with_prompt(traits, shape, labels)
    if traits.pools_mean and "pooling_mask" not in arguments:
        text = torch.ones(batch, length, dtype=torch.int64, device=device) if mask is None else mask
        arguments["pooling_mask"] = insert(shape, text, 0)
    causal = traits.kind.causal
    if order is None and not shape.start:
        return InputPlan(arguments, slice(shape.length, None), length, causal=causal)

    def callers() -> Tensor:
        text = torch.arange(length, device=device) if order is None else torch.argsort(order, dim=1)
        return (text + shape.length * (text >= shape.start)).expand(batch, -1)

    return InputPlan(arguments, callers, length, causal=causal)


def _with_prompts(traits: Traits, shape: PromptShape, name: str, columns: Tensor, mask: Tensor | None) -> Tensor:
    """An argument [batch, L, …] with an entry for each column, with the prompt's put in."""
    if name == VISION_POSITIONS:
        prompt = torch.arange(shape.length, device=columns.device)[None, :, None]
        return insert(
            shape, columns + shape.length, prompt.expand(len(columns), -1, columns.shape[2]).to(columns.dtype)
        )
    value = traits.prompt_value(name)
    return insert_first(shape, columns, mask) if value is None else insert(shape, columns, value)


def with_vision_positions(plan: InputPlan) -> InputPlan:
    """The plan with `VISION_POSITIONS` as the backbone takes them: [1 + axes, batch, columns], the text's count first."""
    arguments = dict(plan.arguments)
    vision = arguments.pop(VISION_POSITIONS, None)
    if vision is None:
        return plan
    arguments["position_ids"] = torch.cat([arguments["position_ids"][None], vision.permute(2, 0, 1)])
    return replace(plan, arguments=arguments)


def _behind_the_padding(
    traits: Traits, shape: PromptShape, arguments: dict[str, Any], attention_mask: Tensor
) -> dict[str, Any]:
    """A causal model's arguments with each row's prompt directly before its text, and positions counted from there."""
    leading = leading_padding(attention_mask)
    has_positions = "position_ids" in arguments or "position_ids" in traits.accepts
    # Asked once, since it waits for the device. What cannot ask moves the columns of every batch.
    moved = (has_positions and _cannot_ask(leading.device)) or bool(leading.any())
    if moved:
        columns = behind_padding(shape, arguments["inputs_embeds"].shape[1], leading)
        arguments = {name: taken(value, columns) for name, value in arguments.items()}
    if "position_ids" not in arguments:
        if "position_ids" in traits.accepts:
            positions = text_positions(arguments["attention_mask"]).clamp(min=0)
            arguments["position_ids"] = positions + traits.first_position
        elif moved:
            _refuse_moved_text(traits)
    return arguments


def _cannot_ask(device: torch.device) -> bool:
    """Whether values on the device cannot be read: in a compiled graph, and while a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _with_prompt(traits: Traits, shape: PromptShape, labels: Tensor) -> Tensor:
    """Labels [batch, L] with the prompt's put in, which do not count: each stands where `bring_back` finds its logits."""
    if traits.shifts_labels:
        labels = labels.clone()
        labels[:, :1] = IGNORE_INDEX  # the first token is predicted by the prompt, whose logits nobody sees
    return insert(shape, labels, IGNORE_INDEX)


def _joined(traits: Traits, plans: list[InputPlan], routing: Routing, length: int) -> InputPlan:
    """One batch from rows that were laid out apart, padded where the text need not be."""
    left, width = traits.kind.causal, max(plan.width for plan in plans)
    if left and any(plan.width < width for plan in plans) and "position_ids" not in plans[0].arguments:
        _refuse_moved_text(traits)
    arguments = {}
    for name, first in plans[0].arguments.items():
        tensors = [plan.arguments[name] for plan in plans]
        if first is not None and first.shape[1:2] == (plans[0].width,):  # one entry per column
            value = IGNORE_INDEX if name == "labels" else 0
            tensors = [widened(tensor, width, value, left) for tensor in tensors]
        arguments[name] = None if first is None else routing.join(tensors)
    if traits.kind.causal and traits.kind.text_moves_to is None:
        return InputPlan(arguments, slice(width - length, None), length, causal=True)

    def columns() -> Tensor:
        return routing.join([plan.indices() + (width - plan.width if left else 0) for plan in plans])

    return InputPlan(arguments, columns, length, causal=traits.kind.causal)


def encoder(traits: Traits, inputs: Inputs, routing: Routing, embed: Embed, *, encoded: bool) -> InputPlan:
    """Lays out the encoder's text of an encoder-decoder; `encoded` where it has run already."""
    if not encoded:
        plan = padded(traits, inputs.with_(labels=None), routing, embed)
        return InputPlan(plan.arguments | {"labels": inputs.labels})
    mask = inputs.attention_mask
    if mask is None:
        if len({shape.length for shape in routing.prompt_shapes}) > 1:
            raise ValueError("encoder_outputs of prompts of several lengths need the text's attention_mask")
        return InputPlan({"labels": inputs.labels})
    width = routing.prompt_width + mask.shape[1]
    text_first = mask.sort(dim=1, descending=True, stable=True).values
    mask = routing.by_shape(text_first, lambda rows, shape: widened(insert(shape, rows, 1), width, 0, left=False))
    return InputPlan({"attention_mask": mask, "labels": inputs.labels})


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
    width, cached = routing.prompt_width, int(cache.get_seq_length())
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
    for rows, shape in routing.by_shape_parts(mask):
        check_length(traits, shape, text_length, rows)
    positions = text_positions(mask)[:, -new:]
    arguments = dict(
        inputs_embeds=continued_text(routing, embeds, positions, kept),
        attention_mask=mask_with_prompt(routing, mask),
        past_key_values=cache,
        labels=inputs.labels,
        **inputs.others,
    )
    if inputs.token_type_ids is not None and "token_type_ids" in traits.accepts:
        arguments["token_type_ids"] = inputs.token_type_ids
    if "position_ids" in traits.accepts:
        text = positions + traits.first_position if inputs.position_ids is None else inputs.position_ids
        prompt = routing.by_shape(positions[:, :1], lambda rows, shape: torch.full_like(rows, shape.length))
        arguments["position_ids"] = text.clamp(min=0) + prompt
    return InputPlan(arguments)


def continued_text(routing: Routing, embeds: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
    """[batch, n, d] embeddings after a cached prefix, each row with its adapter's update for its positions [batch, n].

    Those of `kept` [batch, n] stay as they are.
    """
    parts: Iterable[tuple[Tensor, Tensor]] = zip(routing.split(embeds), routing.split(positions), strict=True)
    updated = routing.join([layer.continue_text(*part) for layer, part in zip(routing.layers, parts, strict=True)])
    return updated if kept is None else torch.where(kept.unsqueeze(-1), embeds, updated)


def mask_with_prompt(routing: Routing, attention_mask: Tensor) -> Tensor:
    """[batch, prompt width + L]: a causal model's mask with each row's prompt directly before its text."""
    width = routing.prompt_width + attention_mask.shape[1]

    def with_prompt(rows: Tensor, shape: PromptShape) -> Tensor:
        mask = insert(shape, rows, 1)
        mask = taken(mask, behind_padding(shape, mask.shape[1], leading_padding(rows)))
        return widened(mask, width, 0, left=True)

    return routing.by_shape(attention_mask, with_prompt)


def check_length(traits: Traits, shape: PromptShape, length: int, attention_mask: Tensor | None) -> None:
    """ValueError if a row of `length` columns with the prompt exceeds the backbone's positions."""
    limit = traits.max_positions
    if limit is None or length + shape.length <= limit:
        return
    longest = length
    if attention_mask is not None and traits.kind.caches:
        longest = int((attention_mask != 0).sum(1).max())  # padding takes no positions
    if longest + shape.length > limit:
        room = limit - shape.length
        raise ValueError(
            f"a row of {longest} tokens with {shape.length} prompt rows exceeds the backbone's {limit} positions: "
            f"truncate the text to {room} tokens (tokenizer(..., max_length={room}, truncation=True))"
        )


def _check_positions(traits: Traits, shape: PromptShape, position_ids: Tensor) -> None:
    if traits.max_positions is None or position_ids.numel() == 0:
        return
    highest = int(position_ids.max()) + shape.length - traits.first_position
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
