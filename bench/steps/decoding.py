"""Decoding: tokens per second of EPT, live and folded, beside the bare backbone."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ept import EPTModel

from .clock import interleaved, settled
from .methods import build
from .ratios import Clock, ratio_row
from .shapes import Shape, backbone, batch_of

__all__ = ["NEW_TOKENS", "decoding"]

Rows = list[dict[str, Any]]

ROWS = (1, 32)
PRESETS = ("EPT", "EPT deep")
NEW_TOKENS = 17  # the first comes out of the text's pass


def decoding(
    shape: Shape, device: str, rounds: int, clock: Clock = time.perf_counter, new_tokens: int = NEW_TOKENS
) -> Iterator[tuple[Rows, Rows]]:
    """Tokens per second beyond the first, greedily with a dynamic cache: rows of decoding.csv and of ratios.csv.

    Yields those of one text, then those of many. The shape has a text for each of the most rows. A method's time is that of
    `new_tokens` less that of one token, in the same round.
    """
    base = backbone(shape, device)
    models: dict[str, Any] = {"backbone": base}
    for preset in PRESETS:
        models[preset] = cast(EPTModel, build(preset, shape, base)[0]).eval()
        models[f"{preset} folded"] = cast(EPTModel, build(preset, shape, base)[0]).fold().eval()
    for count in ROWS:
        rows: Rows = []
        ratios: Rows = []
        ids = batch_of(shape, device)["input_ids"][:count]
        seconds = _seconds(models, ids, new_tokens, device, rounds, clock)
        identity = {"batch": count}
        for name, each in seconds.items():
            low, median, high = statistics.quantiles([count * (new_tokens - 1) / s for s in each], n=4)
            speed = {"unit": "tokens/s", "median": median, "low": low, "high": high, "rounds": rounds}
            rows.append(shape.identity | {"method": name} | speed | identity)
            if name != "backbone":
                row = ratio_row(shape, f"{name}, decoding", "backbone, decoding", each, seconds["backbone"])
                ratios.append(row | identity)
        yield rows, ratios


def _seconds(
    models: dict[str, Any], ids: Tensor, new_tokens: int, device: str, rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of each model for the tokens after the first, by round."""
    steps = {
        f"{name}, {tokens}": settled(_generation(model, ids, tokens), device)
        for name, model in models.items()
        for tokens in (1, new_tokens)
    }
    times = interleaved(steps, rounds, warmup=1, description=f"decoding, {len(ids)} rows", clock=clock)
    return {
        name: [more - one for one, more in zip(times[f"{name}, 1"], times[f"{name}, {new_tokens}"], strict=True)]
        for name in models
    }


def _generation(model: Any, ids: Tensor, tokens: int) -> Callable[[], Any]:
    mask = torch.ones_like(ids)

    def step() -> None:
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)

    return step
