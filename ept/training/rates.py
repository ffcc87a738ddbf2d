"""The learning rates of EPT's parts: the arguments and the optimiser's groups."""

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from ept.layer.folded import FoldedLayer
from ept.model.model import EPTModel

__all__ = [
    "DEEP",
    "DEEP_LEARNING_RATE",
    "DOWN",
    "DOWN_LEARNING_RATE",
    "HEAD_LEARNING_RATE",
    "LEARNING_RATE",
    "PROMPT_LEARNING_RATE",
    "UP",
    "EPTArguments",
    "EPTSeq2SeqTrainingArguments",
    "EPTTrainingArguments",
    "parameter_groups",
]

# In units of the embeddings' RMS (docs/method.md), found on MiniLM with the three tasks of bench/compare.py.
PROMPT_LEARNING_RATE = 0.09


LEARNING_RATE = 0.018


DOWN_LEARNING_RATE = 0.001


DEEP_LEARNING_RATE = 0.005


HEAD_LEARNING_RATE = 0.005


@dataclass
class EPTArguments:
    """The learning rates of EPT's parts, mixed into transformers' arguments: in units of the embeddings' RMS, in the
    layers in units of the hidden states' size."""

    learning_rate: float = field(
        default=LEARNING_RATE, metadata={"help": "Rate of the tensors that start at zero: B, V and W."}
    )
    prompt_learning_rate: float = field(default=PROMPT_LEARNING_RATE, metadata={"help": "Rate of the short prompt P."})
    down_learning_rate: float = field(
        default=DOWN_LEARNING_RATE, metadata={"help": "Rate of the tensors that feed them: A, U, D and the gate G."}
    )
    deep_learning_rate: float = field(
        default=DEEP_LEARNING_RATE,
        metadata={"help": "Rate of D and W where every layer has its own (deep_layers), the first's among them."},
    )
    head_learning_rate: float = field(default=HEAD_LEARNING_RATE, metadata={"help": "Rate of a task head."})
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={
            "help": "Log tokens and tokens per second: of text (non_padding), with padding (all), or not (no).",
            "choices": ["non_padding", "all", "no"],
        },
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "The learning rates' schedule."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up steps; below 1 it is a share of all steps."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the training rows: batches of similar length, or 'random', 'sequential', 'batch_rebalance'.",
            "choices": ["group_by_length", "random", "sequential", "batch_rebalance"],
        },
    )


@dataclass
class EPTTrainingArguments(EPTArguments, TrainingArguments):  # type: ignore[misc]  # its own str | bool is str here
    """transformers' TrainingArguments with EPT's learning rates and their defaults."""


@dataclass
class EPTSeq2SeqTrainingArguments(EPTArguments, Seq2SeqTrainingArguments):  # type: ignore[misc]  # as above
    """transformers' Seq2SeqTrainingArguments with EPT's learning rates and their defaults."""


UP = ("lowrank_b", "space_up", "token_up")


DOWN = ("lowrank_a", "space_down", "gate_weight", "token_down")


DEEP = ("token_down", "token_up", "deep_down", "deep_up")


def parameter_groups(
    model: EPTModel,
    *,
    learning_rate: float = LEARNING_RATE,
    prompt_learning_rate: float = PROMPT_LEARNING_RATE,
    down_learning_rate: float = DOWN_LEARNING_RATE,
    deep_learning_rate: float = DEEP_LEARNING_RATE,
    head_learning_rate: float = HEAD_LEARNING_RATE,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The optimiser's groups: the prompt, what starts at zero, what feeds it, the updates where every layer has its own,
    and the head; no decay on P and biases."""
    if isinstance(model.ept, FoldedLayer):
        raise ValueError("the adapter is folded, for inference only: train the adapter that it was folded from")
    head = [(name, p) for name, p in model.base_model.named_parameters() if p.requires_grad]
    named = dict(model.ept.named_parameters())
    deep = [named.pop(name) for name in DEEP if name in named] if model.ept_config.deep_layers else []
    groups = [
        (prompt_learning_rate, 0.0, [named["prompt"]]),
        (learning_rate, weight_decay, [named[name] for name in UP if name in named]),
        (down_learning_rate, weight_decay, [named[name] for name in DOWN if name in named]),
        (deep_learning_rate, weight_decay, deep),
        (head_learning_rate, weight_decay, [p for name, p in head if not name.endswith("bias")]),
        (head_learning_rate, 0.0, [p for name, p in head if name.endswith("bias")]),
    ]
    return [{"params": params, "lr": lr, "weight_decay": decay} for lr, decay, params in groups if params]
