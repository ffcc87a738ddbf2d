"""Inference: a folded EPT beside the bare backbone, and batches whose rows belong to several adapters."""

import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from ept import EPTModel

from .clock import interleaved, settled
from .methods import build
from .ratios import Clock, ratio_row
from .shapes import Shape, backbone, batch_of

__all__ = ["inference", "mixed"]


def inference(shape: Shape, device: str, rounds: int, clock: Clock = time.perf_counter) -> list[dict[str, Any]]:
    """A folded EPT over the bare backbone on as many columns of ordinary ids: one row of ratios.csv."""
    base = backbone(shape, device)
    batch = batch_of(shape, device)
    folded = cast(EPTModel, build("EPT", shape, base)[0]).fold().eval()
    s = folded.ept_config.prompt_length
    longer = {"input_ids": batch["input_ids"][:, :1].expand(-1, s), "attention_mask": batch["attention_mask"][:, :s]}
    bare = batch | {name: torch.cat([more, batch[name]], 1) for name, more in longer.items()}
    steps = {
        "backbone": settled(_evaluation(base.eval(), bare), device),
        "EPT folded": settled(_evaluation(folded, batch), device),
    }
    seconds = interleaved(steps, rounds, description=f"{shape.name}, inference", clock=clock)
    return [ratio_row(shape, "EPT folded", "backbone", seconds["EPT folded"], seconds["backbone"])]


def mixed(
    shape: Shape,
    device: str,
    rounds: int,
    clock: Clock = time.perf_counter,
    counts: tuple[int, ...] = (8,),
    preset: str = "EPT",
) -> list[dict[str, Any]]:
    """Batches whose rows belong to so many adapters in turn, over the same batch of one adapter; all unfolded."""
    model = cast(EPTModel, build(preset, shape, backbone(shape, device))[0])
    batch = batch_of(shape, device)
    names = [model.active_adapter, *(f"adapter {i}" for i in range(1, max(counts)))]
    for name in names[1:]:
        model.add_adapter(name, model.ept_config)
    model.eval()
    of_preset = "" if preset == "EPT" else f", {preset}"
    alone = f"batch of one adapter{of_preset}"
    steps = {alone: settled(_evaluation(model, batch), device)}
    for count in counts:
        rows = [names[row % count] for row in range(shape.batch)]
        evaluation = _evaluation(model, batch | {"adapter_ids": rows})
        steps[f"mixed batch of {count} adapters{of_preset}"] = settled(evaluation, device)
    seconds = interleaved(steps, rounds, description=f"{shape.name}, mixed batch", clock=clock)
    return [ratio_row(shape, name, alone, seconds[name], seconds[alone]) for name in steps if name != alone]


def _evaluation(model: nn.Module, batch: dict[str, Any]) -> Callable[[], Any]:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros_like(inputs["input_ids"][:, :1])

    def step() -> None:
        with torch.inference_mode():
            model(**inputs)

    return step
