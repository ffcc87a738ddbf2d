"""Training any model with given optimiser groups through transformers' Trainer: the same for EPT and for its peers."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from ept.console import say
from ept.tasks.predicting import padding_collator

__all__ = ["Fit", "fit"]

WARMUP = 0.06
LINE_SECONDS = 30  # between two lines about a run's steps, where standard error is no terminal


@dataclass
class Fit:
    """What a training run leaves behind: losses per logged step, seconds per step."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


class _Watch(TrainerCallback):
    """Fills a Fit and shows the steps with the loss: a progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, fit: Fit, steps: int, description: str | None):
        self.fit, self.steps, self.description = fit, steps, description
        is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=steps, desc=description, unit="step", disable=description is None or not is_terminal)
        self.writes_lines = description is not None and not is_terminal
        self.last_line = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.fit.step_seconds.append(now - self.started)
        self.bar.update()
        if self.writes_lines and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            loss = f", loss {self.fit.losses[-1]:.3f}" if self.fit.losses else ""
            say(f"{self.description}: step {state.global_step} of {self.steps}{loss}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.fit.steps.append(state.global_step)
            self.fit.losses.append(float(logs["loss"]))
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    batch_size: int = 32,
    seed: int = 0,
    description: str | None = None,
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
) -> Fit:
    """Trains with AdamW, a short warm-up and linear decay, in batches of similar length; shows its steps if described.

    Args:
        groups: the optimiser's, each with its learning rate.
        rows: token ids, mask and labels of each row.
        collate: makes a padded batch of rows; by default `padding_collator`'s.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, max(1, round(WARMUP * steps)), steps)
    args = TrainingArguments(
        output_dir=os.path.join(tempfile.gettempdir(), "ept-fit"), max_steps=steps,
        per_device_train_batch_size=batch_size, seed=seed, data_seed=seed,
        train_sampling_strategy="group_by_length", logging_steps=max(1, steps // 30), save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, max_grad_norm=1.0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    result = Fit()
    trainer = Trainer(
        model, args, data_collator=collate or padding_collator(model, tokenizer), train_dataset=rows,
        optimizers=(optimizer, scheduler), callbacks=[_Watch(result, steps, description)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return result
