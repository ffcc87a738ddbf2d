"""Bytes and launches of `prompt_columns`, predicted from the shapes. Plain arithmetic, as prompt_embed's."""

from ..common.traffic import Traffic


def forward(batch: int, length: int, width: int, labels: bool, mask_bytes: int = 8, label_bytes: int = 8) -> Traffic:
    """One launch. The mask is read once more from the cache."""
    whole = batch * (width + length)
    memory = {
        "mask": batch * length * mask_bytes,
        "starts": batch * 4,
        "wide mask": whole * mask_bytes,
        "positions": whole * 8,
        "labels": (batch * length + whole) * label_bytes if labels else 0,
    }
    return Traffic(1, memory, 0)
