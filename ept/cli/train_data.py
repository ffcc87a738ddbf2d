"""The rows of `ept train`: of own files, of a hub data set, of a stream, or of a benchmark's task."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ept.cli.train_options import DataArguments, TrainOptions
from ept.data.columns import Columns, holds_tagged_words, holds_text_to_write
from ept.data.streaming import RowStream, TokenStream
from ept.data.tables import read_file, read_hub
from ept.tasks.glue import Rows, benchmark_task
from ept.tasks.glue_files import read_benchmark
from ept.tasks.kinds import KINDS, CausalText2Text, Text2Text, TokenClassification, asked_kind, default_kind
from ept.tasks.task import Task

__all__ = ["TrainingData", "read_training_data", "token_stream"]

Source = tuple[Dataset | Rows, str]  # rows, and where they are from


@dataclass(frozen=True)
class TrainingData:
    """What is to be learned, and the rows.

    Attributes:
        tables: rows and their source by split; "train" is always there, of a stream its first rows.
        stream: the training rows that are read while training; None where all are in the tables.
    """

    task: Task
    tables: dict[str, Source]
    stream: RowStream | None


def read_training_data(options: TrainOptions) -> TrainingData:
    """Reads the rows and finds out what they teach. ValueError if the data's options do not go together."""
    data, model_name = options.data, options.model.model_name_or_path
    asked = options.model.task
    kind = (
        asked_kind(asked, model_name)
        if asked is not None
        else default_kind(model_name, causal_continues=data.task_name is not None)
    )
    if data.task_name is not None:
        _check_only_benchmark(data)
        benchmark = benchmark_task(data.task_name)
        task = Task.of_benchmark(benchmark, kind)
        return TrainingData(task, dict(read_benchmark(benchmark, data.data_dir, ("train", "validation"))), None)
    if data.data_dir is not None:
        raise ValueError("--data_dir holds a benchmark's task: say which with --task_name")
    stream = _row_stream(options) if data.streaming else None
    tables = _read_tables(data, header=not options.columns.no_header, stream=stream)
    columns = options.columns
    wanted = Columns(columns.text_column, columns.text_pair_column, columns.label_column, columns.label_separator)
    writes = asked_kind(Text2Text.name, model_name) == CausalText2Text.name
    if kind is None and writes and wanted == Columns() and holds_text_to_write(tables["train"][0]):
        kind = CausalText2Text.name
    may_tag = asked is None and kind in (None, Text2Text.name) and columns.label_separator is None
    if may_tag and holds_tagged_words(tables["train"][0], wanted):
        kind = TokenClassification.name  # which says of an encoder-decoder that it labels no words
    if stream is not None and kind is not None and not KINDS[kind].can_stream:
        raise ValueError(f"--streaming is not for {KINDS[kind].asked_as}, whose rows are read whole: leave it out")
    task = Task.of_table(*tables["train"], wanted, kind, stream)
    for table, source in tables.values():
        task.kind.choose_columns(table, source, task.columns)
    return TrainingData(task, dict(tables), stream)


def token_stream(
    data: TrainingData,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    prompt_start: int,
) -> TokenStream:
    """Returns the stream's rows as tokens, in the order that the seed gives."""
    assert data.stream is not None
    args: Any = options.training
    encode = data.task.kind.stream_encoder(
        data.stream.source, data.task.columns, tokenizer, max_length, options.columns.max_target_length
    )
    return TokenStream(
        data.stream, data.task.columns, data.task.streamed_labels, tokenizer,
        max_length=max_length, max_target_length=options.columns.max_target_length,
        batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        shuffle_buffer=options.data.shuffle_buffer, seed=args.seed, shortest=prompt_start, encode=encode,
    )  # fmt: skip


def _check_only_benchmark(data: DataArguments) -> None:
    if data.train_file or data.validation_file or data.test_file or data.dataset_name:
        raise ValueError("--task_name brings its own rows: give --data_dir (or nothing, for the hub's), no other data")
    if data.streaming:
        raise ValueError("--streaming reads own files: leave it out with --task_name")


def _row_stream(options: TrainOptions) -> RowStream:
    """Opens the training rows as a stream. ValueError if the other options do not go with one."""
    data, args = options.data, options.training
    if args.max_steps < 1:
        raise ValueError("--streaming needs --max_steps: how many rows there are is not known before the end")
    if data.packing:
        raise ValueError("--packing chooses among all rows, which --streaming does not hold: leave one of them out")
    if args.dataloader_num_workers > 1:
        raise ValueError("--streaming reads in one process: --dataloader_num_workers 0 or 1")
    # Every process reads the stream and takes its rows of each batch; by default one reads and sends whole batches of
    # one shape, which batches of text are not.
    accelerator_config: Any = args.accelerator_config
    accelerator_config.dispatch_batches = False
    if data.train_file is not None:
        return RowStream(data.train_file, header=not options.columns.no_header)
    if data.dataset_name is None:
        raise ValueError("say what to train on with --train_file (or --dataset_name)")
    return RowStream(f"{data.dataset_name} (train)", hub=(data.dataset_name, data.dataset_config_name, "train"))


def _read_tables(data: DataArguments, *, header: bool, stream: RowStream | None) -> dict[str, tuple[Dataset, str]]:
    """Reads tables and their sources by split; "train" is always there, of a stream its first rows."""
    tables = {}
    if stream is not None:
        tables["train"] = (stream.head(data.shuffle_buffer), stream.source)
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    for split, path in files.items():
        if split in tables:
            continue
        if path is not None:
            tables[split] = (read_file(path, header=header), path)
        elif data.dataset_name is not None:
            table = read_hub(data.dataset_name, data.dataset_config_name, split)
            if table is not None:
                tables[split] = (table, f"{data.dataset_name} ({split})")
    if "train" not in tables:
        raise ValueError("say what to train on with --train_file (or --dataset_name)")
    return {split: tables[split] for split in files if split in tables}
