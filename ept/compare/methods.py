"""The methods that EPT is compared with, and EPT with parts taken away, in one table. Some need PEFT.

A method is put on a loaded backbone, which it freezes but for what the method trains; a classification head is trained
by every method alike. Where a method has a size to choose, it fills the same budget of trained parameters.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ept.backbone.heads import MeanPoolingForSequenceClassification, in_float32
from ept.backbone.traits import head_names
from ept.model.fresh import config_for_budget, get_ept_model
from ept.training.rates import HEAD_LEARNING_RATE, parameter_groups

__all__ = ["ABLATIONS", "METHODS", "TRAIN_THE_BACKBONE", "Method", "adapt", "build"]

Groups = list[dict[str, Any]]  # of an optimiser


@dataclass(frozen=True)
class _Order:
    """What a method is asked for: the arguments of `adapt`, and the names of the backbone's heads."""

    method: str
    base: PreTrainedModel
    heads: list[str]
    budget: int
    rate: float
    head_rate: float
    tokenizer: Any
    token_counts: Tensor | None
    settings: dict[str, Any]
    rates: dict[str, float]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        description: what it is.
        learning_rates: those among which it chooses on the dev part: three each, so that every method gets the same
            search effort. EPT's are multiples of its defaults; the others are absolute, for encoders.
        build: puts it on a backbone; gives the model and the optimiser's groups.
        trains_backbone: whether it needs the backbone's weights in float32.
    """

    description: str
    learning_rates: tuple[float, ...]
    build: Callable[[_Order], tuple[nn.Module, Groups]]
    trains_backbone: bool = False


def build(
    method: str, encoder: str | os.PathLike, num_labels: int, problem_type: str, **settings: Any
) -> tuple[nn.Module, Groups]:
    """Calls `adapt`, with its `settings`, on a pretrained encoder with a fresh linear head on the mean of its text tokens."""
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
) -> tuple[nn.Module, Groups]:
    """Freezes a backbone but for what a method trains; returns the model and the optimiser's groups with their rates.

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
    order = _Order(
        method, base, head_names(base), budget, rate, head_rate, tokenizer, token_counts, settings or {}, rates or {}
    )
    return _method(method).build(order)


def _method(name: str) -> Method:
    if name in METHODS or name in ABLATIONS:
        return (METHODS | ABLATIONS)[name]
    prefix, _, rows = name.rpartition(" ")
    if prefix == "prompt tuning" and rows.isdecimal():
        return _prompt_tuning(int(rows))
    raise ValueError(f"unknown method {name!r}: choose one of {', '.join([*METHODS, *ABLATIONS])}")


# ---------------------------------------------------------------------- EPT


def _ept(description: str, preset: str, **settings: Any) -> Method:
    """Makes a row of EPT with the sizes of a preset that fill the budget, and `settings` over them."""

    def put_on(order: _Order) -> tuple[nn.Module, Groups]:
        config = config_for_budget(order.base, order.budget, preset=preset, **settings | order.settings)
        model = get_ept_model(order.base, config, tokenizer=order.tokenizer, token_counts=order.token_counts)
        groups = parameter_groups(model, **{"head_learning_rate": order.head_rate} | order.rates)
        in_heads = {id(p) for name in order.heads for p in order.base.get_submodule(name).parameters()}
        for group in groups:
            if not any(id(p) in in_heads for p in group["params"]):
                group["lr"] *= order.rate
        return model, groups

    return Method(description, (0.5, 1.0, 2.0), put_on)


# ---------------------------------------------------------------------- its peers


def _peer(
    description: str,
    learning_rates: tuple[float, ...],
    put_on: Callable[[_Order], nn.Module],
    *,
    trains_backbone: bool = False,
) -> Method:
    """Makes a row of a method whose parameters all train at one rate, and the head at its own.

    Args:
        put_on: makes the model from the backbone and marks what is trained.
    """

    def put_on_frozen(order: _Order) -> tuple[nn.Module, Groups]:
        _freeze(order)
        if trains_backbone and order.base.dtype != torch.float32:
            raise ValueError(
                f"{order.method} trains the backbone's own weights: load them in float32, not {order.base.dtype}"
            )
        model = put_on(order)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        beside_head = [p for name, p in trained if not _is_in(order.heads, name)]
        head = [p for name, p in trained if _is_in(order.heads, name)]
        if not beside_head:
            raise ValueError(_nothing_to_train(order, "biases"))
        groups = [{"params": beside_head, "lr": order.rate}, {"params": head, "lr": order.head_rate}]
        return model, [group for group in groups if group["params"]]

    return Method(description, learning_rates, put_on_frozen, trains_backbone)


def _head_only(order: _Order) -> tuple[nn.Module, Groups]:
    _freeze(order)
    _mark_trained(order, lambda name: False)
    head = [p for p in order.base.parameters() if p.requires_grad]
    if not head:
        raise ValueError(_nothing_to_train(order, "classification head"))
    return order.base, [{"params": head, "lr": order.rate}]


def _nothing_to_train(order: _Order, missing: str) -> str:
    return f"{order.method} has nothing to train: {type(order.base).__name__} has no {missing}; leave the method out"


def _biases(order: _Order) -> nn.Module:
    return _mark_trained(order, lambda name: name.endswith("bias"))


def _all_weights(order: _Order) -> nn.Module:
    return _mark_trained(order, lambda name: True)


def _prompt_tuning(rows: int) -> Method:
    def put_on(order: _Order) -> nn.Module:
        from peft import PromptTuningConfig, PromptTuningInit

        # Before the encoder's text alone, as in Lester et al. (2021); PEFT would put a second prompt before the decoder's.
        return _with_peft(order, PromptTuningConfig(
            task_type=_task_type(order), num_virtual_tokens=rows, num_transformer_submodules=1,
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        ))  # fmt: skip

    description = f"PEFT PromptTuning, {rows} rows, embeddings of sampled words"
    return _peer(description, (0.0025, 0.005, 0.01), put_on)


def _lora(order: _Order) -> nn.Module:
    """Puts LoRA on what PEFT names for the model's kind: on all of them where the budget holds a rank of them, else at rank
    1 on the first kind of them (the query) in as many last layers as fit."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    base, budget = order.base, order.budget
    wanted = TARGETS.get(base.config.model_type, ["q_proj", "v_proj"])
    sizes = {
        name: sum(module.weight.shape)  # in + out features
        for name, module in base.named_modules()
        if name.split(".")[-1] in wanted and getattr(module, "weight", None) is not None and module.weight.dim() == 2
    }
    if not sizes:
        raise ValueError(f"LoRA finds no {' or '.join(wanted)} in {type(base).__name__}: leave the method out")
    rank, targets = budget // sum(sizes.values()), list(sizes)
    if rank == 0:
        first = {name: size for name, size in sizes.items() if name.split(".")[-1] == wanted[0]}
        rank, targets = 1, _last_that_fit(first, budget)
    return _with_lora(order, rank, targets)


def _lora_everywhere(order: _Order) -> nn.Module:
    """Puts LoRA on every linear layer in the backbone's layers where the budget holds a rank of all, else at rank 1 on as many
    of the last ones as fit."""
    sizes = {
        name: sum(module.weight.shape)
        for name, module in order.base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and _is_in_a_layer(name) and not _is_in(order.heads, f"{name}.")
    }
    if not sizes:
        raise ValueError(f"LoRA finds no linear layers in {type(order.base).__name__}: leave the method out")
    rank, targets = order.budget // sum(sizes.values()), list(sizes)
    if rank == 0:
        rank, targets = 1, _last_that_fit(sizes, order.budget)
    return _with_lora(order, rank, targets)


def _last_that_fit(sizes: dict[str, int], budget: int) -> list[str]:
    """Returns the names whose sizes fill a budget, from the last one back. ValueError if none fits."""
    names, room = [], budget
    for name in reversed(sizes):
        if sizes[name] <= room:
            names.append(name)
            room -= sizes[name]
    if not names:
        raise ValueError(f"a budget of {budget} parameters holds no LoRA of rank 1: raise it")
    return names


def _is_in_a_layer(name: str) -> bool:
    """Tells whether a module is part of one of several layers, which are numbered."""
    return any(part.isdecimal() for part in name.split("."))


def _with_lora(order: _Order, rank: int, targets: list[str]) -> nn.Module:
    from peft import LoraConfig

    return _with_peft(order, LoraConfig(
        task_type=_task_type(order), r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets,
    ))  # fmt: skip


def _freeze(order: _Order) -> None:
    """Turns the backbone's dropout off for good, and makes its heads float32."""
    # Training mode would turn on the frozen backbone's dropout, and each architecture reads its own settings for it.
    base: Any = order.base.eval()
    base.train = lambda mode=True: base
    for name in order.heads:
        in_float32(base.get_submodule(name))


def _mark_trained(order: _Order, is_trained: Callable[[str], bool]) -> nn.Module:
    """Marks the head and the parameters of these names as trained; returns the backbone itself."""
    for name, parameter in order.base.named_parameters():
        parameter.requires_grad_(_is_in(order.heads, name) or is_trained(name))
    return order.base


def _is_in(heads: list[str], name: str) -> bool:
    """Tells whether a parameter belongs to a head, also under the names that PEFT gives it."""
    return any(f".{head}." in f".{name}" for head in heads)


def _task_type(order: _Order) -> str:
    if order.heads:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if order.base.config.is_encoder_decoder else "CAUSAL_LM"


def _with_peft(order: _Order, config: Any) -> nn.Module:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        return get_peft_model(order.base, config)


# ---------------------------------------------------------------------- the table


METHODS: dict[str, Method] = {
    "head only": Method("the classification head alone", (0.005, 0.02, 0.05), _head_only),
    "EPT deep": _ept("EPTConfig.for_budget(…, preset='deep'): updates in every layer, the default", "deep"),
    # The default once, and so named in results that were written then.
    "EPT": _ept("EPTConfig.for_budget(…, preset='input'): the input alone", "input"),
    "EPT paper": _ept("EPTConfig.for_budget(…), the paper's parts", "paper"),
    "DePT": _ept("short prompt and low-rank update only", "paper", fusion=False, spaces=False, num_spaces=0),
    "prompt tuning 20": _prompt_tuning(20),
    "prompt tuning 100": _prompt_tuning(100),
    "LoRA": _peer("PEFT LoRA on query and value, of the rank that the budget holds", (0.002, 0.005, 0.01), _lora),
    "LoRA all": _peer("PEFT LoRA on all linear layers of the layers", (0.002, 0.005, 0.01), _lora_everywhere),
    "BitFit": _peer("all biases of the backbone", (0.002, 0.005, 0.01), _biases, trains_backbone=True),
    "full": _peer("all weights of the backbone", (0.00005, 0.0001, 0.0002), _all_weights, trains_backbone=True),
}

# EPT without one of its parts, the other sizes grown to the same budget.
ABLATIONS: dict[str, Method] = {
    "EPT without spaces": _ept("the input-only preset's other parts", "input", spaces=False, num_spaces=0),
    "EPT without token update": _ept("the input-only preset's other parts", "input", token_update=False, token_rank=0),
    "EPT paper without update": _ept("the paper's other parts", "paper", lowrank_update=False),
    "EPT paper without fusion": _ept("the paper's other parts", "paper", fusion=False),
    "EPT paper without spaces": _ept("the paper's other parts", "paper", spaces=False, num_spaces=0),
}

TRAIN_THE_BACKBONE = tuple(name for name, method in METHODS.items() if method.trains_backbone)
