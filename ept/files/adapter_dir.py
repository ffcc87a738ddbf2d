"""Adapter directories: adapter_config.json beside adapter_model.safetensors, written atomically, read with suspicion.

A save puts the new weights beside the old ones under a pending name, then replaces the config, which names the
weights' SHA-256, then gives the weights their final name. Killed at any point, the directory holds one whole adapter:
the reader takes the pending file when it is the one that the config names.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "check_weights",
    "read_adapter",
    "read_json_config",
    "weights_sha256",
    "write_adapter",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PENDING_NAME = "adapter_model.pending.safetensors"


def write_adapter(directory: str | os.PathLike, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes settings and tensors into `directory` (made if absent) so that a kill leaves the old or the new adapter."""
    directory = Path(directory)
    if directory.is_file():
        raise NotADirectoryError(f"{directory} is a file: give a directory to save the adapter in")
    directory.mkdir(parents=True, exist_ok=True)
    _promote_pending(directory)
    blob = dump_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
    text = json.dumps(settings | {"weights_sha256": hashlib.sha256(blob).hexdigest()}, indent=2) + "\n"
    written = {directory / PENDING_NAME: blob, directory / (CONFIG_NAME + ".new"): text.encode()}
    try:
        for path, data in written.items():
            _write(path, data)
    except OSError:  # a full disk: what there is of the new adapter only takes up room
        for path in written:
            path.unlink(missing_ok=True)
        raise
    os.replace(directory / (CONFIG_NAME + ".new"), directory / CONFIG_NAME)
    os.replace(directory / PENDING_NAME, directory / WEIGHTS_NAME)


def read_adapter(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads an adapter directory: settings and tensors. ValueError or FileNotFoundError says what is wrong with it."""
    directory = Path(directory)
    config_file = directory / CONFIG_NAME
    settings = read_json_config(directory, wanted="a directory that save_pretrained wrote", remedy="save again")
    if isinstance(settings, dict) and "peft_type" in settings:
        raise ValueError(
            f"{directory} holds a PEFT adapter: ept import makes an EPT adapter of it, if it is a prompt's"
        )
    if not isinstance(settings, dict) or settings.get("method") != "EPT":
        raise ValueError(
            f'{config_file} is not an EPT adapter (it lacks "method": "EPT"): was it made by another tool?'
        )
    blob = _weights(directory, settings.pop("weights_sha256", None))
    try:
        tensors = load_tensors(blob)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS_NAME} is truncated or damaged ({error}): copy it again") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{directory / WEIGHTS_NAME}: tensor {name} holds NaN or infinity: the training diverged")
    return settings, tensors


def read_json_config(directory: str | os.PathLike, *, wanted: str, remedy: str) -> Any:
    """Reads adapter_config.json, whoever wrote it; returns what the JSON holds, which may be no object.

    Args:
        wanted: the directory that the caller reads, in an error's words.
        remedy: what to do about a damaged file.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no JSON.
    """
    file = Path(directory) / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG_NAME}: give {wanted}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): the file is damaged, {remedy}") from error


def check_weights(directory: str | os.PathLike) -> None:
    """Raises ValueError if the weights of an adapter directory are not those that its config names.

    Apart from `read_adapter`, so that what is wrong with the tensors themselves is said first.
    """
    directory = Path(directory)
    sha256 = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8")).get("weights_sha256")
    if sha256 is not None and hashlib.sha256(_weights(directory, sha256)).hexdigest() != sha256:
        raise ValueError(
            f"{directory / WEIGHTS_NAME} is not the file that {CONFIG_NAME} names: copy both again, or delete "
            '"weights_sha256" from it if you changed the weights on purpose'
        )


def weights_sha256(directory: str | os.PathLike) -> str:
    """Returns the SHA-256 of an adapter directory's weights, of which `read_adapter` found nothing wrong."""
    directory = Path(directory)
    sha256 = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8")).get("weights_sha256")
    return hashlib.sha256(_weights(directory, sha256)).hexdigest()


def _weights(directory: Path, sha256: str | None) -> bytes:
    pending, final = directory / PENDING_NAME, directory / WEIGHTS_NAME
    if pending.is_file():
        blob = pending.read_bytes()
        if hashlib.sha256(blob).hexdigest() == sha256:
            return blob
    if not final.is_file():
        raise FileNotFoundError(f"{directory} holds no {WEIGHTS_NAME}: the copy is incomplete")
    return final.read_bytes()


def _promote_pending(directory: Path) -> None:
    """Finishes a save that was killed between its two replacements, before a new one overwrites the pending file."""
    pending, config_file = directory / PENDING_NAME, directory / CONFIG_NAME
    if not (pending.is_file() and config_file.is_file()):
        return
    try:
        sha256 = json.loads(config_file.read_text(encoding="utf-8")).get("weights_sha256")
    except ValueError:
        return
    if hashlib.sha256(pending.read_bytes()).hexdigest() == sha256:
        os.replace(pending, directory / WEIGHTS_NAME)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
