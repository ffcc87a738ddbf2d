"""Generation: the wrapped model's `generate` on rows that begin with a prompt; see docs/generation.md."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ept_kernels import text_positions

from .adapters import AdaptersMixin
from .inputs import Group, leading_padding, of_one_shape, prompt_width

__all__ = ["GenerationMixin"]

# Ways to generate that would read the text by other paths than the forward that EPT stands before.
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


class GenerationMixin(AdaptersMixin):
    """What an EPTModel does to generate text."""

    _adapter_enabled: bool

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        adapter_ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The wrapped model's `generate`; the prompt's rows are not tokens: they do not count and are not returned.

        Args:
            input_ids: [batch, L] (also as `inputs`), or `inputs_embeds` [batch, L, d], which gives the same tokens and
                returns the new ones alone. Causal models want their padding on the left.
            attention_mask: [batch, L], 1 on text; None: transformers' rule, padding by its id.
            adapter_ids: each row's adapter by name; None: the active one for all.
            kwargs: everything that `generate` of the wrapped model takes. With `past_key_values` of an earlier turn the
                whole text goes in again, as in transformers; only what the cache lacks is computed.

        Raises:
            ValueError, TypeError: what cannot be right is refused with the reason.
        """
        backbone: Any = self.base_model  # its class has `generate`; PreTrainedModel alone has not
        if not self._adapter_enabled:
            with self._deep_updates_of([]):
                return backbone.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        inputs_embeds = kwargs.pop("inputs_embeds", None)
        if input_ids is None and inputs_embeds is None:
            raise ValueError("generate needs input_ids or inputs_embeds")
        for name, reason in UNSUPPORTED.items():
            if self._generation_setting(kwargs, name):
                raise ValueError(reason)
        if self._generation_setting(kwargs, "guidance_scale") not in (None, 1):
            raise ValueError("classifier-free guidance is not supported with EPT: leave guidance_scale out")
        if self._generation_setting(kwargs, "cache_implementation") == "paged":
            raise ValueError('cache_implementation="paged" batches by paths of its own: take another, or leave it out')
        read_ids = input_ids if inputs_embeds is None else None
        self._check_inputs(read_ids, inputs_embeds, attention_mask, None, None, None, kwargs)
        text = input_ids if inputs_embeds is None else inputs_embeds
        groups = self._groups(adapter_ids, len(text), text.device)
        if self._kind == "seq2seq":
            prepared = self._prepare_encoder_of_seq2seq(groups, read_ids, inputs_embeds, attention_mask, {})
            with self._deep_updates_of(groups):
                return backbone.generate(**{k: v for k, v in prepared.arguments.items() if v is not None}, **kwargs)
        if not self._shifts_labels or "past_key_values" not in inspect.signature(self.base_model.forward).parameters:
            raise TypeError(f"{type(self.base_model).__name__} does not generate text with a key-value cache")
        if kwargs.get("position_ids") is not None:
            raise ValueError("generate counts positions from attention_mask: leave position_ids out")
        if attention_mask is None:
            attention_mask = self._mask_of(text, kwargs)
        if attention_mask.shape[1] == 0 or (attention_mask.diff(dim=1) < 0).any() or not attention_mask[:, -1].all():
            raise ValueError("text to go on with must end each row: pad on the left (tokenizer.padding_side = 'left')")
        self._check_cache(kwargs.get("past_key_values"), groups, text.shape[1])
        self._lengths_without_prompt(kwargs, text.shape[1])
        self._check_room(kwargs, groups, attention_mask)
        arguments = self._prepare_groups(groups, read_ids, inputs_embeds, attention_mask, None, None, None).arguments
        start = prompt_width(groups) + leading_padding(attention_mask)
        with self._deep_updates_of(groups):
            hook = functools.partial(self._update_decoding_step, groups=groups, start=start)
            handle = self.base_model.register_forward_pre_hook(hook, with_kwargs=True)
            try:
                ids = {} if input_ids is None else {"input_ids": input_ids}
                mask = arguments["attention_mask"]
                return backbone.generate(**ids, inputs_embeds=arguments["inputs_embeds"], attention_mask=mask, **kwargs)
            finally:
                handle.remove()

    def _update_decoding_step(
        self,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        groups: list[Group],
        start: Tensor,
    ) -> tuple[tuple, dict] | None:
        """A hook on the wrapped model while it generates: embeds new tokens with their update.

        `start` [batch] is the backbone's column of each row's first text token; beams and returned sequences repeat
        the rows.
        """
        if not self._adapter_enabled:  # a pass of the bare model in between, say in a logits processor
            return None
        input_ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + self._first_position
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return args, kwargs
        kwargs["input_ids"] = None
        times = len(input_ids) // len(start)
        start = start.repeat_interleave(times).unsqueeze(1)
        groups = [group.repeated(times) for group in groups]
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        if cache is not None and cache.get_seq_length() > 0:
            embeddings = self.base_model.get_input_embeddings()(input_ids)
            kwargs["inputs_embeds"] = self._continue_text(groups, embeddings, cache.get_seq_length() + column - start)
        else:  # generation without a cache repeats the whole text
            text = (column + prompt_width(groups) >= start).to(torch.int64)
            prepared = self._prepare_groups(groups, input_ids, None, text, None, None, None).arguments
            kwargs["inputs_embeds"] = prepared["inputs_embeds"]
            if kwargs.get("position_ids") is not None:
                positions = text_positions(prepared["attention_mask"]).clamp(min=0)
                kwargs["position_ids"] = positions + self._first_position
        return args, kwargs

    def _generation_setting(self, kwargs: dict, name: str) -> Any:
        """A setting as `generate` of the wrapped model will see it: an argument, the given config's, or the model's."""
        for value in (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)):
            if value is not None:
                return value
        return getattr(self.base_model.generation_config, name, None)

    def _mask_of(self, text: Tensor, kwargs: dict) -> Tensor:
        """The mask that transformers' generate infers: padding by its id, unless that also ends texts."""
        pad, end = (self._generation_setting(kwargs, name) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, (list, tuple)) else [end]
        if text.dim() == 3 or pad is None or pad in ends:
            return torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        return (text != pad).to(torch.int64)

    def _lengths_without_prompt(self, kwargs: dict, length: int) -> None:
        """`max_length` and `min_length` count the text: as numbers of new tokens they are free of the prompt."""
        for word in ("max", "min"):
            given = self._generation_setting(kwargs, f"{word}_length")
            kwargs.pop(f"{word}_length", None)
            if given and self._generation_setting(kwargs, f"{word}_new_tokens") is None:
                if word == "max" and given <= length:
                    raise ValueError(f"max_length={given} leaves nothing to generate after {length} tokens of text")
                kwargs[f"{word}_new_tokens"] = max(0, given - length)

    def _check_room(self, kwargs: dict, groups: list[Group], attention_mask: Tensor) -> None:
        """ValueError if the longest row could run past the backbone's positions."""
        if self._max_length is None:
            return
        rooms = []
        for group in of_one_shape(groups):
            s, longest = group.layer.config.prompt_length, int(group.of(attention_mask).sum(1).max())
            rooms.append((self._max_length - s - longest, s, longest))
        room, s, longest = min(rooms)
        new = self._generation_setting(kwargs, "max_new_tokens")
        if new is None:
            kwargs["max_new_tokens"] = min(DEFAULT_NEW_TOKENS, room)
        if room < (1 if new is None else new):
            raise ValueError(
                f"{longest} tokens of text with {s} prompt rows leave {max(0, room)} of the backbone's {self._max_length} "
                f"positions, but max_new_tokens is {new or DEFAULT_NEW_TOKENS}: lower it, or shorten the text"
            )

    def _check_cache(self, cache: Any, groups: list[Group], length: int) -> None:
        """ValueError if a given cache cannot be of the beginning of this text with these prompts."""
        if cache is None or not cache.get_seq_length():
            return
        width = prompt_width(groups)
        if not width < int(cache.get_seq_length()) < width + length:
            raise ValueError(
                f"past_key_values holds {int(cache.get_seq_length())} columns, the prompt's {width} among them, but the text "
                f"has {length} tokens: give the whole text, from the first turn on, with at least one token that is new"
            )
