"""Tries the optimiser and its schedule before a training, so that options that cannot work are refused at once."""

import math
from typing import Any

import torch
import transformers

__all__ = ["check_optimizer"]


def check_optimizer(trainer: Any) -> None:
    """Raises ValueError if the trainer's optimiser or its schedule cannot be made; it makes its own when it trains."""
    args = trainer.args
    if args.optim_args and not all(word.count("=") == 1 for word in args.optim_args.split(",")):
        raise ValueError(f"--optim_args {args.optim_args} must be name=value, with commas between several")
    if not isinstance(args.lr_scheduler_kwargs, dict | None):
        raise ValueError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs} must be a JSON object with names and values"
        )
    try:
        optimizer = trainer.create_optimizer()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"--optim {args.optim.value}: {error}") from error
    trainer.optimizer = None
    _check_schedule(args, optimizer, _number_of_steps(trainer))


def _number_of_steps(trainer: Any) -> int:
    args = trainer.args
    if args.max_steps >= 0:
        return args.max_steps
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(args.num_train_epochs * math.ceil(len(trainer.train_dataset) / rows))


def _check_schedule(args: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    warmup, option = args.get_warmup_steps(steps), f"--lr_scheduler_type {args.lr_scheduler_type.value}"
    try:
        schedule = transformers.get_scheduler(
            args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs
        )
        for factor in getattr(schedule, "lr_lambdas", []):
            factor(steps)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{option}: {error} (--lr_scheduler_kwargs '{{\"name\": value}}')") from error
    except ZeroDivisionError as error:
        raise ValueError(
            f"{option}: {warmup} of {steps} steps are warm-up, which leaves none: --warmup_steps 0"
        ) from error
