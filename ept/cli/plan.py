"""`ept plan`: the memory of a training step."""

import importlib.util
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModel

from ept.backbone.loading import read_config
from ept.cli.errors import bad_input_is_one_line
from ept.cli.options import AdapterArguments, ept_config
from ept.cli.parser import OptionParser, option
from ept.inspect.memory import BYTES, DTYPES, UNUSABLE_BYTES, UNUSABLE_SHARE, gpu_memory, largest_batch, plan_step

__all__ = ["PlanArguments", "run"]


@dataclass
class PlanArguments:
    _argument_group_name = "what is planned"

    model: str = field(
        metadata={"help": "Hub name or directory of the model, or a config.json; its weights are not read."}
    )
    batch: int = option("Rows at a time on one device.", 32)
    length: int = option("Tokens of the longest row: rows are padded to it.", 128)
    target_length: int | None = option("Tokens of the longest text to write (encoder-decoder); by default as --length.")
    task: str | None = option(
        "classification or text2text; by default text2text where the model writes text.",
        choices=("classification", "text2text"),
    )
    dtype: str | None = option(
        "Type of the frozen weights; by default a row for each but float16.", choices=tuple(DTYPES)
    )
    gpu: str | None = option(
        "What must hold it: a name (h100, a100-40, rtx4090, …) or a size (24GB). EPT's own part then counts as kernels."
    )
    largest_batch: bool = option("With --gpu: also say how many rows fit, which takes four times as long.", False)


def run(argv: list[str]) -> None:
    """`ept plan`: a table of what a step takes at each dtype, with and without activation checkpointing; then JSON."""
    with bad_input_is_one_line("plan"):
        parser = OptionParser(
            "plan",
            "Says what memory a training step takes, from the model's config alone; the last line printed is JSON.",
            PlanArguments,
            AdapterArguments,
        )
        options, adapter = parser.parse(argv)
        if options.largest_batch and options.gpu is None:
            raise ValueError("--largest_batch asks what a --gpu holds: give it")
        room = None if options.gpu is None else gpu_memory(options.gpu) * (1 - UNUSABLE_SHARE) - UNUSABLE_BYTES
        config = read_config(options.model, may_be_file=True)
        with torch.device("meta"):
            backbone = AutoModel.from_config(config)
        settings = ept_config(adapter, backbone)
        modes = (False, True) if backbone.supports_gradient_checkpointing else (False,)
        dtypes = [name for name in DTYPES if name != "float16"] if options.dtype is None else [options.dtype]
        on_gpu = room is not None and settings.impl != "torch" and importlib.util.find_spec("triton") is not None
        rows = []
        for dtype, checkpointing in itertools.product(dtypes, modes):

            def planned(batch: int, dtype: str = dtype, checkpointing: bool = checkpointing) -> dict[str, Any]:
                return plan_step(
                    config, settings, batch=batch, length=options.length, target_length=options.target_length,
                    task=options.task, dtype=dtype, checkpointing=checkpointing, kernels=on_gpu,
                )  # fmt: skip

            row = {"dtype": dtype, "checkpointing": checkpointing} | planned(options.batch)
            if room is not None:
                row["fits"] = row["peak"] <= room
            if room is not None and options.largest_batch:
                row["largest_batch"] = largest_batch(lambda batch, planned=planned: planned(batch)["peak"], room)  # type: ignore[misc]
            rows.append(row)
    print(_table(rows, options.gpu))
    print(json.dumps({"model": options.model, "batch": options.batch, "length": options.length, "rows": rows}))


def _table(rows: list[dict[str, Any]], gpu: str | None) -> str:
    names = ("dtype", "checkpointing", *BYTES) + (() if gpu is None else (f"fits {gpu}",))
    has_batches = "largest_batch" in rows[0]
    names += ("largest batch",) if has_batches else ()
    lines: list[tuple[str, ...]] = [names]
    for row in rows:
        line: tuple[str, ...] = (
            row["dtype"],
            "yes" if row["checkpointing"] else "no",
            *(_in_units(row[name]) for name in BYTES),
        )
        line += () if gpu is None else ("yes" if row["fits"] else "no",)
        lines.append((*line, str(row["largest_batch"])) if has_batches else line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _in_units(size: int) -> str:
    """Returns bytes in units of 10^9, 10^6 or 10^3, three digits."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:.0f} {unit}"
    return f"{size / 1000:.3g} kB"
