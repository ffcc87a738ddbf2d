"""`ept plan`: the memory of a training step."""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
)

from ept.console import bad_input_is_one_line
from ept.inspect.memory import BYTES, CONTEXT, UNUSABLE, gpu_memory, plan_step

__all__ = ["run"]


def run(argv: list[str]) -> None:
    """`ept plan`: a table of what a step takes at each dtype, with and without activation checkpointing; then JSON."""
    with bad_input_is_one_line("plan"):
        from ept.cli.options import ept_config, plan_parser

        given, sizes = plan_parser().parse(argv)
        memory = None if given.gpu is None else gpu_memory(given.gpu)
        config = _read_config(given.model)
        with torch.device("meta"):
            backbone = AutoModel.from_config(config)
        ours = ept_config(sizes, backbone)
        modes = (False, True) if backbone.supports_gradient_checkpointing else (False,)
        dtypes = ("float32", "bfloat16", "8bit", "4bit") if given.dtype is None else (given.dtype,)
        rows = []
        for dtype, checkpointing in itertools.product(dtypes, modes):
            row = {"dtype": dtype, "checkpointing": checkpointing} | plan_step(
                config, ours, batch=given.batch, length=given.length, target_length=given.target_length,
                task=given.task, dtype=dtype, checkpointing=checkpointing,
            )  # fmt: skip
            if memory is not None:
                row["fits"] = row["peak"] <= memory * (1 - UNUSABLE) - CONTEXT
            rows.append(row)
    print(_table(rows, given.gpu))
    print(json.dumps({"model": given.model, "batch": given.batch, "length": given.length, "rows": rows}))


def _read_config(name_or_path: str) -> PreTrainedConfig:
    """The config of a hub name, of a model directory, or of a config.json by itself."""
    path = Path(name_or_path)
    if not path.exists() and (path.is_absolute() or name_or_path.startswith(".") or len(path.parts) > 2):
        raise ValueError(
            f"{name_or_path}: no such directory or file; give a hub name, a model's directory or its config"
        )
    return AutoConfig.from_pretrained(name_or_path)


def _table(rows: list[dict[str, Any]], gpu: str | None) -> str:
    names = ("dtype", "checkpointing", *BYTES) + (() if gpu is None else (f"fits {gpu}",))
    lines: list[tuple[str, ...]] = [names]
    for row in rows:
        line = (row["dtype"], "yes" if row["checkpointing"] else "no", *(_said(row[name]) for name in BYTES))
        lines.append(line if gpu is None else (*line, "yes" if row["fits"] else "no"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _said(size: int) -> str:
    """Bytes in units of 10^9, 10^6 or 10^3, three digits."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:.0f} {unit}"
    return f"{size / 1000:.3g} kB"
