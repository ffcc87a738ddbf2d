"""The parts of an adapter, a row each: their tensors, when they are on, and what they become when they are folded.

Counts (`EPTConfig`), start values (`EPTLayer`), constants (`FoldedLayer`), learning rates (`ept.training`) and words
(`ept inspect`) are read off this table; a new part is a new row. Symbols as in docs/method.md. `config` is an EPTConfig.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["PARTS", "Part", "PartTensor", "folded_tensors_of", "tensors_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PartTensor:
    """One tensor of a part.

    Attributes:
        name: of the tensor in the layer and in saved files.
        shape: from a config and the width that the tensor has, `width`.
        std: standard deviation of its start values, from a config and that width; None starts it at zero.
        rate: the learning rate that moves it: "prompt", "up" (what starts at zero), "down" (what feeds it) or "deep".
        in_layers: whether it acts in the layers, whose width may be another than the embeddings'.
    """

    name: str
    shape: Callable[[Any, int], Shape]
    std: Callable[[Any, int], float] | None = None
    rate: str = "up"
    in_layers: bool = False

    def width(self, embed_dim: int, layer_dim: int) -> int:
        """The width that it has where the embeddings have `embed_dim` and the layers `layer_dim`."""
        return layer_dim if self.in_layers else embed_dim


@dataclass(frozen=True)
class Part:
    """A part of the method.

    Attributes:
        name: as in counts of parameters.
        label: in words.
        is_on: whether a config has it.
        tensors: what is trained, in the order of files and of the optimiser.
        folded: what is left of it for inference: name and shape of each constant.
        folds: whether a config leaves these constants; None: where the part is on.
        sizes: its sizes in words, from a config.
    """

    name: str
    label: str
    is_on: Callable[[Any], bool]
    tensors: tuple[PartTensor, ...]
    folded: tuple[PartTensor, ...]
    sizes: Callable[[Any], list[str]]
    folds: Callable[[Any], bool] | None = None

    def count(self, config: Any, embed_dim: int, layer_dim: int) -> int:
        """Trained numbers of the part for embeddings of width `embed_dim` and layers of width `layer_dim`."""
        return sum(math.prod(tensor.shape(config, tensor.width(embed_dim, layer_dim))) for tensor in self.tensors)


def _one(config: Any, d: int) -> float:
    return 1.0


def _by_rank(config: Any, d: int) -> float:
    return 1 / math.sqrt(config.rank)


def _by_width(config: Any, d: int) -> float:
    return 1 / math.sqrt(d)


def _prompt(config: Any, d: int) -> Shape:
    return config.prompt_length, d


def _space(config: Any, d: int) -> Shape:
    return config.num_spaces, config.space_dim, d


def _token(config: Any, d: int) -> Shape:
    return config.token_rank, d


def _deep(config: Any, d: int) -> Shape:
    return config.known_deep_layers, config.token_rank, d


def _text(config: Any, d: int) -> Shape:
    return config.max_text_length, d


PARTS = (
    Part(
        "prompt",
        "short prompt",
        lambda config: True,
        (PartTensor("prompt", _prompt, _one, "prompt"),),
        (PartTensor("prompt", _prompt),),
        lambda config: [f"s = {config.prompt_length}"],
    ),
    Part(
        "lowrank",
        "low-rank pair",
        lambda config: config.has_lowrank,
        (
            PartTensor("lowrank_a", lambda config, d: (config.max_text_length, config.rank), _by_rank, "down"),
            PartTensor("lowrank_b", lambda config, d: (config.rank, d)),
        ),
        (PartTensor("text_update", _text),),
        lambda config: [f"N = {config.max_text_length}", f"r = {config.rank}", f"alpha = {config.alpha:g}"],
        lambda config: config.has_lowrank and config.lowrank_update,
    ),
    Part(
        "spaces",
        "spaces",
        lambda config: config.has_spaces,
        (
            PartTensor("space_down", _space, _by_width, "down"),
            PartTensor("space_up", _space),
            PartTensor("gate_weight", lambda config, d: (config.num_spaces, d), _by_width, "down"),
        ),
        (),
        lambda config: [f"K = {config.num_spaces}", f"h = {config.space_dim}"],
    ),
    Part(
        "token",
        "token-conditioned update",
        lambda config: config.has_token_update,
        (PartTensor("token_down", _token, _by_width, "down"), PartTensor("token_up", _token)),
        (PartTensor("token_down", _token), PartTensor("token_up", _token)),
        lambda config: [f"q = {config.token_rank}"],
    ),
    Part(
        "deep",
        "deep updates",
        lambda config: bool(config.known_deep_layers),
        (
            PartTensor("deep_down", _deep, _by_width, "deep", in_layers=True),
            PartTensor("deep_up", _deep, rate="deep", in_layers=True),
        ),
        (PartTensor("deep_down", _deep, in_layers=True), PartTensor("deep_up", _deep, in_layers=True)),
        lambda config: [f"deep layers = {config.known_deep_layers}"],
    ),
)


def tensors_of(config: Any) -> list[PartTensor]:
    """The trained tensors of the parts that a config has, in order."""
    return [tensor for part in PARTS if part.is_on(config) for tensor in part.tensors]


def folded_tensors_of(config: Any) -> list[PartTensor]:
    """The constants that the parts of a config leave for inference, in order."""
    return [tensor for part in PARTS if (part.folds or part.is_on)(config) for tensor in part.folded]
