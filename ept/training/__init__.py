"""Training through transformers' Trainer."""

from ept.training.checkpoints import last_checkpoint
from ept.training.health import gate_health
from ept.training.rates import (
    DEEP_LEARNING_RATE,
    DOWN_LEARNING_RATE,
    HEAD_LEARNING_RATE,
    LEARNING_RATE,
    PROMPT_LEARNING_RATE,
    EPTArguments,
    EPTSeq2SeqTrainingArguments,
    EPTTrainingArguments,
    parameter_groups,
)
from ept.training.trainer import EPTContinuationTrainer, EPTSeq2SeqTrainer, EPTTrainer, EPTWritingTrainer

__all__ = [
    "DEEP_LEARNING_RATE",
    "DOWN_LEARNING_RATE",
    "HEAD_LEARNING_RATE",
    "LEARNING_RATE",
    "PROMPT_LEARNING_RATE",
    "EPTArguments",
    "EPTContinuationTrainer",
    "EPTSeq2SeqTrainer",
    "EPTSeq2SeqTrainingArguments",
    "EPTTrainer",
    "EPTTrainingArguments",
    "EPTWritingTrainer",
    "gate_health",
    "last_checkpoint",
    "parameter_groups",
]
