"""Training through transformers' Trainer."""

from ept.training.checkpoints import last_checkpoint
from ept.training.health import gate_health
from ept.training.rates import EPTSeq2SeqTrainingArguments, EPTTrainingArguments, parameter_groups
from ept.training.trainer import EPTContinuationTrainer, EPTSeq2SeqTrainer, EPTTrainer, EPTWritingTrainer

__all__ = [
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
