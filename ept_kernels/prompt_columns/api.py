"""The public function: checks the arguments and chooses an implementation."""

from torch import Tensor

from ..availability import resolve
from ..common.operators import Calls
from . import eager, reference
from .arguments import Columns, Rows, Settings
from .checks import check_rows

__all__ = ["prompt_columns"]


def prompt_columns(
    attention_mask: Tensor,
    prompt_length: int,
    *,
    prompt_lengths: Tensor | None = None,
    labels: Tensor | None = None,
    first_position: int = 0,
    ignore_index: int = -100,
    drops_first_label: bool = False,
    impl: str = "auto",
) -> Columns:
    """Puts S columns of ones directly before each row's first text token; returns mask, positions and labels to match.

    Nothing on the host waits for what the mask holds: rows without padding on the left are treated as those with it.

    Args:
        attention_mask: [batch, L] bool or integer, nonzero on text. Padding may stand anywhere in a row.
        prompt_length: S, the columns that are added.
        prompt_lengths: [batch] integers, how many of them are the row's prompt: the last ones. The others are padding.
            None: all.
        labels: [batch, L] integers. They stay where the outputs of their tokens will be looked for, at the end of a row.
        first_position: the number of the first position.
        ignore_index: the label that does not count, for the added columns.
        drops_first_label: whether the first column's label does not count either.
        impl: "reference" (the specification), "torch", "triton", or "auto" (Triton where it can run, else torch).

    Returns:
        starts [batch] int32, the columns before each row's first text token, L where there is none: what `prompt_embed` takes
        as `prompt_start`; mask [batch, S + L] in the mask's dtype, 1 on text and prompts; positions [batch, S + L] int64, for
        each column the columns of the mask before it; labels [batch, S + L] in their dtype, [0, 0] without labels.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value; the message names it.
    """
    impl = resolve(impl, attention_mask.device)
    rows = Rows(attention_mask, prompt_lengths, labels)
    settings = Settings(prompt_length, first_position, ignore_index, drops_first_label)
    call = _calls.checked(rows, settings, rows, settings)
    if impl == "triton":
        from . import triton_op

        return triton_op.prompt_columns(rows, settings, call)
    return (reference if impl == "reference" else eager).prompt_columns(rows, settings)


_calls = Calls(check_rows)
