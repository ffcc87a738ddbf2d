"""What the command line trains: the backbone with the right head, its metrics, its predictions."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file, is_bitsandbytes_available

from .backbones import head_names
from .config import EPTConfig
from .console import without_load_reports
from .heads import MeanPoolingForSequenceClassification
from .model import EPTModel, max_text_tokens
from .saving import CONFIG_NAME, read_adapter

__all__ = [
    "best_metric",
    "input_limit",
    "is_causal",
    "is_text_to_text",
    "load_adapter",
    "load_backbone",
    "load_tokenizer",
    "metrics_of",
    "predict",
]

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


def load_adapter(
    directory: str, name_or_path: str | None = None, *, dtype: str = "auto"
) -> tuple[EPTModel, PreTrainedTokenizerBase, str]:
    """A trained adapter on its backbone in eval mode, its tokenizer, and its task.

    Raises:
        ValueError, OSError: the adapter is incomplete or damaged, or its backbone is not where it was.
    """
    settings = read_adapter(directory)[0]
    _check_settings(Path(directory) / CONFIG_NAME, settings)
    name_or_path = name_or_path or settings.get("base_model_name_or_path")
    if not name_or_path:
        raise ValueError(f"{directory} does not say what model it was trained on: give --model_name_or_path")
    kind = settings.get("base_model_class") or ""
    if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        task = "text2text"
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        task = "continuation"
    elif kind.endswith("ForSequenceClassification"):
        task = "regression" if settings.get("problem_type") == "regression" else "classification"
    else:
        raise ValueError(
            f"{directory} adapts a {kind or 'model of no known kind'}: load it with EPTModel.from_pretrained"
        )
    head = "mean" if kind == MeanPoolingForSequenceClassification.__name__ else "first"
    names = settings.get("label_names") if task == "classification" else None
    if task == "classification" and not names:
        raise ValueError(f"{Path(directory) / CONFIG_NAME} names no labels: the file is damaged, copy it again")
    model = load_backbone(name_or_path, task, names, head=head, dtype=dtype)
    has_tokenizer = (Path(directory) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(directory if has_tokenizer else name_or_path)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return EPTModel.from_pretrained(model, directory).eval(), tokenizer, task


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """ValueError if what an adapter's config says is not of the kind that is read."""
    kinds = {"base_model_name_or_path": str, "base_model_class": str, "label_names": list, "backbone": dict}
    for name, kind in kinds.items():
        value = settings.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{file}: {name} cannot be {value!r}: the file is damaged, copy it again")
    if not all(isinstance(name, str) for name in settings.get("label_names") or []):
        raise ValueError(f"{file}: label_names are not all strings: the file is damaged, copy it again")
    backbone = settings.get("backbone") or {}
    if "embedding_sha256" in backbone and not {"embedding_dtype", "embedding_sample"} <= backbone.keys():
        raise ValueError(f"{file}: backbone lacks its embeddings' dtype or sample: the file is damaged, copy it again")
    known = {field.name for field in dataclasses.fields(EPTConfig)}
    try:
        EPTConfig(**{name: value for name, value in settings.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


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


# What an evaluation gives for each task, and whether more of it is better; first what tells the best checkpoint.
METRICS = {
    "classification": {"accuracy": True, "f1": True, "loss": False},
    "regression": {"pearson": True, "spearman": True, "mse": False, "loss": False},
    "text2text": {"loss": False, "exact_match": True},
    "continuation": {"accuracy": True, "f1": True},
}


def best_metric(task: str, wanted: str | None = None) -> tuple[str, bool]:
    """The metric that tells the best checkpoint (by default the paper's), and whether more of it is better."""
    metrics = METRICS[task]
    name = next(iter(metrics)) if wanted is None else wanted.removeprefix("eval_")
    if name not in metrics:
        raise ValueError(f"--metric_for_best_model {wanted} is unknown: {task} has {', '.join(metrics)}")
    return name, metrics[name]


def metrics_of(task: str, predictions: Any, labels: Any) -> dict[str, float]:
    """The task's metrics, the paper's first.

    Args:
        predictions: logits or label scores [rows, classes]; values [rows] or [rows, 1]; or generated texts.
        labels: class numbers [rows]; values [rows]; or texts.
    """
    if task == "text2text":
        same = [a.strip() == b.strip() for a, b in zip(predictions, labels, strict=True)]
        return {"exact_match": sum(same) / len(same)}
    predictions, labels = torch.as_tensor(predictions).float(), torch.as_tensor(labels)
    if task in ("classification", "continuation"):
        from sklearn.metrics import accuracy_score, f1_score

        chosen, two = predictions.argmax(-1), predictions.shape[-1] == 2
        f1 = f1_score(labels, chosen, average="binary" if two else "macro", zero_division=0.0)
        return {"accuracy": float(accuracy_score(labels, chosen)), "f1": float(f1)}
    from scipy.stats import pearsonr, spearmanr

    values, labels = predictions.flatten().double(), labels.double()
    mse = (values - labels).square().mean().item()
    if len(labels) < 2 or values.std() == 0 or labels.std() == 0:
        return {"pearson": 0.0, "spearman": 0.0, "mse": mse}  # a constant correlates with nothing
    return {
        "pearson": float(pearsonr(values, labels).statistic),
        "spearman": float(spearmanr(values, labels).statistic),
        "mse": mse,
    }


# ---------------------------------------------------------------------- predictions


@torch.no_grad()
def predict(
    model: EPTModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    batch: dict[str, Tensor],
    max_new_tokens: int = 128,
) -> Tensor | list[str]:
    """Logits [rows, classes], values [rows] or generated texts for a padded batch of tokens."""
    inputs: dict[str, Any] = {key: value.to(model.ept.prompt.device) for key, value in batch.items() if key != "labels"}
    if task == "text2text":
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)
    logits = model(**inputs).logits.float().cpu()
    return logits.squeeze(-1) if task == "regression" else logits


def lines_of(task: str, predictions: Tensor | list[str], label_names: Callable[[int], str]) -> Iterator[str]:
    """One line per row: label and probability with a tab between, the value, or the text."""
    if not isinstance(predictions, Tensor):
        yield from (" ".join(text.split("\n")) for text in predictions)
    elif task == "regression":
        yield from (f"{value:.6g}" for value in predictions.tolist())
    else:
        best = predictions.softmax(-1).max(-1)
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield f"{label_names(label)}\t{probability:.6f}"
