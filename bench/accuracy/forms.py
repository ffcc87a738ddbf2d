"""Forms of the updates, and the paper's parts, side by side: python -m bench.accuracy.forms QUESTION DIRECTORY OUTPUT

DIRECTORY is what `python -m bench.accuracy.transfer export DIRECTORY [--glue DIRECTORY]` wrote.

| QUESTION | what | steps |
|---|---|---|
| layers | what could be changed in the updates of the layers | 150 |
| glue | the same on GLUE's tasks | 150 |
| paper | the paper's parts beside prompt tuning | 1,000 |

Each form's rates are searched on dev parts, with other seeds than the five of the final runs, which read the test parts. A
line in OUTPUT for every run; what stands there is not run again. `forms_table.py` makes the tables.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ept.machine import describe

from .arms import ALL_ROWS, HEAD_RATE, TASKS
from .many import LINEARS, WARMUP, Shape, along_layers, features, fresh, fresh_head, logits_of, settings, train
from .transfer import Bundle, encode_predictions, read_bundle, score

SEARCH_SEEDS, FINAL_SEEDS = (5, 6), (0, 1, 2, 3, 4)
FACTORS = tuple({"rate": rate} for rate in (1.0, 0.5, 2.0))


@dataclass(frozen=True)
class Form:
    """A shape with its way of training.

    Attributes: `rates` (those that the search tries, as keywords of `settings`), `down` (a factor on D's rate), `upwards` (the
    last layer's rate over the first's), `warmup` (the share of the steps in which the rates rise), `averaged` (the share of the
    last steps whose tensors are averaged).
    """

    shape: Shape
    rates: tuple[dict[str, float], ...] = FACTORS
    down: float = 1.0
    upwards: float = 1.0
    warmup: float = WARMUP
    averaged: float = 0.0


def _lora(*rates: float, **shape: Any) -> dict[str, Any]:
    return {"shape": Shape("LoRA", **shape), "rates": tuple({"rate": rate} for rate in rates)}


# Of about as many parameters as the first, 19,200, unless the name says more.
LAYERS = {
    "EPT": Form(Shape("EPT", 4)),
    "identity": Form(Shape("EPT", 4, activation="identity")),
    "read by the attention alone": Form(Shape("EPT", 4, attention_only=True)),
    "also behind the last layer": Form(Shape("EPT", 4, after_last=True)),
    "bias and gain of every channel, q = 3": Form(Shape("EPT", 3, affine=True)),
    "D shared by two layers, q = 5": Form(Shape("EPT", 5, sharing=2)),
    "no prompt": Form(Shape("EPT", 4, prompt_length=0)),
    "D at half of W's rate": Form(Shape("EPT", 4), down=0.5),
    "D at twice W's rate": Form(Shape("EPT", 4), down=2.0),
    "D at four times W's rate": Form(Shape("EPT", 4), down=4.0),
    "the last layer at four times the first's rate": Form(Shape("EPT", 4), upwards=4.0),
    "the last layer at a quarter of the first's rate": Form(Shape("EPT", 4), upwards=0.25),
    "warm-up of a quarter": Form(Shape("EPT", 4), warmup=0.25),
    "with the paper's pair, fusion and spaces": Form(
        Shape("EPT", 4, spaces=(4, 2), lowrank=4, positions=48), ({"others": 0.1}, {"others": 1.0}, {"others": 0.02})
    ),
    "the last fifth averaged": Form(Shape("EPT", 4), averaged=0.2),
    "EPT of half the size and LoRA r = 1": Form(
        Shape("EPT", 2, lora_rank=1), tuple({"lora": x} for x in (0.005, 0.0025, 0.01))
    ),
    "EPT, q = 8": Form(Shape("EPT", 8)),
    "LoRA r = 2": Form(**_lora(0.005, 0.0025, 0.01, rank=2)),
    "LoRA r = 4": Form(**_lora(0.005, 0.0025, 0.01, rank=4)),
    "LoRA r = 4, the last fifth averaged": Form(**_lora(0.005, 0.0025, 0.01, rank=4), averaged=0.2),
    "LoRA on all linear layers, r = 1": Form(**_lora(0.005, 0.0025, 0.001, rank=1, targets=tuple(LINEARS))),
}
APART = tuple(
    {"prompt": prompt, "others": others} for prompt, others in itertools.product((1, 4), (1, 0.1, 0.02, 0.004))
)
ALONE = tuple({"prompt": prompt} for prompt in (0.5, 1.0, 2.0, 4.0, 8.0))
PAIR: dict[str, Any] = {"lowrank": 35, "positions": 48}
# 38,160 parameters, as 100 rows of prompt tuning, but for the last three.
PAPER = {
    "the paper's parts": Form(Shape("EPT", 0, prompt_length=40, spaces=(4, 2), **PAIR), APART),
    "without fusion": Form(Shape("EPT", 0, prompt_length=40, spaces=(4, 2), fusion=False, **PAIR), APART),
    "DePT": Form(Shape("EPT", 0, prompt_length=60, fusion=False, **PAIR), APART),
    "prompt tuning 100": Form(Shape("EPT", 0, prompt_length=100), ALONE),
    "prompt tuning 40": Form(Shape("EPT", 0, prompt_length=40), ALONE),
    "EPT": Form(Shape("EPT", 4), FACTORS),
    "EPT with pair, fusion and spaces": Form(Shape("EPT", 4, spaces=(4, 2), lowrank=4, positions=48), APART),
}


@dataclass(frozen=True)
class Question:
    """Forms, the tasks, sizes of training sets, steps and rows of a step that they are compared on."""

    forms: dict[str, Form]
    tasks: tuple[str, ...]
    rows: tuple[int, ...]
    steps: int
    batch_size: int


QUESTIONS = {
    "layers": Question(LAYERS, TASKS, (2000, 500), 150, 32),
    "glue": Question(LAYERS, ("mrpc", "cola", "sst2"), (2000,), 150, 32),
    "paper": Question(PAPER, ("sst2", "cola"), (ALL_ROWS,), 1000, 16),
}


@dataclass(frozen=True)
class Job:
    form: str
    task: str
    rows: int
    seed: int
    part: str
    rates: tuple[tuple[str, float], ...]

    @property
    def identity(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class Runner:
    """Runs jobs in waves of one form, and keeps a line of each.

    Args:
        wave: runs side by side, for a prompt of up to 32 rows; fewer for longer ones.
    """

    def __init__(self, question: Question, bundle: Bundle, output: Path, deadline: float, wave: int, steps: int | None):
        self.question, self.bundle, self.output, self.deadline, self.wave = question, bundle, output, deadline, wave
        self.steps = steps or question.steps
        self.lines = {line["identity"]: line for line in read_lines(output)}

    def run(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """The jobs' lines, those that were there among them.

        Raises:
            TimeoutError: the deadline came first.
        """
        missing = defaultdict(list)
        for job in jobs:
            if job.identity not in self.lines:
                missing[job.form].append(job)
        for name, of_form in missing.items():
            of_form.sort(key=lambda job: (job.rows, job.task))
            at_once = max(1, self.wave // (1 + self.question.forms[name].shape.prompt_length // 32))
            for start in range(0, len(of_form), at_once):
                if time.monotonic() > self.deadline:
                    raise TimeoutError
                self._wave(self.question.forms[name], of_form[start : start + at_once])
        return [self.lines[job.identity] for job in jobs]

    def _wave(self, form: Form, jobs: list[Job]) -> None:
        started, bundle = time.perf_counter(), self.bundle
        rows = [bundle.drawn(job.task, job.rows, job.seed) for job in jobs]
        starts = [
            fresh(form.shape, bundle.encoder, job.seed, bundle.frequent_ids)
            | fresh_head(own.num_labels, bundle.encoder.width, job.seed)
            for job, own in zip(jobs, rows, strict=True)
        ]
        rates = [
            settings(form.shape, head_rate=HEAD_RATE, down=form.down, **{"rate": 1.0} | dict(job.rates)) for job in jobs
        ]
        if form.upwards != 1:
            updates = bundle.encoder.layers + form.shape.after_last
            rates = [along_layers(own, form.upwards, updates) for own in rates]
        trained, losses = train(
            bundle.encoder, form.shape, starts, rows, rates, [job.seed for job in jobs], steps=self.steps,
            batch_size=self.question.batch_size, averaged=form.averaged, warmup=form.warmup,
        )  # fmt: skip
        judged = [bundle.parts[job.task][job.part] for job in jobs]
        read = features(bundle.encoder, form.shape, trained, judged)
        machine = describe()
        with open(self.output, "a") as file:
            for number, (job, x, part) in enumerate(zip(jobs, read, judged, strict=True)):
                own = {name: tensor[number : number + 1] for name, tensor in trained.items()}
                logits = logits_of(x.unsqueeze(0), own)[0, :, : part.num_labels].cpu().numpy()
                line = asdict(job) | {
                    "identity": job.identity, "steps": self.steps, "dtype": bundle.dtype,
                    "train_loss": round(float(losses[number]), 5),
                    "score": round(score(logits, part, bundle.metrics.get(job.task)), 5),
                    "trained_parameters": sum(t.numel() for name, t in own.items() if not name.startswith("head")),
                    "machine": machine,
                }  # fmt: skip
                if job.part == "test":
                    line["predictions"] = encode_predictions(logits)
                self.lines[job.identity] = line
                file.write(json.dumps(line) + "\n")
        print(f"{jobs[0].form}: {len(jobs)} runs in {time.perf_counter() - started:.1f} s", flush=True)


def answer(runner: Runner, forms: dict[str, Form], first_rates: bool = False) -> None:
    """Searches every form's rates on the first size's dev parts, then runs the final seeds, what is compared first.

    Args:
        first_rates: no search, every form at the first of its rates.
    """
    question, chosen = runner.question, {}
    for name, form in forms.items():
        if first_rates:
            chosen[name] = tuple(form.rates[0].items())
            continue
        means = {}
        for rates in form.rates:
            told = tuple(rates.items())
            jobs = [
                Job(name, task, question.rows[0], seed, "dev", told) for seed in SEARCH_SEEDS for task in question.tasks
            ]
            means[told] = statistics.mean(line["score"] for line in runner.run(jobs))
        chosen[name] = max(means, key=means.__getitem__)
        print(f"{name}: {dict(chosen[name])}, dev {means[chosen[name]]:.4f}", flush=True)
    for rows in question.rows:
        for name in forms:
            runner.run([
                Job(name, task, rows, seed, "test", chosen[name]) for seed in FINAL_SEEDS for task in question.tasks
            ])  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.forms", description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wave", type=int, default=120, help="runs side by side")
    parser.add_argument("--steps", type=int, help="in place of the question's")
    parser.add_argument("--forms", nargs="+", help="only these")
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--rows", nargs="+", type=int, help="only these sizes of training sets")
    parser.add_argument(
        "--first_rates", action="store_true", help="each form at the first of its rates, without a search"
    )
    options = parser.parse_args()
    name, question = options.question, QUESTIONS[options.question]
    for name_of, chosen, there in (("tasks", options.tasks, question.tasks), ("rows", options.rows, question.rows)):
        if unknown := set(chosen or ()) - set(there):
            parser.error(
                f"{name} has no {name_of} {', '.join(map(str, unknown))}: choose of {', '.join(map(str, there))}"
            )
    question = replace(
        question, tasks=tuple(options.tasks or question.tasks), rows=tuple(options.rows or question.rows)
    )
    if unknown := set(options.forms or ()) - set(question.forms):
        parser.error(f"{name} has no {', '.join(sorted(unknown))}: choose of {', '.join(question.forms)}")
    torch.set_float32_matmul_precision("high")
    bundle = read_bundle(options.directory, options.device)
    if absent := set(question.tasks) - set(bundle.parts):
        parser.error(f"{options.directory} holds no {', '.join(sorted(absent))}: export it with --glue DIRECTORY")
    deadline = time.monotonic() + 60 * options.minutes
    runner = Runner(question, bundle, options.output, deadline, options.wave, options.steps)
    try:
        answer(runner, {form: question.forms[form] for form in options.forms or question.forms}, options.first_rates)
    except TimeoutError:
        print("out of time", flush=True)


if __name__ == "__main__":
    main()
