"""EPTConfig: every setting of an EPT adapter, validated on creation; presets and the choice of sizes for a budget."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ept.parts import PARTS
from ept_kernels import ACTIVATIONS, IMPLEMENTATIONS

__all__ = ["PRESETS", "EPTConfig", "check_choice"]

INITS = ("vocab", "text", "normal", "decompose")  # of the prompt

# Sizes beyond these are typing errors, not models: no backbone has as many positions or columns.
LIMITS = {
    "prompt_length": 10_000,
    "max_text_length": 10_000_000,
    "rank": 100_000,
    "num_spaces": 10_000,
    "space_dim": 100_000,
    "token_rank": 100_000,
    "deep_layers": 10_000,
    "prompt_start": 10_000,
}


@dataclass
class EPTConfig:
    """Settings of an EPT adapter. Symbols as in docs/method.md.

    The default [ours] is the most accurate of the presets (bench/NOTES.md): a prompt of 2 rows and a narrow
    token-conditioned update in every layer. `EPTConfig.deep()` asks for the same, and refuses a backbone whose layers
    cannot be found. `EPTConfig.input_only()` changes the input alone, `EPTConfig.paper()` has the paper's parts.

    Args:
        prompt_length: s, rows of the short prompt.
        max_text_length: N, text positions that the low-rank update covers.
        rank: r of the low-rank pair; 0 turns update and fusion off.
        num_spaces, space_dim: K and h of the spaces; K = 0 turns them off.
        token_rank: q of the token-conditioned update; 0 turns it off.
        deep_layers: layers of the backbone after the first whose input gets a token-conditioned update of its own, of
            rank q too (deep updates [ours], after adapters); 0 turns them off, -1 takes all layers. None takes all
            layers where the backbone's can be found. Elsewhere, which a warning says, it means the input-only form:
            `input_only()`'s values for the settings that are as they were. Without a token-conditioned update it is 0.
        token_dropout: probability with which a hidden unit of a token-conditioned update is left out of a training
            step, for the whole batch alike; the others are scaled by 1 / (1 − probability).
        alpha: the low-rank pair is scaled by c = alpha / √rank.
        activation: σ of spaces and token-conditioned update.
        lowrank_update, fusion, spaces, token_update: switches of the parts, for ablations.
        prompt_start: text column at which the prompt stands; None means 1 for encoder classifiers whose head reads
            the first token, 0 for everything else.
        embed_scale: e, the RMS of the backbone's embeddings; None measures it, 1.0 turns the units off.
        init: start of P: "vocab" (rows of sampled frequent tokens), "text" (rows of `init_text`'s words), "normal",
            or "decompose" (from a trained soft prompt, given to `get_ept_model`). "adapters" starts all tensors from
            trained adapters, given to `get_ept_model` too.
        init_text: the words for init="text".
        backbone_dropout: True keeps the frozen backbone's dropout on in training; it is off by default.
        impl: implementation of `ept_kernels.prompt_embed`.

    Raises:
        ValueError, TypeError: a setting that cannot work, with the reason.
    """

    prompt_length: int = 2
    max_text_length: int = 256
    rank: int = 0
    num_spaces: int = 0
    space_dim: int = 2
    token_rank: int = 4
    token_dropout: float = 0.0
    deep_layers: int | None = None
    alpha: float = 8.0
    activation: str = "silu"
    lowrank_update: bool = True
    fusion: bool = True
    spaces: bool = True
    token_update: bool = True
    prompt_start: int | None = None
    embed_scale: float | None = None
    init: str = "vocab"
    init_text: str | None = None
    backbone_dropout: bool = False
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("prompt_length", "max_text_length", "space_dim"):
            self._check_size(name, minimum=1)
        for name in ("rank", "num_spaces", "token_rank"):
            self._check_size(name, minimum=0)
        if self.deep_layers is not None:
            self._check_size("deep_layers", minimum=-1)
        if self.prompt_start is not None:
            self._check_size("prompt_start", minimum=0)
        for name in ("lowrank_update", "fusion", "spaces", "token_update", "backbone_dropout"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        self._check_number("alpha", _is_positive, "positive and finite")
        if self.embed_scale is not None:
            self._check_number("embed_scale", _is_positive, "positive and finite")
        self._check_number("token_dropout", lambda value: 0 <= value < 1, "at least 0 and below 1")
        if self.rank > self.max_text_length:
            raise ValueError(
                f"rank={self.rank} is larger than max_text_length={self.max_text_length}: the low-rank pair cannot "
                "have a higher rank than it has rows; lower rank"
            )
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("init", self.init, (*INITS, "adapters"))
        check_choice("impl", self.impl, IMPLEMENTATIONS)
        if self.init_text is not None and not isinstance(self.init_text, str):
            raise TypeError(f"init_text={self.init_text!r} must be a string")
        if self.deep_layers and not self.has_token_update:
            raise ValueError(
                f"deep_layers={self.deep_layers}: deep updates are the token-conditioned update in more layers: give "
                "token_rank >= 1 and leave token_update on, or set deep_layers=0"
            )
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError('init="text" and init_text="some words" go together: give both or neither')

    def _check_size(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be a whole number")
        if not minimum <= value <= LIMITS[name]:
            raise ValueError(f"{name}={value} must be in {minimum} … {LIMITS[name]}")

    def _check_number(self, name: str, is_valid: Callable[[float], bool], must_be: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} must be a number")
        if not is_valid(value):
            raise ValueError(f"{name}={value} must be {must_be}")
        setattr(self, name, float(value))

    @property
    def scale(self) -> float:
        """c = alpha / √rank."""
        return self.alpha / math.sqrt(self.rank) if self.rank else 0.0

    @property
    def known_embed_scale(self) -> float:
        """e = `embed_scale`; ValueError while that is None."""
        if self.embed_scale is None:
            raise ValueError("config.embed_scale is not set: give the embeddings' RMS, or 1.0 for plain units")
        return self.embed_scale

    @property
    def known_deep_layers(self) -> int:
        """`deep_layers` as a number; ValueError while that is -1 or None, where only a backbone can say it."""
        layers = self.deep_layers
        if layers is None and not self.has_token_update:
            layers = 0
        if layers is None or layers < 0:
            raise ValueError(
                f"deep_layers={self.deep_layers} is known once a model is wrapped: give the number of layers after the "
                "first, or 0 (EPTConfig.input_only())"
            )
        return layers

    @property
    def has_deep_updates(self) -> bool:
        """Whether layers after the first have updates; ValueError while only a backbone can say."""
        return self.deep_layers == -1 or self.known_deep_layers > 0

    def as_input_only(self) -> "EPTConfig":
        """These settings in the input-only form: those that are the default's become `input_only()`'s."""
        default, input_only = EPTConfig(), EPTConfig.input_only()
        names = [field.name for field in dataclasses.fields(self)]
        moved = {name: getattr(input_only, name) for name in names if getattr(self, name) == getattr(default, name)}
        return dataclasses.replace(self, **moved)

    @property
    def has_lowrank(self) -> bool:
        """Whether A and B exist: one of the parts that read them is on."""
        return self.rank > 0 and (self.lowrank_update or self.fusion)

    @property
    def has_spaces(self) -> bool:
        return self.num_spaces > 0 and self.spaces

    @property
    def has_token_update(self) -> bool:
        return self.token_rank > 0 and self.token_update

    def parameters_by_part(self, embed_dim: int, layer_dim: int | None = None) -> dict[str, int]:
        """Trained parameters of each part that is on.

        Args:
            embed_dim: d, width of the embeddings.
            layer_dim: width of the layers; None: as wide as the embeddings.
        """
        layer_dim = embed_dim if layer_dim is None else layer_dim
        return {part.name: part.count(self, embed_dim, layer_dim) for part in PARTS if part.is_on(self)}

    def num_parameters(self, embed_dim: int, layer_dim: int | None = None) -> int:
        """Trained parameters without a task head: s·d + N·r + r·d + 2·K·d·h + d·K + 2·q·(d + deep layers · layer_dim), of
        what is on; arguments as in `parameters_by_part`."""
        return sum(self.parameters_by_part(embed_dim, layer_dim).values())

    @classmethod
    def paper(cls, **settings: Any) -> "EPTConfig":
        """The paper's form: all parts but the token-conditioned update. T5-base's 76,800 parameters by default."""
        preset = dict(
            prompt_length=40, rank=30, num_spaces=4, space_dim=2, token_rank=0, token_update=False, deep_layers=0
        )
        return cls(**preset | settings)

    @classmethod
    def deep(cls, **settings: Any) -> "EPTConfig":
        """The default with its updates in the layers asked for: a backbone that cannot have them is refused."""
        return cls(**dict(deep_layers=-1) | settings)

    @classmethod
    def input_only(cls, **settings: Any) -> "EPTConfig":
        """What acts on the input alone [ours], for programs that take embeddings and for PEFT's format.

        A prompt of 4 rows, 4 spaces and a token-conditioned update with dropout: 100·d trained parameters, as many as a
        soft prompt of 100 tokens.
        """
        preset = dict(prompt_length=4, num_spaces=4, space_dim=2, token_rank=38, token_dropout=0.25, deep_layers=0)
        return cls(**preset | settings)

    @classmethod
    def for_budget(
        cls, parameters: int, embed_dim: int, *, layer_dim: int | None = None, preset: str = "paper", **settings: Any
    ) -> "EPTConfig":
        """The sizes that fill a budget of trained parameters exactly or just below, from widths alone.

        `ept.config_for_budget` asks a model for them and fills the default preset. Here the paper's is taken where none
        is named, since it needs no number of layers.

        Args:
            parameters: the budget, without a task head.
            embed_dim: d, width of the backbone's word embeddings.
            layer_dim: width of its layers; None: as wide as the embeddings.
            preset: "paper" divides the budget as the paper's T5-base setting does (40 % prompt, 40 % low-rank pair,
                20 % spaces: [reading]); "default" and "deep" keep the prompt at 2 rows and give the token-conditioned
                updates the rest [ours]; they need `deep_layers`, a number; "input" keeps it at 4 rows, gives the spaces
                up to 20 % and the token-conditioned update the rest [ours]. What is left over, less than a rank of what
                fills the rest, goes into more prompt rows, but not beside deep updates: rows cost time. There is always
                one row.
            settings: any field of EPTConfig; a size given here is kept and the others fill the rest.

        Raises:
            ValueError: the budget is too small, or the given sizes already exceed it; or how many layers have updates
                is left to a backbone.
        """
        check_choice("preset", preset, PRESETS)
        widths = embed_dim, embed_dim if layer_dim is None else layer_dim
        for name, value in (("parameters", parameters), ("embed_dim", embed_dim), ("layer_dim", widths[1])):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if parameters < embed_dim:
            raise ValueError(
                f"a budget of {parameters} parameters does not hold one prompt row of width {embed_dim}: "
                f"give at least {embed_dim}"
            )
        if preset == "paper":
            # The rank is chosen below; the preset's own may not fit a short max_text_length.
            config = _fill_paper(cls.paper(**{"rank": 0} | settings), parameters, widths, settings)
        else:
            config = _fill_updates(PRESETS[preset](**settings), parameters, widths, settings)
        if config.num_parameters(*widths) > parameters:
            raise ValueError(
                f"the given sizes take {config.num_parameters(*widths)} parameters, more than the budget of "
                f"{parameters}: raise the budget or lower one of {', '.join(settings)}"
            )
        return config

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "EPTConfig":
        """The config of a plain dictionary. Raises ValueError on an unknown key."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - names)
        if unknown:
            raise ValueError(f"unknown setting(s) {', '.join(unknown)}: EPTConfig has {', '.join(sorted(names))}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Name of a preset -> what makes its config, with any settings over the preset's.
PRESETS: dict[str, Callable[..., EPTConfig]] = {
    "default": EPTConfig,
    "deep": EPTConfig.deep,
    "paper": EPTConfig.paper,
    "input": EPTConfig.input_only,
}


def _is_positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}")


def _fill_paper(base: EPTConfig, parameters: int, widths: tuple[int, int], fixed: dict[str, Any]) -> EPTConfig:
    """Prompt 40 %, spaces up to 20 %, low-rank pair the rest; then the prompt moves a little to close the gap.

    `widths`: of the embeddings and of the layers, as in `_fill_updates`.
    """
    d = widths[0]
    base = _fit_spaces(base, parameters, d, fixed)
    by_part = base.parameters_by_part(*widths)
    room = parameters - sum(by_part.get(part, 0) for part in ("spaces", "token", "deep"))
    per_row, per_rank = d, base.max_text_length + d
    wants_lowrank = base.lowrank_update or base.fusion

    if "prompt_length" in fixed:
        lengths = [base.prompt_length]
    elif "rank" in fixed or not wants_lowrank:
        rest = room - (base.rank * per_rank if wants_lowrank else 0)
        lengths = [max(1, rest // per_row)]
    else:
        target = 0.4 * parameters / per_row
        low, high = max(1, math.floor(0.75 * target)), max(1, math.ceil(1.25 * target))
        lengths = [s for s in range(low, high + 1) if s * per_row <= room] or [max(1, room // per_row)]

    def candidate(length: int) -> tuple[int, float, int, int]:
        rank = 0
        if wants_lowrank:
            rest = (room - length * per_row) // per_rank
            rank = base.rank if "rank" in fixed else max(0, min(rest, base.max_text_length, d))
        left = room - length * per_row - rank * per_rank
        if "prompt_length" not in fixed and left >= per_row:  # the rank is at its limit
            length, left = length + left // per_row, left % per_row
        return left, abs(length - 0.4 * parameters / per_row), length, rank

    _, _, length, rank = min(candidate(s) for s in lengths)
    return dataclasses.replace(base, prompt_length=length, rank=rank)


def _fit_spaces(base: EPTConfig, parameters: int, d: int, fixed: dict[str, Any]) -> EPTConfig:
    """The most spaces (at most 4), then the widest, that a fifth of the budget holds."""
    if not base.spaces or ("num_spaces" in fixed and "space_dim" in fixed) or base.num_spaces == 0:
        return base
    share = parameters // (5 * d)
    numbers = [base.num_spaces] if "num_spaces" in fixed else [4, 3, 2]
    for number in numbers:
        width = base.space_dim if "space_dim" in fixed else (share // number - 1) // 2
        if width >= 1 and number * (2 * width + 1) <= share:
            return dataclasses.replace(base, num_spaces=number, space_dim=width)
    if "num_spaces" in fixed:
        return dataclasses.replace(base, space_dim=1)
    return dataclasses.replace(base, num_spaces=0)


def _fill_updates(base: EPTConfig, parameters: int, widths: tuple[int, int], fixed: dict[str, Any]) -> EPTConfig:
    """Few prompt rows and up to a fifth for the spaces; the token-conditioned updates take the rest."""
    d = widths[0]
    base = _fit_spaces(base, parameters, d, fixed)
    layers = base.known_deep_layers
    per_rank = 2 * d + layers * 2 * widths[1]  # D and W, of the input and of each layer
    if "prompt_length" not in fixed:
        # Deep updates take at least a rank each; what they leave is the prompt's.
        most = (parameters - per_rank) // d if layers else parameters // (5 * d)
        base = dataclasses.replace(base, prompt_length=max(1, min(base.prompt_length, most)))
    if "token_rank" not in fixed and base.token_update:
        rest = parameters - (base.num_parameters(*widths) - per_rank * base.token_rank)
        base = dataclasses.replace(base, token_rank=max(1 if layers else 0, rest // per_rank))
    left = parameters - base.num_parameters(*widths)
    if "prompt_length" not in fixed and not layers and left >= d:
        base = dataclasses.replace(base, prompt_length=base.prompt_length + left // d)
    return base
