"""Facts about a backbone, asked once when it is wrapped.

`KINDS` is the table of what depends on a backbone's kind: a new kind is a new row. `Traits` are the facts of one model.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.backbone.probes import id_for_shape, sets_global_attention, shifts_labels_of

__all__ = [
    "IGNORE_INDEX", "KINDS", "PER_TOKEN", "Kind", "Traits", "head_names", "is_causal", "is_encoder_decoder", "kind_of",
    "max_text_tokens", "positions_of", "reads_first_token", "text_part", "traits_of",
]  # fmt: skip

IGNORE_INDEX = -100  # what transformers' losses skip
# Models without position_ids to whom only distances matter, which count as causal here.
RELATIVE_POSITIONS = ("bloom", "mpt", "falcon", "xlnet")

# Arguments with an entry for each text token, and what the prompt's columns hold: a number, an attribute of the config
# that says it, or None for what the row's first text token has.
PER_TOKEN: dict[str, int | str | None] = {
    "bbox": 0,  # where a word stands on the page: the prompt stands nowhere, as special tokens do
    "global_attention_mask": 0,  # as text for which nothing is said
    "langs": None,
    "mm_token_type_ids": 0,  # text, not image
    "moe_mm_token_type_ids": 0,
    "cross_attention_mask": 0,  # sees no image of its own
    "image_attention_mask": 0,
    "image_embeds_position_mask": 0,
    "pooling_mask": 0,  # not in the mean
    "xpath_tags_seq": "tag_pad_id",
    "xpath_subs_seq": "subs_pad_id",
}


# Attributes of a config that name the tokens in whose place a model puts what it sees or hears.
PLACEHOLDERS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id", "audio_token_index",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What depends on a backbone's kind.

    Attributes:
        text_moves_to: the side of a row to which its text is moved past the padding. Encoders count positions by
            columns, so their text starts at the first; a pooled causal model reads the last column, so its text ends
            there. None: the text stays where it is.
        causal: each token sees those before it alone. The prompt then stands directly before a row's first text token.
        caches: a key-value cache may be given to `forward`.
        encoder_decoder: the prompt stands before the encoder's text; labels belong to the decoder and stay.
    """

    name: str
    text_moves_to: Literal["start", "end"] | None
    causal: bool
    caches: bool
    encoder_decoder: bool


KINDS = {
    kind.name: kind
    for kind in (
        Kind("encoder", "start", causal=False, caches=False, encoder_decoder=False),
        Kind("seq2seq", "start", causal=False, caches=False, encoder_decoder=True),
        Kind("causal", None, causal=True, caches=True, encoder_decoder=False),
        Kind("causal-pooled", "end", causal=True, caches=False, encoder_decoder=False),
    )
}


@dataclass(frozen=True)
class Traits:
    """The facts about one backbone that EPT asks for.

    Attributes:
        kind: its row of `KINDS`.
        name: its class.
        accepts: which of "position_ids" and "token_type_ids" its forward takes and heeds.
        max_positions: columns that it has positions for, the prompt's among them; None sets no limit.
        first_position: the number of its first position.
        head_names: its children that train, in order.
        classifies_rows: it gives one result a row.
        reads_first_token: its head or pooler reads the first token.
        pools_mean: its head is our mean over the text, which takes a `pooling_mask`.
        shifts_labels: its loss compares each column with the next one's label.
        takes_loss_kwargs: its loss divides by the Trainer's `num_items_in_batch`.
        generates: it writes text with a key-value cache.
        moved_text_is_same: text that starts later gives the same results although no positions are given.
        prompt_values: `PER_TOKEN` with the config's numbers.
        placeholders: ids of the tokens in whose place it puts images, videos and sounds; it finds them by their embeddings.
        sets_global_attention: it gives the first token global attention where no mask says otherwise (Longformer).
        id_for_shape: the token by which it is told the shape of a text beside its embeddings; None: they suffice.
        rope_owner: where the module stands that counts positions in images (Qwen-VL and its kin).
    """

    kind: Kind
    name: str
    accepts: frozenset[str]
    max_positions: int | None
    first_position: int
    head_names: tuple[str, ...]
    classifies_rows: bool
    reads_first_token: bool
    pools_mean: bool
    shifts_labels: bool
    takes_loss_kwargs: bool
    generates: bool
    moved_text_is_same: bool
    prompt_values: dict[str, int | None]
    placeholders: tuple[int, ...]
    sets_global_attention: bool
    id_for_shape: int | None
    rope_owner: str | None

    def prompt_value(self, name: str) -> int | None:
        """What the prompt's columns of a `PER_TOKEN` argument hold; None: what the row's first text token has."""
        return self.prompt_values[name]

    def labels_are_per_token(self, labels: Tensor) -> bool:
        """Whether labels [batch] or [batch, …] have one entry for each text token."""
        return not self.kind.encoder_decoder and not self.classifies_rows and labels.dim() == 2


def traits_of(model: PreTrainedModel) -> Traits:
    """The facts about a model, from its class, its config and its modules."""
    kind, name = KINDS[kind_of(model)], type(model).__name__
    pools_mean = isinstance(model, MeanPoolingForSequenceClassification)
    parameters = inspect.signature(model.forward).parameters
    # Whether a head passes on what it takes as **kwargs is known of our own alone.
    inner: nn.Module = model.encoder if isinstance(model, MeanPoolingForSequenceClassification) else model
    accepts = {"position_ids", "token_type_ids"} & inspect.signature(inner.forward).parameters.keys()
    if getattr(model.config, "alibi", False):
        accepts.discard("position_ids")  # taken and ignored
    max_positions, first_position = positions_of(model)
    writes = kind.name == "causal" and model.get_output_embeddings() is not None
    shifts_labels = shifts_labels_of(model, default=writes)
    return Traits(
        kind=kind,
        name=name,
        accepts=frozenset(accepts),
        max_positions=max_positions,
        first_position=first_position,
        head_names=tuple(head_names(model)),
        classifies_rows="SequenceClassification" in name,
        reads_first_token=reads_first_token(model),
        pools_mean=pools_mean,
        shifts_labels=shifts_labels,
        # Only the losses of causal language models divide by the number of items.
        takes_loss_kwargs=shifts_labels
        and getattr(model, "accepts_loss_kwargs", True)
        and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()),
        generates=writes and "past_key_values" in parameters,
        moved_text_is_same=model.config.model_type in RELATIVE_POSITIONS,
        prompt_values={
            name: getattr(model.config, value, 0) if isinstance(value, str) else value
            for name, value in PER_TOKEN.items()
        },
        placeholders=tuple(placeholders_of(model)),
        sets_global_attention=sets_global_attention(model),
        id_for_shape=id_for_shape(model),
        rope_owner=next((name for name, module in model.named_modules() if hasattr(module, "get_rope_index")), None),
    )


def kind_of(model: PreTrainedModel) -> str:
    """The name of a model's row in `KINDS`."""
    if is_encoder_decoder(model):
        return "seq2seq"
    config, text = model.config, model.config.get_text_config()
    causal = is_causal(config)
    if not causal and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        # Beside images or sounds: the language model's kind.
        causal = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or (
            text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            and text.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        )
    if not causal:
        return "encoder"
    return "causal-pooled" if "ForSequenceClassification" in type(model).__name__ else "causal"


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether a config is a causal language model's; an encoder's counts where it says that it is a decoder."""
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_encoder


def placeholders_of(model: PreTrainedModel) -> list[int]:
    """The ids of `PLACEHOLDERS` that a model's config names, or its map of a vocabulary with images; without repetition."""
    sources: list[Any] = [model.config, *(getattr(module, "vocabulary_mapping", None) for module in model.modules())]
    ids = (getattr(source, name, None) for source in sources for name in PLACEHOLDERS if source is not None)
    return list(dict.fromkeys(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0))


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model has an encoder and a decoder; an encoder alone keeps the config of both."""
    return bool(model.config.is_encoder_decoder) and "decoder_input_ids" in inspect.signature(model.forward).parameters


def text_part(model: Any) -> nn.Module:
    """The part of a model that reads the text: of an encoder-decoder its encoder, beside images its language model."""
    if is_encoder_decoder(model):
        return model.get_encoder()
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def reads_first_token(model: PreTrainedModel) -> bool:
    """Whether an encoder's head or pooler reads the first token: all of transformers' do, our mean does not."""
    if isinstance(model, MeanPoolingForSequenceClassification):
        return False
    return "ForSequenceClassification" in type(model).__name__ or getattr(model, "pooler", None) is not None


def head_names(model: PreTrainedModel) -> list[str]:
    """Children beside the backbone that train: those of a classification model, none of a language model."""
    if model.base_model is model or model.get_output_embeddings() is not None:
        return []
    return [
        name for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]  # fmt: skip


def max_text_tokens(model: PreTrainedModel, prompt_length: int) -> int | None:
    """The most text tokens that a model has positions for beside the prompt; None where it sets no limit."""
    positions, _ = positions_of(model)
    return None if positions is None else positions - prompt_length


def positions_of(model: PreTrainedModel) -> tuple[int | None, int]:
    """How many columns a model has positions for (None: no limit), and the number of the first."""
    for name, module in text_part(model).named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin start counting after the padding index.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first, first
    if is_encoder_decoder(model) and not hasattr(model.config, "max_position_embeddings"):
        return None, 0
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return (limit if limit is not None and limit > 0 else None), 0
