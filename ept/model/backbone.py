"""The wrapped model as a call runs it: how it is given its input, and what its hooks are told. Knows no adapter by name."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from ept.backbone.embeddings import is_plain, weight_of
from ept.backbone.traits import Traits
from ept.model.calls import Call, Decoding
from ept.model.generation import DecodingSteps, GenerationSettings
from ept.model.hooks import entries_of, hook_layers
from ept.model.inputs import Inputs
from ept.model.layout import InputPlan, continued, encoder, padded
from ept.model.packing import Packing, take_starts
from ept.model.routing import Member, Routing

__all__ = ["Backbone"]


@dataclass(frozen=True)
class Backbone:
    """A wrapped model with the facts about it.

    Attributes:
        model: the wrapped model.
        traits: its facts.
        packing: lays out its packed rows.
        path_of_layers: where its layers stand; None while no adapter has updates in them.
    """

    model: PreTrainedModel
    traits: Traits
    packing: Packing
    path_of_layers: str | None

    def lay_out(self, inputs: Inputs, routing: Routing, cache: Any, kwargs: dict[str, Any]) -> InputPlan:
        """The model's arguments for a forward.

        Args:
            cache: the caller's `past_key_values`.
            kwargs: the caller's other arguments; what the plan says in its own way is taken out.
        """
        if self.traits.kind.encoder_decoder:
            encoded = kwargs.get("encoder_outputs") is not None
            return encoder(self.traits, inputs, routing, self.embed, encoded=encoded).with_arguments(
                past_key_values=cache
            )
        starts = take_starts(inputs, kwargs)
        if starts is not None:
            if cache is not None or kwargs.pop("use_cache", False):
                raise ValueError(
                    "packed examples and a cache do not go together: leave past_key_values and use_cache out"
                )
            plan = self.packing.plan(inputs, routing, starts, self.embed)
        elif cache is not None and cache.get_seq_length() > 0:
            kwargs.pop("cache_position", None)
            plan = continued(self.traits, inputs, routing, self._embeddings(inputs), cache)
        else:
            plan = self.lay_out_rows(inputs, routing).with_arguments(past_key_values=cache)
        return plan.keeping(kwargs.pop("logits_to_keep", None)) if self.traits.kind.caches else plan

    def lay_out_rows(self, inputs: Inputs, routing: Routing) -> InputPlan:
        """The model's arguments for rows of one example each."""
        return padded(self.traits, inputs, routing, self.embed, self.model.config.get_text_config().pad_token_id)

    def start_of_text(
        self, inputs: Inputs, routing: Routing, settings: GenerationSettings
    ) -> tuple[InputPlan, Decoding | None]:
        """The model's arguments to generate from a text, and what embeds the tokens that follow.

        An encoder-decoder reads the text once: nothing follows. Changes the settings' arguments.
        """
        if self.traits.kind.encoder_decoder:
            return encoder(self.traits, inputs, routing, self.embed, encoded=False), None
        mask = settings.prepare_causal(inputs, routing)
        arguments = self.lay_out_rows(inputs.with_(attention_mask=mask), routing).arguments
        decoding = DecodingSteps.of(self.model.get_input_embeddings(), self.traits, routing, mask, self.embed)
        return InputPlan({name: arguments[name] for name in ("inputs_embeds", "attention_mask")}), decoding

    def embed(self, inputs: Inputs, routing: Routing) -> Tensor:
        """The model's input [batch, s + L, d]."""
        embedding = self.model.get_input_embeddings()
        by_ids = inputs.inputs_embeds is None and is_plain(embedding)
        ids = inputs.input_ids if by_ids else None
        embeds = None if by_ids else self._embeddings(inputs)
        table = weight_of(embedding) if by_ids else None
        none = [None] * len(routing.members)
        rows = zip(
            routing.layers,
            *(none if tensor is None else routing.split(tensor) for tensor in (ids, inputs.attention_mask, embeds)),
            strict=True,
        )
        return routing.join(
            [layer(own_ids, mask, embedding_weight=table, inputs_embeds=own) for layer, own_ids, mask, own in rows]
        )

    def _embeddings(self, inputs: Inputs) -> Tensor:
        """[batch, L, d] the text's embeddings without any update."""
        if inputs.inputs_embeds is not None:
            return inputs.inputs_embeds
        return self.model.get_input_embeddings()(inputs.input_ids)

    def call(self, routing: Routing, active: Member, decoding: Decoding | None = None) -> Call:
        """What the hooks are to know of a call whose rows are routed so; `active` has the heads that the model holds."""
        updates = tuple(layer.layer_updates() for layer in routing.layers)
        layers = self.hooked_layers()
        deepest = max([0, *(len(update.down) for update in updates if update is not None)])
        if deepest > len(layers):
            raise ValueError(
                f"deep_layers={deepest}, but the backbone has {len(layers)} layers after the first left: "
                "it has changed since it was wrapped"
            )
        heads: dict[nn.Module, list[nn.Module]] = {}
        if any(layer is not active.layer for layer in routing.layers):
            by_head = zip(*(member.heads for member in routing.members), strict=True)
            heads = {head: list(own) for head, own in zip(active.heads, by_head, strict=True)}
        return Call(routing, entries_of(self.model), layers, updates, heads, decoding)

    def hooked_layers(self) -> tuple[nn.Module, ...]:
        """The layers after the first, each with its hook; empty while no adapter has updates in them."""
        if self.path_of_layers is None:
            return ()
        return hook_layers(list(cast(nn.ModuleList, self.model.get_submodule(self.path_of_layers))))
