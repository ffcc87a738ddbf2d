"""Memory of a training step: the peak of what it allocates, and the EPT layer's own part, predicted and measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ept import EPTConfig
from ept.inspect.storages import StorageCounter
from ept_kernels.prompt_embed import traffic

__all__ = ["own_bytes", "peak_bytes", "predicted_own_bytes"]


def peak_bytes(step: Callable[[], Any], device: str = "cpu") -> int:
    """The most that a step has allocated at one time beyond what stood before it. Run the step once before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with StorageCounter() as counter:
        step()
    return counter.peak


def own_bytes(layer: nn.Module, forward: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """Bytes of an EPTLayer in a training step, measured in one that changes nothing.

    They are its trained tensors with their gradients and AdamW's moments, and what `forward` keeps for the backward
    beside those and its `inputs` (E, ids, …).
    """
    trained = list(layer.parameters())
    inputs_and_weights = {t.untyped_storage()._cdata for t in trained + inputs}
    saved: dict[int, Tensor] = {}  # holds the tensors, so that no other storage takes the place of one

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    bytes_kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in inputs_and_weights)
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    out.float().sum().backward()
    optimizer.step()
    moments = [value for p in trained for value in optimizer.state[p].values() if value.dim() > 0]
    gradients = [p.grad for p in trained if p.grad is not None]
    owned = sum(t.nbytes for t in (*trained, *gradients, *moments))
    layer.zero_grad()
    return bytes_kept + owned


def predicted_own_bytes(config: EPTConfig, d: int, batch: int, length: int, masked: bool, impl: str) -> int:
    """The same on paper for impl "torch" or "triton": four numbers of fp32 for each trained one, and what is kept."""
    n, r = (config.max_text_length, config.rank) if config.has_lowrank else (0, 0)
    k, h = (config.num_spaces, config.space_dim) if config.has_spaces else (0, 0)
    x = traffic.Shapes(
        batch=batch, length=length, d=d, s=config.prompt_length, n=n, r=r, k=k, h=h,
        q=config.token_rank if config.has_token_update else 0, masked=masked,
    )  # fmt: skip
    kept = x.kept * x.compute_bytes + x.slots
    if impl == "torch":
        kept = sum(traffic.kept_by_torch(x, fusion=config.fusion, lowrank_update=config.lowrank_update).values())
    if config.token_dropout:  # the mask, and W times it, which torch has already as W in the embeddings' size
        kept += 4 * x.q * (1 if impl == "torch" else 1 + d)
    return 16 * x.weights + kept
