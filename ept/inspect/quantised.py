"""Stand-ins for bitsandbytes' layers in 8 and 4 bits, which take the same memory and compute nothing."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["quantise"]

BLOCK = 64  # weights that share one fp32 scale in 4 bits; in 8 bits a row shares one


class _Dequantised(torch.autograd.Function):
    """x·Wᵀ with W made from its quantised form for the time of the product, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "_QuantisedLinear") -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return x @ x.new_empty(layer.out_features, layer.in_features).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(ctx.layer.out_features, ctx.layer.in_features), None


class _QuantisedLinear(nn.Module):
    """Stands for bitsandbytes' layer: as many bytes, the same memory while it runs; its values mean nothing."""

    def __init__(self, linear: nn.Linear | Conv1D, bits: int):
        super().__init__()
        shape = linear.weight.t().shape if isinstance(linear, Conv1D) else linear.weight.shape
        self.out_features, self.in_features = shape
        numel = linear.weight.numel()
        scales = -(-numel // BLOCK) if bits == 4 else self.out_features
        self.register_buffer("weight", torch.empty(-(-numel * bits // 8), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = _Dequantised.apply(x, self)
        return out if self.bias is None else out + self.bias


def quantise(model: PreTrainedModel, bits: int) -> None:
    """Replaces the linear layers that transformers would: not the output embeddings, not a head, none kept in fp32."""
    kept = set(model._keep_in_fp32_modules or ())
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if (
                (type(child) is nn.Linear or type(child) is Conv1D)
                and child is not model.get_output_embeddings()
                and name not in kept
            ):
                setattr(parent, name, _QuantisedLinear(child, bits))
