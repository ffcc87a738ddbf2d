"""The methods of a shape, built on the same frozen weights, at no more trained parameters than 100 prompt tokens have."""

import copy
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ept.backbone.embeddings import embedding_width
from ept.backbone.heads import in_float32
from ept.backbone.traits import head_names
from ept.compare.methods import adapt

from .shapes import Shape

__all__ = ["PROMPT_TUNING", "bare", "batch_for", "build", "is_here", "lora_config"]

BUDGET_ROWS = 100
PROMPT_TUNING = f"prompt tuning {BUDGET_ROWS}"
OF_PEFT = (PROMPT_TUNING, "LoRA")

Groups = list[dict[str, Any]]  # an optimiser's


def is_here(method: str) -> bool:
    """Whether what a method needs is installed: PEFT, for some."""
    return method not in OF_PEFT or importlib.util.find_spec("peft") is not None


def build(method: str, shape: Shape, base: PreTrainedModel) -> tuple[nn.Module, Groups]:
    """A method on the shared weights of `base`, and its optimiser groups.

    LoRA is spread over the depth where `ept.compare.methods` would take the last layers alone: its gradient then has as
    far to go as that of a LoRA with more parameters.
    """
    model, budget = _sharing(base), BUDGET_ROWS * embedding_width(base.get_input_embeddings())
    torch.manual_seed(0)
    if method != "LoRA":
        return adapt(method, model, budget=budget, rate=1.0)
    from peft import get_peft_model

    wrapped = get_peft_model(_without_dropout(model), lora_config(model, shape.targets, budget, shape.task))
    return wrapped, [{"params": [p for p in wrapped.parameters() if p.requires_grad]}]


def bare(base: PreTrainedModel) -> PreTrainedModel:
    """The backbone alone on the shared weights of `base`; its head trains, as behind every method."""
    model = _without_dropout(_sharing(base)).requires_grad_(False)
    for name in head_names(model):
        head = model.get_submodule(name)
        head.requires_grad_()
        in_float32(head)
    return model


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the weights, which stay frozen; a classification head is a copy, since it trains."""
    shared = {id(p): p for name, p in model.named_parameters() if not name.startswith("classifier.")}
    return copy.deepcopy(model, shared)


def _without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a `train()` that does nothing, as `adapt` has it, so that dropout stays off."""
    frozen: Any = model
    frozen.train = lambda mode=True: model
    return model


def batch_for(method: str, shape: Shape, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as a method takes it: the mean-pooling head must be told which columns behind PEFT's prompt are text."""
    if method != PROMPT_TUNING or shape.task != "SEQ_CLS":
        return batch
    return batch | {"pooling_mask": F.pad(batch["attention_mask"], (BUDGET_ROWS, 0))}


def lora_config(model: PreTrainedModel, targets: tuple[str, str], budget: int, task: str) -> Any:
    """LoRA on the target projections whose trained parameters come as near to the budget as they can from below.

    All get the same rank, and as many of them one rank more, evenly over the depth, as the budget still holds. Where it
    does not hold rank 1 of all, only those are adapted. ValueError if it holds not even one.
    """
    from peft import LoraConfig

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in targets}
    cost = {name: m.in_features + m.out_features for name, m in layers.items()}
    rank = budget // sum(cost.values())
    left = budget - rank * sum(cost.values())
    names = list(layers)
    count = len(names)
    while count and sum(cost[n] for n in _spread(names, count)) > left:
        count -= 1
    more = _spread(names, count)
    if rank == 0 and not more:
        raise ValueError(f"a budget of {budget} parameters does not hold LoRA of rank 1 in one projection")
    lowest = max(rank, 1)
    return LoraConfig(
        task_type=task, r=lowest, lora_alpha=8, lora_dropout=0.0, target_modules=more if rank == 0 else names,
        rank_pattern=dict.fromkeys(more, rank + 1) if rank else {},
    )  # fmt: skip


def _spread(names: list[str], count: int) -> list[str]:
    """`count` of the names, evenly, the first among them."""
    return [names[i * len(names) // count] for i in range(count)]
