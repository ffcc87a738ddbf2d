"""Starting from adapters of other tasks: EPT and LoRA, from scratch and from the same sources. The protocol is in README.md.

    python -m bench.accuracy.transfer export DIRECTORY [--glue DIRECTORY]  # the encoder and the tasks as plain tensors
    python -m bench.accuracy.transfer run DIRECTORY OUTPUT [--minutes 5] [--device cuda]
    python -m bench.accuracy.transfer more DIRECTORY OUTPUT    # other weights, and LoRA on all linear layers

`run` and `more` do without the packages that hold texts and weights. Their lines go to OUTPUT;
`python -m bench.accuracy.transfer_table` makes its table of those in bench/results/accuracy/transfer.jsonl.
"""

import argparse
import base64
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ept.machine import describe
from ept.model.transfer import ERROR_SCALE, FIRST_ROWS, leave_one_out_error, targets_of, weighted_sum

from .arms import HEAD_RATE, STEPS, TASKS
from .many import LINEARS, Encoder, Rows, Shape, features, fresh, fresh_head, logits_of, settings, train
from .precision import fast_dtype

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"
MAX_LENGTH = 48
SOURCE_ROWS = 2000
SEARCH_SEEDS, FINAL_SEEDS = (5, 6, 7), (0, 1, 2, 3, 4)
SIBLING = {"movies": "rating", "rating": "movies"}  # the task with the same texts
SHAPES = {
    "EPT": Shape("EPT", 4),
    "LoRA r=4": Shape("LoRA", 4),
    "LoRA r=2": Shape("LoRA", 2),
    "EPT q=8": Shape("EPT", 8),
    "LoRA, all linear": Shape("LoRA", 1, tuple(LINEARS)),
}
SEARCHED, FINAL_ARMS = ("EPT", "LoRA r=4"), ("EPT", "LoRA r=4", "LoRA r=2")
USUAL_RATE = {"EPT": 1.0, "LoRA": 0.005}
SCRATCH_FACTORS = (0.25, 0.5, 1.0, 2.0)
FACTORS = (0.125, 0.25, 0.5, 1.0)
HEAD_RATES = (0.0025, 0.02)  # beside the usual one
WAYS = {
    "EPT": ("single", "mean", "blend", "pick", "down", "single, fresh prompt", "single, fitted head"),
    "LoRA": ("single", "mean", "blend", "pick", "down", "mean product", "single, fitted head"),
}
GATE_STEPS, GATE_RATE = 30, 0.2

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """One run. `way` "scratch" starts fresh; `far` leaves out the source with the same texts; `part` is judged."""

    arm: str
    task: str
    rows: int
    seed: int
    way: str
    factor: float
    part: str
    head_rate: float = HEAD_RATE
    far: bool = False

    @property
    def shape(self) -> Shape:
        return SHAPES[self.arm]

    @property
    def rate(self) -> float:
        return self.factor * USUAL_RATE[self.shape.method]


# ---------------------------------------------------------------------- the bundle


@dataclass
class Bundle:
    """The encoder and the tasks.

    Attributes: `parts` (task -> part -> rows), `kept` (task -> the numbers of training rows whose texts stand in no
    task's dev or test part), `frequent_ids` (tokens that fresh prompts are drawn from), `metrics` (task -> its metric).
    """

    encoder: Encoder
    parts: dict[str, dict[str, Rows]]
    kept: dict[str, np.ndarray]
    frequent_ids: np.ndarray
    metrics: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return str(self.encoder.weights["embeddings.word_embeddings.weight"].dtype).removeprefix("torch.")

    def drawn(self, task: str, rows: int, seed: int) -> Rows:
        """The training rows of a seed, the same for all methods."""
        train = self.parts[task]["train"]
        return train.take(np.random.default_rng(seed).permutation(len(train))[:rows])

    def drawn_for_source(self, task: str, seed: int) -> Rows:
        """Training rows of a source, none of whose texts is judged in any task."""
        kept = self.kept[task]
        return self.parts[task]["train"].take(np.random.default_rng(seed).permutation(kept)[:SOURCE_ROWS])


def export(directory: Path, glue: Path | None = None) -> None:
    """Writes the encoder in bfloat16 and the tasks' tokens and labels; with `glue`, those of GLUE's files, too."""
    from transformers import AutoModel, AutoTokenizer

    from ept.backbone.embeddings import embedding_rms
    from ept.backbone.layers import find_layers

    from ..quiet import quiet
    from ..text.real_text import GLUE_TASKS, load_task, minilm
    from ..text.rows import load

    quiet()
    directory.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_pretrained(str(minilm()), dtype=torch.bfloat16)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    save_file(weights, directory / "encoder.safetensors")
    judged: dict[str, set[str]] = {}
    for task in TASKS:
        texts = load_task(task).texts
        for text in (*texts["dev"], *texts["test"]):
            judged.setdefault(text, set()).add(task)
    arrays: dict[str, np.ndarray] = {}
    counts = np.zeros(model.config.vocab_size, dtype=np.int64)
    for name in (*TASKS, *(() if glue is None else GLUE_TASKS)):
        loaded, _, parts = load(name, MAX_LENGTH, glue=glue)
        for part, rows in parts.items():
            arrays[f"{name}.{part}.lengths"] = np.array([row["length"] for row in rows], dtype=np.uint8)
            arrays[f"{name}.{part}.ids"] = np.concatenate([row["input_ids"] for row in rows]).astype(np.uint16)
            arrays[f"{name}.{part}.labels"] = np.array([row["labels"] for row in rows], dtype=np.float32)
        arrays[f"{name}.kept"] = np.array([i for i, text in enumerate(loaded.texts["train"]) if text not in judged])
        arrays[f"{name}.num_labels"], arrays[f"{name}.metric"] = np.array(loaded.num_labels), np.array(loaded.metric)
        if name in TASKS:
            counts += np.bincount(arrays[f"{name}.train.ids"], minlength=len(counts))
    counts[AutoTokenizer.from_pretrained(str(minilm())).all_special_ids] = 0
    arrays["frequent_ids"] = np.argsort(-counts, kind="stable")[:5000]
    arrays["num_heads"] = np.array(model.config.num_attention_heads)
    arrays["embed_scale"] = np.array(embedding_rms(model.get_input_embeddings()))
    arrays["deep_scale"] = find_layers(model).sizes.double().numpy()
    np.savez_compressed(directory / "tasks.npz", **arrays)  # type: ignore[arg-type]


def read_bundle(directory: Path, device: str) -> Bundle:
    """What `export` wrote, the encoder in the type that is fast on the device."""
    if not (directory / "tasks.npz").is_file():
        raise SystemExit(f"{directory} holds no bundle: python -m bench.accuracy.transfer export {directory}")
    arrays = dict(np.load(directory / "tasks.npz"))
    encoder = Encoder(
        load_file(directory / "encoder.safetensors"), int(arrays["num_heads"]), float(arrays["embed_scale"]),
        tuple(arrays["deep_scale"].tolist()),
    ).to(device, getattr(torch, fast_dtype("bfloat16", device)))  # fmt: skip
    parts: dict[str, dict[str, Rows]] = {}
    tasks = [name.removesuffix(".num_labels") for name in arrays if name.endswith(".num_labels")]
    for task in tasks:
        count = int(arrays[f"{task}.num_labels"])
        for part in ("train", "dev", "test"):
            ends = np.cumsum(arrays[f"{task}.{part}.lengths"].astype(np.int64))[:-1]
            ids = np.split(arrays[f"{task}.{part}.ids"].astype(np.int64), ends)
            labels = arrays[f"{task}.{part}.labels"]
            parts.setdefault(task, {})[part] = Rows(ids, labels, count)
    kept = {task: arrays[f"{task}.kept"] for task in tasks}
    return Bundle(encoder, parts, kept, arrays["frequent_ids"], {task: str(arrays[f"{task}.metric"]) for task in tasks})


# ---------------------------------------------------------------------- starts


def _targets(rows: Rows, device: Any) -> Tensor:
    labels = torch.from_numpy(rows.labels).to(device)
    return targets_of(labels if rows.num_labels == 1 else labels.long(), rows.num_labels)


def fitted_head(found: Tensor, targets: Tensor) -> Tensors:
    """A head by ridge regression; class scores are spread to about ±2."""
    x, y = found.double(), targets.double()
    centre, mean = x.mean(0), y.mean(0)
    products = (x - centre) @ (x - centre).mT
    ridge = 0.1 * products.diagonal().mean() * torch.eye(len(x), device=x.device, dtype=x.dtype)
    weight = ((x - centre).mT @ torch.linalg.solve(products + ridge, y - mean)).mT
    scale = 1.0 if y.shape[1] == 1 else 4.0
    bias = mean - weight @ centre
    return {
        "head_weight": (scale * weight).float().cpu(),
        "head_bias": (scale * (bias - (scale > 1) / y.shape[1])).float().cpu(),
    }


def mean_product(sources: list[Tensors]) -> Tensors:
    """The best LoRA of the same rank for the mean of the sources' products B·A, its singular values shared evenly."""
    total = {}
    for name in (name for name in sources[0] if name.startswith("lora_a")):
        other = name.replace("lora_a", "lora_b")
        a = torch.cat([source[name] for source in sources], dim=-2).double()  # [layers, ranks, in]
        b = torch.cat([source[other] for source in sources], dim=-1).double() / len(sources)
        rank = sources[0][name].shape[-2]
        left, low = torch.linalg.qr(b)
        right, high = torch.linalg.qr(a.mT)
        u, s, vt = torch.linalg.svd(low @ high.mT)
        root = s[..., :rank].sqrt()
        total[name] = (root.unsqueeze(-1) * (vt[..., :rank, :] @ right.mT)).float()
        total[other] = ((left @ u[..., :rank]) * root.unsqueeze(-2)).float()
    return total


class Look(NamedTuple):
    """A candidate's start values, what its head would read of the first rows, and the share of the targets it misses."""

    features: Tensor
    targets: Tensor
    error: float
    tensors: Tensors


def _sources(looked: dict[str, Look]) -> list[str]:
    """Which of the candidates are sources by themselves."""
    return [name for name in looked if name in TASKS]


def _blend(looks: list[Look], sharpness: float) -> Tensors:
    """The sum of what was looked at, each weighted by the softmax of its negative error."""
    weights = torch.softmax(-torch.tensor([look.error for look in looks]) / sharpness, 0)
    return weighted_sum([look.tensors for look in looks], weights.tolist())


class Study:
    """The runs' state: the bundle, the trained sources, what is known of the starts, and the lines."""

    def __init__(self, bundle: Bundle, output: Path, deadline: float, steps: int = STEPS, wave: int = 120):
        self.bundle, self.output, self.deadline, self.steps, self.wave = bundle, output, deadline, steps, wave
        self.sources: dict[tuple[str, int], dict[str, Tensors]] = defaultdict(dict)  # (arm, seed) -> task
        self.starts: dict[tuple, dict[str, Tensors]] = {}  # (arm, task, rows, seed, far) -> way
        self.errors: dict[tuple, dict[str, float]] = {}
        self.machine = describe()

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def _fresh(self, job: Job) -> Tensors:
        return fresh(job.shape, self.bundle.encoder, job.seed, self.bundle.frequent_ids)

    def train_sources(self, seeds: tuple[int, ...], arms: list[str]) -> None:
        """An adapter for each task and seed from the seed's one start, at the method's usual rate."""
        for arm in arms:
            jobs = [Job(arm, task, SOURCE_ROWS, seed, "source", 1.0, "none") for seed in seeds for task in TASKS]
            for chosen in _chunks(jobs, self.wave):
                rows = [self.bundle.drawn_for_source(job.task, job.seed) for job in chosen]
                trained, _ = self._train(chosen, rows, [self._start(job, self._fresh(job)) for job in chosen])
                for number, job in enumerate(chosen):
                    own = {name: t[number].cpu() for name, t in trained.items() if not name.startswith("head")}
                    self.sources[arm, job.seed][job.task] = own

    def _start(self, job: Job, tensors: Tensors) -> Tensors:
        head = fresh_head(self.bundle.parts[job.task]["train"].num_labels, self.bundle.encoder.width, job.seed)
        return head | tensors

    def _train(self, jobs: list[Job], rows: list[Rows], starts: list[Tensors]) -> tuple[Tensors, Tensor]:
        return train(
            self.bundle.encoder, jobs[0].shape, starts, rows,
            [settings(job.shape, job.rate, job.head_rate) for job in jobs], [job.seed for job in jobs], steps=self.steps,
        )  # fmt: skip

    def prepare(self, jobs: list[Job]) -> None:
        """Fills `starts` and `errors` for the runs that begin from sources."""
        missing = [job for job in jobs if job.way != "scratch" and job.way not in self.starts.get(_start_key(job), {})]
        by_shape = defaultdict(list)
        for job in {(_start_key(job), job.way): job for job in missing}.values():
            by_shape[job.arm, job.rows].append(job)
        for group in by_shape.values():
            keys = list({_start_key(job): job for job in group}.values())
            for chosen in _chunks(sorted(keys, key=lambda job: TASKS.index(job.task)), max(1, self.wave // 6)):
                looked = self._look(chosen)
                own = [job for job in group if _start_key(job) in looked]
                gated = [job for job in own if job.way == "gate"]
                gates = self._gates(gated, [looked[_start_key(job)] for job in gated]) if gated else []
                for job in own:
                    key = _start_key(job)
                    start = gates.pop(0) if job.way == "gate" else self._start_of(job, looked[key])
                    self.starts.setdefault(key, {})[job.way] = start
                    self.errors[key] = {name: round(look.error, 4) for name, look in looked[key].items()}

    def _look(self, jobs: list[Job]) -> dict[tuple, dict[str, "Look"]]:
        """What each candidate's head would read of each job's first rows, and how much of the labels that misses."""
        candidates: list[tuple[Job, str, Tensors, Rows]] = []
        for job in jobs:
            others = {t: s for t, s in self.sources[job.arm, job.seed].items() if t != job.task}
            if job.far:
                others.pop(SIBLING.get(job.task, ""), None)
            rows = self.bundle.drawn(job.task, job.rows, job.seed)
            rows = rows.take(range(min(len(rows), FIRST_ROWS)))
            starts = dict(others)
            starts["mean"] = weighted_sum(list(others.values()), [1 / len(others)] * len(others))
            starts["fresh"] = self._fresh(job)
            candidates += [(job, name, tensors, rows) for name, tensors in starts.items()]
        device = next(iter(self.bundle.encoder.weights.values())).device
        stacked = {name: torch.stack([c[2][name] for c in candidates]).to(device) for name in candidates[0][2]}
        read = features(self.bundle.encoder, jobs[0].shape, stacked, [c[3] for c in candidates])
        looked: dict[tuple, dict[str, Look]] = defaultdict(dict)
        for task in {job.task for job in jobs}:
            index = [i for i, (job, *_) in enumerate(candidates) if job.task == task]
            x = torch.stack([read[i] for i in index])
            y = torch.stack([_targets(candidates[i][3], device) for i in index])
            for i, own_x, own_y, error in zip(index, x, y, leave_one_out_error(x, y).tolist(), strict=True):
                job, name, tensors, _ = candidates[i]
                looked[_start_key(job)][name] = Look(own_x, own_y, error, tensors)
        return looked

    def _gates(self, jobs: list[Job], looked: list[dict[str, "Look"]]) -> list[Tensors]:
        """Each job's sources summed by the softmax of numbers that were trained, with a head, in GATE_STEPS of their own."""
        sources = [[found[name].tensors for name in _sources(found)] for found in looked]
        device = next(iter(self.bundle.encoder.weights.values())).device
        stacked = {
            name: torch.stack([torch.stack([source[name] for source in own]) for own in sources]).to(device)
            for name in sources[0][0]
        }

        def as_adapter(trained: Tensors) -> Tensors:
            weights = trained["gate"].softmax(1)
            mixed = {name: torch.einsum("rk,rk...->r...", weights, tensor) for name, tensor in stacked.items()}
            return mixed | {name: tensor for name, tensor in trained.items() if name.startswith("head")}

        starts = [self._start(job, {"gate": torch.zeros(len(sources[0]))}) for job in jobs]
        rows = [self.bundle.drawn(job.task, job.rows, job.seed) for job in jobs]
        rates = [{"gate": GATE_RATE, "head_weight": HEAD_RATE, "head_bias": HEAD_RATE} for _ in jobs]
        trained, _ = train(
            self.bundle.encoder, jobs[0].shape, starts, rows, rates, [job.seed for job in jobs], steps=GATE_STEPS,
            as_adapter=as_adapter,
        )  # fmt: skip
        weights = trained["gate"].softmax(1).tolist()
        return [weighted_sum(own, weight) for own, weight in zip(sources, weights, strict=True)]

    def _start_of(self, job: Job, looked: dict[str, "Look"]) -> Tensors:
        singles = _sources(looked)
        first = looked[min(singles, key=lambda name: looked[name].error)]
        single, sources = first.tensors, [looked[name].tensors for name in singles]
        fresh_start = looked["fresh"].tensors
        match job.way:
            case "single":
                return single
            case "mean":
                return looked["mean"].tensors
            case "blend" | "blend 0.02" | "blend 0.1" | "blend 0.2":
                return _blend([looked[name] for name in singles], float(job.way[6:] or ERROR_SCALE))
            case "blend with fresh":
                return _blend([looked[name] for name in (*singles, "fresh")], ERROR_SCALE)
            case "pick":
                return min(looked.values(), key=lambda look: look.error).tensors
            case "down":
                return fresh_start | {n: t for n, t in single.items() if n.endswith("down") or n.startswith("lora_a")}
            case "single, fitted head":
                return single | fitted_head(first.features, first.targets)
            case "single, fresh prompt":
                return single | {"prompt": fresh_start["prompt"]}
            case "mean product":
                return mean_product(sources)
        raise ValueError(f"unknown way {job.way!r}")

    def run(self, stage: str, jobs: list[Job]) -> list[dict[str, Any]]:
        """Runs the jobs in waves until the deadline; a line each."""
        self.prepare(jobs)
        records: list[dict[str, Any]] = []
        by_arm = defaultdict(list)
        for job in jobs:
            by_arm[job.arm].append(job)
        for group in by_arm.values():
            group.sort(key=lambda job: (TASKS.index(job.task), job.rows))
            for chosen in _chunks(group, self.wave):
                if self.is_late():
                    return records
                records += self._wave(stage, chosen)
        return records

    def _wave(self, stage: str, jobs: list[Job]) -> list[dict[str, Any]]:
        started = time.perf_counter()
        rows = [self.bundle.drawn(job.task, job.rows, job.seed) for job in jobs]
        starts = [
            self._start(job, self._fresh(job) if job.way == "scratch" else self.starts[_start_key(job)][job.way])
            for job in jobs
        ]
        trained, losses = self._train(jobs, rows, starts)
        judged = [self.bundle.parts[job.task][job.part] for job in jobs]
        found = features(self.bundle.encoder, jobs[0].shape, trained, judged)
        records = []
        for number, (job, x, part) in enumerate(zip(jobs, found, judged, strict=True)):
            own = {name: tensor[number : number + 1] for name, tensor in trained.items()}
            logits = logits_of(x.unsqueeze(0), own)[0, :, : part.num_labels].cpu().numpy()
            trained_parameters = sum(t.numel() for name, t in own.items() if not name.startswith("head"))
            record = {"stage": stage} | asdict(job) | {
                "rate": job.rate, "steps": self.steps, "dtype": self.bundle.dtype, "score": round(score(logits, part), 5),
                "train_loss": round(float(losses[number]), 5),
                "trained_parameters": trained_parameters + part.num_labels * (self.bundle.encoder.width + 1),
            }  # fmt: skip
            if job.way != "scratch":
                record["errors"] = self.errors[_start_key(job)]
            if job.part == "test":
                record["predictions"] = encode_predictions(logits)
            records.append(record | {"machine": self.machine})
        with open(self.output, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        print(f"{stage}: {jobs[0].arm}, {len(jobs)} runs in {time.perf_counter() - started:.1f} s", flush=True)
        return records


def _start_key(job: Job) -> tuple:
    return job.arm, job.task, job.rows, job.seed, job.far


def _chunks(items: list, size: int) -> Iterator[list]:
    """Parts of about equal length, none longer than `size`."""
    count = -(-len(items) // size)
    for part in np.array_split(np.arange(len(items)), count) if items else ():
        yield [items[i] for i in part]


def score(logits: np.ndarray, rows: Rows, metric: str | None = None) -> float:
    """Accuracy, or a correlation: Pearson's for a regression, Matthews', which is Pearson's of classes 0 and 1, where
    `metric` says so; 0 where all outputs are equal."""
    outputs = logits.argmax(1) if rows.num_labels > 1 else logits[:, 0]
    if rows.num_labels > 1 and metric != "matthews":
        return float((outputs == rows.labels).mean())
    return float(np.corrcoef(outputs, rows.labels)[0, 1]) if outputs.std() > 0 else 0.0


# ---------------------------------------------------------------------- the stages


def best(records: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """The values of `names` with the best mean score over tasks and seeds."""
    scores: dict[tuple, list[float]] = defaultdict(list)
    for record in records:
        scores[tuple(record[name] for name in names)].append(record["score"])
    most = max(len(values) for values in scores.values())
    chosen = max((k for k, v in scores.items() if len(v) == most), key=lambda k: statistics.mean(scores[k]))
    return dict(zip(names, chosen, strict=True))


def everything(study: Study) -> None:
    """Sources, the search on dev parts at 100 rows, the final runs at 100, then the other sizes.

    The search takes as many seeds as half of the time that is left holds, by the time of the sources.
    """
    started = time.monotonic()
    study.train_sources(SEARCH_SEEDS + FINAL_SEEDS, ["EPT", "LoRA r=4", "LoRA r=2"])
    now = time.monotonic()
    per_run = (now - started) / (3 * len(SEARCH_SEEDS + FINAL_SEEDS) * len(TASKS))
    per_seed = per_run * len(TASKS) * len(SEARCHED) * (len(SCRATCH_FACTORS) + len(WAYS["EPT"]) * len(FACTORS) + 4)
    seeds = SEARCH_SEEDS[: int(max(1, min(len(SEARCH_SEEDS), 0.5 * (study.deadline - now) // per_seed)))]
    print(f"sources trained in {now - started:.1f} s, {len(seeds)} seeds for the search", flush=True)
    small = _search(study, 100, seeds, WAYS, FACTORS)
    _final(study, {100: small})
    _final(study, {50: small})
    ways = {SHAPES[arm].method: (small[arm, True]["way"],) for arm in SEARCHED}
    large = _search(study, 500, SEARCH_SEEDS[:2], ways, SCRATCH_FACTORS)
    _final(study, {500: large, 2000: large})
    study.train_sources(FINAL_SEEDS, ["EPT q=8"])
    _final(study, {100: small}, arms=("EPT q=8",))


def more(study: Study) -> None:
    """Other weights than the blend's, and LoRA on all linear layers."""
    seeds, others = SEARCH_SEEDS, ("gate", "blend 0.02", "blend 0.1", "blend 0.2", "blend with fresh")
    study.train_sources(seeds, list(SEARCHED))
    for arm in SEARCHED:
        for way in ("blend", *others):
            study.prepare(_grid(100, seeds, "dev", arm=arm, way=way, factor=0.25))
        ways = ("blend", *others)
        study.run("weights", [j for way in ways for j in _grid(100, seeds, "dev", arm=arm, way=way, factor=0.25)])
    arm = "LoRA, all linear"
    study.train_sources(seeds + FINAL_SEEDS, [arm])
    chosen = {}
    for way in ("scratch", "blend"):
        factors = (0.125, 0.25, 0.5, 1.0, 2.0) if way == "scratch" else FACTORS
        records = study.run(
            "search 100", [j for factor in factors for j in _grid(100, seeds, "dev", arm=arm, way=way, factor=factor)]
        )
        told = best(records, ("way", "factor"))
        heads = [job for rate in HEAD_RATES for job in _grid(100, seeds, "dev", arm=arm, head_rate=rate, **told)]
        records = [r for r in records if all(r[name] == value for name, value in told.items())]
        chosen[arm, way == "blend"] = best(records + study.run("search 100", heads), ("way", "factor", "head_rate"))
        print("chosen", arm, chosen[arm, way == "blend"], flush=True)
    _final(study, {100: chosen}, arms=(arm,))
    _final(study, {50: chosen}, arms=(arm,))


def _grid(rows: int, seeds: tuple[int, ...], part: str, **told: Any) -> list[Job]:
    return [Job(task=task, rows=rows, seed=seed, part=part, **told) for seed in seeds for task in TASKS]


def _search(
    study: Study, rows: int, seeds: tuple[int, ...], ways: Mapping[str, tuple[str, ...]], factors: tuple[float, ...]
) -> dict[tuple[str, bool], dict[str, Any]]:
    """The best way, factor and then head rate for (arm, whether from sources), on dev parts.

    Raises:
        TimeoutError: the deadline came before every setting had its runs.
    """
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for arm in SEARCHED:
        for warm in (False, True):
            tried = ways[SHAPES[arm].method] if warm else ("scratch",)
            jobs = [
                job
                for way in tried
                for factor in (factors if warm else SCRATCH_FACTORS)
                for job in _grid(rows, seeds, "dev", arm=arm, way=way, factor=factor)
            ]
            records = study.run(f"search {rows}", jobs)
            chosen = best(records, ("way", "factor"))
            heads = [job for rate in HEAD_RATES for job in _grid(rows, seeds, "dev", arm=arm, head_rate=rate, **chosen)]
            records = [r for r in records if all(r[name] == value for name, value in chosen.items())]
            records += study.run(f"search {rows}", heads)
            if study.is_late():
                raise TimeoutError
            found[arm, warm] = best(records, ("way", "factor", "head_rate"))
            print("chosen", rows, arm, "from sources" if warm else "from scratch", found[arm, warm], flush=True)
    return found


def _final(
    study: Study, sizes: dict[int, dict[tuple[str, bool], dict[str, Any]]], arms: tuple[str, ...] = FINAL_ARMS
) -> None:
    """The test parts; tasks that share their texts once more without each other."""
    jobs = []
    for rows, chosen in sizes.items():
        for arm in arms:
            searched = arm if (arm, True) in chosen else "EPT" if SHAPES[arm].method == "EPT" else "LoRA r=4"
            for warm in (False, True):
                own = _grid(rows, FINAL_SEEDS, "test", arm=arm, **chosen[searched, warm])
                jobs += own + [replace(job, far=True) for job in own if warm and job.task in SIBLING]
    study.run("final", jobs)


def encode_predictions(logits: np.ndarray) -> str:
    """As in `study`, which needs packages that this module must do without."""
    values = logits[:, 0] / 1e-3 if logits.shape[1] == 1 else logits.argmax(1)
    return base64.b64encode(np.clip(np.rint(values), -32768, 32767).astype("<i2").tobytes()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.transfer", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("export", "run", "more"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wave", type=int, default=120, help="runs side by side")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--glue", type=Path, metavar="DIRECTORY", help="of GLUE's files, to be exported too")
    options = parser.parse_args()
    if options.what == "export":
        export(options.directory, options.glue)
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan every new length
    deadline = time.monotonic() + 60 * options.minutes
    bundle = read_bundle(options.directory, options.device)
    try:
        study = Study(bundle, options.output, deadline, options.steps, options.wave)
        (everything if options.what == "run" else more)(study)
    except TimeoutError:
        print("out of time", flush=True)


if __name__ == "__main__":
    main()
