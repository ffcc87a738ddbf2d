"""Loads pretrained models with the right head and precision, their configs and their tokenizers."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file, is_bitsandbytes_available

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.backbone.precision import precision_for
from ept.backbone.traits import head_names, is_causal, max_text_tokens
from ept.console import without_load_reports

__all__ = [
    "DTYPES",
    "HEADS",
    "absolute_path",
    "architecture_of",
    "has_causal_form",
    "input_limit",
    "load_causal",
    "load_classifier",
    "load_seq2seq",
    "load_token_classifier",
    "load_tokenizer",
    "load_whole",
    "pad_like_tokenizer",
    "precision",
    "read_config",
]

logger = logging.getLogger(__name__)

HEADS = ("auto", "mean", "first")
DTYPES = ("auto", "float32", "bfloat16", "float16", "8bit", "4bit")


# ---------------------------------------------------------------------- configs


def read_config(name_or_path: str, *, may_be_file: bool = False, **settings: Any) -> PreTrainedConfig:
    """Reads the config of a hub name or of a model's directory; with `may_be_file`, also of a config.json by itself.

    Args:
        settings: what `AutoConfig.from_pretrained` takes.

    Raises:
        ValueError: a path that is not there; it must not be looked up as a hub name.
    """
    path = Path(name_or_path)
    is_path = path.is_absolute() or name_or_path.startswith(".") or len(path.parts) > 2
    if is_path and not path.is_dir() and not (may_be_file and path.is_file()):
        raise ValueError(
            f"{name_or_path}: no such directory or file; give a hub name, a model's directory or its config"
            if may_be_file
            else f"{name_or_path}: no such directory; give a hub name or the directory of a saved model"
        )
    return AutoConfig.from_pretrained(name_or_path, **settings)


def architecture_of(config: PreTrainedConfig) -> str:
    """Returns "seq2seq" (an encoder-decoder), "causal" or "encoder", by a model's config."""
    if config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if is_causal(config) else "encoder"


def has_causal_form(config: PreTrainedConfig) -> bool:
    """Tells whether transformers has a causal language model of this kind; of some encoders, as BERT, it has one, too."""
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# ---------------------------------------------------------------------- models


def load_whole(
    model_class: Any, name_or_path: str | os.PathLike, *, reads_pooler: bool = True, **settings: Any
) -> PreTrainedModel:
    """Loads a pretrained model that lacks no weights, except of a head, which trains.

    Weights that the checkpoint lacks are random, others at each load. What is frozen must not be so, since no adapter
    holds it.

    Args:
        model_class: of transformers, with `from_pretrained`.
        reads_pooler: False where nothing reads a bare encoder's pooler. A bare encoder without is otherwise warned of.
        settings: of `from_pretrained`.

    Raises:
        ValueError: the checkpoint lacks weights that stay frozen; their modules are named.
    """
    with without_load_reports():
        model, report = model_class.from_pretrained(name_or_path, output_loading_info=True, **settings)
    trained, is_bare = head_names(model), model.base_model is model
    missing = sorted({name.rpartition(".")[0] or name for name in report["missing_keys"]})
    missing = [name for name in missing if name.split(".")[0] not in trained]
    without_pooler = [name for name in missing if not (is_bare and name.split(".")[0] == "pooler")]
    if len(without_pooler) < len(missing) and reads_pooler:
        logger.warning("%s has no pooler: `pooler_output` is of random weights, others at each load", name_or_path)
    if without_pooler:
        raise ValueError(
            f"{name_or_path} lacks weights of a {type(model).__name__} that stay frozen, and would be random: "
            f"{', '.join(without_pooler)}. Give a checkpoint that has them"
            + (", or let the head read the tokens' mean, `head=mean`" if "pooler" in " ".join(without_pooler) else "")
        )
    return model


def load_seq2seq(name_or_path: str, dtype: str = "auto") -> PreTrainedModel:
    """Loads the pretrained encoder-decoder; `dtype` as in `load_classifier`."""
    return load_whole(AutoModelForSeq2SeqLM, absolute_path(name_or_path), **precision(name_or_path, dtype))


def load_causal(name_or_path: str, dtype: str = "auto") -> PreTrainedModel:
    """Loads the pretrained causal language model; `dtype` as in `load_classifier`."""
    return load_whole(AutoModelForCausalLM, absolute_path(name_or_path), **precision(name_or_path, dtype))


def load_classifier(
    name_or_path: str, num_labels: int, problem_type: str, *, head: str = "auto", dtype: str = "auto"
) -> PreTrainedModel:
    """Loads the pretrained model with a classification or regression head.

    Args:
        name_or_path: hub name or local directory.
        num_labels, problem_type: as in transformers' configs.
        head: "mean" (a linear head on the mean of the tokens), "first" (transformers' own head), or "auto": the mean
            where the directory is a sentence-transformers model that was trained with it.
        dtype: one of `DTYPES`, of the frozen weights; "auto" takes the checkpoint's, or float32 where that is bfloat16 and
            the CPU has no instructions for it; "8bit" and "4bit" are bitsandbytes' (nf4).
    """
    name_or_path = absolute_path(name_or_path)
    if head == "mean" or (head == "auto" and _pools_the_mean(name_or_path)):
        encoder = load_whole(AutoModel, name_or_path, reads_pooler=False, **precision(name_or_path, dtype))
        return MeanPoolingForSequenceClassification(encoder, num_labels, problem_type)
    return load_whole(
        AutoModelForSequenceClassification,
        name_or_path,
        num_labels=num_labels,
        problem_type=problem_type,
        **precision(name_or_path, dtype, not_quantised=_heads_of(AutoModelForSequenceClassification, name_or_path)),
    )


def load_token_classifier(name_or_path: str, num_labels: int, dtype: str = "auto") -> PreTrainedModel:
    """Loads the pretrained model with a head on every token; `dtype` as in `load_classifier`."""
    name_or_path, auto_class = absolute_path(name_or_path), AutoModelForTokenClassification
    return load_whole(
        auto_class,
        name_or_path,
        num_labels=num_labels,
        **precision(name_or_path, dtype, not_quantised=_heads_of(auto_class, name_or_path)),
    )


def absolute_path(name_or_path: str) -> str:
    """Makes a local directory's path absolute, since an adapter names it and may be used from elsewhere; a name stays."""
    return str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path


def _heads_of(auto_class: Any, name_or_path: str) -> list[str]:
    """Returns the modules that a model with a head of this kind trains, from its config alone."""
    with torch.device("meta"):
        return head_names(auto_class.from_config(AutoConfig.from_pretrained(name_or_path)))


def precision(name_or_path: str, dtype: str, not_quantised: list[str] | None = None) -> dict[str, Any]:
    """Returns from_pretrained's arguments for a type of the frozen weights.

    Args:
        name_or_path: of the model, whose config says what "auto" means.
        dtype: one of `DTYPES`.
        not_quantised: modules that keep their precision, such as a head that trains.
    """
    if dtype not in ("8bit", "4bit"):
        saved_dtype = read_config(name_or_path).get_text_config().dtype if dtype == "auto" else None
        chosen = precision_for(dtype, saved_dtype)
        return {"dtype": chosen.dtype} | ({} if chosen.attention is None else {"attn_implementation": chosen.attention})
    if not is_bitsandbytes_available():
        raise ValueError(f"`dtype={dtype}` needs bitsandbytes: pip install bitsandbytes, or take `dtype=bfloat16`")
    if dtype == "8bit":
        quantised = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=not_quantised)
    else:
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=not_quantised,
        )
    return {"dtype": torch.bfloat16, "quantization_config": quantised}


def _pools_the_mean(name_or_path: str) -> bool:
    """Tells whether a model is one of sentence-transformers that takes the tokens' mean."""
    file = cached_file(
        name_or_path, "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if file is None:
        return False
    pooling = json.loads(Path(file).read_text(encoding="utf-8"))
    return bool(pooling.get("pooling_mode_mean_tokens")) or pooling.get("pooling_mode") == "mean"


# ---------------------------------------------------------------------- tokenizers


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; one without a padding token pads with its end of text, which the attention mask hides."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_like_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells a model whose config names no padding token the tokenizer's."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def input_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_length: int, max_length: int | None = None
) -> int | None:
    """Returns the most tokens of a text: by `max_length`, the tokenizer, and the backbone's positions beside the prompt.

    Returns None where nothing sets a limit. Raises ValueError if `max_length` does not fit the backbone.
    """
    room = max_text_tokens(model, prompt_length)
    if max_length is not None and room is not None and max_length > room:
        raise ValueError(
            f"`max_length={max_length}` does not fit: the backbone has {room + prompt_length} positions, "
            f"of which the prompt takes {prompt_length}"
        )
    limits = [n for n in (max_length, room, tokenizer.model_max_length) if n is not None]
    return min(limits) if min(limits) < 10**9 else None  # tokenizers without a limit say 10^30
