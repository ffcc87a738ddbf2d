"""What the arguments of `prompt_columns` must be; each message names the argument and the remedy."""

from torch import Tensor

from ..common.checks import check_same_device, check_shape, describe
from .arguments import Rows, Settings


def check_rows(rows: Rows, settings: Settings) -> None:
    """All arguments."""
    mask, lengths, labels = rows
    if mask.dim() != 2 or mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool or integer [batch, length], nonzero on text, not {describe(mask)}: "
            "additive masks are not supported"
        )
    if settings.width < 0:
        raise ValueError(f"prompt_length={settings.width} must not be negative: it is a number of columns")
    for name, tensor, shape in (("prompt_lengths", lengths, mask.shape[:1]), ("labels", labels, mask.shape)):
        if tensor is None:
            continue
        _check_integers(name, tensor)
        check_shape(name, tensor, tuple(shape))
        check_same_device("attention_mask", mask, **{name: tensor})


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must hold integers, not {describe(tensor)}")
