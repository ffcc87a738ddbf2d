"""The command line's options as dataclasses, and a parser whose help a person can read."""

import dataclasses
import itertools
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser

from ept.backbone.loading import HEADS, TASKS
from ept.config import INITS, PRESETS, EPTConfig
from ept.model.fresh import config_for_budget
from ept.tasks.glue import BENCHMARK_TASKS
from ept.training.rates import EPTSeq2SeqTrainingArguments

__all__ = [
    "AdapterArguments",
    "OptionParser",
    "ept_config",
    "eval_parser",
    "plan_parser",
    "predict_parser",
    "train_parser",
]


def option(help: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help} | metadata)


DTYPES = ("auto", "float32", "bfloat16", "float16", "8bit", "4bit")


TASK_HELP = f"A task of GLUE or SuperGLUE in place of the files: {', '.join(BENCHMARK_TASKS)}."
DATA_DIR_HELP = "Where the task's published files are (tsv, jsonl or parquet); without it they come from the hub."


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = field(
        metadata={"help": "Hub name or directory of the pretrained model, which stays frozen."}
    )
    task: str | None = option(
        "What to learn. By default text2text for an encoder-decoder; else regression where the labels are decimal "
        "numbers, and classification. continuation: a causal model scores the labels' words after the text (its default "
        "with --task_name).",
        choices=TASKS,
        aliases=["--problem_type"],
    )
    head: str = option(
        "Classification head: on the tokens' mean, or transformers' own (first token of an encoder, last of a causal "
        "model). auto: the mean for a sentence-transformers model that says so.",
        "auto",
        choices=HEADS,
    )
    dtype: str = option(
        "Type of the frozen weights; auto: as saved; 8bit and 4bit need bitsandbytes. What is trained is float32.",
        "auto",
        choices=DTYPES,
    )


@dataclass
class ColumnArguments:
    _argument_group_name = "columns"

    text_column: str | None = option("Column with the text; found by itself where there is only one choice.")
    text_pair_column: str | None = option("Column with a second text, for tasks on pairs.")
    label_column: str | None = option(
        "Column with the label, or with the text to write (text2text); by default the one named label."
    )
    no_header: bool = option("The csv or tsv files have no header: columns are given by number, from 0.", False)
    max_seq_length: int | None = option("Cut texts to this many tokens; by default to what the model has room for.")
    max_target_length: int = option("Cut texts to write to this many tokens (text2text).", 128)


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


ADAPTER_HELP = {
    "prompt_length": "s, rows of the short prompt.",
    "max_text_length": "N, text positions that the low-rank update covers.",
    "rank": "r of the low-rank pair; 0 turns it off.",
    "num_spaces": "K, number of spaces; 0 turns them off.",
    "space_dim": "h, width of each space.",
    "token_rank": "q of the token-conditioned update; 0 turns it off.",
    "token_dropout": "Share of the token-conditioned update's hidden units that a training step leaves out.",
    "deep_layers": "Layers after the first whose input gets an update of rank q of its own; -1: all, 0: none.",
    "alpha": "The low-rank pair is scaled by alpha / sqrt(rank).",
    "activation": "Of spaces and token-conditioned update: silu, relu, gelu or identity.",
    "lowrank_update": "Whether the low-rank pair updates the text.",
    "fusion": "Whether the prompt is fused with the low-rank pair.",
    "spaces": "Whether the prompt is projected into the spaces.",
    "token_update": "Whether the token-conditioned update is on.",
    "prompt_start": "Text column at which the prompt stands; by default 1 where the head reads the first token, else 0.",
    "embed_scale": "Unit of all that is trained; by default the RMS of the model's embeddings.",
    "init": f"Start of the prompt: {', '.join(INITS)} (needs --soft_prompt).",
    "init_text": "The words for --init text.",
    "backbone_dropout": "Whether the frozen model's dropout stays on in training.",
    "impl": "Implementation of the embedding step: auto, torch, reference or triton.",
}


def _adapter_help(name: str) -> str:
    """What a setting does, and its value in the presets."""
    values = {"default": EPTConfig(), "paper": EPTConfig.paper(), "deep": EPTConfig.deep()}
    said = {preset: getattr(config, name) for preset, config in values.items()}
    if said["default"] is None:
        return ADAPTER_HELP[name]
    others = [f", {preset}: {value}" for preset, value in said.items() if value != said["default"]]
    return f"{ADAPTER_HELP[name]} (default: {said['default']}{''.join(others)})"


# None: not given, so that a preset or a budget decides.
AdapterArguments = make_dataclass(
    "AdapterArguments",
    [
        ("preset", str, option("Sizes to start from: ours, the paper's parts, or deep updates.", "default", choices=PRESETS)),
        ("budget", int | None, option("Choose the sizes that fill this many trained parameters (without a head).")),
        ("soft_prompt", str | None, option(
            "Trained prompt for --init decompose: a PEFT prompt-tuning adapter, or a safetensors file with one matrix."
        )),
        *(
            (name, kind if kind == kind | None else kind | None, option(_adapter_help(name)))
            for name, kind in get_type_hints(EPTConfig).items()
        ),
    ],
    namespace={"_argument_group_name": "adapter"},
)  # fmt: skip


def ept_config(sizes: Any, backbone: Any) -> EPTConfig:
    """The settings that the adapter's options say, for a backbone."""
    given = {k: v for k, v in vars(sizes).items() if v is not None and k not in ("preset", "budget", "soft_prompt")}
    if (given.get("init") == "decompose") != (sizes.soft_prompt is not None):
        raise ValueError("--init decompose and --soft_prompt go together: give both or neither")
    if sizes.budget is not None:
        return config_for_budget(backbone, sizes.budget, preset=sizes.preset, **given)
    presets: dict[str, Callable[..., EPTConfig]] = {"paper": EPTConfig.paper, "deep": EPTConfig.deep}
    return presets.get(sizes.preset, EPTConfig)(**given)


@dataclass
class RunArguments:
    _argument_group_name = "run"

    early_stopping_patience: int | None = option(
        "Stop after this many evaluations without a better metric (needs --load_best_model_at_end)."
    )
    overwrite_output_dir: bool = option("Start anew in an --output_dir that holds another run.", False)


@dataclass
class AdapterDirArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": "Directory that ept train (or save_pretrained) wrote."})
    model_name_or_path: str | None = option("The model it was trained on, where it is not in its old place.")
    dtype: str = option("Type of the frozen weights; auto: as saved.", "auto", choices=DTYPES)


@dataclass
class TestDataArguments:
    _argument_group_name = "data: a csv, tsv, jsonl or parquet file, or a data set of the hub"

    test_file: str | None = option("Rows to evaluate on.")
    dataset_name: str | None = option("Hub data set in place of the file.")
    dataset_config_name: str | None = option("Configuration of the hub data set.")
    dataset_split: str | None = option("Split of the hub data set or the task; by default test, for a task validation.")
    task_name: str | None = option(TASK_HELP)
    data_dir: str | None = option(DATA_DIR_HELP)
    batch_size: int = option("Rows at a time.", 32)


@dataclass
class PredictArguments:
    _argument_group_name = "input and output"

    input_file: str | None = option("Texts, one a line (a pair: with a tab between); by default standard input.")
    batch_size: int | None = option(
        "Rows at a time; by default 32 from a file, 1 from standard input, so that each line is answered at once."
    )
    max_seq_length: int | None = option("Cut texts to this many tokens; by default as in training.")
    max_target_length: int = option("Write at most this many tokens (text2text).", 128)


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
        "Type of the frozen weights; by default a row for each but float16.",
        choices=("float32", "bfloat16", "float16", "8bit", "4bit"),
    )
    gpu: str | None = option("What must hold it: a name (h100, a100-40, rtx4090, …) or a size (24GB).")


# The training arguments that the help explains; the others are listed by name.
EXPLAINED = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "activation_checkpointing", "learning_rate", "prompt_learning_rate", "down_learning_rate",
    "deep_learning_rate",
    "head_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "train_sampling_strategy", "eval_strategy",
    "eval_steps", "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model",
    "resume_from_checkpoint", "logging_steps", "report_to", "bf16", "fp16", "seed", "disable_tqdm",
)  # fmt: skip
HELP = {
    "output_dir": "Where the adapter, its tokenizer and the checkpoints go.",
    "resume_from_checkpoint": "true: go on from the last whole checkpoint in --output_dir; auto: begin where there is none; "
    "or a checkpoint's directory.",
    "lr_scheduler_type": "Schedule of the learning rates: linear, cosine, constant_with_warmup, …",
    "metric_for_best_model": "Which checkpoint is best; by default accuracy, pearson or (text2text) loss.",
    "gradient_accumulation_steps": "Batches per update.",
    "activation_checkpointing": "Compute activations again in the backward pass, to save memory.",
    "bf16": "Mixed precision with bfloat16.",
    "fp16": "Mixed precision with float16.",
    "num_train_epochs": "Passes over the training rows.",
    "max_steps": "Number of updates, in place of the epochs.",
}


AT_LEAST_ONE = (
    "shuffle_buffer", "batch", "length", "target_length", "max_seq_length", "max_target_length", "batch_size",
    "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "eval_accumulation_steps", "generation_max_length", "generation_num_beams",
    "early_stopping_patience",
)  # fmt: skip


def _what_it_must_be(name: str, value: Any) -> str | None:
    """What a number's option takes, if `value` is something else."""
    if name in AT_LEAST_ONE and value is not None and value < 1:
        return "at least 1"
    if name == "dataloader_num_workers" and value < 0:
        return "at least 0"
    if name.endswith("learning_rate") and not (value >= 0 and math.isfinite(value)):
        return "finite and at least 0"
    if name == "num_train_epochs" and not (value > 0 and math.isfinite(value)):
        return "finite and above 0"
    return "a number" if isinstance(value, float) and math.isnan(value) else None


class OptionParser(HfArgumentParser):
    """transformers' parser, with errors of one line and with a help in groups."""

    def __init__(self, command: str, description: str, *types: Any):
        super().__init__(types, prog=f"ept {command}", description=description, allow_abbrev=False)

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """One object for each dataclass; an option that none has is an error."""
        *parsed, unknown = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            self.error(f"unknown option {unknown[0]}: see {self.prog} --help")
        for name, value in itertools.chain.from_iterable(vars(group).items() for group in parsed):
            if wanted := _what_it_must_be(name, value):
                self.error(f"--{name} {value} must be {wanted}")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # every option has a second spelling, with hyphens
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def format_help(self) -> str:
        width = max(60, min(110, shutil.get_terminal_size().columns))
        parts = [f"usage: {self.prog} [options]\n\n{textwrap.fill(self.description or '', width)}\n"]
        for kind in self.dataclass_types:
            fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
            if kind is EPTSeq2SeqTrainingArguments:
                parts += ["\ntraining (all of transformers' TrainingArguments):\n"]
                parts += [_entry(fields[name], width) for name in EXPLAINED if name in fields]
                rest = ", ".join(f"--{name}" for name in fields if name not in EXPLAINED)
                parts += ["\nalso, as in transformers:\n", textwrap.fill(
                    rest, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False), "\n"]  # fmt: skip
            else:
                parts += [f"\n{kind._argument_group_name}:\n"]
                parts += [_entry(f, width) for f in fields.values()]
        return "".join(parts)

    def print_usage(self, file: Any = None) -> None:
        print(f"usage: {self.prog} [options]", file=file or sys.stderr)


def _entry(f: dataclasses.Field, width: int) -> str:
    """An option's lines in the help: its name, and from column 34 what it does and its default."""
    said = HELP.get(f.name) or f.metadata.get("help", "")
    if len(said) > 240:  # some of transformers' own run over many lines
        said = said.split(". ")[0].rstrip(".") + "."
    if "choices" in f.metadata:
        said += f" One of {', '.join(f.metadata['choices'])}."
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
        said += " (required)"
    elif f.default is not dataclasses.MISSING and f.default not in (None, False, ""):
        said += f" (default: {getattr(f.default, 'value', f.default)})"
    text = textwrap.wrap(said, width - 34) or [""]
    name = f"  --{f.name}"
    first = f"{name:<33} {text[0]}\n" if len(name) <= 32 else f"{name}\n{'':34}{text[0]}\n"
    return first + "".join(f"{'':34}{line}\n" for line in text[1:])


def train_parser() -> OptionParser:
    return OptionParser(
        "train",
        "Tunes a frozen model with EPT on labelled text. At the end --output_dir holds the adapter.",
        ModelArguments, DataArguments, ColumnArguments, AdapterArguments, RunArguments, EPTSeq2SeqTrainingArguments,
    )  # fmt: skip


def eval_parser() -> OptionParser:
    return OptionParser(
        "eval",
        "Evaluates an adapter on labelled text; the last line printed is the metrics as JSON.",
        AdapterDirArguments, TestDataArguments, ColumnArguments,
    )  # fmt: skip


def predict_parser() -> OptionParser:
    return OptionParser(
        "predict",
        "Reads texts, one a line, and prints for each a line: label, tab, probability; or a value; or the written text.",
        AdapterDirArguments, PredictArguments,
    )  # fmt: skip


def plan_parser() -> OptionParser:
    return OptionParser(
        "plan",
        "Says what memory a training step takes, from the model's config alone; the last line printed is JSON.",
        PlanArguments, AdapterArguments,
    )  # fmt: skip
