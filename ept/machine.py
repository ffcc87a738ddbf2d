"""What a figure needs beside it: device, versions, commit."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["commit", "describe"]


def describe() -> dict[str, Any]:
    """Returns device, threads, versions and the commit of this checkout."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {_cpu()}"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": transformers.__version__,
        "peft": _version("peft"),
        "commit": commit(Path(__file__).parent),
    }


def commit(checkout: Path) -> str:
    """Returns the short name of a checkout's commit ("-dirty" where tracked files differ from it), or "unknown"."""
    dirty = "-dirty" if _git(checkout, "status", "--porcelain", "-uno") else ""
    return _git(checkout, "rev-parse", "--short", "HEAD") + dirty


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(checkout: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=checkout)
    except OSError:
        return "unknown"
    return result.stdout.strip() or ("unknown" if result.returncode else "")
