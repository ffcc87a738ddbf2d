"""Whole training steps and inference: EPT beside the bare backbone and its peers at equal trained parameters.

Each method of a shape is built on the same frozen weights; they take turns on the same batch. A step is forward,
backward and AdamW at a learning rate of zero. The floor is the backbone alone on ready-made embeddings of EPT's total
length, which ask for their gradient, without an optimiser. The budget of every method is a soft prompt of 100 tokens.

Real weights: MiniLM. The other shapes have seeded random weights, which take the same time. On a CPU the last one has
4 of its 22 layers, and the two largest are in bf16.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.initialization import no_init_weights

from ept import EPTModel, MeanPoolingForSequenceClassification
from ept.backbone.embeddings import embedding_width, weight_of
from ept.compare.methods import adapt

from .fit import encode
from .memory import own_bytes, peak_bytes, predicted_own_bytes
from .real_text import load_task, minilm
from .step_time import floor_step, interleaved, quartiles, training_step

__all__ = ["GOALS", "SHAPES", "Shape", "by_length", "inference", "lora_config", "mixed", "training"]

Clock = Callable[[], float]
BUDGET_ROWS = 100
PROMPT_TUNING = f"prompt tuning {BUDGET_ROWS}"
FLOOR = "floor"
FEWEST_ROUNDS = 3
# (method, over) -> goal, where it holds for every shape; beside a shape where it does not.
GOALS: dict[tuple[str, str], float | dict[str, float]] = {
    ("EPT", FLOOR): 1.02,
    ("EPT", PROMPT_TUNING): {"MiniLM": 0.45, "T5-small": 0.70},
    ("EPT", "LoRA"): 1.10,
    ("EPT by length", "DePT padded to 256"): 0.50,
    ("EPT folded", "backbone"): 1.01,
    ("mixed batch of 8 adapters", "batch of one adapter"): 1.05,
}
OVERS = ((PROMPT_TUNING, ("EPT", "EPT paper", "DePT", "LoRA")), ("LoRA", ("EPT",)))


@dataclasses.dataclass(frozen=True)
class Shape:
    """A backbone, the batch that it gets, and what is measured on it.

    `config` is None for the real MiniLM. `dtype` is that of the frozen weights. `targets` are the projections that
    LoRA adapts. `paper` also measures the paper's preset, and its floor.
    """

    name: str
    batch: int
    length: int
    rounds: int
    targets: tuple[str, str]
    task: TaskType
    config: Callable[[str], PreTrainedConfig] | None = None
    dtype: torch.dtype = torch.float32
    paper: bool = False

    @property
    def weights(self) -> str:
        return "real" if self.config is None else "seeded"


def _t5(d: int, layers: int, heads: int, d_ff: int) -> Callable[[str], PreTrainedConfig]:
    start: dict[str, Any] = {"decoder_start_token_id": 0}  # taken without being named
    return lambda device: T5Config(d_model=d, num_layers=layers, num_heads=heads, d_ff=d_ff, dropout_rate=0.0, **start)


def _tinyllama(device: str) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
        num_hidden_layers=4 if device == "cpu" else 22,
    )  # fmt: skip


SHAPES = (
    Shape("MiniLM", 32, 64, 10, ("query", "value"), TaskType.SEQ_CLS, paper=True),
    Shape("T5-small", 16, 128, 7, ("q", "v"), TaskType.SEQ_2_SEQ_LM, _t5(512, 6, 8, 2048), paper=True),
    Shape("T5-base", 2, 64, 5, ("q", "v"), TaskType.SEQ_2_SEQ_LM, _t5(768, 12, 12, 3072)),
    Shape("T5-large", 1, 64, 3, ("q", "v"), TaskType.SEQ_2_SEQ_LM, _t5(1024, 24, 16, 4096), torch.bfloat16),
    Shape("TinyLlama-1.1B", 1, 64, 5, ("q_proj", "v_proj"), TaskType.CAUSAL_LM, _tinyllama, torch.bfloat16),
)


# ---------------------------------------------------------------------- models


def backbone(shape: Shape, device: str) -> PreTrainedModel:
    """The frozen model of a shape, in evaluation mode: dropout is off for every method."""
    if shape.config is None:
        kind = "single_label_classification"
        return MeanPoolingForSequenceClassification.from_encoder(str(minilm()), 2, kind).eval().to(device)
    auto = AutoModelForCausalLM if shape.task == TaskType.CAUSAL_LM else AutoModelForSeq2SeqLM
    with no_init_weights():
        model = auto.from_config(shape.config(device), dtype=shape.dtype)
    model.tie_weights()
    _fill(model)
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Seeded weights of standard deviation 0.02, one block of them over and over: drawing a billion takes minutes."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for part in parameter.view(-1).split(len(block)):
            part.copy_(block[: len(part)])


def batch_of(shape: Shape, model: PreTrainedModel, device: str) -> dict[str, Tensor]:
    """Seeded ids without padding, and labels of the shape's task."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2000, 20000, (shape.batch, shape.length), generator=g)
    if shape.task == TaskType.SEQ_CLS:
        labels = torch.arange(shape.batch) % 2
    else:
        labels = ids if shape.task == TaskType.CAUSAL_LM else torch.randint(5, 20000, (shape.batch, 4), generator=g)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the weights, which stay frozen; a classification head is a copy, since it trains."""
    shared = {id(p): p for name, p in model.named_parameters() if not name.startswith("classifier.")}
    return copy.deepcopy(model, shared)


def lora_config(model: PreTrainedModel, targets: tuple[str, str], budget: int, task: TaskType) -> LoraConfig:
    """LoRA on the target projections whose trained parameters come as near to the budget as they can from below.

    All get the same rank, and as many of them one rank more, evenly over the depth, as the budget still holds. Where it
    does not hold rank 1 of all, only those are adapted. ValueError if it holds not even one.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in targets}
    cost = {name: m.in_features + m.out_features for name, m in layers.items()}
    rank = budget // sum(cost.values())
    left = budget - rank * sum(cost.values())
    names = list(layers)
    count = len(names)
    while count and sum(cost[n] for n in _spread(names, count)) > left:
        count -= 1
    more = _spread(names, count)
    if rank == 0 and not more:
        raise ValueError(f"a budget of {budget} parameters does not hold LoRA of rank 1 in one projection")
    lowest = max(rank, 1)
    return LoraConfig(
        task_type=task, r=lowest, lora_alpha=8, lora_dropout=0.0, target_modules=more if rank == 0 else names,
        rank_pattern=dict.fromkeys(more, rank + 1) if rank else {},
    )  # fmt: skip


def _spread(names: list[str], count: int) -> list[str]:
    """`count` of the names, evenly, the first among them."""
    return [names[i * len(names) // count] for i in range(count)]


def build(method: str, shape: Shape, base: PreTrainedModel) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A method on the shared weights of `base`, and its optimiser groups.

    LoRA is spread over the depth where `ept.peers` would take the last layers alone: its gradient then has as far to go
    as that of a LoRA with more parameters.
    """
    model, budget = _sharing(base), BUDGET_ROWS * embedding_width(base.get_input_embeddings())
    torch.manual_seed(0)
    if method != "LoRA":
        return adapt(method, model, budget=budget, rate=1.0)
    frozen: Any = model
    frozen.train = lambda mode=True: model  # as `adapt` does, so that dropout stays off
    wrapped = get_peft_model(model, lora_config(model, shape.targets, budget, shape.task))
    return wrapped, [{"params": [p for p in wrapped.parameters() if p.requires_grad]}]


# ---------------------------------------------------------------------- training


def training(
    shape: Shape, device: str, rounds: int, clock: Clock = time.perf_counter
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Step times and peak memory of every method of a shape, and their ratios: rows of end_to_end.csv and ratios.csv."""
    base = backbone(shape, device)
    batch = batch_of(shape, base, device)
    names = ["EPT", *(["EPT paper"] if shape.paper else []), PROMPT_TUNING, "DePT", "LoRA"]
    built = {name: build(name, shape, base) for name in names}
    models, groups = {name: pair[0] for name, pair in built.items()}, {name: pair[1] for name, pair in built.items()}
    steps: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        if name.startswith("EPT"):  # beside its floor, so that the two see the same moments
            steps[_floor_of(name)] = _floor(shape, cast(EPTModel, model), batch)
        steps[name] = training_step(model, groups[name], [_batch_for(name, shape, batch)])
    steps = {name: _settled(step, device) for name, step in steps.items()}
    seconds = interleaved(steps, rounds, warmup=1, description=f"{shape.name}, training", clock=clock)
    rows = []
    for name, step in steps.items():
        low, median, high = statistics.quantiles(seconds[name], n=4)
        row = _identity(shape) | {
            "method": name, "unit": "ms", "median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high,
            "rounds": rounds, "peak_bytes": peak_bytes(step, device),
        }  # fmt: skip
        if name in models:
            row["trained_parameters"] = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        rows.append(row | (_own_part(shape, cast(EPTModel, models[name]), batch) if name.startswith("EPT") else {}))
    pairs = [(name, _floor_of(name)) for name in names if name.startswith("EPT")]
    pairs += [(name, over) for over, methods in OVERS for name in methods if name in steps]
    return rows, [_ratio(shape, name, over, seconds[name], seconds[over]) for name, over in pairs]


def _floor_of(name: str) -> str:
    return FLOOR if name == "EPT" else f"{FLOOR} of {name}"


def _batch_for(method: str, shape: Shape, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean-pooling head must be told which columns behind PEFT's prompt are text."""
    if method != PROMPT_TUNING or shape.task != TaskType.SEQ_CLS:
        return batch
    return batch | {"pooling_mask": F.pad(batch["attention_mask"], (BUDGET_ROWS, 0))}


def _floor(shape: Shape, model: EPTModel, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """The wrapped backbone's own step on as many columns as it gets from EPT."""
    s, weight = model.ept_config.prompt_length, weight_of(model.base_model.get_input_embeddings())
    embeds = torch.randn(shape.batch, s + shape.length, weight.shape[1], generator=torch.Generator().manual_seed(0))
    labels = batch["labels"]
    if shape.task == TaskType.CAUSAL_LM:
        labels = F.pad(labels, (s, 0), value=-100)
    return floor_step(model.base_model, embeds.to(weight), labels)


def _own_part(shape: Shape, model: EPTModel, batch: dict[str, Tensor]) -> dict[str, int]:
    weight, layer = weight_of(model.base_model.get_input_embeddings()), model.ept
    impl = "torch" if weight.device.type == "cpu" else "triton"
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "own_bytes_predicted": predicted_own_bytes(layer.config, layer.embed_dim, len(ids), ids.shape[1], True, impl),
        "own_bytes_measured": own_bytes(layer, lambda: layer(ids, mask, embedding_weight=weight), [weight, ids, mask]),
    }


def _settled(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    if device == "cpu":
        return step

    def settled() -> None:
        step()
        torch.cuda.synchronize()

    return settled


def _identity(shape: Shape) -> dict[str, Any]:
    return {
        "shape": shape.name, "weights": shape.weights, "dtype": str(shape.dtype).removeprefix("torch."),
        "batch": shape.batch, "length": shape.length,
    }  # fmt: skip


def _ratio(shape: Shape, method: str, over: str, seconds: list[float], baseline: list[float]) -> dict[str, Any]:
    low, median, high = quartiles(seconds, baseline)
    goal = GOALS.get((method, over))
    if isinstance(goal, dict):
        goal = goal.get(shape.name)
    return _identity(shape) | {
        "method": method, "over": over, "unit": "ratio", "median": median, "low": low, "high": high,
        "rounds": len(seconds), "goal": "" if goal is None else goal, "met": "" if goal is None else median <= goal,
    }  # fmt: skip


# ---------------------------------------------------------------------- real text lengths


BY_LENGTH = Shape("MiniLM, movie reviews", 16, 256, 4, ("query", "value"), TaskType.SEQ_CLS)


def by_length(device: str, rounds: int, clock: Clock = time.perf_counter) -> list[dict[str, Any]]:
    """EPT on batches of similar length, padded to their longest row, over DePT's recipe: all rows padded to 256 columns.

    The batches are a sixth, a half and five sixths of the way up the training rows by length. What is compared is the
    sum over them; a padded batch takes the same whatever is in it.
    """
    shape, columns = BY_LENGTH, BY_LENGTH.length
    base = backbone(dataclasses.replace(shape, name="MiniLM"), device)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    rows = sorted(encode(load_task("movies"), "train", tokenizer, columns), key=lambda row: row["length"])
    starts = [len(rows) * part // 6 - shape.batch // 2 for part in (1, 3, 5)]
    steps = {}
    for name, pad in (("EPT", None), ("DePT", columns)):
        model, groups = build(name, shape, base)
        batches = [_padded(rows[start : start + shape.batch], pad, device) for start in starts]
        steps[name] = _settled(_all_of(training_step(model, groups, batches), len(batches)), device)
    seconds = interleaved(steps, rounds, warmup=1, description=f"{shape.name}, training", clock=clock)
    return [_ratio(shape, "EPT by length", "DePT padded to 256", seconds["EPT"], seconds["DePT"])]


def _padded(rows: list[dict[str, Any]], columns: int | None, device: str) -> dict[str, Tensor]:
    width = columns or max(row["length"] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : row["length"]], mask[i, : row["length"]] = torch.tensor(row["input_ids"]), 1
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def _all_of(step: Callable[[], Any], count: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(count):
            step()

    return steps


# ---------------------------------------------------------------------- inference


def inference(shape: Shape, device: str, rounds: int, clock: Clock = time.perf_counter) -> list[dict[str, Any]]:
    """A folded EPT over the bare backbone on as many columns of ordinary ids: one row of ratios.csv."""
    base = backbone(shape, device)
    batch = batch_of(shape, base, device)
    folded = cast(EPTModel, build("EPT", shape, base)[0]).fold().eval()
    s = folded.ept_config.prompt_length
    longer = {"input_ids": batch["input_ids"][:, :1].expand(-1, s), "attention_mask": batch["attention_mask"][:, :s]}
    bare = batch | {name: torch.cat([more, batch[name]], 1) for name, more in longer.items()}
    steps = {
        "backbone": _settled(_evaluation(base.eval(), bare), device),
        "EPT folded": _settled(_evaluation(folded, batch), device),
    }
    seconds = interleaved(steps, rounds, description=f"{shape.name}, inference", clock=clock)
    return [_ratio(shape, "EPT folded", "backbone", seconds["EPT folded"], seconds["backbone"])]


def mixed(
    shape: Shape, device: str, rounds: int, clock: Clock = time.perf_counter, adapters: int = 8
) -> list[dict[str, Any]]:
    """A batch whose rows belong to several adapters in turn over the same batch of one adapter, both unfolded."""
    model = cast(EPTModel, build("EPT", shape, backbone(shape, device))[0])
    batch = batch_of(shape, model.base_model, device)
    names = [model.active_adapter, *(f"adapter {i}" for i in range(1, adapters))]
    for name in names[1:]:
        model.add_adapter(name, model.ept_config)
    model.eval()
    rows = [names[row % adapters] for row in range(shape.batch)]
    mixture, alone = f"mixed batch of {adapters} adapters", "batch of one adapter"
    steps = {
        alone: _settled(_evaluation(model, batch), device),
        mixture: _settled(_evaluation(model, batch | {"adapter_ids": rows}), device),
    }
    seconds = interleaved(steps, rounds, description=f"{shape.name}, mixed batch", clock=clock)
    return [_ratio(shape, mixture, alone, seconds[mixture], seconds[alone])]


def _evaluation(model: nn.Module, batch: dict[str, Any]) -> Callable[[], Any]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros_like(inputs["input_ids"][:, :1])

    def step() -> None:
        with torch.inference_mode():
            model(**inputs)

    return step
