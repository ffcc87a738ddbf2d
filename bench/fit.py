"""Training one method on one task through transformers' Trainer, and its score: the same for every method."""

import os
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from scipy.stats import pearsonr
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from .real_text import Task

__all__ = ["Fit", "encode", "fit", "predict", "score", "token_counts"]

WARMUP = 0.06


@dataclass
class Fit:
    """What a training run leaves behind: losses per logged step, seconds per step."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def encode(task: Task, part: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """Token ids and labels of a part of a task, truncated, not padded."""
    encoded = tokenizer(task.texts[part], truncation=True, max_length=max_length, return_token_type_ids=False)
    label_type = float if task.problem_type == "regression" else int
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label_type(label), "length": len(ids)}
        for ids, mask, label in zip(encoded["input_ids"], encoded["attention_mask"], task.labels[part], strict=True)
    ]


def token_counts(rows: list[dict[str, Any]], vocab_size: int) -> Tensor:
    """[vocab] how often each token occurs."""
    return torch.bincount(torch.tensor([i for row in rows for i in row["input_ids"]]), minlength=vocab_size)


class _Collator(DataCollatorWithPadding):
    """Pads to the longest row; PEFT prompt tuning's head must be told which columns are text (its rows come first)."""

    prompt_rows: int = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__([{k: v for k, v in f.items() if k != "length"} for f in features])
        if self.prompt_rows:
            mask = batch["attention_mask"]
            batch["pooling_mask"] = torch.cat([mask.new_zeros(len(mask), self.prompt_rows), mask], dim=1)
        return dict(batch)


def collator(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> _Collator:
    collate = _Collator(tokenizer)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        collate.prompt_rows = model.active_peft_config.num_virtual_tokens
    return collate


class _Watch(TrainerCallback):
    """Fills a Fit and shows one progress bar with the loss."""

    def __init__(self, fit: Fit, steps: int, description: str | None):
        self.fit = fit
        self.bar = tqdm(total=steps, desc=description, unit="step", disable=description is None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.fit.step_seconds.append(time.perf_counter() - self.started)
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.fit.steps.append(state.global_step)
            self.fit.losses.append(float(logs["loss"]))
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    batch_size: int = 32,
    seed: int = 0,
    description: str | None = None,
) -> Fit:
    """Trains with AdamW, a short warm-up and linear decay, in batches of similar length; a bar if described."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, max(1, round(WARMUP * steps)), steps)
    args = TrainingArguments(
        output_dir=os.path.join(tempfile.gettempdir(), "ept-bench"), max_steps=steps,
        per_device_train_batch_size=batch_size, seed=seed, data_seed=seed,
        train_sampling_strategy="group_by_length", logging_steps=max(1, steps // 30), save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, max_grad_norm=1.0,
    )  # fmt: skip
    result = Fit()
    trainer = Trainer(
        model, args, data_collator=collator(model, tokenizer), train_dataset=rows,
        optimizers=(optimizer, scheduler), callbacks=[_Watch(result, steps, description)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return result


@torch.no_grad()
def predict(
    model: nn.Module, rows: list[dict[str, Any]], tokenizer, batch_size: int = 64, description: str | None = None
) -> np.ndarray:
    """Logits [rows, labels], in the order of the rows; batches of similar length; a bar if described."""
    model.eval()
    collate = collator(model, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    logits: list[np.ndarray | None] = [None] * len(rows)
    for start in tqdm(range(0, len(order), batch_size), desc=description, unit="batch", disable=description is None):
        index = order[start : start + batch_size]
        batch = collate([rows[i] for i in index])
        batch.pop("labels")
        for i, row in zip(index, model(**batch).logits.float().numpy(), strict=True):
            logits[i] = row
    return np.stack(logits)


def score(task: Task, logits: np.ndarray, part: str) -> float:
    """Accuracy, or Pearson's correlation for a regression."""
    labels = np.asarray(task.labels[part])
    if task.problem_type == "regression":
        return float(pearsonr(logits[:, 0], labels).statistic)
    return float((logits.argmax(1) == labels).mean())
