"""Trains a tiny model in children of one process, each killed where it is told to be; see test_training.py.

    python killed_run.py DIRECTORY SCENARIOS

SCENARIOS is JSON: {name: [run, run, …]}, the runs of one output directory in order; a run is a dictionary of
`kill_at` ("step 5", "optimizer 4", "state 4", "adapter 4": a real SIGKILL at the step's start, or in the middle of
writing that file of checkpoint 4) and `resume` (None, True or a checkpoint's name). Prints each run's exit status.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
import transformers as hf

from ept import get_ept_model
from ept.files import adapter_dir
from ept.training.rates import EPTTrainingArguments
from ept.training.trainer import EPTTrainer
from tiny_models import all_parts, backbone, ids

STEPS = 10


class KillAtStep(hf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_middle_of(file: str, step: int) -> None:
    """Half of the file is written, then the process dies."""

    def half(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    here = f"checkpoint-{step}"
    if file == "optimizer":
        save = torch.save

        def torch_save(value, path, *args, **kwargs):
            save(value, path, *args, **kwargs)
            if Path(path).name == "optimizer.pt" and Path(path).parent.name == here:
                half(Path(path), Path(path).read_bytes())

        torch.save = torch_save
    elif file == "state":
        save_to_json = hf.TrainerState.save_to_json

        def save_state(state, path):
            save_to_json(state, path)
            if Path(path).parent.name == here:
                half(Path(path), Path(path).read_bytes())

        hf.TrainerState.save_to_json = save_state
    else:
        write = adapter_dir._write

        def write_file(path, data):
            if path.parent.name == here:
                half(path, data)
            write(path, data)

        adapter_dir._write = write_file


def train(output_dir: Path, kill_at: str | None, resume: bool | str | None) -> None:
    torch.manual_seed(0)
    # RoBERTa's head has dropout of its own, so that the random state matters.
    model = get_ept_model(backbone("roberta", hf.AutoModelForSequenceClassification, num_labels=2), all_parts())
    rows = [
        {"input_ids": ids(1, 3 + i % 9, seed=i)[0], "labels": i % 2, "attention_mask": torch.ones(3 + i % 9).long()}
        for i in range(15)  # an epoch is four steps, and the last batch has one row
    ]
    args = EPTTrainingArguments(
        output_dir, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=2,
        eval_strategy="epoch", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_steps=100,
    )  # fmt: skip
    callbacks = []
    if kill_at is not None:
        place, step = kill_at.split()
        if place == "step":
            callbacks.append(KillAtStep(int(step)))
        else:
            kill_in_the_middle_of(place, int(step))
    collator = hf.DataCollatorWithPadding(Tokenizer())
    trainer = EPTTrainer(model, args, collator, rows, rows[:4], callbacks=callbacks)
    trainer.train(str(output_dir / resume) if isinstance(resume, str) else resume)
    model.save_pretrained(output_dir)


class Tokenizer:
    """What a collator needs of one."""

    def pad(self, features, **_):
        width = max(len(f["input_ids"]) for f in features)
        batch = {key: torch.zeros(len(features), width, dtype=torch.long) for key in ("input_ids", "attention_mask")}
        for i, f in enumerate(features):
            for key in batch:
                batch[key][i, : len(f[key])] = f[key]
        return batch | {"labels": torch.tensor([f["labels"] for f in features])}


def get_ready_to_fork() -> None:
    """Does once, for all children, what each would do anew: imports, and going through all of their objects for garbage."""
    for name in ("bert", "roberta", "llama"):
        backbone(name)
    gc.collect()
    gc.freeze()


def in_a_child(**run) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            train(**run)
            os._exit(0)
        finally:  # reached with an exception only, which is shown before the parent's code could run on
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitpid(pid, 0)[1]


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    get_ready_to_fork()
    directory, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    status = {
        name: [
            in_a_child(output_dir=directory / name, kill_at=run.get("kill_at"), resume=run.get("resume"))
            for run in runs
        ]
        for name, runs in scenarios.items()
    }
    print(json.dumps(status))
