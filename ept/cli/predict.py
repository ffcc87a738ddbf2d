"""`ept predict`: labels texts, one a line."""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ept.cli.shared import _label_words
from ept.console import bad_input_is_one_line
from ept.files.run_record import _read_record

__all__ = ["predict"]


def predict(argv: list[str]) -> None:
    """`ept predict`: one line of output for each line of input."""
    with bad_input_is_one_line("predict"):
        from ept.backbone.loading import input_limit
        from ept.cli.options import predict_parser
        from ept.pretrained import load_adapter
        from ept.tasks.continuation import ContinuationCollator, candidates, contexts, label_scores
        from ept.tasks.glue import benchmark_task
        from ept.tasks.predicting import lines_of
        from ept.tasks.predicting import predict as predict_batch

        where, options = predict_parser().parse(argv)
        if options.input_file is not None and not Path(options.input_file).is_file():
            raise ValueError(f"{options.input_file}: no such file")
        record = _read_record(where.adapter)
        model, tokenizer, task = load_adapter(where.adapter, where.model_name_or_path, dtype=where.dtype)
        limit = options.max_seq_length or record.get("max_seq_length")
        limit = input_limit(model.base_model, tokenizer, model.ept_config.prompt_length, limit)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        task_name = record.get("task_name") if task in ("classification", "regression") else None
        pairs = record.get("columns", {}).get("text_pair") is not None
        pairs |= task_name is not None and len(benchmark_task(task_name).texts) == 2
        words = _label_words(record, model) if task == "continuation" else None
        collate = None if words is None else ContinuationCollator(tokenizer, candidates(tokenizer, list(words)))
        by_number: Any = model.config.id2label if words is None else words
        batch_size = options.batch_size or (32 if options.input_file else 1)
        with contextlib.ExitStack() as stack:
            source = options.input_file or "standard input"
            lines = stack.enter_context(open(options.input_file, "rb")) if options.input_file else sys.stdin.buffer
            for texts in _batches(_texts(lines, source, pairs), batch_size):
                predictions: torch.Tensor | list[str]
                if collate is not None:
                    room = None if limit is None else limit - max(map(len, collate.label_ids))
                    rows = contexts(tokenizer, [" ".join(row) for row in texts], room)
                    predictions = label_scores(model, rows, collate)
                else:
                    truncation = {} if limit is None else {"truncation": True, "max_length": limit}
                    batch = tokenizer(*zip(*texts, strict=True), padding=True, return_tensors="pt", **truncation)
                    predictions = predict_batch(model, tokenizer, task, batch, options.max_target_length)
                for line in lines_of(task, predictions, by_number.__getitem__):
                    print(line, flush=True)


def _texts(lines: Iterable[bytes], source: str, pairs: bool) -> Iterator[tuple[str, ...]]:
    """Each line's text, or its two texts."""
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
