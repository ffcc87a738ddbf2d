"""The accuracy study's runs: each trains one arm on one task and leaves one JSON line. The protocol is in README.md.

    python -m bench.accuracy.study STAGE [--processes 2] [--minutes 60] [--arms ARM …] [--glue DIRECTORY]

A stage's lines stand in bench/results/accuracy/STAGE.jsonl; what stands there is not run again, so a stage that was
interrupted goes on. `--minutes` starts no run after that time.
"""

import argparse
import base64
import functools
import json
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ept import EPTModel, MeanPoolingForSequenceClassification
from ept.compare.methods import adapt
from ept.console import say
from ept.machine import describe
from ept.model.start_values import token_counts
from ept.training import gate_health

from ..quiet import quiet
from ..text.language_models import language_model
from ..text.real_text import GLUE_TASKS, Task, load_task, minilm
from ..text.rows import fit, load, predict, score, tokenizer_of
from ..text.written import collator_of, judge, text_loss, written_rows
from .arms import STAGES
from .precision import fast_dtype

__all__ = ["MAX_LENGTH", "RESULTS", "decode_predictions", "glue_tasks", "key", "minilm_for", "read"]

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
MAX_LENGTH = 48
BATCH_SIZE = 32
OTHER_TEXTS = 100  # of the dev part of another task, whose loss shows what a language model has forgotten
PREDICTION_UNIT = 1e-3  # regression outputs are kept in thousandths

Job = dict[str, Any]


def key(job: Job) -> str:
    """What makes a run that run, whatever its stage and its arm's name."""
    names = ("method", "budget", "settings", "rates", "head_rate", "rate", "task", "rows", "steps", "seed", "dtype")
    others = ("reads_test", "backbone", "batch_size", "max_length", "form")  # but the first: None for MiniLM's usual
    return json.dumps({name: job.get(name) for name in (*names, *others)}, sort_keys=True)


def read(stage: str) -> list[Job]:
    """The stage's lines."""
    path = RESULTS / f"{stage}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def encode_predictions(values: np.ndarray) -> str:
    """Class numbers, or regression outputs in thousandths, as base64 of little-endian int16."""
    return base64.b64encode(np.clip(np.rint(values), -32768, 32767).astype("<i2").tobytes()).decode()


def decode_predictions(text: str) -> np.ndarray:
    """int16 [test rows], as `encode_predictions` wrote them."""
    return np.frombuffer(base64.b64decode(text), dtype="<i2")


def run(job: Job, glue: Path | None = None) -> Job:
    """One training run; returns the job with what came of it. The test part is read by final stages alone.

    Args:
        glue: the directory of GLUE's files, for its tasks.
    """
    torch.set_num_threads(1)
    quiet()
    started = time.perf_counter()
    backbone, is_written = job.get("backbone", "minilm"), job.get("form") == "written"
    max_length, dtype = job.get("max_length", MAX_LENGTH), fast_dtype(job["dtype"])
    task, tokenizer, parts = load(job["task"], max_length, backbone, glue)
    if is_written:
        parts = {part: written_rows(task, part, tokenizer, max_length) for part in parts}
    rows = parts["train"]
    if job["rows"] < len(rows):
        # Another seed draws other rows; the same rows for all arms at a seed.
        rows = [rows[i] for i in np.random.default_rng(job["seed"]).permutation(len(rows))[: job["rows"]]]
    set_seed(job["seed"])
    if backbone == "minilm":
        base = minilm_for(task, dtype)
    else:
        base = _language_model(backbone, None if is_written else task, tokenizer, dtype)
    model, groups = adapt(
        job["method"], base, budget=job["budget"], rate=job["rate"], head_rate=job["head_rate"],
        tokenizer=tokenizer, token_counts=token_counts([row["input_ids"] for row in rows], len(tokenizer)),
        settings=job.get("settings"), rates=_named_as_now(job.get("rates") or {}),
    )  # fmt: skip
    collate = collator_of(task, tokenizer) if is_written else None
    trace = fit(
        model, groups, rows, tokenizer, steps=job["steps"], batch_size=job.get("batch_size", BATCH_SIZE),
        seed=job["seed"], collate=collate,
    )  # fmt: skip
    part = "test" if job["reads_test"] else "dev"
    result = {
        "train_loss": statistics.mean(trace.losses[-5:]),
        "trained_parameters": sum(p.numel() for group in groups for p in group["params"]),
        "step_seconds": statistics.median(trace.step_seconds),
        "computed_in": dtype,
    }
    if collate is not None:
        written = judge(model, parts[part], collate, task, part)
        result |= {
            "score": written.score, "exact_match": written.exact_match, "answer_loss": written.answer_loss,
            "other_text_loss": text_loss(model, tokenizer, _texts_of(_other_task(task)), MAX_LENGTH),
            "other_text_loss_before": _other_text_loss(backbone, dtype, _other_task(task)),
        }  # fmt: skip
        predictions = np.asarray(written.predictions)
    else:
        logits = predict(model, parts[part], tokenizer)
        result["score"] = score(task, logits, part)
        predictions = logits[:, 0] / PREDICTION_UNIT if logits.shape[1] == 1 else logits.argmax(1)
    if job["reads_test"]:
        result["predictions"] = encode_predictions(predictions)
    if isinstance(model, EPTModel):
        result |= {"layer_rate": model.layer_rate} | _look(model)
    return job | result | {"seconds": time.perf_counter() - started}


def _named_as_now(rates: dict[str, float]) -> dict[str, float]:
    """A job's rates. On record, that of what starts at zero has the name that it had: `learning_rate`."""
    return {"up_learning_rate" if name == "learning_rate" else name: rate for name, rate in rates.items()}


# Eager attention: the backward of torch's fused attention takes half of a bf16 step on a CPU.
def minilm_for(task: Task, dtype: str) -> PreTrainedModel:
    """The encoder in `dtype` under a fresh head on the mean of its text."""
    base = MeanPoolingForSequenceClassification.from_encoder(
        str(minilm()), task.num_labels, task.problem_type, attn_implementation="eager"
    )
    base.encoder.to(getattr(torch, dtype))
    return base


def _language_model(name: str, task: Task | None, tokenizer: PreTrainedTokenizerBase, dtype: str) -> PreTrainedModel:
    """Itself, or under a fresh head for a task, which reads the last token, as transformers has it."""
    common = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    if task is None:
        base = AutoModelForCausalLM.from_pretrained(language_model(name), **common)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(
            language_model(name), num_labels=task.num_labels, problem_type=task.problem_type, **common
        )
    base.config.pad_token_id = tokenizer.pad_token_id
    return base


def _other_task(task: Task) -> str:
    """Whose texts show what is forgotten: news articles, or film reviews where the task itself is of news."""
    return "news" if task.answers is None else "movies"


def _texts_of(name: str) -> list[str]:
    return load_task(name).texts["dev"][:OTHER_TEXTS]


@functools.cache
def _other_text_loss(name: str, dtype: str, texts: str) -> float:
    """What a frozen language model makes of a task's texts."""
    tokenizer = tokenizer_of(name)
    return text_loss(_language_model(name, None, tokenizer, dtype), tokenizer, _texts_of(texts), MAX_LENGTH)


@torch.no_grad()
def _look(model: EPTModel) -> dict[str, float]:
    """Whether the gate is alive and the spaces differ."""
    weights = model.gate_weights()
    if weights is None or weights.shape[1] == 0:
        return {}
    entropy = gate_health(weights).get("gate_entropy", 0.0)  # one space has none
    return {"gate_entropy": entropy, "gate_largest": float(weights.max(1).values.mean())}


def run_stage(
    name: str, processes: int, minutes: float, arms: list[str] | None = None, glue: Path | None = None
) -> None:
    jobs = [job for job in STAGES[name]() if arms is None or job["arm"] in arms]
    RESULTS.mkdir(parents=True, exist_ok=True)
    done = {key(record) for record in read(name)}
    elsewhere = {key(record): record for other in STAGES for record in read(other)}
    missing = []
    for job in jobs:
        if key(job) not in done and key(job) in elsewhere:
            _append(name, elsewhere[key(job)] | {"arm": job["arm"]})
        elif key(job) not in done:
            missing.append(job)
    for task in {job["task"] for job in missing} - set(GLUE_TASKS):
        load_task(task)  # downloads once, before the processes start
    for backbone in {job["backbone"] for job in missing if "backbone" in job}:
        language_model(backbone)
    if missing:
        say(
            f"backbones are computed in {', '.join(sorted({fast_dtype(job['dtype']) for job in missing}))}, fast on this machine"
        )
    deadline = time.monotonic() + 60 * minutes
    machine = describe()
    waiting = iter(missing)
    pending: set[Future[Any]] = set()
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(missing), desc=name, unit="run") as bar,
    ):
        while True:
            while (
                len(pending) < processes and time.monotonic() < deadline and (start := next(waiting, None)) is not None
            ):
                pending.add(pool.submit(run, start, glue))
            if not pending:
                break
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                _append(name, future.result() | {"machine": machine})
                bar.update()


def _append(stage: str, record: Job) -> None:
    with open(RESULTS / f"{stage}.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def glue_tasks(parser: argparse.ArgumentParser, options: argparse.Namespace, jobs: list[Job]) -> dict[str, Task]:
    """A stage's tasks of GLUE. Ends the program where no `--glue` says where their files are, or they cannot be read."""
    names = sorted({job["task"] for job in jobs} & set(GLUE_TASKS))
    if options.glue is None and names:
        parser.error(f"{options.stage} has tasks of GLUE: give the directory of its files (--glue DIRECTORY)")
    try:
        return {name: load_task(name, options.glue) for name in names}
    except (ValueError, OSError) as error:
        parser.error(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.study", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--arms", nargs="+", help="only these; default: all")
    parser.add_argument("--glue", type=Path, metavar="DIRECTORY", help="of GLUE's files, for stages with its tasks")
    options = parser.parse_args()
    arms = list(dict.fromkeys(job["arm"] for job in STAGES[options.stage]()))
    if unknown := set(options.arms or ()) - set(arms):
        parser.error(f"{options.stage} has no {', '.join(sorted(unknown))}: choose of {', '.join(map(repr, arms))}")
    glue_tasks(parser, options, STAGES[options.stage]())
    try:
        run_stage(options.stage, options.processes, options.minutes, options.arms, options.glue)
    except ModuleNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
