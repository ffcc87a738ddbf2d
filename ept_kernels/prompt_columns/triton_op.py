"""The kernel as an operator that torch.compile and opcheck know; an ordinary eager call goes past it.

ept_kernels::prompt_columns    triton_forward.forward; integers have no gradient
"""

from typing import Any

import torch
from torch import Tensor

from ..common.operators import Call, schema_of, unflatten
from ..common.triton_repeat import repeat
from . import triton_forward
from .arguments import Columns, Rows, Settings


@torch.library.custom_op(
    "ept_kernels::prompt_columns", mutates_args=(), schema=schema_of(Rows, Settings, returns=len(Columns._fields))
)  # fmt: skip
def prompt_columns_op(*flat: Any) -> tuple[Tensor, ...]:
    """The fields of Columns for those of Rows and Settings."""
    return tuple(triton_forward.forward(*unflatten(flat, Rows, Settings)))


@prompt_columns_op.register_fake
def _(*flat: Any) -> tuple[Tensor, ...]:
    return tuple(triton_forward.empty_results(*unflatten(flat, Rows, Settings)))


def prompt_columns(rows: Rows, settings: Settings, call: Call | None = None) -> Columns:
    """The columns in one launch.

    `call` is that of the public function. Without it the tensors go through the operator.
    """
    if call is None or not call.contiguous:
        rows = Rows(*(None if t is None else t.contiguous() for t in rows))  # type: ignore[arg-type]
    if call is None:
        return Columns(*prompt_columns_op(*rows, *settings))

    def function(*tensors: Any) -> Columns:
        return triton_forward.forward(Rows(*tensors), settings)

    return Columns(*repeat(call, "columns", function, rows))
