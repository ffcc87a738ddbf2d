"""`ept predict`: labels, values or written texts for lines of text and for tables."""

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ept.backbone.loading import input_limit
from ept.cli.errors import bad_input_is_one_line
from ept.cli.options import THRESHOLD_HELP, AdapterDirArguments
from ept.cli.parser import OptionParser, option
from ept.cli.predict_input import Lines, TableRows, is_table
from ept.cli.predict_output import Output
from ept.console import say
from ept.data.columns import Columns
from ept.data.rows import has_optional_header
from ept.files.adapter_dir import weights_sha256
from ept.pretrained import SavedAdapter
from ept.tasks.glue import benchmark_task
from ept.tasks.kind import TaskKind

__all__ = ["PredictArguments", "run"]


@dataclass
class PredictArguments:
    _argument_group_name = "input and output"

    input_file: str | None = option(
        "Texts, one a line (a pair: with a tab between), or a csv, tsv, jsonl or parquet table; by default standard "
        "input, a text a line."
    )
    output_file: str | None = option(
        "Where the predictions go, by default standard output. A .jsonl gets an object a row with its id. A run that was "
        "interrupted goes on, by FILE.partial.json beside it; any other file that holds something is refused."
    )
    overwrite_output_file: bool = option("Write over what --output_file holds.", False)
    all_probabilities: bool = option("Also write the probability of every class.", False)
    text_column: str | None = option("Of a table: column with the text; by default as in training, or the only one.")
    text_pair_column: str | None = option("Of a table: column with the second text; by default as in training.")
    id_column: str | None = option("Of a table: column with the rows' ids; by default id, idx or index, or the number.")
    no_header: bool = option("The csv or tsv file has no header: columns are given by number, from 0.", False)
    batch_size: int | None = option(
        "Rows at a time; by default 32 from a file, 1 from standard input, so that each line is answered at once."
    )
    threshold: float | None = option(THRESHOLD_HELP)
    max_seq_length: int | None = option("Cut texts to this many tokens; by default as in training.")
    max_target_length: int = option("Write at most this many tokens (text2text).", 128)


def run(argv: list[str]) -> None:
    """`ept predict`: one line of output for each row of input."""
    with bad_input_is_one_line("predict"):
        parser = OptionParser(
            "predict",
            "Reads texts, one a line or a table's, and prints for each a line: label, tab, probability (of every label above "
            "the threshold, where a row may have several); or a value; or the words' labels; or the written text.",
            AdapterDirArguments,
            PredictArguments,
        )
        place, options = parser.parse(argv)
        if options.input_file is not None and not Path(options.input_file).is_file():
            raise ValueError(f"{options.input_file}: no such file")
        saved_adapter = SavedAdapter.open(place.adapter, revision=place.revision)
        source = _source(options, saved_adapter, saved_adapter.kind())
        # A first pass over a file finds what is wrong with any row before the model is loaded.
        total = None if options.input_file is None else sum(1 for _ in source)
        output = _output(options, saved_adapter)
        rows = iter(source)
        output.skip_done(rows)
        if output.done:
            say(
                f"{options.output_file} holds {output.done} rows already, which are not done again "
                "(--overwrite_output_file does them again)"
            )
        if output.done == total:
            output.finish()
            return
        model, tokenizer, kind = saved_adapter.load(place.model_name_or_path, dtype=place.dtype)
        if options.threshold is not None:
            kind = kind.with_threshold(options.threshold)
        max_length = options.max_seq_length or saved_adapter.max_length
        max_length = input_limit(model.base_model, tokenizer, model.ept_config.prompt_length, max_length)
        limit = kind.text_limit(tokenizer, max_length, options.max_target_length)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        predictor = kind.predictor(model, tokenizer, kind.target_limit(max_length, options.max_target_length))
        batch_size = options.batch_size or (32 if options.input_file else 1)
        quiet = options.input_file is None or (options.output_file is None and sys.stdout.isatty())
        with tqdm(total=total, initial=output.done, desc="Predicting", disable=quiet) as bar:
            for batch in _batches(rows, batch_size):
                encoded = kind.encode_texts(tokenizer, [row.texts for row in batch], limit)
                output.write(batch, kind, predictor(encoded))
                bar.update(len(batch))
        output.finish()


def _source(options: PredictArguments, saved_adapter: SavedAdapter, kind: TaskKind) -> Lines | TableRows:
    """Finds the rows to predict for; ValueError where the options do not go with them or with the adapter."""
    if options.all_probabilities and not kind.gives_probabilities:
        raise ValueError(f"--all_probabilities: {kind.asked_as} has no classes of rows: leave it out")
    pairs = _reads_pairs(kind, saved_adapter.record)
    if options.input_file is None or not is_table(options.input_file):
        for name in ("text_column", "text_pair_column", "id_column", "no_header"):
            if getattr(options, name):
                raise ValueError(f"--{name} is for tables: give a .csv, .tsv, .jsonl or .parquet as --input_file")
        return Lines(options.input_file, pairs)
    if (kind.reads_one_text or kind.reads_words) and options.text_pair_column is not None:
        raise ValueError(f"the adapter reads one text ({kind.asked_as}), not a pair: leave out --text_pair_column")
    recorded = saved_adapter.record.get("columns", {})
    may_lack_header = has_optional_header(Path(options.input_file)) and saved_adapter.record.get("no_header", False)
    return TableRows(
        options.input_file,
        kind,
        wanted=Columns(options.text_column, options.text_pair_column),
        recorded=Columns(recorded.get("text"), recorded.get("text_pair"), recorded.get("label")),
        pairs=pairs or options.text_pair_column is not None,
        id_column=options.id_column,
        header=not (options.no_header or may_lack_header),
    )


# What the written lines depend on beside the adapter and the input file's content.
OPTIONS_OF_LINES = (
    "all_probabilities", "text_column", "text_pair_column", "id_column", "no_header", "threshold", "max_seq_length",
    "max_target_length",
)  # fmt: skip


def _output(options: PredictArguments, saved_adapter: SavedAdapter) -> Output:
    """Opens where the predictions go; ValueError if that is where the texts are."""
    read, written = options.input_file, options.output_file
    if read is not None and written is not None and Path(written).exists() and Path(written).samefile(read):
        raise ValueError(f"--output_file {written} is the --input_file: give another")
    origin = None
    if written is not None and read is not None:
        of_input = hashlib.sha256()
        with open(read, "rb") as file:
            while block := file.read(1 << 20):
                of_input.update(block)
        of_options = {f"--{name}": getattr(options, name) for name in OPTIONS_OF_LINES}
        origin = {"adapter": weights_sha256(saved_adapter.directory), "input": of_input.hexdigest()} | of_options
    return Output(written, origin, all_probabilities=options.all_probabilities, overwrite=options.overwrite_output_file)


def _reads_pairs(kind: TaskKind, record: dict[str, Any]) -> bool:
    """Tells whether an adapter was trained on pairs of texts."""
    if record.get("task_name") is not None:
        return len(kind.benchmark_templates(benchmark_task(record["task_name"]))) == 2
    return record.get("columns", {}).get("text_pair") is not None


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch
