"""PEFT's files: prompt-tuning adapters and DePT's checkpoints in, prompt-tuning adapters out; `ept import`.

DePT (Shi & Lipani 2024) is a fork of PEFT whose adapters, "PROMPT_TUNING_LORA", add scaling·A·B with
scaling = lora_alpha / √r to all `max_length` columns of the text. Columns are text positions where texts are padded on
the right, as its T5 models do, so there EPT with the low-rank update alone is the same function.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.config import EPTConfig
from ept.files.adapter_dir import CONFIG_NAME, WEIGHTS_NAME, read_json_config
from ept.files.hub import local_directory
from ept.layer.folded import fold_layer
from ept.model.model import EPTModel

__all__ = ["from_peft", "named_as_head", "read_peft", "read_soft_prompt", "save_peft", "why_not_peft"]

PROMPT, LOW_RANK = "prompt_embeddings", ("prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B")
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}


# ---------------------------------------------------------------------- in


def from_peft(
    model: PreTrainedModel,
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> EPTModel:
    """Reads a PEFT prompt-tuning adapter or a DePT checkpoint; returns an EPTModel around `model`, which can be trained on.

    Prompt tuning becomes EPT with the prompt alone; DePT becomes EPT with the low-rank update alone. A head that the
    adapter holds is put on the model. To start another EPT adapter from a trained prompt, give `read_soft_prompt(path)`
    to `get_ept_model` as `soft_prompt`, with init="decompose".

    Args:
        model: the backbone that the adapter was trained on, with the same head.
        path: directory with adapter_config.json and adapter_model.safetensors (or adapter_model.bin), or a hub id.
        revision, token, cache_dir: of a hub id, as in `EPTModel.from_pretrained`.

    Raises:
        ValueError, OSError: the adapter is not there, of another kind, partial, damaged, or does not fit the model.
    """
    path = local_directory(path, revision=revision, token=token, cache_dir=cache_dir)
    settings, tensors = read_peft(path)
    prompt = _prompt_of(settings, tensors, path)
    sizes: dict[str, Any] = dict(prompt_length=len(prompt), rank=0)
    if settings["peft_type"] == "PROMPT_TUNING_LORA" and settings.get("r", 8):
        for name in LOW_RANK:
            if name not in tensors:
                raise ValueError(
                    f"{path} is only a part of a DePT checkpoint: it lacks {name}, the low-rank pair was not saved with "
                    "it (save_lora_embeddings). read_soft_prompt reads its prompt"
                )
        a, b = (tensors[name] for name in LOW_RANK)
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or b.shape[1] != prompt.shape[1]:
            raise ValueError(f"{path}: the low-rank pair is {tuple(a.shape)} by {tuple(b.shape)}: the file is damaged")
        sizes |= dict(rank=a.shape[1], max_text_length=len(a), alpha=float(settings.get("lora_alpha", 8)))
    config = EPTConfig(**sizes, fusion=False, num_spaces=0, token_rank=0, prompt_start=0, init="normal")
    wrapped = EPTModel(model, config)
    e = wrapped.ept.embed_scale
    if prompt.shape[1] != wrapped.ept.embed_dim:
        raise ValueError(
            f"{path} holds a prompt of width {prompt.shape[1]}, but the model's embeddings have {wrapped.ept.embed_dim}: "
            "load the model that it was trained on"
        )
    own = {"prompt": prompt.float() / e}
    if config.rank:
        own |= {"lowrank_a": a.float(), "lowrank_b": b.float() / e}
    wrapped.load_adapter_tensors(own | _head_of(wrapped, tensors, path), source=str(path))
    return wrapped


def read_soft_prompt(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Tensor:
    """Reads Q [m, d]: the trained prompt of a PEFT prompt-tuning or DePT adapter, or the one matrix of a safetensors file.

    Args:
        path: a directory, a file, or a hub id.
        revision, token, cache_dir: of a hub id, as in `EPTModel.from_pretrained`.
    """
    path = local_directory(path, revision=revision, token=token, cache_dir=cache_dir)
    if path.is_dir():
        settings, tensors = read_peft(path)
        return _prompt_of(settings, tensors, path)
    tensors = _load(path)
    found = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    name = PROMPT if PROMPT in tensors else found[0] if len(found) == 1 else None
    if name is None:
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors)) or 'no tensor'}: a soft prompt is a file with one matrix [m, d]"
        )
    return _checked(tensors[name], path)


def read_peft(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a directory that PEFT, or DePT's fork of it, wrote."""
    config_file = Path(path) / CONFIG_NAME
    settings = read_json_config(path, wanted="the directory of a PEFT adapter", remedy="copy it again")
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind not in ("PROMPT_TUNING", "PROMPT_TUNING_LORA"):
        ours = isinstance(settings, dict) and settings.get("method") == "EPT"
        raise ValueError(
            f"{path} is an EPT adapter already: load it with EPTModel.from_pretrained"
            if ours
            else f"{config_file} is of peft_type {kind}: only prompt tuning (PROMPT_TUNING) and DePT "
            "(PROMPT_TUNING_LORA) adapters have a soft prompt to read"
        )
    for name in (WEIGHTS_NAME, "adapter_model.bin"):
        if (Path(path) / name).is_file():
            return settings, _load(Path(path) / name)
    raise FileNotFoundError(f"{path} holds neither {WEIGHTS_NAME} nor adapter_model.bin: the copy is incomplete")


def _load(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".bin":
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        else:
            tensors = load_tensors(file.read_bytes())
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): copy it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds no tensors by name: it is not an adapter")
    return tensors


def _prompt_of(settings: dict[str, Any], tensors: dict[str, Tensor], path: str | os.PathLike) -> Tensor:
    if PROMPT not in tensors:
        raise ValueError(
            f"{path} has no tensor {PROMPT} (only {', '.join(sorted(tensors)) or 'none'}): it is incomplete"
        )
    prompt = _checked(tensors[PROMPT], Path(path))
    rows = settings.get("num_virtual_tokens")
    if rows is not None and len(prompt) == 2 * rows:
        raise ValueError(
            f"{path} has a second prompt of {rows} rows for the decoder (num_transformer_submodules=2), which EPT does "
            "not have: train with num_transformer_submodules=1"
        )
    if rows is not None and len(prompt) != rows:
        raise ValueError(f"{path}: num_virtual_tokens is {rows}, but {PROMPT} has {len(prompt)} rows: it is damaged")
    return prompt


def _checked(prompt: Tensor, path: Path) -> Tensor:
    if prompt.dim() != 2 or len(prompt) == 0 or not prompt.is_floating_point():
        raise ValueError(f"{path}: a soft prompt must be [m, d], not {tuple(prompt.shape)} of {prompt.dtype}")
    if not prompt.isfinite().all():
        raise ValueError(f"{path}: the prompt holds NaN or infinity: its training diverged")
    return prompt


def _head_of(model: EPTModel, tensors: dict[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """The model's head, with the adapter's tensors where it has them; an adapter's tensor that finds no place is an error."""
    named = named_as_head(tensors)
    head = {name: tensor for name, tensor in model.adapter_tensors().items() if name.startswith("head.")}
    extra = sorted(set(named) - set(head))
    if extra:
        raise ValueError(f"{path} holds {', '.join(extra)}, which {type(model.base_model).__name__} has not")
    return head | named


def named_as_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors beside the prompt, by the names that the head has in an EPT adapter."""
    named = {}
    for name, tensor in tensors.items():
        if name != PROMPT and name not in LOW_RANK:
            parts = [part for part in name.split(".") if part not in ("base_model", "model", "modules_to_save")]
            named["head." + ".".join(parts)] = tensor
    return named


# ---------------------------------------------------------------------- out


def why_not_peft(model: EPTModel) -> str | None:
    """What keeps an adapter from being a PEFT prompt-tuning adapter with the same results; None where nothing does."""
    config, name = model.ept_config, type(model.base_model).__name__
    if config.has_lowrank and config.lowrank_update:
        return "its low-rank update changes the text's embeddings"
    if config.has_token_update:
        return "its token-conditioned update changes the text's embeddings"
    if model.ept.prompt_start:
        return f"its prompt stands at text column {model.ept.prompt_start}, PEFT's always before the text"
    if isinstance(model.base_model, MeanPoolingForSequenceClassification):
        return "its head reads the mean of the text, and PEFT would take the prompt's rows into the mean"
    if not any(name.endswith(ending) for ending in TASK_TYPES):
        return f"PEFT has no task type for {name}"
    return None


def save_peft(model: EPTModel, directory: str | os.PathLike) -> None:
    """Writes P* and the head as a PEFT prompt-tuning adapter, which `PeftModel.from_pretrained` loads.

    PEFT's logits are the same on rows without padding and on rows padded on the right; on the left PEFT puts the
    prompt before the padding, EPT behind it. ValueError where PEFT cannot express the adapter, with the reason.
    """
    reason = why_not_peft(model)
    if reason is not None:
        config = model.ept_config
        remedy = ""
        if config.has_token_update or (config.has_lowrank and config.lowrank_update):
            remedy = "; train one whose prompt is all: EPTConfig.input_only(token_rank=0)"
        raise ValueError(f"this adapter cannot be a PEFT prompt-tuning adapter: {reason}{remedy}")
    name, text = type(model.base_model).__name__, model.config.get_text_config()
    settings = {
        "peft_type": "PROMPT_TUNING",
        "task_type": next(task for ending, task in TASK_TYPES.items() if name.endswith(ending)),
        "base_model_name_or_path": getattr(model.config, "_name_or_path", "") or None,
        "inference_mode": True,
        "modules_to_save": model.head_names or None,
        "num_virtual_tokens": model.ept_config.prompt_length,
        "num_transformer_submodules": 1,
        "token_dim": model.ept.embed_dim,
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "prompt_tuning_init": "RANDOM",
    }
    tensors = {PROMPT: fold_layer(model.ept).prompt}
    for name, tensor in model.adapter_tensors().items():
        if name.startswith("head."):
            tensors[f"base_model.{name.removeprefix('head.')}"] = tensor
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, directory / WEIGHTS_NAME)
    (directory / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------- ept import
