"""A task: its kind, the columns or the benchmark that its rows come from, its rows as tokens, and its metrics.

One `Task` for own files and for the benchmarks' tasks, in `ept train`, `ept eval` and `ept sweep` alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ept.console import say
from ept.data.columns import Columns, split_labels
from ept.data.labels import LabelCounts, Labels
from ept.data.streaming import RowStream
from ept.tasks.fitting_text import fit_texts
from ept.tasks.glue import BenchmarkTask, Rows
from ept.tasks.kind import TaskKind
from ept.tasks.kinds import KINDS, Classification, MultiLabel, Regression, TokenClassification
from ept.tasks.metrics import is_better_higher

__all__ = ["Split", "Task"]


FEWEST_TO_DOUBT = 10  # rows, below which labels that occur once say nothing


@dataclass
class Split:
    """Rows that a model reads.

    Attributes:
        data: `input_ids`, `attention_mask` and `labels` of each row: class numbers, scores, or the tokens to write.
        truth: what predictions are judged by: the rows' labels, or the texts to write.
        rows: the benchmark's rows, for its metrics; None for own files.
        source: where they are from.
    """

    data: Any
    truth: list
    rows: Rows | None
    source: str


@dataclass(frozen=True)
class Task:
    """What a model learns.

    Attributes:
        kind: the kind of task, with its labels.
        columns: of own files.
        benchmark: a task of the benchmarks, in place of the columns.
    """

    kind: TaskKind
    columns: Columns
    benchmark: BenchmarkTask | None = None

    @classmethod
    def of_table(
        cls, table: Dataset, source: str, wanted: Columns, kind: str | None = None, stream: RowStream | None = None
    ) -> "Task":
        """Reads the task from the training rows of an own file; says which classes there are, with their rows.

        Args:
            wanted: the columns that are not to be guessed.
            kind: a name in `KINDS`; None takes classification, regression or several labels a row, as the labels
                suggest.
            stream: where `table` holds only its first rows, the stream, whose other rows are asked for their labels.
        """
        kind_class = None if kind is None else KINDS[kind]
        columns = (kind_class or Classification).choose_columns(table, source, wanted)
        if columns.label_separator is not None:
            kind_class = kind_class or MultiLabel
            if kind_class is not MultiLabel:
                raise ValueError(
                    f"`Columns.label_separator` is for several labels a row, not for {kind_class.name}: leave one out"
                )
        if kind_class is not None and kind_class.label_form is None:
            return cls(kind_class.of_texts(table, columns), columns)
        column, label_form = columns.chosen_label, None if kind_class is None else kind_class.label_form
        if label_form == TokenClassification.label_form:
            labels = Labels.of_words(table, source, columns)
            for line in LabelCounts.of_words(table, source, columns).lines():
                say(f"{source}: {line}")
            return cls(TokenClassification(labels.names), columns)
        table = split_labels(table, columns)
        if stream is not None and label_form != Regression.label_form:
            counts = stream.label_counts(columns)  # one pass over all rows: a class may come late
            labels = Labels.of_counts(counts, source, column, label_form)
        else:
            counts = LabelCounts.of(table, source, column)
            labels = Labels.of(table, source, column, label_form)
        if labels.names is None:
            return cls(Regression(), columns)
        if not labels.several:
            _speak_of_single_labels(counts, source, column, asked=kind is not None)
        for line in counts.lines():
            say(f"{source}: {line}")
        return cls((kind_class or (MultiLabel if labels.several else Classification))(labels.names), columns)

    @classmethod
    def of_benchmark(cls, task: BenchmarkTask, kind: str | None) -> "Task":
        """Makes the task of a benchmark's; `kind` is a name in `KINDS`, or None for the head that the task's labels need."""
        natural: type[TaskKind] = Regression if task.is_regression else Classification
        kind_class = natural if kind is None else KINDS[kind]
        if kind_class.has_head and kind_class is not natural:
            raise ValueError(
                f"{task.name} is a {natural.name}, not a {kind}: leave `kind` out, or give an adapter of this task"
            )
        return cls(kind_class(kind_class.benchmark_labels(task)), Columns(), task)

    @property
    def streamed_labels(self) -> Labels | None:
        """What a TokenStream makes of the label column; None where it holds text to write."""
        form = self.kind.label_form
        return None if form is None else Labels(self.kind.label_names, form == MultiLabel.label_form)

    def encode(
        self,
        table: Dataset | Rows,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        max_target_length: int,
    ) -> Split:
        """Encodes the rows in at most `max_length` tokens; says once how many were cut, and how many have no label."""
        max_target_length = self.kind.target_limit(max_length, max_target_length)
        limit = self.kind.text_limit(tokenizer, max_length, max_target_length)
        rows: Rows | None = None
        columns = self.columns
        if isinstance(table, Rows):
            rows = _labelled(table, source)
            table, columns = self._as_table(rows, source, tokenizer, limit)
        else:
            table = split_labels(table, columns)
        data, truth, remarks = self.kind.encode_table(table, source, columns, tokenizer, limit, max_target_length)
        for remark in remarks:
            say(f"{source}: {remark}")
        return Split(data, truth, rows, source)

    def _as_table(
        self, rows: Rows, source: str, tokenizer: PreTrainedTokenizerBase, limit: int | None
    ) -> tuple[Dataset, Columns]:
        """Makes a table of a benchmark's rows, text and label, the passages cut to fit."""
        if self.benchmark is None:
            raise ValueError("the rows of a benchmark need its task: see Task.of_benchmark")
        benchmark = self.benchmark
        templates = self.kind.benchmark_templates(benchmark)

        def count(texts: list[tuple[str, ...]]) -> list[int]:
            return self.kind.count_tokens(tokenizer, texts)

        texts, cut = fit_texts(benchmark, rows, templates, count, limit)
        if cut:
            say(f"{source}: {', '.join(benchmark.cut)} of {cut} of {len(rows)} rows cut to fit in {limit} tokens")
        columns = Columns("text", "text_pair" if len(templates) > 1 else None, "label")
        names = [name for name in (columns.text, columns.text_pair) if name is not None]
        values = {name: list(column) for name, column in zip(names, zip(*texts, strict=True), strict=True)}
        labels = [self.kind.benchmark_label(benchmark, label) for label in rows.known_labels()]
        return Dataset.from_dict(values | {"label": labels}), columns

    def metrics(self, predictions: Any, split: Split) -> dict[str, float]:
        """Computes the metrics of all of a split's rows in their order, the task's first one first.

        Args:
            predictions: logits or label scores [rows, classes]; values [rows] or [rows, 1]; or written texts.
        """
        if self.benchmark is None:
            return self.kind.metrics(predictions, split.truth)
        if split.rows is None:
            raise ValueError(f"{split.source} lacks the rows of {self.benchmark.name}: it is not of this task")
        return self.benchmark.judge(self.kind.benchmark_values(self.benchmark, predictions, split.rows), split.rows)

    def compute_metrics(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> Callable[[Any], dict[str, float]]:
        """Returns the function that transformers' Trainer calls with the predictions of a split's rows, in their order."""

        def compute(evaluated: Any) -> dict[str, float]:
            predictions = evaluated.predictions
            if isinstance(predictions, tuple):
                predictions = predictions[0]
            return self.metrics(self.kind.from_trainer(predictions, tokenizer, evaluated.label_ids), split)

        return compute

    def best_metric(self, metric_for_best_model: str | None = None) -> tuple[str, bool]:
        """Returns the metric that tells the best checkpoint (by default the task's first), and whether more of it is better."""
        if self.benchmark is None:
            return self.kind.best_metric(metric_for_best_model)
        loss = ["loss"] if "loss" in self.kind.evaluated else []
        choices = [*self.benchmark.metrics, *loss]
        name = choices[0] if metric_for_best_model is None else metric_for_best_model.removeprefix("eval_")
        if name not in choices:
            raise ValueError(
                f"`metric_for_best_model`: {metric_for_best_model} is unknown: {self.benchmark.name} has {', '.join(choices)}"
            )
        return name, is_better_higher(name)


def _speak_of_single_labels(counts: LabelCounts, source: str, column: str, *, asked: bool) -> None:
    """Says that nearly all labels occur once, as texts to be written do; ValueError where no kind was asked for."""
    rows, once = sum(counts.rows.values()), sum(count == 1 for count in counts.rows.values())
    if rows < FEWEST_TO_DOUBT or once < 0.9 * rows:
        return
    doubt = f"{source}: {once} of {rows} rows have a label ({column!r}) that no other row has"
    if not asked:
        raise ValueError(
            f'{doubt}: are they texts to be written? `kind="text2text"` (with a model that writes); '
            'if they are classes: `kind="classification"`'
        )
    say(f"{doubt}: texts to be written are learned with the task text2text")


def _labelled(rows: Rows, source: str) -> Rows:
    """Leaves out rows without a label, and says how many. ValueError if no row has one."""
    keep = [i for i, label in enumerate(rows.labels) if label is not None]
    if not keep:
        raise ValueError(
            f"{source} holds no labels, as the benchmarks' test files: train and evaluate on another split"
        )
    if len(keep) == len(rows):
        return rows
    say(f"{source}: {len(rows) - len(keep)} of {len(rows)} rows have no label and are left out")
    groups = None if rows.groups is None else [rows.groups[i] for i in keep]
    return Rows([rows.fields[i] for i in keep], [rows.labels[i] for i in keep], groups)
