"""One training step: a method's, and the floor's, which differs from EPT's by EPT alone.

Both call `train()`, go forward and backward, clip the gradients' norm at 1 and step AdamW over the same groups of as
many tensors of the same sizes, at a learning rate of zero: the model stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ept import EPTModel
from ept.backbone.embeddings import weight_of

from .methods import Groups
from .shapes import Shape

__all__ = ["floor_of_shape", "floor_step", "training_step"]

CLIPPED_AT = 1.0  # the Trainer's default


def training_step(model: nn.Module, groups: Groups, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """A method's step, on the batches in turn with each call."""
    update = _update(groups)
    turn = 0

    def step() -> None:
        nonlocal turn
        model.train()
        model(**batches[turn % len(batches)]).loss.backward()
        update()
        turn += 1

    return step


def floor_step(model: PreTrainedModel, groups: Groups, embeds: Tensor, labels: Tensor) -> Callable[[], None]:
    """A step of the backbone alone on ready-made embeddings [batch, columns, d], which ask for their gradient.

    Tensors in the groups that are not the model's own stand for the adapter's: their gradients are there already.
    """
    embeds = embeds.detach().requires_grad_()
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    of_model = {id(p) for p in model.parameters()}
    stand_ins = [(p, torch.zeros_like(p)) for group in groups for p in group["params"] if id(p) not in of_model]
    update = _update(groups)

    def step() -> None:
        model.train()
        model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.backward()
        embeds.grad = None
        for parameter, gradient in stand_ins:
            parameter.grad = gradient
        update()

    return step


def floor_of_shape(
    shape: Shape, bare: PreTrainedModel, model: EPTModel, groups: Groups, batch: dict[str, Tensor]
) -> Callable[[], None]:
    """The floor of an EPT model: `bare` on as many columns as EPT's backbone gets, with tensors of EPT's sizes to train."""
    s, weight = model.ept_config.prompt_length, weight_of(bare.get_input_embeddings())
    embeds = torch.randn(shape.batch, s + shape.length, weight.shape[1], generator=torch.Generator().manual_seed(0))
    labels = F.pad(batch["labels"], (s, 0), value=-100) if shape.task == "CAUSAL_LM" else batch["labels"]
    in_head = {id(p): name for name, p in model.base_model.named_parameters()}
    of_floor = [
        group
        | {
            "params": [
                bare.get_parameter(in_head[id(p)]) if id(p) in in_head else nn.Parameter(torch.zeros_like(p))
                for p in group["params"]
            ]
        }
        for group in groups
    ]
    return floor_step(bare, of_floor, embeds.to(weight), labels)


def _update(groups: Groups) -> Callable[[], None]:
    """Clips, steps and clears the gradients."""
    trained = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(
        [group | {"lr": 0.0} for group in groups], weight_decay=0.0, fused=True, capturable=trained[0].is_cuda
    )

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, CLIPPED_AT)
        optimizer.step()
        optimizer.zero_grad()

    return update
