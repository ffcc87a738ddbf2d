"""`ept predict`: labels texts, one a line."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ept.backbone.loading import input_limit
from ept.cli.errors import bad_input_is_one_line
from ept.cli.options import THRESHOLD_HELP, AdapterDirArguments
from ept.cli.parser import OptionParser, option
from ept.pretrained import SavedAdapter
from ept.tasks.glue import benchmark_task
from ept.tasks.kind import TaskKind

__all__ = ["PredictArguments", "run"]


@dataclass
class PredictArguments:
    _argument_group_name = "input and output"

    input_file: str | None = option("Texts, one a line (a pair: with a tab between); by default standard input.")
    batch_size: int | None = option(
        "Rows at a time; by default 32 from a file, 1 from standard input, so that each line is answered at once."
    )
    threshold: float | None = option(THRESHOLD_HELP)
    max_seq_length: int | None = option("Cut texts to this many tokens; by default as in training.")
    max_target_length: int = option("Write at most this many tokens (text2text).", 128)


def run(argv: list[str]) -> None:
    """`ept predict`: one line of output for each line of input."""
    with bad_input_is_one_line("predict"):
        parser = OptionParser(
            "predict",
            "Reads texts, one a line, and prints for each a line: label, tab, probability (of every label above the "
            "threshold, where a row may have several); or a value; or the written text.",
            AdapterDirArguments,
            PredictArguments,
        )
        place, options = parser.parse(argv)
        if options.input_file is not None and not Path(options.input_file).is_file():
            raise ValueError(f"{options.input_file}: no such file")
        saved_adapter = SavedAdapter.open(place.adapter)
        model, tokenizer, kind = saved_adapter.load(place.model_name_or_path, dtype=place.dtype)
        if options.threshold is not None:
            kind = kind.with_threshold(options.threshold)
        max_length = options.max_seq_length or saved_adapter.max_length
        max_length = input_limit(model.base_model, tokenizer, model.ept_config.prompt_length, max_length)
        limit = kind.text_limit(tokenizer, max_length)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        predictor = kind.predictor(model, tokenizer, options.max_target_length)
        batch_size = options.batch_size or (32 if options.input_file else 1)
        with contextlib.ExitStack() as stack:
            source = options.input_file or "standard input"
            lines = stack.enter_context(open(options.input_file, "rb")) if options.input_file else sys.stdin.buffer
            for texts in _batches(_texts(lines, source, _reads_pairs(kind, saved_adapter.record)), batch_size):
                for line in kind.lines(predictor(kind.encode_texts(tokenizer, texts, limit))):
                    print(line, flush=True)


def _reads_pairs(kind: TaskKind, record: dict[str, Any]) -> bool:
    """Tells whether an adapter was trained on pairs of texts."""
    if record.get("task_name") is not None:
        return len(kind.benchmark_templates(benchmark_task(record["task_name"]))) == 2
    return record.get("columns", {}).get("text_pair") is not None


def _texts(lines: Iterable[bytes], source: str, pairs: bool) -> Iterator[tuple[str, ...]]:
    """Yields each line's text, or its two texts."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}, line {number}: not UTF-8 (byte {line[error.start]:#04x})") from error
        texts = tuple(text.split("\t", 1)) if pairs else (text,)
        if pairs and len(texts) != 2:
            raise ValueError(f"{source}, line {number}: the adapter labels pairs: write two texts with a tab between")
        yield texts


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch
