"""Starting an adapter from trained ones of the same backbone.

The functions here are pure: conversion to another adapter's units, the weighted sum of several, whether their units line
up, and how well each suits new rows. `start_from` puts them together for a wrapped model.

D and W enter a product through σ, so their sum means something only where unit j of one adapter does what unit j of the
other does: where both were trained from one start. `lined_up` sees that in D, which moves little in training.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ept.backbone.probes import evaluating
from ept.config import EPTConfig
from ept.layer.layer import EPTLayer
from ept.parts import tensors_of

__all__ = [
    "ERROR_SCALE",
    "FIRST_ROWS",
    "Source",
    "Start",
    "Suitability",
    "converted",
    "leave_one_out_error",
    "lined_up",
    "start_from",
    "targets_of",
    "weighted_sum",
    "weights_by_error",
]

RIDGES = (0.01, 0.1, 1.0)  # of the features' mean squared size
# A difference of so much in error is a factor of e in weight; 0.02 to 0.1 are level (bench/NOTES.md).
ERROR_SCALE = 0.05
FIRST_ROWS = 200  # of `init_rows` that are read: the time of a leave-one-out error grows with their cube
BATCH = 32
# D of two adapters from one start keeps a cosine of 0.7, of two starts one of 0.00 ± 0.02 (MiniLM, bench/NOTES.md).
LINED_UP = 0.3
MEANINGS, MEANINGS_OF_LOWRANK = ("activation", "prompt_start"), ("alpha", "lowrank_update", "fusion")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A trained adapter to start from.

    Attributes: `name` (for errors), `config`, `tensors` by name (a head's do no harm).
    """

    name: str
    config: EPTConfig
    tensors: Tensors


@dataclass(frozen=True)
class Start:
    """What an adapter started from.

    Attributes:
        weights: of each source, by name; "fresh" where none of them was better than an untrained adapter.
        errors: `leave_one_out_error` of each and of "fresh"; None where the weights were given.
    """

    weights: dict[str, float]
    errors: dict[str, float] | None = None


def converted(source: Source, layer: EPTLayer) -> Tensors:
    """The source's tensors in the units of another adapter's `embed_scale` and `deep_scale`.

    The adapter does with them what the source does, to rounding.

    Raises:
        ValueError: sizes or settings differ, or the units do where the fusion is on, whose softmax has a unit of its own.
    """
    config = layer.config
    for name in MEANINGS + (MEANINGS_OF_LOWRANK if config.has_lowrank else ()):
        theirs, own = getattr(source.config, name), getattr(config, name)
        if theirs != own:
            raise ValueError(f"{source.name} has {name}={theirs!r}, this config {name}={own!r}: give both the same")
    tensors = {}
    ratio = source.config.known_embed_scale / layer.embed_scale
    changed = not math.isclose(ratio, 1, rel_tol=1e-6)
    if changed and config.has_lowrank and config.fusion:
        raise ValueError(
            f"{source.name} has embed_scale={source.config.embed_scale}, this adapter {layer.embed_scale}, and the fusion "
            "cannot be converted: give both the same"
        )
    for tensor in tensors_of(config):
        value, shape = source.tensors.get(tensor.name), tensor.shape(config, layer.embed_dim)
        if value is None or tuple(value.shape) != shape:
            found = "no such tensor" if value is None else f"{tuple(value.shape)}"
            raise ValueError(
                f"{source.name}: {tensor.name} must be {shape} for this config, but it has {found}: give the source's sizes"
            )
        tensors[tensor.name] = value.detach().cpu().float()
    extra = sorted(
        name for name in source.tensors if name not in tensors and not name.startswith(("head.", "deep_scale"))
    )
    if extra:
        raise ValueError(f"{source.name} has {', '.join(extra)}, which this config has not: give the source's sizes")
    factors = {"prompt": ratio, "lowrank_b": ratio, "space_up": ratio, "token_up": ratio}
    factors |= {"space_down": 1 / ratio, "gate_weight": 1 / ratio, "token_down": 1 / ratio}
    tensors = {name: value * factors.get(name, 1.0) if changed else value for name, value in tensors.items()}
    if layer.deep_scale is not None:
        if "deep_scale" not in source.tensors:
            raise ValueError(f"{source.name} lacks deep_scale, the unit of its deep updates: give all that was saved")
        sizes = (source.tensors["deep_scale"].cpu().float() / layer.deep_scale.cpu().float())[:, None, None]
        tensors["deep_down"], tensors["deep_up"] = tensors["deep_down"] / sizes, tensors["deep_up"] * sizes
    return tensors


def weighted_sum(sources: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """The sum of tensors of the same names and shapes, each source's times its weight."""
    first, *others = sources
    total = {name: weights[0] * tensor for name, tensor in first.items()}
    for source, weight in zip(others, weights[1:], strict=True):
        total = {name: tensor + weight * source[name] for name, tensor in total.items()}
    return total


def lined_up(sources: Sequence[Tensors]) -> bool:
    """Whether all were trained from one start: the mean cosine between the D of any two, unit by unit, is above 0.3.

    True where they have no D: then every tensor has a meaning of its own.
    """
    first, *others = [_units(source) for source in sources]
    if first is None:
        return True
    return all(other is not None and (first * other).sum(1).mean().item() > LINED_UP for other in others)


def _units(tensors: Tensors) -> Tensor | None:
    """[units, d] the directions that D of all layers reads, of length 1."""
    found = [tensors[name].flatten(0, -2) for name in ("token_down", "deep_down") if name in tensors]
    return nn.functional.normalize(torch.cat(found).float(), dim=1) if found else None


def weights_by_error(errors: Sequence[float]) -> list[float]:
    """Weights that sum to 1: the softmax of −error / 0.05."""
    return torch.softmax(-torch.tensor(errors, dtype=torch.float64) / ERROR_SCALE, 0).tolist()


def targets_of(labels: Tensor, num_labels: int) -> Tensor:
    """[n, c] fp32: labels that are numbers as they are, classes [n] as columns of zeros and ones."""
    if labels.is_floating_point():
        return labels.float().reshape(len(labels), -1)
    if num_labels == 1:
        return labels.float().unsqueeze(1)
    return nn.functional.one_hot(labels, num_labels).float()


def leave_one_out_error(features: Tensor, targets: Tensor) -> Tensor:
    """[…] the share of the targets' variance that a ridge regression misses on rows that it has not seen.

    Every row is predicted from all the others, in closed form; the best of three ridges counts. 0 is a perfect
    prediction, about 1 that of the targets' mean.

    Args:
        features: [… , n, d] what a head reads of n rows.
        targets: [… , n, c] values, or a column of zeros and ones for each class.

    Raises:
        ValueError: fewer than 2 rows, or targets that are all equal.
    """
    x, y = features.double(), targets.double()
    rows = x.shape[-2]
    if rows < 2:
        raise ValueError(f"{rows} row: leaving one out needs at least 2")
    y = y - y.mean(-2, keepdim=True)
    spread = y.square().sum((-2, -1))
    if not (spread > 0).all():
        raise ValueError("all labels are equal, which tells nothing of any adapter: give rows of several labels")
    x = x - x.mean(-2, keepdim=True)
    products = x @ x.mT
    size = products.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(rows, dtype=x.dtype, device=x.device)
    errors = []
    for ridge in RIDGES:
        # The large constant stands for an intercept without a penalty.
        inverse = torch.linalg.inv(products + ridge * size * eye + 1e3 * size)
        missed = inverse @ y / inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        errors.append(missed.square().sum((-2, -1)) / spread)
    return torch.stack(errors).amin(0)


def start_from(
    layer: EPTLayer,
    sources: Sequence[Source],
    weights: Sequence[float] | None,
    error: Callable[[], float] | None,
) -> Start:
    """Copies into a fresh layer the weighted sum of sources.

    Args:
        layer: as it starts without sources.
        sources: each is `converted` first.
        weights: of each source; None: by `error`, or the only source as it is.
        error: how badly the layer, as it is at the call, suits new rows.

    Returns:
        The weights, and the errors where they were asked for. Where several sources line up, the weights are
        `weights_by_error`; elsewhere whichever of them and the fresh start has the lowest error is taken alone.

    Raises:
        ValueError: a source does not fit, or it is not said how several go together, or they cannot be summed.
    """
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"an adapter is given twice among {', '.join(names)}: name each one once")
    tensors = [converted(source, layer) for source in sources]
    same_start = lined_up(tensors)
    errors = None
    if weights is not None:
        if len(weights) != len(sources) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"init_weights={list(weights)} must be {len(sources)} finite numbers, one for each adapter"
            )
        if sum(weight != 0 for weight in weights) > 1 and not same_start:
            raise ValueError(
                "the adapters were not trained from one start, so a sum of them means nothing: give one of them the weight 1 "
                "and the others 0, or give init_rows in place of init_weights"
            )
    elif error is None:
        if len(sources) > 1:
            raise ValueError("several adapters need init_rows, which choose among them, or init_weights")
        weights = [1.0]
    else:
        fresh = {tensor.name: layer.get_parameter(tensor.name).detach().clone() for tensor in tensors_of(layer.config)}
        errors = {"fresh": error()}
        for name, source in zip(names, tensors, strict=True):
            _copy(source, layer)
            errors[name] = error()
        _copy(fresh, layer)
        best = min(errors, key=errors.__getitem__)
        if same_start and len(sources) > 1:
            weights = weights_by_error([errors[name] for name in names])
        elif best == "fresh":
            return Start({"fresh": 1.0}, errors)
        else:
            weights = [float(name == best) for name in names]
    _copy(weighted_sum(tensors, weights), layer)
    return Start(dict(zip(names, weights, strict=True)), errors)


@torch.no_grad()
def _copy(tensors: Tensors, layer: EPTLayer) -> None:
    for name, tensor in tensors.items():
        layer.get_parameter(name).copy_(tensor)


class Suitability:
    """How badly a wrapped model's adapter, as it is at a call, suits labelled rows: `leave_one_out_error` of what its head
    reads of the first `FIRST_ROWS` of them.

    Args:
        model: an EPTModel with a head.
        rows: what its forward takes, `labels` [n] or [n, c] among it.

    Raises:
        ValueError: the model has no head, or its rows have no labels or one label for every token.
    """

    def __init__(self, model: Any, rows: dict[str, Tensor]):
        num_labels = getattr(model.config, "num_labels", 0)
        ends = [
            module
            for name in model.head_names
            for module in model.base_model.get_submodule(name).modules()
            if isinstance(module, nn.Linear) and module.out_features == num_labels
        ]
        if not ends:
            raise ValueError(
                f"init_rows are judged by what a head reads, and {model.traits.name} has none: give init_weights"
            )
        if "labels" not in rows:
            raise ValueError("init_rows need their labels, by which the adapters are judged")
        device = ends[-1].weight.device
        first = {name: tensor[:FIRST_ROWS].to(device) for name, tensor in rows.items()}
        self._model, self._end, self._targets = model, ends[-1], targets_of(first.pop("labels"), num_labels)
        self._rows = [
            dict(zip(first, part, strict=True)) for part in zip(*(t.split(BATCH) for t in first.values()), strict=True)
        ]

    @torch.no_grad()
    def error(self) -> float:
        """The error; in between, the end of the head hands on what it reads."""
        handle = self._end.register_forward_hook(lambda module, arguments, output: arguments[0])
        try:
            with evaluating(self._model):
                features = torch.cat([self._model(**rows).logits for rows in self._rows])
        finally:
            handle.remove()
        if features.dim() != 2:
            raise ValueError("init_rows have one label a row; this model labels every token: give init_weights")
        return leave_one_out_error(features, self._targets).item()
