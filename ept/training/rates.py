"""The learning rates of EPT's parts: the arguments and the optimiser's groups."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ept.model.model import EPTModel
from ept.parts import PARTS

__all__ = [
    "DEEP_LEARNING_RATE",
    "DOWN_LEARNING_RATE",
    "HEAD_LEARNING_RATE",
    "LEARNING_RATE",
    "PROMPT_LEARNING_RATE",
    "EPTArguments",
    "EPTSeq2SeqTrainingArguments",
    "EPTTrainingArguments",
    "parameter_groups",
]

# In units of the embeddings' RMS (docs/method.md), found on MiniLM with the three tasks of `make compare`.
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


# A checkpoint's training_args.bin is a pickle that names the classes' module: the public one, which stays.
EPTTrainingArguments.__module__ = EPTSeq2SeqTrainingArguments.__module__ = "ept.training"


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
    """Returns the optimiser's groups, in this order: the prompt, what starts at zero, what feeds it, the updates where every
    layer has its own, and the head.

    The rates are those of `EPTArguments`. The prompt and biases have no weight decay.

    Raises:
        ValueError: the adapter is folded.
    """
    if not model.ept.trainable:
        raise ValueError("the adapter is folded, for inference only: train the adapter that it was folded from")
    tensors = _tensors_by_rate(model)
    head = [(name, p) for name, p in model.base_model.named_parameters() if p.requires_grad]
    groups = [
        (prompt_learning_rate, 0.0, tensors["prompt"]),
        (learning_rate, weight_decay, tensors["up"]),
        (down_learning_rate, weight_decay, tensors["down"]),
        (deep_learning_rate, weight_decay, tensors["deep"]),
        (head_learning_rate, weight_decay, [p for name, p in head if not name.endswith("bias")]),
        (head_learning_rate, 0.0, [p for name, p in head if name.endswith("bias")]),
    ]
    return [{"params": params, "lr": lr, "weight_decay": decay} for lr, decay, params in groups if params]


def _tensors_by_rate(model: EPTModel) -> dict[str, list[nn.Parameter]]:
    """Returns the adapter's trained tensors by the learning rate that moves them, as `ept.parts` says.

    Beside deep updates the first layer's token-conditioned update learns at their rate, as one of them.
    """
    by_name = dict(model.ept.named_parameters())
    by_rate: dict[str, list[nn.Parameter]] = {"prompt": [], "up": [], "down": [], "deep": []}
    for part in PARTS:
        for tensor in part.tensors:
            is_deep = part.name == "token" and model.ept_config.deep_layers
            if tensor.name in by_name:
                by_rate["deep" if is_deep else tensor.rate].append(by_name[tensor.name])
    return by_rate
