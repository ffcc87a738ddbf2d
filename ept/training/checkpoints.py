"""The checkpoints of a training: finding the last whole one."""

import json
import os
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

__all__ = ["last_checkpoint"]


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint-N in a directory, or None.

    The Trainer writes trainer_state.json last, so a checkpoint that a kill cut short lacks it or breaks off in it.
    """
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and _parses(path / TRAINER_STATE_NAME):
            found.append((int(match[1]), str(path)))
    return max(found)[1] if found else None


def _parses(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
