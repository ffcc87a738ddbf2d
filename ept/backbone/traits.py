"""What EPT must know of a backbone, asked once."""

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ept.backbone.heads import MeanPoolingForSequenceClassification

__all__ = ["head_names", "kind_of", "max_text_tokens", "positions_of", "reads_first_token"]


IGNORE_INDEX = -100  # what transformers' losses skip


def kind_of(model: PreTrainedModel) -> str:
    """ "seq2seq", "causal", "causal-pooled" (a causal backbone whose head reads the last token) or "encoder"."""
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
    """Whether an encoder's head or pooler reads the first token (all of transformers' do, but for the mean)."""
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
    """The most text tokens that the backbone `model` has positions for beside the prompt; None: it sets no limit."""
    positions, _ = positions_of(model)
    return None if positions is None else positions - prompt_length


def positions_of(model: PreTrainedModel) -> tuple[int | None, int]:
    """How many columns the backbone has positions for (None: no limit), and the number of the first."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin start counting after the padding index.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first, first
    if model.config.is_encoder_decoder and not hasattr(model.config, "max_position_embeddings"):
        return None, 0
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return (limit if limit is not None and limit > 0 else None), 0
