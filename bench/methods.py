"""The methods that are compared, each at a budget of trained parameters, behind one function.

Every method trains the same linear head on the mean of the text tokens, on the same frozen encoder.
"""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import Tensor, nn

from ept import EPTConfig, MeanPoolingForSequenceClassification, get_ept_model
from ept.training import parameter_groups

__all__ = ["METHODS", "build"]


# Name -> (what it is, the learning rates among which every method chooses on the dev part: three each, so that every
# method gets the same search effort). EPT's are multiples of its defaults; the others are absolute.
METHODS: dict[str, tuple[str, tuple[float, ...]]] = {
    "head only": ("linear head on the mean of the text tokens", (0.005, 0.02, 0.05)),
    "EPT": ("EPTConfig.for_budget(…, preset='default')", (0.5, 1.0, 2.0)),
    "EPT paper": ("EPTConfig.for_budget(…), the paper's parts", (0.5, 1.0, 2.0)),
    "DePT": ("short prompt and low-rank update only", (0.5, 1.0, 2.0)),
    "prompt tuning 20": ("PEFT PromptTuning, 20 rows, embeddings of sampled words", (0.0025, 0.005, 0.01)),
    "prompt tuning 100": ("PEFT PromptTuning, 100 rows, embeddings of sampled words", (0.0025, 0.005, 0.01)),
    "LoRA": ("PEFT LoRA on query and value, of the rank that the budget holds", (0.001, 0.002, 0.005)),
    "BitFit": ("all biases of the encoder", (0.001, 0.002, 0.005)),
    "full": ("all weights of the encoder", (0.00005, 0.0001, 0.0002)),
}


# PEFT's training mode turns on the frozen encoder's dropout; here it is off for every method alike.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(
    method: str,
    encoder: Path,
    num_labels: int,
    problem_type: str,
    *,
    budget: int,
    rate: float,
    head_rate: float = 0.02,
    tokenizer: Any = None,
    token_counts: Tensor | None = None,
    settings: dict[str, Any] | None = None,
    rates: dict[str, float] | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model, frozen but for what the method trains, and its optimiser groups with their learning rates."""
    base = MeanPoolingForSequenceClassification.from_encoder(str(encoder), num_labels, problem_type, **NO_DROPOUT)
    d = base.config.hidden_size
    if method == "head only":
        base.encoder.requires_grad_(False)
        return base, [{"params": list(base.classifier.parameters()), "lr": rate}]
    if method in ("BitFit", "full"):
        for name, parameter in base.encoder.named_parameters():
            parameter.requires_grad_(method == "full" or name.endswith("bias"))
        own = [parameter for parameter in base.encoder.parameters() if parameter.requires_grad]
        return base, [{"params": own, "lr": rate}, {"params": list(base.classifier.parameters()), "lr": head_rate}]
    if method in ("EPT", "EPT paper", "DePT"):
        settings = settings or {}
        if method == "EPT":
            config = EPTConfig.for_budget(budget, d, preset="default", **settings)
        else:
            only = dict(fusion=False, spaces=False, num_spaces=0) if method == "DePT" else {}
            config = EPTConfig.for_budget(budget, d, preset="paper", **only | settings)
        model = get_ept_model(base, config, tokenizer=tokenizer, token_counts=token_counts)
        groups = parameter_groups(model, **{"head_learning_rate": head_rate} | (rates or {}))
        for group in groups:
            if not any(p is q for p in group["params"] for q in base.classifier.parameters()):
                group["lr"] *= rate
        return model, groups
    if method.startswith("prompt tuning"):
        peft_config = PromptTuningConfig(
            task_type=TaskType.SEQ_CLS, num_virtual_tokens=int(method.split()[-1]),
            prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        )  # fmt: skip
    elif method == "LoRA":
        peft_config = _lora(budget, base.config.num_hidden_layers, d)
    else:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    model = get_peft_model(base, peft_config)
    own = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" in n]
    return model, [{"params": own, "lr": rate}, {"params": head, "lr": head_rate}]


def _lora(budget: int, layers: int, d: int) -> LoraConfig:
    """Query and value of all layers where the budget holds a rank of them, else the query of as many last layers."""
    rank, where = budget // (4 * d * layers), dict(target_modules=["query", "value"])
    if rank == 0:
        rank, deep = 1, min(layers, budget // (2 * d))
        where = dict(target_modules=["query"], layers_to_transform=list(range(layers - deep, layers)))
    return LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **where)
