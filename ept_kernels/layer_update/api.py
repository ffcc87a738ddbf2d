"""The public function: checks the arguments, chooses an implementation, fixes the dtype of computation and result."""

import torch
from torch import Tensor

from ..availability import resolve
from ..common.dtypes import widest
from ..common.operators import Call, Calls
from . import eager, reference
from .arguments import Settings, Update
from .checks import check_update, check_values

__all__ = ["layer_update"]


def layer_update(
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    hidden_scale: float | Tensor = 1.0,
    activation: str = "silu",
    adapter_index: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns the hidden states that a layer reads with each token's update added (step 8 of docs/method.md).

        out = hidden + h·σ((hidden/h)·downᵀ)·up

    With `adapter_index` each batch row is updated by an adapter of its own.

    Args:
        hidden: H [batch, columns, d], of any strides. It is never changed; the result is a new tensor.
        down, up: D and W, [q, d] each; with `adapter_index` [adapters, q, d] each; [batch, q, d] without one are a pair for
            each row.
        hidden_scale: h, the size of the hidden states, a constant: a number, or a 0-d tensor; with `adapter_index`
            also a tensor [adapters].
        activation: σ, one of "silu", "relu", "gelu", "identity".
        adapter_index: [batch] integers: the adapter of each row, -1 for a row that stays as it is.
        impl: "reference" (the specification), "torch", "triton", or "auto" (Triton where it can run, else torch).

    Returns:
        [batch, columns, d] in the dtype of `hidden`. "torch" and "triton" compute in fp32 at least and round once
        beside bf16 and fp16; autocast does not reach inside. Gradients go to `hidden`, `down` and `up`. A row of a
        mixed batch equals the same row updated alone: to the bit with "triton", up to the order of the sums with
        "torch", whose batched product may take another.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value; the message names it.
        IndexError: an index names no adapter (checked on CPU, where it costs nothing; on a GPU "triton" gives NaN there).
    """
    impl = resolve(impl, hidden.device)
    scales = hidden_scale if isinstance(hidden_scale, Tensor) else None
    settings = (activation, None if scales is not None else hidden_scale)
    arguments = (hidden, down, up, hidden_scale, activation, adapter_index)
    call = _calls.checked((hidden, down, up, adapter_index, scales), settings, *arguments)
    check_values(hidden_scale, adapter_index, len(down))
    if adapter_index is None and down.dim() == 3 and impl != "torch":
        adapter_index, call = torch.arange(len(hidden), device=hidden.device), None  # which the checks have not seen
    if impl == "triton":
        return _launch(Update(hidden, down, up, adapter_index), hidden_scale, activation, call)
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "torch":
            return eager.layer_update(hidden, down, up, hidden_scale, activation, adapter_index)
        dtype = widest(hidden, down, up)
        if isinstance(hidden_scale, Tensor):
            hidden_scale = hidden_scale.detach().to(dtype)
        wide = (hidden.to(dtype), down.to(dtype), up.to(dtype), hidden_scale, activation)
        if adapter_index is None:
            return reference.layer_update(*wide).to(hidden.dtype)
        return reference.layer_update_by_row(*wide, adapter_index).to(hidden.dtype)


_calls = Calls(check_update)


def _launch(update: Update, hidden_scale: float | Tensor, activation: str, call: Call | None) -> Tensor:
    """layer_update by the kernels."""
    from . import triton_op

    if not isinstance(hidden_scale, Tensor):
        return triton_op.layer_update(update, Settings(float(hidden_scale), activation), call)
    scales = hidden_scale.detach().to(update.hidden.device)
    return triton_op.layer_update(update._replace(scales=scales), Settings(activation=activation), call)
