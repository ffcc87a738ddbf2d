"""Generation: the wrapped model's `generate` on rows that begin with a prompt; see docs/generation.md.

While a model generates, its thread is in a `Call` whose decoding embeds the new tokens. What the caller hands in to be
called between steps (logits processors, stopping criteria, streamers) runs outside of it, so that a pass of the bare
backbone in there is one.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from ept.backbone.embeddings import is_plain, placeholder_columns, weight_of
from ept.backbone.traits import Traits
from ept.model.calls import bare
from ept.model.columns import leading_padding
from ept.model.inputs import Inputs
from ept.model.layout import VISION_POSITIONS, Embed, longest_row, padded, with_vision_positions
from ept.model.routing import Routing, TextSteps

__all__ = ["DecodingSteps", "GenerationSettings", "outside_the_call"]

# Modes of generation that bypass the wrapped model's forward.
UNSUPPORTED = {
    "assistant_model": "assisted generation is not supported with EPT: leave out the assistant",
    "prompt_lookup_num_tokens": "assisted generation is not supported with EPT: leave out prompt_lookup_num_tokens",
    "assistant_early_exit": "assisted generation is not supported with EPT: leave out assistant_early_exit",
    "use_mtp": "assisted generation is not supported with EPT: leave out use_mtp",
    "custom_generate": "custom_generate is not supported with EPT: leave it out",
    "prefill_chunk_size": "prefill_chunk_size is not supported with EPT: leave it out",
    "token_healing": "token_healing is not supported with EPT: leave it out",
    "negative_prompt_ids": "guidance by a negative prompt is not supported with EPT: leave it out",
}
DEFAULT_NEW_TOKENS = 20  # transformers', where nothing says how many


class GenerationSettings:
    """The keyword arguments of one `generate`, read as the wrapped model will read them.

    Args:
        backbone: the wrapped model, whose generation config holds what the arguments do not say.
        traits: of it.
        arguments: the caller's; the methods change them.
    """

    def __init__(self, backbone: Any, traits: Traits, arguments: dict[str, Any]):
        self.backbone, self.traits, self.arguments = backbone, traits, arguments

    def get(self, name: str) -> Any:
        """A setting: an argument, the given config's, or the model's."""
        for value in (self.arguments.get(name), getattr(self.arguments.get("generation_config"), name, None)):
            if value is not None:
                return value
        return getattr(self.backbone.generation_config, name, None)

    def refuse_unsupported(self) -> None:
        """ValueError where a setting asks for a way to generate that EPT does not stand before."""
        for name, reason in UNSUPPORTED.items():
            if self.get(name):
                raise ValueError(reason)
        if self.get("guidance_scale") not in (None, 1):
            raise ValueError("classifier-free guidance is not supported with EPT: leave guidance_scale out")
        if self.get("cache_implementation") == "paged":
            raise ValueError('cache_implementation="paged" batches by paths of its own: take another, or leave it out')

    def prepare_causal(self, inputs: Inputs, routing: Routing) -> Tensor:
        """[batch, L] the mask of a text that a causal model goes on with; lengths come to count new tokens alone.

        Raises TypeError or ValueError where it cannot go on.
        """
        if not self.traits.generates:
            raise TypeError(f"{self.traits.name} does not generate text with a key-value cache")
        if self.arguments.get("position_ids") is not None:
            raise ValueError("generate counts positions from attention_mask: leave position_ids out")
        mask = self._mask_of(inputs)
        self._check_cache(routing, inputs.length)
        self._count_without_prompt(inputs.length)
        self._check_room(routing, mask)
        return mask

    def _mask_of(self, inputs: Inputs) -> Tensor:
        """[batch, L] the given mask, or the one that transformers infers: padding by its id, unless that also ends texts.

        ValueError where a row does not end with text.
        """
        mask = inputs.attention_mask
        if mask is None:
            pad, end = self.get("pad_token_id"), self.get("eos_token_id")
            ends = end if isinstance(end, (list, tuple)) else [end]
            if inputs.text.dim() == 3 or pad is None or pad in ends:
                mask = torch.ones(inputs.batch, inputs.length, dtype=torch.int64, device=inputs.device)
            else:
                mask = (inputs.text != pad).to(torch.int64)
        if mask.shape[1] == 0 or (mask.diff(dim=1) < 0).any() or not mask[:, -1].all():
            raise ValueError("text to go on with must end each row: pad on the left (tokenizer.padding_side = 'left')")
        return mask

    def _check_cache(self, routing: Routing, length: int) -> None:
        """ValueError if a given cache cannot be of the beginning of this text with these prompts."""
        cache = self.arguments.get("past_key_values")
        if cache is None or not cache.get_seq_length():
            return
        width = routing.prompt_width
        if not width < int(cache.get_seq_length()) < width + length:
            raise ValueError(
                f"past_key_values holds {int(cache.get_seq_length())} columns, the prompt's {width} among them, but the text "
                f"has {length} tokens: give the whole text, from the first turn on, with at least one token that is new"
            )

    def _count_without_prompt(self, length: int) -> None:
        """`max_length` and `min_length` count the text: as numbers of new tokens they are free of the prompt."""
        for word in ("max", "min"):
            whole = self.get(f"{word}_length")
            self.arguments.pop(f"{word}_length", None)
            if whole and self.get(f"{word}_new_tokens") is None:
                if word == "max" and whole <= length:
                    raise ValueError(f"max_length={whole} leaves nothing to generate after {length} tokens of text")
                self.arguments[f"{word}_new_tokens"] = max(0, whole - length)

    def _check_room(self, routing: Routing, attention_mask: Tensor) -> None:
        """ValueError if the longest row could run past the backbone's positions."""
        limit = self.traits.max_positions
        if limit is None:
            return
        longest, s = longest_row(routing.places(prompt_last=True), attention_mask)
        room = limit - s - longest
        new = self.get("max_new_tokens")
        if new is None:
            self.arguments["max_new_tokens"] = min(DEFAULT_NEW_TOKENS, room)
        if room < (1 if new is None else new):
            raise ValueError(
                f"{longest} tokens of text with {s} prompt rows leave {max(0, room)} of the backbone's {limit} "
                f"positions, but max_new_tokens is {new or DEFAULT_NEW_TOKENS}: lower it, or shorten the text"
            )


@dataclass(frozen=True)
class DecodingSteps:
    """Changes the arguments of the wrapped model's forward while it generates: new tokens come embedded and updated.

    Attributes:
        embedding: the wrapped model's input embeddings.
        traits: of the wrapped model.
        routing: the batch's; beams and returned sequences repeat its rows.
        steps: what embeds the new tokens: made once, so that a token costs no more than its own update.
        start: [batch] the backbone's column of each row's first text token.
        embed: makes the backbone's input of a whole text.
        others: the text's arguments with an entry for each column, [batch, L, …], by name.
    """

    embedding: nn.Module
    traits: Traits
    routing: Routing
    steps: TextSteps
    start: Tensor
    embed: Embed
    others: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        embedding: nn.Module,
        traits: Traits,
        routing: Routing,
        attention_mask: Tensor,
        embed: Embed,
        others: Mapping[str, Tensor],
    ) -> "DecodingSteps":
        """The steps after a text whose mask is [batch, L]."""
        start = routing.prompt_width + leading_padding(attention_mask)
        return cls(embedding, traits, routing, routing.steps(), start, embed, others)

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The forward's keyword arguments with embeddings in place of ids, and positions that the backbone knows."""
        input_ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None and self.traits.first_position:
            kwargs["position_ids"] = kwargs["position_ids"] + self.traits.first_position
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return kwargs
        kwargs["input_ids"] = None
        if cache is not None and cache.get_seq_length() > 0:
            kwargs["inputs_embeds"] = self._new_tokens(input_ids, cache)
            return kwargs
        # Generation without a cache repeats the whole text.
        routing = self.routing.for_rows(len(input_ids))
        start, column = self._starts(len(input_ids)), torch.arange(input_ids.shape[1], device=input_ids.device)
        text = (column + routing.prompt_width >= start).to(torch.int64)
        grown = {name: _grown(name, tensor, kwargs.get(name), input_ids) for name, tensor in self.others.items()}
        inputs = Inputs.of(grown | {"input_ids": input_ids, "attention_mask": text})
        arguments = with_vision_positions(padded(self.traits, inputs, routing, self.embed)).arguments
        own = {"attention_mask", "labels"} | ({"position_ids"} if kwargs.get("position_ids") is None else set())
        return kwargs | {name: value for name, value in arguments.items() if name not in own}

    def _new_tokens(self, input_ids: Tensor, cache: Any) -> Tensor:
        """[batch, n, d] embeddings of tokens [batch, n] that follow what the cache holds. They are text, never padding."""
        positions = None
        if self.steps.depends_on_positions:
            positions = cache.get_seq_length() - self._starts(len(input_ids))
            if input_ids.shape[1] > 1:
                positions = positions + torch.arange(input_ids.shape[1], device=input_ids.device)
        if is_plain(self.embedding) and not self.traits.placeholders:
            return self.steps.embed(input_ids, weight_of(self.embedding), None, positions)
        embeds = self.embedding(input_ids)
        kept = placeholder_columns(self.traits.placeholders, self.embedding, embeds)
        updated = self.steps.embed(None, None, embeds, positions)
        return updated if kept is None else torch.where(kept.unsqueeze(-1), embeds, updated)

    def _starts(self, rows: int) -> Tensor:
        """[rows, 1] the column of each row's first text token, where rows come several times in a row."""
        times = rows // len(self.start)
        return (self.start if times == 1 else self.start.repeat_interleave(times)).unsqueeze(1)


def _grown(name: str, tensor: Tensor, written: Tensor | None, input_ids: Tensor) -> Tensor:
    """A text's argument [batch, L, …] for the text with what was written, [batch · beams, n].

    `written` is transformers' own, whose last columns are those of the new tokens.
    """
    tensor = tensor.repeat_interleave(len(input_ids) // len(tensor), dim=0)
    new = input_ids.shape[1] - tensor.shape[1]
    if name == VISION_POSITIONS:
        tail = tensor[:, -1:] + torch.arange(1, new + 1, device=tensor.device)[None, :, None]
    elif written is not None and new:
        tail = written[:, -new:]
    else:
        tail = torch.zeros_like(tensor[:, -1:]).expand(-1, new, *tensor.shape[2:])
    return torch.cat([tensor, tail.to(tensor.dtype)], dim=1)


# ---------------------------------------------------------------------- what the caller hands in


def outside_the_call(arguments: dict[str, Any]) -> dict[str, Any]:
    """`generate`'s keyword arguments with the caller's functions made to run outside of the call."""
    changed = dict(arguments)
    for name, collected in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
        if arguments.get(name):
            own = (called if _is_transformers_own(called) else _Outside(called) for called in arguments[name])
            changed[name] = collected(own)
    if arguments.get("streamer") is not None:
        changed["streamer"] = _StreamerOutside(arguments["streamer"])
    if arguments.get("prefix_allowed_tokens_fn") is not None:
        changed["prefix_allowed_tokens_fn"] = _Outside(arguments["prefix_allowed_tokens_fn"])
    return changed


def _is_transformers_own(called: Any) -> bool:
    """Whether transformers made it: `generate` knows these by their class, and they run no model, guidance excepted."""
    guides = isinstance(called, UnbatchedClassifierFreeGuidanceLogitsProcessor)
    return type(called).__module__.startswith("transformers.") and not guides


class _Outside:
    """A function of the caller's that runs outside of the call; everything else about it is the function's own."""

    def __init__(self, called: Callable):
        self.called = called
        # transformers reads there which arguments a logits processor takes.
        vars(self)["__call__"] = functools.wraps(called.__call__)(functools.partial(_Outside.__call__, self))  # type: ignore[operator]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with bare():
            return self.called(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "called":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.called, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # transformers asks for it with isinstance
        return type(self.called)


class _StreamerOutside(BaseStreamer):
    """A streamer of the caller's that runs outside of the call."""

    def __init__(self, streamer: Any):
        self.streamer = streamer

    def put(self, value: Tensor) -> None:
        with bare():
            self.streamer.put(value)

    def end(self) -> None:
        with bare():
            self.streamer.end()
