"""What the command line trains: the backbone with the right head, its metrics, its predictions."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file, is_bitsandbytes_available

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.backbone.traits import head_names, max_text_tokens
from ept.console import without_load_reports

__all__ = ["input_limit", "is_causal", "is_text_to_text", "load_backbone", "load_tokenizer"]

HEADS = ("auto", "mean", "first")
TASKS = ("classification", "regression", "text2text", "continuation")


def is_text_to_text(name_or_path: str) -> bool:
    """Whether a model is an encoder-decoder, by its config."""
    _check_directory(name_or_path)
    return bool(AutoConfig.from_pretrained(name_or_path).is_encoder_decoder)


def is_causal(name_or_path: str) -> bool:
    """Whether a model is a causal language model, by its config."""
    _check_directory(name_or_path)
    kind = AutoConfig.from_pretrained(name_or_path).model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def load_backbone(
    name_or_path: str, task: str, label_names: list[str] | None = None, *, head: str = "auto", dtype: str = "auto"
) -> PreTrainedModel:
    """The pretrained model with a head for `task`.

    Args:
        name_or_path: hub name or local directory.
        task: one of TASKS. "continuation": a causal language model scores the labels' words after the text.
        label_names: the classes' names in the order of their numbers.
        head: "mean" (a linear head on the mean of the tokens), "first" (transformers' own head), or "auto": the mean
            where the directory is a sentence-transformers model that was trained with it.
        dtype: of the frozen weights; "auto" takes the checkpoint's; "8bit" and "4bit" are bitsandbytes' (nf4).

    Raises:
        ValueError, OSError: there is no such model, or it does not do the task.
    """
    if is_text_to_text(name_or_path) != (task == "text2text"):
        raise ValueError(
            f"{name_or_path} is an encoder-decoder: use --task text2text, with the labels written as text"
            if task != "text2text"
            else f"{name_or_path} is no encoder-decoder: text2text needs one (T5, BART); "
            "a causal language model learns labels with --task continuation"
        )
    if task == "continuation" and not is_causal(name_or_path):
        raise ValueError(f"{name_or_path} is no causal language model, which continuation needs: leave out --task")
    if Path(name_or_path).is_dir():
        name_or_path = str(Path(name_or_path).resolve())  # the adapter names it, and may be used from elsewhere
    with without_load_reports():
        if task == "text2text":
            return AutoModelForSeq2SeqLM.from_pretrained(name_or_path, **_weights(dtype))
        if task == "continuation":
            return AutoModelForCausalLM.from_pretrained(name_or_path, **_weights(dtype))
        if task == "regression":
            num_labels, problem_type = 1, "regression"
        elif label_names is None:
            raise ValueError(f"{task} needs label_names: the classes' names")
        else:
            num_labels, problem_type = len(label_names), "single_label_classification"
        if head == "mean" or (head == "auto" and _pools_the_mean(name_or_path)):
            model = MeanPoolingForSequenceClassification.from_encoder(
                name_or_path, num_labels, problem_type, **_weights(dtype)
            )
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                name_or_path,
                num_labels=num_labels,
                problem_type=problem_type,
                **_weights(dtype, _heads_of_a_classifier(name_or_path)),
            )
    if label_names is not None:
        model.config.id2label = dict(enumerate(label_names))
        model.config.label2id = {name: i for i, name in enumerate(label_names)}
    return model


def _heads_of_a_classifier(name_or_path: str) -> list[str]:
    """The modules that a classification model of this kind trains, from its config alone."""
    with torch.device("meta"):
        return head_names(AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(name_or_path)))


def _weights(dtype: str, trained: list[str] | None = None) -> dict[str, Any]:
    """from_pretrained's arguments for a type of the frozen weights; `trained` modules are not quantised."""
    if dtype == "bfloat16" and not torch.accelerator.is_available():
        # On a CPU torch's fused attention spends half of a bf16 training step in its backward (bench/NOTES.md).
        return {"dtype": dtype, "attn_implementation": "eager"}
    if dtype not in ("8bit", "4bit"):
        return {"dtype": dtype}
    if not is_bitsandbytes_available():
        raise ValueError(f"--dtype {dtype} needs bitsandbytes: pip install bitsandbytes, or take --dtype bfloat16")
    if dtype == "8bit":
        quantised = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=trained)
    else:
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=trained,
        )
    return {"dtype": torch.bfloat16, "quantization_config": quantised}


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer; one without a padding token pads with its end of text, which the attention mask hides."""
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def input_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_length: int, wanted: int | None = None
) -> int | None:
    """The most tokens of a text: what is wanted, the tokenizer's limit, and the backbone's positions beside the prompt."""
    fits = max_text_tokens(model, prompt_length)
    if wanted is not None and fits is not None and wanted > fits:
        raise ValueError(
            f"--max_seq_length {wanted} does not fit: the backbone has {fits + prompt_length} positions, "
            f"of which the prompt takes {prompt_length}"
        )
    limits = [n for n in (wanted, fits, tokenizer.model_max_length) if n is not None]
    return min(limits) if min(limits) < 10**9 else None  # tokenizers without a limit say 10^30


def _check_directory(name_or_path: str) -> None:
    """A path that is not there must not be looked up as a hub name."""
    path = Path(name_or_path)
    if not path.is_dir() and (path.is_absolute() or name_or_path.startswith(".") or len(path.parts) > 2):
        raise ValueError(f"{name_or_path}: no such directory; give a hub name or the directory of a saved model")


def _pools_the_mean(name_or_path: str) -> bool:
    file = cached_file(
        name_or_path, "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if file is None:
        return False
    pooling = json.loads(Path(file).read_text(encoding="utf-8"))
    return bool(pooling.get("pooling_mode_mean_tokens")) or pooling.get("pooling_mode") == "mean"


# ---------------------------------------------------------------------- metrics


# ---------------------------------------------------------------------- predictions
