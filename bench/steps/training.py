"""Whole training steps: EPT beside the bare backbone and its peers at equal trained parameters.

Each method of a shape is built on the same frozen weights; they take turns on the same batch. The floor of a preset is
the backbone alone on as many columns, with tensors of the preset's sizes to train: see `step.py`.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

from torch import Tensor, nn

from ept import EPTModel
from ept.backbone.embeddings import weight_of

from .captured import captured
from .clock import interleaved, settled
from .memory import own_bytes, peak_bytes, predicted_own_bytes
from .methods import PROMPT_TUNING, bare, batch_for, build, is_here
from .ratios import Clock, floor_name, ratio_row
from .shapes import Shape, backbone, batch_of
from .step import floor_of_shape, training_step

__all__ = ["PRESETS", "captured_training", "training"]

PRESETS = ("EPT", "EPT deep")
OVERS = ((PROMPT_TUNING, (*PRESETS, "EPT paper", "DePT", "LoRA")), ("LoRA", PRESETS))
CAPTURED = (*PRESETS, PROMPT_TUNING, "LoRA")
FIRST_ROUNDS = 3

Rows = list[dict[str, Any]]
Steps = dict[str, Callable[[], Any]]


def training(
    shape: Shape, device: str, rounds: int, clock: Clock = time.perf_counter, methods: tuple[str, ...] | None = None
) -> Iterator[tuple[Rows, Rows]]:
    """Step times and peak memory of every method of a shape, and their ratios: rows of end_to_end.csv and ratios.csv.

    Yields the times and ratios of the first rounds, so that something stands in the tables when the run is cut off, and
    then everything.
    Without `methods`: both presets and the peers, the paper's preset where the shape asks for it. A method of PEFT's is
    left out where that is not installed.
    """
    if methods is None:
        methods = (*PRESETS, *(["EPT paper"] if shape.paper else []), PROMPT_TUNING, "DePT", "LoRA")
    batch = batch_of(shape, device)
    steps, models = _steps(shape, device, batch, methods)
    steps = {name: settled(step, device) for name, step in steps.items()}
    first = min(FIRST_ROUNDS, rounds)
    seconds = interleaved(steps, first, warmup=1, description=f"{shape.name}, training", clock=clock)
    if rounds > first:
        yield [_time_row(shape, name, seconds[name]) for name in steps], _ratios(shape, seconds)
        more = interleaved(steps, rounds - first, warmup=1, description=f"{shape.name}, training", clock=clock)
        seconds = {name: [*seconds[name], *more[name]] for name in steps}
    rows = []
    for name, step in steps.items():
        row = _time_row(shape, name, seconds[name]) | {"peak_bytes": peak_bytes(step, device)}
        if name in models:
            row["trained_parameters"] = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        model = models.get(name)
        if isinstance(model, EPTModel) and not model.ept_config.deep_layers:
            row |= _own_part(model, batch)
        rows.append(row)
    yield rows, _ratios(shape, seconds)


def captured_training(
    shape: Shape, device: str, rounds: int, clock: Clock = time.perf_counter
) -> Iterator[tuple[Rows, Rows, str | None]]:
    """The same of steps that are replayed as CUDA graphs, one method after another: each graph keeps its activations.

    Yields after each method its row, the ratios that it completes, and what kept it from being captured, or None. On a
    CPU there is nothing to capture, and the steps run as they are.
    """
    steps, _ = _steps(shape, device, batch_of(shape, device), CAPTURED)
    seconds: dict[str, list[float]] = {}
    how = {"way": "captured"}
    for name, step in steps.items():
        try:
            replay = captured(step) if device == "cuda" else step
        except RuntimeError as error:  # what cannot be captured says so as one
            yield [], [], f"{name} cannot be captured: {str(error).splitlines()[0]}"
            continue
        seconds |= interleaved({name: settled(replay, device)}, rounds, warmup=1, clock=clock)
        del replay
        complete = [(a, b) for a, b in _pairs(steps) if name in (a, b) and {a, b} <= seconds.keys()]
        ratios = [ratio_row(shape, a, b, seconds[a], seconds[b]) | how for a, b in complete]
        yield [_time_row(shape, name, seconds[name]) | how], ratios, None


def _steps(
    shape: Shape, device: str, batch: dict[str, Tensor], methods: tuple[str, ...]
) -> tuple[Steps, dict[str, nn.Module]]:
    """The step of each method that is here, a preset's behind its floor so that the two see the same moments; and the
    methods' models."""
    base = backbone(shape, device)
    floor = bare(base)
    steps: Steps = {}
    models = {}
    for name in filter(is_here, methods):
        model, groups = build(name, shape, base)
        if name.startswith("EPT"):
            steps[floor_name(name)] = floor_of_shape(shape, floor, cast(EPTModel, model), groups, batch)
        steps[name] = training_step(model, groups, [batch_for(name, shape, batch)])
        models[name] = model
    return steps, models


def _pairs(steps: Collection[str]) -> list[tuple[str, str]]:
    """The method and what it is compared with, of those that are there."""
    pairs = [(name, floor_name(name)) for name in steps if name.startswith("EPT")]
    pairs += [(name, over) for over, names in OVERS for name in names]
    return [(name, over) for name, over in pairs if name in steps and over in steps]


def _ratios(shape: Shape, seconds: dict[str, list[float]]) -> Rows:
    return [ratio_row(shape, name, over, seconds[name], seconds[over]) for name, over in _pairs(seconds)]


def _time_row(shape: Shape, name: str, seconds: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(seconds, n=4)
    times = {"unit": "ms", "median": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high, "rounds": len(seconds)}
    return shape.identity | {"method": name} | times


def _own_part(model: EPTModel, batch: dict[str, Tensor]) -> dict[str, int]:
    weight, layer = weight_of(model.base_model.get_input_embeddings()), model.ept
    impl = "torch" if weight.device.type == "cpu" else "triton"
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "own_bytes_predicted": predicted_own_bytes(layer.config, layer.embed_dim, len(ids), ids.shape[1], True, impl),
        "own_bytes_measured": own_bytes(layer, lambda: layer(ids, mask, embedding_weight=weight), [weight, ids, mask]),
    }
