"""Checks that several commands make."""

from pathlib import Path
from typing import Any

from ept.files.adapter_dir import CONFIG_NAME
from ept.model.model import EPTModel

__all__ = ["check_prompt_start", "new_adapter_dir"]


def check_prompt_start(model: EPTModel, data: Any, source: str) -> None:
    """Raises ValueError if a text does not reach the column at which the prompt stands: it could be a batch by itself."""
    start = model.ept.prompt_start
    for row, ids in enumerate(data["input_ids"] if start else [], start=1):
        if len(ids) < start:
            raise ValueError(
                f"{source}, row {row}: {len(ids)} tokens are too few for a prompt that stands at column {start} "
                "(--prompt_start): lower it, or leave the row out"
            )


def new_adapter_dir(output_dir: str) -> Path:
    """Returns the directory for an adapter to be written. ValueError if it is a file or holds another adapter."""
    path = Path(output_dir)
    if path.is_file() or (path / CONFIG_NAME).exists():
        raise ValueError(f"--output_dir {output_dir} is a file or holds another adapter: give a new directory")
    return path
