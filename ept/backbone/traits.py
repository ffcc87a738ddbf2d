"""Facts about a backbone, asked once when it is wrapped.

`KINDS` is the table of what depends on a backbone's kind: a new kind is a new row. `Traits` are the facts of one model.
"""

import inspect
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ept.backbone.heads import MeanPoolingForSequenceClassification

__all__ = [
    "IGNORE_INDEX", "KINDS", "Kind", "Traits", "head_names", "kind_of", "max_text_tokens", "positions_of",
    "reads_first_token", "traits_of",
]  # fmt: skip

IGNORE_INDEX = -100  # what transformers' losses skip
RELATIVE_POSITIONS = ("bloom", "mpt", "falcon")  # causal models without position_ids to whom only distances matter


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
    shifts_labels = kind.name == "causal" and model.get_output_embeddings() is not None
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
        takes_loss_kwargs=shifts_labels and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()),
        generates=shifts_labels and "past_key_values" in parameters,
        moved_text_is_same=model.config.model_type in RELATIVE_POSITIONS,
    )


def kind_of(model: PreTrainedModel) -> str:
    """The name of a model's row in `KINDS`."""
    if model.config.is_encoder_decoder:
        return "seq2seq"
    model_type = model.config.model_type
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(model.config, "is_decoder", False)
    )
    if not causal:
        return "encoder"
    return "causal-pooled" if "ForSequenceClassification" in type(model).__name__ else "causal"


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
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin start counting after the padding index.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first, first
    if model.config.is_encoder_decoder and not hasattr(model.config, "max_position_embeddings"):
        return None, 0
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return (limit if limit is not None and limit > 0 else None), 0
