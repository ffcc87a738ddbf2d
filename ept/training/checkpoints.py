"""The checkpoints of a training: the last whole one, whether a model can go on from one, and what the run started from."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ept.config import EPTConfig
from ept.files.adapter_dir import read_adapter
from ept.model.model import EPTModel
from ept.model.transfer import Start

__all__ = ["StartNote", "adapter_settings", "check_same_adapter", "is_whole", "last_checkpoint", "noted_start"]


class StartNote(TrainerCallback, ExportableState):
    """Has every checkpoint's trainer_state.json say what the run's adapter started from, a `Start` as a dictionary."""

    def __init__(self, started_from: dict[str, Any] | None = None):
        self.started_from = started_from

    def state(self) -> dict[str, Any]:
        """What transformers keeps: the arguments that make this callback again."""
        return {"args": {"started_from": self.started_from}, "attributes": {}}


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Finds the newest whole checkpoint-N in a directory; None where there is none."""
    whole = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and is_whole(path):
            whole.append((int(match[1]), str(path)))
    return max(whole)[1] if whole else None


def is_whole(checkpoint: str | os.PathLike) -> bool:
    """Tells whether a checkpoint was written to its end.

    The Trainer writes trainer_state.json last, so one that a kill cut short lacks it or breaks off in it.
    """
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def noted_start(checkpoint: str) -> Start | None:
    """Returns what the run of a checkpoint started from; None where no `StartNote` says it."""
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    note = state.get("stateful_callbacks", {}).get(StartNote.__name__)
    return None if note is None else Start(**note["args"]["started_from"])


def adapter_settings(checkpoint: str) -> dict[str, Any]:
    """The fields of the EPTConfig of a checkpoint's adapter."""
    saved, fields = read_adapter(checkpoint)[0], dataclasses.fields(EPTConfig)
    return {field.name: saved[field.name] for field in fields if field.name in saved}


def check_same_adapter(checkpoint: str, model: EPTModel) -> None:
    """Raises ValueError if a checkpoint's adapter has other sizes or labels than the model that is to go on from it."""
    checkpoint_settings = read_adapter(checkpoint)[0]
    for name, value in model.ept_config.to_dict().items():
        if checkpoint_settings.get(name) != value:
            raise ValueError(
                f"{checkpoint} was trained with {name} {checkpoint_settings.get(name)}, not {value}: resume as it began"
            )
    names: Any = model.config.id2label  # by number, though transformers' type has names for keys, too
    label_names = [names[number] for number in sorted(names)]
    if model.head_names and checkpoint_settings.get("label_names") != label_names:
        raise ValueError(
            f"{checkpoint} was trained with the labels {checkpoint_settings.get('label_names')}, not {label_names}"
        )
