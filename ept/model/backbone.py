"""The wrapped model as a call runs it: how it is given its input, and what its hooks are told. Knows no adapter by name."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ept.backbone.embeddings import is_plain, placeholder_columns, weight_of
from ept.backbone.layers import LayerSites
from ept.backbone.traits import Traits
from ept.model.calls import Call, Decoding
from ept.model.columns import Places
from ept.model.generation import DecodingSteps, GenerationSettings
from ept.model.heads import heads_by_row
from ept.model.hooks import entries_of, hook_layers
from ept.model.inputs import Inputs, first_token
from ept.model.layout import VISION_POSITIONS, InputPlan, continued, encoder, padded, with_vision_positions
from ept.model.packing import Packing
from ept.model.routing import Member, Routing
from ept.model.stacks import Stacks

__all__ = ["Backbone"]


@dataclass(frozen=True)
class Backbone:
    """A wrapped model with the facts about it.

    Attributes:
        model: the wrapped model.
        traits: its facts.
        packing: lays out its packed rows.
        sites: where updates in its layers act; None while no adapter has any.
        stacks: what is kept of the adapters from call to call.
    """

    model: PreTrainedModel
    traits: Traits
    packing: Packing
    sites: LayerSites | None
    stacks: Stacks

    def lay_out(
        self, inputs: Inputs, routing: Routing, starts: Tensor | None, cache: Any, kwargs: dict[str, Any]
    ) -> InputPlan:
        """The model's arguments for a forward.

        Args:
            starts: `take_starts` of the call.
            cache: the caller's `past_key_values`.
            kwargs: the caller's other arguments; what the plan says in its own way is taken out.
        """
        if self.traits.kind.encoder_decoder:
            decoded = ("decoder_input_ids", "decoder_inputs_embeds")
            if inputs.labels is None and all(kwargs.get(name) is None for name in decoded):
                raise ValueError(f"{self.traits.name} needs {', '.join(decoded)} or labels for its decoder")
            return encoder(self.traits, inputs, routing, self.embed, encoded=_encoded(kwargs)).with_arguments(
                past_key_values=cache
            )
        inputs = self._completed(inputs, kwargs, packed=starts is not None, cached=_length(cache) > 0)
        if starts is not None:
            if cache is not None or kwargs.pop("use_cache", False):
                raise ValueError(
                    "packed examples and a cache do not go together: leave past_key_values and use_cache out"
                )
            plan = self.packing.plan(inputs, routing, starts, self.embed)
        elif _length(cache) > 0:
            kwargs.pop("cache_position", None)
            embeds = self._embeddings(inputs)
            kept = placeholder_columns(self.traits.placeholders, self.model.get_input_embeddings(), embeds)
            plan = continued(self.traits, inputs, routing, embeds, kept, cache)
        else:
            plan = with_vision_positions(self.lay_out_rows(inputs, routing)).with_arguments(past_key_values=cache)
        return plan.keeping(kwargs.pop("logits_to_keep", None)) if self.traits.kind.caches else plan

    def lay_out_rows(self, inputs: Inputs, routing: Routing) -> InputPlan:
        """The model's arguments for rows of one example each."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        plan = padded(self.traits, inputs, routing, self.embed, pad)
        if self.traits.id_for_shape is None:
            return plan
        embeds = plan.arguments["inputs_embeds"]
        return plan.with_arguments(
            input_ids=torch.full(embeds.shape[:2], self.traits.id_for_shape, device=embeds.device)
        )

    def start_of_text(
        self, inputs: Inputs, routing: Routing, settings: GenerationSettings
    ) -> tuple[InputPlan, Decoding | None]:
        """The model's arguments to generate from a text, and what embeds the tokens that follow.

        An encoder-decoder reads the text once, or has read it before: nothing follows. Changes the settings' arguments.
        """
        if self.traits.kind.encoder_decoder:
            return encoder(self.traits, inputs, routing, self.embed, encoded=_encoded(settings.arguments)), None
        mask = settings.prepare_causal(inputs, routing)
        inputs = inputs.with_(attention_mask=mask)
        inputs = self._completed(inputs, settings.arguments, packed=False, cached=False)
        arguments = with_vision_positions(self.lay_out_rows(inputs, routing)).arguments
        others = (
            inputs.others
            if inputs.token_type_ids is None
            else {**inputs.others, "token_type_ids": inputs.token_type_ids}
        )
        decoding = DecodingSteps.of(self.model.get_input_embeddings(), self.traits, routing, mask, self.embed, others)
        # Positions are transformers' to count, from the mask, but where it would count by images of an earlier call.
        counted = {"labels", "position_ids"} if self.traits.rope_owner is None else {"labels"}
        return InputPlan({name: value for name, value in arguments.items() if name not in counted}), decoding

    def _completed(self, inputs: Inputs, kwargs: dict[str, Any], *, packed: bool, cached: bool) -> Inputs:
        """Fills in what a model would find by itself: which token has global attention; beside images token types, a mask
        and positions in images.

        They are found from the caller's columns, before the prompt's come between. Raises
        ValueError where these positions cannot be known.
        """
        traits = self.traits
        if traits.sets_global_attention and "global_attention_mask" not in inputs.others:
            inputs = inputs.with_others({"global_attention_mask": first_token(inputs)})
        if traits.placeholders and "token_type_ids" in traits.accepts and inputs.token_type_ids is None and not cached:
            zeros = torch.zeros(inputs.batch, inputs.length, dtype=torch.int64, device=inputs.device)
            inputs = inputs.with_(token_type_ids=zeros)
        if traits.rope_owner is None:
            return inputs
        if inputs.attention_mask is None and not packed and not cached:
            ones = torch.ones(inputs.batch, inputs.length, dtype=torch.int64, device=inputs.device)
            inputs = inputs.with_(attention_mask=ones)
        if cached and inputs.position_ids is None:
            raise ValueError(
                f"{traits.name} counts positions in images, and a cache does not say where they ended: give position_ids, "
                "or call generate with the whole text"
            )
        return self._with_vision_positions(inputs, kwargs, packed=packed, cached=cached)

    def _with_vision_positions(self, inputs: Inputs, kwargs: dict[str, Any], *, packed: bool, cached: bool) -> Inputs:
        """The inputs with the positions that their columns have in images."""
        if cached:
            return inputs
        if not any(name.endswith("grid_thw") and value is not None for name, value in kwargs.items()):
            ids, placeholders = inputs.input_ids, self.traits.placeholders
            if ids is not None and torch.isin(ids, ids.new_tensor(placeholders)).any():
                raise ValueError("the text has places of images: give image_grid_thw, by which positions are counted")
            return inputs
        if packed or inputs.input_ids is None or inputs.position_ids is not None:
            raise ValueError(
                "positions in images are counted from input_ids, one example a row: leave inputs_embeds and position_ids out"
            )
        owner: Any = self.model.get_submodule(self.traits.rope_owner or "")
        available = kwargs | inputs.present()
        names = inspect.signature(owner.get_rope_index).parameters
        if "mm_token_type_ids" in names and "mm_token_type_ids" not in available:
            raise ValueError("images need mm_token_type_ids, which the processor gives: positions are counted by them")
        positions, _ = owner.get_rope_index(**{name: available[name] for name in names if name in available})
        return inputs.with_others({VISION_POSITIONS: positions.permute(1, 2, 0)})

    def embed(self, inputs: Inputs, routing: Routing, places: Places) -> Tensor:
        """The model's input [batch, S + L, d]; placeholders of images stay as they are."""
        embedding, placeholders = self.model.get_input_embeddings(), self.traits.placeholders
        by_ids = inputs.inputs_embeds is None and is_plain(embedding)
        ids = inputs.input_ids if by_ids else None
        embeds = None if by_ids else self._embeddings(inputs)
        table = weight_of(embedding) if by_ids else None
        updated = routing.embed(ids, inputs.attention_mask, table, embeds, places)
        if not placeholders:
            return updated
        embeds = self._embeddings(inputs)
        kept = placeholder_columns(placeholders, embedding, embeds)
        assert kept is not None
        return torch.where(places.insert(kept, 0).unsqueeze(-1), places.insert(embeds, 0).to(updated.dtype), updated)

    def _embeddings(self, inputs: Inputs) -> Tensor:
        """[batch, L, d] the text's embeddings without any update."""
        if inputs.inputs_embeds is not None:
            return inputs.inputs_embeds
        return self.model.get_input_embeddings()(inputs.input_ids)

    def call(
        self, routing: Routing, active: Member, members: Sequence[Member], decoding: Decoding | None = None
    ) -> Call:
        """What the hooks are to know of a call whose rows are routed so.

        `active` has the heads that the model holds, `members` are all adapters.
        """
        updates = routing.layer_updates()
        layers = self.hooked_layers()
        sites = sum(site is not None for numbers in layers.values() for site in numbers)
        deepest = max([0, *(len(update.down) for update in updates)])
        if deepest > sites:
            raise ValueError(
                f"deep_layers={deepest}, but the backbone has {sites} layers after the first left: "
                "it has changed since it was wrapped"
            )
        heads = {}
        if any(layer is not active.layer for layer in routing.layers):
            heads = heads_by_row(active, routing, members, self.stacks)
        batch_dim = 0 if self.sites is None else self.sites.batch_dim
        return Call(entries_of(self.model), layers, updates, heads, decoding, batch_dim)

    def hooked_layers(self) -> dict[nn.Module, tuple[int | None, ...]]:
        """The layers that updates act on, each with its hook, and the sites of its calls; empty where there are none."""
        if self.sites is None:
            return {}
        layers = self.sites.calls(self.sites.modules(self.model))
        hook_layers(layers, self.sites.at)
        return layers


def _length(cache: Any) -> int:
    """Columns that a cache holds; 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def _encoded(arguments: dict[str, Any]) -> int | None:
    """Columns of the `encoder_outputs` among a call's arguments; None without them."""
    outputs = arguments.get("encoder_outputs")
    return None if outputs is None else outputs[0].shape[1]
