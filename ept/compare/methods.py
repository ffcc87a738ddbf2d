"""The methods that EPT is compared with, and EPT with parts taken away, behind one function. Some need PEFT.

A method is put on a loaded backbone, which it freezes but for what the method trains; a classification head is trained
by every method alike. Where a method has a size to choose, it fills the same budget of trained parameters.
"""

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ept.backbone.heads import MeanPoolingForSequenceClassification, in_float32
from ept.backbone.traits import head_names
from ept.model.fresh import config_for_budget, get_ept_model
from ept.training.rates import HEAD_LEARNING_RATE, parameter_groups

__all__ = ["ABLATIONS", "METHODS", "TRAIN_THE_BACKBONE", "adapt", "build"]

# Name -> (what it is, the learning rates among which every method chooses on the dev part: three each, so that every
# method gets the same search effort). EPT's are multiples of its defaults; the others are absolute, for encoders.
METHODS: dict[str, tuple[str, tuple[float, ...]]] = {
    "head only": ("the classification head alone", (0.005, 0.02, 0.05)),
    "EPT": ("EPTConfig.for_budget(…, preset='default')", (0.5, 1.0, 2.0)),
    "EPT paper": ("EPTConfig.for_budget(…), the paper's parts", (0.5, 1.0, 2.0)),
    "EPT deep": ("EPTConfig.for_budget(…, preset='deep')", (0.5, 1.0, 2.0)),
    "DePT": ("short prompt and low-rank update only", (0.5, 1.0, 2.0)),
    "prompt tuning 20": ("PEFT PromptTuning, 20 rows, embeddings of sampled words", (0.0025, 0.005, 0.01)),
    "prompt tuning 100": ("PEFT PromptTuning, 100 rows, embeddings of sampled words", (0.0025, 0.005, 0.01)),
    "LoRA": ("PEFT LoRA on query and value, of the rank that the budget holds", (0.002, 0.005, 0.01)),
    "BitFit": ("all biases of the backbone", (0.002, 0.005, 0.01)),
    "full": ("all weights of the backbone", (0.00005, 0.0001, 0.0002)),
}

TRAIN_THE_BACKBONE = ("BitFit", "full")  # methods that need its weights in float32

# EPT without one of its parts, the other sizes grown to the same budget: preset, and the settings that take it away.
_WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "EPT without spaces": ("default", dict(spaces=False, num_spaces=0)),
    "EPT without token update": ("default", dict(token_update=False, token_rank=0)),
    "EPT paper without update": ("paper", dict(lowrank_update=False)),
    "EPT paper without fusion": ("paper", dict(fusion=False)),
    "EPT paper without spaces": ("paper", dict(spaces=False, num_spaces=0)),
}
ABLATIONS = {name: ("the other parts grown to the same budget", METHODS["EPT"][1]) for name in _WITHOUT}
_EPT = _WITHOUT | {
    "EPT": ("default", {}),
    "EPT paper": ("paper", {}),
    "EPT deep": ("deep", {}),
    "DePT": ("paper", dict(fusion=False, spaces=False, num_spaces=0)),
}


def build(
    method: str, encoder: str | os.PathLike, num_labels: int, problem_type: str, **settings: Any
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """`adapt`, with its `settings`, on a pretrained encoder with a fresh linear head on the mean of its text tokens."""
    base = MeanPoolingForSequenceClassification.from_encoder(str(encoder), num_labels, problem_type)
    return adapt(method, base, **settings)


def adapt(
    method: str,
    base: PreTrainedModel,
    *,
    budget: int,
    rate: float,
    head_rate: float = HEAD_LEARNING_RATE,
    tokenizer: Any = None,
    token_counts: Tensor | None = None,
    settings: dict[str, Any] | None = None,
    rates: dict[str, float] | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model, frozen but for what the method trains, and its optimiser groups with their learning rates.

    Args:
        method: a name in METHODS or ABLATIONS, or "prompt tuning" with any number of rows.
        base: a backbone; its dropout is turned off, for every method alike.
        budget: trained parameters without the head, where the method has a size to choose.
        rate: a factor on EPT's default rates; the rate itself for other methods.
        head_rate: of the classification head, if there is one; "head only" trains it at `rate`.
        tokenizer, token_counts: as in `get_ept_model`.
        settings, rates: for EPT, over its config and over its learning rates.

    Raises:
        ValueError: no such method, or one that finds nothing to train in this backbone, or no room in the budget.
    """
    heads = head_names(base)
    if method in _EPT:
        preset, without = _EPT[method]
        config = config_for_budget(base, budget, preset=preset, **without | (settings or {}))
        wrapped = get_ept_model(base, config, tokenizer=tokenizer, token_counts=token_counts)
        groups = parameter_groups(wrapped, **{"head_learning_rate": head_rate} | (rates or {}))
        in_heads = {id(p) for name in heads for p in base.get_submodule(name).parameters()}
        for group in groups:
            if not any(id(p) in in_heads for p in group["params"]):
                group["lr"] *= rate
        return wrapped, groups
    # Training mode would turn on the frozen backbone's dropout, and each architecture reads its own settings for it.
    base.eval()
    frozen: Any = base
    frozen.train = lambda mode=True: base
    model: nn.Module
    for name in heads:
        in_float32(base.get_submodule(name))
    if method in ("head only", "BitFit", "full"):
        if method in TRAIN_THE_BACKBONE and base.dtype != torch.float32:
            raise ValueError(f"{method} trains the backbone's own weights: load them in float32, not {base.dtype}")
        model = base
        for name, parameter in base.named_parameters():
            in_head = _is_in(heads, name)
            parameter.requires_grad_(in_head or method == "full" or (method == "BitFit" and name.endswith("bias")))
    elif method.startswith("prompt tuning ") and method.split()[-1].isdecimal():
        model = _prompt_tuning(base, int(method.split()[-1]), heads)
    elif method == "LoRA":
        model = _lora(base, budget, heads)
    else:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join([*METHODS, *ABLATIONS])}")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    own = [p for name, p in trained if not _is_in(heads, name)]
    head = [p for name, p in trained if _is_in(heads, name)]
    if method == "head only":
        own, head, head_rate = [], head, rate
    if not (head if method == "head only" else own):
        what = "classification head" if method == "head only" else "biases"
        raise ValueError(f"{method} has nothing to train: {type(base).__name__} has no {what}; leave the method out")
    groups = [{"params": own, "lr": rate}, {"params": head, "lr": head_rate}]
    return model, [group for group in groups if group["params"]]


def _is_in(heads: list[str], name: str) -> bool:
    """Whether a parameter belongs to a head, also under the names that PEFT gives it."""
    return any(f".{head}." in f".{name}" for head in heads)


def _task_type(base: PreTrainedModel, heads: list[str]) -> str:
    if heads:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"


def _peft(base: PreTrainedModel, config: Any) -> nn.Module:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        return get_peft_model(base, config)


def _prompt_tuning(base: PreTrainedModel, rows: int, heads: list[str]) -> nn.Module:
    from peft import PromptTuningConfig, PromptTuningInit

    # Before the encoder's text alone, as in Lester et al. (2021); PEFT would put a second prompt before the decoder's.
    return _peft(base, PromptTuningConfig(
        task_type=_task_type(base, heads), num_virtual_tokens=rows, num_transformer_submodules=1,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    ))  # fmt: skip


def _lora(base: PreTrainedModel, budget: int, heads: list[str]) -> nn.Module:
    """LoRA on what PEFT names for the model's kind: on all of them where the budget holds a rank of them, else at rank
    1 on the first kind of them (the query) in as many last layers as fit."""
    from peft import LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    kinds = TARGETS.get(base.config.model_type, ["q_proj", "v_proj"])
    sizes = {
        name: sum(module.weight.shape)  # in + out features
        for name, module in base.named_modules()
        if name.split(".")[-1] in kinds and getattr(module, "weight", None) is not None and module.weight.dim() == 2
    }
    if not sizes:
        raise ValueError(f"LoRA finds no {' or '.join(kinds)} in {type(base).__name__}: leave the method out")
    rank, targets = budget // sum(sizes.values()), list(sizes)
    if rank == 0:
        rank, targets, room = 1, [], budget
        for name in reversed(sizes):
            if name.split(".")[-1] == kinds[0] and sizes[name] <= room:
                targets.append(name)
                room -= sizes[name]
    if not targets:
        raise ValueError(f"a budget of {budget} parameters holds no LoRA of rank 1: raise it")
    return _peft(base, LoraConfig(
        task_type=_task_type(base, heads), r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets,
    ))  # fmt: skip
