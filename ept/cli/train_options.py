"""The options of `ept train`."""

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ept.backbone.loading import DTYPES, HEADS
from ept.cli.options import DATA_DIR_HELP, TASK_HELP, AdapterArguments, ColumnArguments
from ept.cli.parser import ForeignOptions, OptionParser, option
from ept.tasks.kinds import ASKED
from ept.training.rates import EPTSeq2SeqTrainingArguments

__all__ = ["DataArguments", "ModelArguments", "RunArguments", "TrainOptions", "parse_train_options"]


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={"help": "Hub name or directory of the pretrained model, which stays frozen."}
    )
    task: str | None = option(
        "What to learn. By default text2text (to write) for an encoder-decoder, and for a causal model whose file has "
        "prompt and completion, or messages; token_classification (a label for each word, NER) where rows are lists of words and "
        "as many labels; else multi_label where the labels are lists (or --label_separator is given), "
        "regression where they are decimal numbers, and classification. continuation: a causal model scores the labels' "
        "words after the text (its default with --task_name).",
        choices=ASKED,
        aliases=["--problem_type"],
    )
    head: str = option(
        "Classification head: on the tokens' mean, or transformers' own (first token of an encoder, last of a causal "
        "model). auto: the mean for a sentence-transformers model that says so.",
        "auto",
        choices=HEADS,
    )
    dtype: str = option(
        "Type of the frozen weights; auto: as saved, but float32 for bfloat16 on a CPU without its instructions; 8bit and 4bit "
        "need bitsandbytes. What is trained is float32.",
        "auto",
        choices=DTYPES,
    )


@dataclass
class DataArguments:
    _argument_group_name = "data: csv, tsv, jsonl or parquet files, or a data set of the hub"

    train_file: str | None = option("Rows to train on.")
    validation_file: str | None = option("Rows to evaluate on while training; each epoch unless --eval_strategy says.")
    test_file: str | None = option("Rows to evaluate on once, at the end.")
    dataset_name: str | None = option("Hub data set in place of the files; its splits train, validation and test.")
    dataset_config_name: str | None = option("Configuration of the hub data set.")
    task_name: str | None = option(TASK_HELP)
    data_dir: str | None = option(DATA_DIR_HELP)
    streaming: bool = option(
        "Read the training rows while training, in constant memory; needs a number of steps. Validation and test rows "
        "are read whole.",
        False,
    )
    shuffle_buffer: int = option("With --streaming: rows that are read ahead and shuffled together.", 10_000)

    packing: bool = option(
        "Put several short texts with their answers into one row of --max_seq_length tokens, each with a prompt of its own "
        "(a causal model's text2text). A batch then has as many rows, and more texts.",
        False,
    )


@dataclass
class RunArguments:
    _argument_group_name = "run"

    early_stopping_patience: int | None = option(
        "Stop after this many evaluations without a better metric (needs --load_best_model_at_end)."
    )
    overwrite_output_dir: bool = option("Start anew in an --output_dir that holds another run.", False)


TRAINING_ARGUMENTS = ForeignOptions(
    EPTSeq2SeqTrainingArguments,
    title="training (all of transformers' TrainingArguments)",
    rest="also, as in transformers",
    explained=(
        "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "activation_checkpointing", "learning_rate", "prompt_learning_rate",
        "up_learning_rate", "down_learning_rate", "deep_learning_rate", "head_learning_rate", "lr_scheduler_type", "warmup_steps",
        "weight_decay", "train_sampling_strategy", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
        "save_total_limit", "load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint", "logging_steps",
        "report_to", "bf16", "fp16", "seed", "disable_tqdm",
    ),
    help={
        "output_dir": "Where the adapter, its tokenizer and the checkpoints go.",
        "resume_from_checkpoint": "true: go on from the last whole checkpoint in --output_dir; auto: begin where there is "
        "none; or a checkpoint's directory.",
        "lr_scheduler_type": "Schedule of the learning rates: linear, cosine, constant_with_warmup, …",
        "metric_for_best_model": "Which checkpoint is best; by default the task's first metric, or loss for text2text.",
        "gradient_accumulation_steps": "Batches per update.",
        "activation_checkpointing": "Compute activations again in the backward pass, to save memory.",
        "bf16": "Mixed precision with bfloat16.",
        "fp16": "Mixed precision with float16.",
        "num_train_epochs": "Passes over the training rows.",
        "max_steps": "Number of updates, in place of the epochs.",
    },
)  # fmt: skip


class TrainOptions(NamedTuple):
    """What the command line says: an object for each group of options.

    Attributes:
        explicit: the options that the user wrote, by name, with the word after each.
        argv: the words themselves.
    """

    model: ModelArguments
    data: DataArguments
    columns: ColumnArguments
    adapter: Any
    run: RunArguments
    training: EPTSeq2SeqTrainingArguments
    explicit: dict[str, str]
    argv: list[str]


def parse_train_options(argv: list[str]) -> TrainOptions:
    """Parses the options of `ept train`. ValueError if some do not go together."""
    explicit = _explicit(argv)
    judged_by = {"validation_file", "dataset_name", "task_name"}
    if _wants_best_model(explicit) and not explicit.keys() & judged_by:
        raise ValueError("--load_best_model_at_end needs a --validation_file to judge by")
    parser = OptionParser(
        "train",
        "Tunes a frozen model with EPT on labelled text. At the end --output_dir holds the adapter.",
        ModelArguments,
        DataArguments,
        ColumnArguments,
        AdapterArguments,
        RunArguments,
        EPTSeq2SeqTrainingArguments,
        foreign=TRAINING_ARGUMENTS,
    )
    model, data, columns, adapter, run, training = parser.parse(argv + _implied_strategies(explicit))
    options = TrainOptions(model, data, columns, adapter, run, training, explicit, argv)
    if "output_dir" not in explicit:
        raise ValueError("say where the adapter goes with --output_dir")
    if options.run.early_stopping_patience is not None and not options.training.load_best_model_at_end:
        raise ValueError("--early_stopping_patience needs --load_best_model_at_end, and --validation_file to judge by")
    return options


def _explicit(argv: list[str]) -> dict[str, str]:
    explicit = {}
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word.startswith("--"):
            name, is_joined, value = word.removeprefix("--").partition("=")
            explicit[name.replace("-", "_")] = value if is_joined else following
    return explicit


def _wants_best_model(explicit: dict[str, str]) -> bool:
    """Tells whether --load_best_model_at_end is among the options, and not with a word that transformers takes for false."""
    return explicit.get("load_best_model_at_end", "false").lower() not in ("false", "f", "no", "n", "0")


def _implied_strategies(explicit: dict[str, str]) -> list[str]:
    """Returns the options that follow from others.

    With rows to validate on there is an evaluation each epoch; for the best model, a checkpoint at each evaluation.
    """
    evaluate = explicit.get("eval_strategy") or ("steps" if "eval_steps" in explicit else "epoch")
    words = []
    if "eval_strategy" not in explicit and ("validation_file" in explicit or _wants_best_model(explicit)):
        words += ["--eval_strategy", evaluate]
    if "save_strategy" not in explicit and _wants_best_model(explicit):
        words += ["--save_strategy", evaluate]
    return words
