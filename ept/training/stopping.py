"""Ends a training after a whole step when the process is told to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["StopOnSignal"]


class StopOnSignal(TrainerCallback):
    """Once a signal came to any process, all save a checkpoint after the same step and stop; `came` says so."""

    def __init__(self) -> None:
        self.came = False

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[None]:
        """Notes SIGTERM within the block; only in the main thread, since Python takes no signals in others."""
        self.came = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: Any) -> None:
        self.came = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:  # a process that stopped alone would leave the others waiting for it
            came = torch.tensor(int(self.came), device=args.device)
            torch.distributed.all_reduce(came, torch.distributed.ReduceOp.MAX)
            self.came = bool(came)
        if self.came:
            control.should_save = control.should_training_stop = True
