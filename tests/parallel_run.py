"""Trains a tiny model in one or several processes, all forked from one; see test_scaling.py.

    python parallel_run.py DIRECTORY RUNS

RUNS is a JSON list, run in order; a run is a dictionary of
`name` (its output directory, below DIRECTORY), `kind` ("ddp" or "fsdp2"), `processes`, `batch` (rows per process),
and, where wanted, `model` ("encoder", or "causal"), `dropout` (of the token-conditioned update), `resume` (true),
`second` (true: a second adapter is trained after the first, by the same trainer),
`steps` (after how many to stop), `signal` ([process, step, number]: a real signal at the step's start), `disk` ([step,
bytes]: from that step on no file can grow beyond so many).
Prints each run's exit codes, by process: minus the signal that killed it, 143 where SIGTERM ended it.
"""

import json
import os
import resource
import socket
import sys
from pathlib import Path

import accelerate
import torch
import transformers as hf

from ept import get_ept_model
from ept.training.rates import EPTTrainingArguments
from ept.training.trainer import EPTTrainer
from killed_run import Tokenizer, get_ready_to_fork
from tiny_models import all_parts, backbone, ids

STEPS, ROWS = 6, 32  # the rows are a multiple of every batch: a last, smaller batch would be filled up from the first


class Stop(hf.TrainerCallback):
    """Ends the run after some steps, with the schedule of the whole one; or lets something befall it."""

    def __init__(self, steps, signal, disk):
        self.steps, self.signal, self.disk = steps, signal, disk

    def on_step_begin(self, args, state, control, **kwargs):
        if self.signal[:2] == [args.process_index, state.global_step]:
            os.kill(os.getpid(), self.signal[2])
        if self.disk[0] == state.global_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.disk[1], resource.RLIM_INFINITY))

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.steps


class TokenLabels(Tokenizer):
    """Labels are the text itself, of another length in each row: a token must count the same in every process."""

    def pad(self, features, **given):
        batch = super().pad([f | {"labels": 0} for f in features], **given)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def train(
    output_dir, batch, model="encoder", dropout=0.0, resume=False, second=False, steps=STEPS, signal=(), disk=(-1, 0)
) -> None:
    torch.manual_seed(0)
    causal = model == "causal"
    auto = hf.AutoModelForCausalLM if causal else hf.AutoModelForSequenceClassification
    base = backbone("llama", auto) if causal else backbone("bert", auto, num_labels=2)
    wrapped = get_ept_model(base, all_parts(token_dropout=dropout, deep_layers=-1))
    if second:
        wrapped.add_adapter("second", all_parts())
    rows = [
        {"input_ids": ids(1, 3 + i % 9, seed=i)[0], "labels": i % 2, "attention_mask": torch.ones(3 + i % 9).long()}
        for i in range(ROWS)
    ]
    args = EPTTrainingArguments(
        output_dir, max_steps=STEPS, per_device_train_batch_size=batch, save_steps=3, disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, logging_steps=1, eval_strategy="steps", eval_steps=3, head_learning_rate=0.001,
        up_learning_rate=0.001, prompt_learning_rate=0.001, weight_decay=0.01,
    )  # fmt: skip
    collator = hf.DataCollatorWithPadding(TokenLabels() if causal else Tokenizer())
    trainer = EPTTrainer(wrapped, args, collator, rows, rows[:8], callbacks=[Stop(steps, signal, disk)])
    trainer.train(resume_from_checkpoint=resume)
    if trainer.terminated:
        os._exit(143)
    if second:
        wrapped.set_adapter("second")
        trainer.train()
    trainer.save_model()
    trainer.save_state()


def in_children(kind: str, processes: int, **run) -> list[int]:
    """Exit code of each process of a run, which are forked from this one."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            try:
                if processes > 1:
                    os.environ |= dict(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                    )  # fmt: skip
                if kind == "fsdp2":
                    os.environ |= FSDP2
                    layer = "LlamaDecoderLayer" if run.get("model") == "causal" else "BertLayer"
                    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layer
                    fsdp_on_the_cpu()
                train(**run)
                os._exit(0)
            finally:  # reached with an exception only, which is shown before the parent's code could run on
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


# What `accelerate launch` sets for configs/fsdp2.yaml.
FSDP2 = dict(
    ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT", FSDP_RESHARD_AFTER_FORWARD="true", FSDP_CPU_RAM_EFFICIENT_LOADING="false",
)  # fmt: skip


def fsdp_on_the_cpu() -> None:
    """accelerate takes FSDP's settings on accelerators only; torch's sharding itself runs on gloo all the same."""
    prepare = accelerate.state.AcceleratorState.__init__

    def prepare_fsdp(state, *args, fsdp_plugin=None, **kwargs):
        prepare(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.distributed_type, state.fsdp_plugin = accelerate.DistributedType.FSDP, fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = prepare_fsdp


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    get_ready_to_fork()
    directory = Path(sys.argv[1])
    print(json.dumps([in_children(output_dir=directory / run.pop("name"), **run) for run in json.loads(sys.argv[2])]))
