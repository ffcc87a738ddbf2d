"""The arguments and results of `prompt_columns`, by what they are."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """The mask [batch, L]; how many of the S added columns are a row's prompt [batch], None for all; labels [batch, L]."""

    mask: Tensor
    lengths: Tensor | None = None
    labels: Tensor | None = None


class Settings(NamedTuple):
    """S, the number of the first position, the label that does not count, and whether the first label counts."""

    width: int
    first_position: int = 0
    ignore_index: int = -100
    drops_first_label: bool = False


class Columns(NamedTuple):
    """The columns before each row's first text token [batch] int32; with the added columns, [batch, S + L] each: the mask
    in its dtype, positions int64, and labels in their dtype, or an empty tensor without labels."""

    starts: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
