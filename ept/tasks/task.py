"""What is learned: the kind of model, its labels, its rows as tokens, and how its predictions are judged.

One `Problem` for the rows of own files and for the benchmarks' tasks, for `ept train`, `ept eval` and `ept sweep`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from ept.console import say
from ept.data.labels import Labels
from ept.data.tables import Columns, choose_columns
from ept.data.tokens import tokenize, tokenize_targets
from ept.tasks.continuation import ContinuationCollator, candidates, contexts
from ept.tasks.fitting_text import fit_texts
from ept.tasks.glue import BenchmarkTask, Rows
from ept.tasks.metrics import best_metric, metrics_of

__all__ = ["Problem", "Split"]


@dataclass
class Split:
    """Rows that a model reads.

    Attributes:
        data: `input_ids`, `attention_mask` and `labels` of each row: class numbers, scores, or the tokens to write.
        truth: what predictions are judged by: the rows' labels, or the texts to write.
        rows: the benchmark's rows, for its metrics.
        source: where they are from.
    """

    data: Dataset
    truth: list
    rows: Rows | None
    source: str


@dataclass(frozen=True)
class Problem:
    """What a model learns.

    Attributes:
        kind: one of `ept.tasks.TASKS`.
        label_names: the classes' names, or the words whose continuation is scored; None for regression and text2text.
        columns: of own files.
        benchmark: a task of the benchmarks, in place of the columns.
    """

    kind: str
    label_names: tuple[str, ...] | None
    columns: Columns
    benchmark: BenchmarkTask | None = None

    @classmethod
    def of_table(cls, table: Dataset, source: str, wanted: Columns, kind: str | None, stream: Any = None) -> "Problem":
        """What the training rows of an own file say; `kind` where it is not what their labels suggest. Where the table
        holds the first rows of a RowStream, that is asked for the others' labels."""
        columns = choose_columns(table, source, wanted)
        if kind == "text2text":
            return cls(kind, None, columns)
        if stream is not None and kind != "regression":
            table = stream.distinct(columns.chosen_label)  # one pass over all rows: a class may come late
        labels = Labels.of(table, source, columns.chosen_label, "classification" if kind == "continuation" else kind)
        if labels.names is None:
            return cls("regression", None, columns)
        return cls(kind or "classification", labels.names, columns)

    @classmethod
    def of_benchmark(cls, task: BenchmarkTask, kind: str | None) -> "Problem":
        """A benchmark's task; `kind` "text2text" or "continuation", or None for a head of the task's own kind."""
        if kind in (None, "classification", "regression"):
            own = "regression" if task.is_regression else "classification"
            if kind not in (None, own):
                raise ValueError(
                    f"{task.name} is a {own}, not a {kind}: leave --task out, or give an adapter of this task"
                )
            return cls(own, task.labels or None, Columns(), task)
        return cls(kind, task.words if kind == "continuation" else None, Columns(), task)

    def encode(
        self,
        table: Dataset | Rows,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        target_limit: int,
    ) -> Split:
        """The rows as tokens in at most `limit`; says once how many were cut, and how many have no label."""
        if self.kind == "continuation" and limit is not None:
            limit -= max(map(len, candidates(tokenizer, self._words())))
        rows: Rows | None = None
        if isinstance(table, Rows):
            rows = _labelled(table, source)
            read, columns = self._table(rows, source, tokenizer, limit)
        else:
            read, columns = table, self.columns
        label = columns.chosen_label
        truth: list[Any]
        encoded: list[Any]
        if self.kind == "text2text":
            truth = list(read[label])
            encoded = tokenize_targets(read, source, label, tokenizer, target_limit)
        else:
            truth = encoded = Labels(self.label_names).encode(read, source, label)
        if self.kind == "continuation":
            texts = [read[name] for name in (columns.text, columns.text_pair) if name is not None]
            ids = contexts(tokenizer, [" ".join(parts) for parts in zip(*texts, strict=True)], limit)
            data = Dataset.from_dict(
                {"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids], "labels": encoded}
            )
        else:
            data, cut = tokenize(read, source, columns, tokenizer, limit, encoded)
            if cut:
                say(f"{source}: {cut} of {len(data)} rows were cut to {limit} tokens")
        return Split(data, truth, rows, source)

    def _table(self, rows: Rows, source: str, tokenizer: Any, limit: int | None) -> tuple[Dataset, Columns]:
        """A benchmark's rows as text and label, its passages cut to fit; the labels as words where they are written."""
        task, headed = self._task(), self.kind in ("classification", "regression")
        templates = task.texts if headed else (task.prompt,)

        def count(texts: list[tuple[str, ...]]) -> list[int]:
            if self.kind == "continuation":
                return [len(ids) for ids in contexts(tokenizer, [text for (text,) in texts])]
            return [len(ids) for ids in tokenizer(*map(list, zip(*texts, strict=True)), verbose=False)["input_ids"]]

        texts, cut = fit_texts(task, rows, templates, count, limit)
        if cut:
            say(f"{source}: {', '.join(task.cut)} of {cut} of {len(rows)} rows cut to fit in {limit} tokens")
        names = ("text", "text_pair")[: len(templates)]
        columns = {name: list(column) for name, column in zip(names, zip(*texts, strict=True), strict=True)}
        known = rows.known_labels()
        labels = [float(n) for n in known] if self.kind == "regression" else [task.word(n) for n in known]
        return Dataset.from_dict(columns | {"label": labels}), Columns(
            names[0], names[1] if len(names) > 1 else None, "label"
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Makes a padded batch of a split's rows."""
        if self.kind == "continuation":
            return ContinuationCollator(tokenizer, candidates(tokenizer, self._words()))
        return (DataCollatorForSeq2Seq if self.kind == "text2text" else DataCollatorWithPadding)(tokenizer)

    def metrics(self, predictions: Any, split: Split) -> dict[str, float]:
        """The metrics of all of a split's rows in their order, the paper's first.

        Args:
            predictions: logits or label scores [rows, classes]; values [rows] or [rows, 1]; or written texts.
        """
        if self.benchmark is None:
            return metrics_of(self.kind, predictions, split.truth)
        if split.rows is None:
            raise ValueError(f"{split.source} lacks the rows of {self.benchmark.name}: it is not of this problem")
        task = self.benchmark
        found: list[float]
        if self.kind == "text2text":
            known = split.rows.known_labels()
            found = [task.read_word(text, label) for text, label in zip(predictions, known, strict=True)]
        elif self.kind == "regression":
            found = torch.as_tensor(predictions).double().flatten().tolist()
        else:
            found = torch.as_tensor(predictions).argmax(-1).tolist()
            if task.is_regression:
                words = self._words()
                found = [float(words[int(i)]) for i in found]
        return task.judge(found, split.rows)

    def _task(self) -> BenchmarkTask:
        if self.benchmark is None:
            raise ValueError("the rows of a benchmark need its problem: see Problem.of_benchmark")
        return self.benchmark

    def _words(self) -> list[str]:
        """`label_names` of a kind that has some."""
        if self.label_names is None:
            raise ValueError(f"{self.kind} has no label names: give them")
        return list(self.label_names)

    def best_metric(self, wanted: str | None = None) -> tuple[str, bool]:
        """The metric that tells the best checkpoint (by default the paper's), and whether more of it is better."""
        if self.benchmark is None:
            return best_metric(self.kind, wanted)
        name = self.benchmark.metrics[0] if wanted is None else wanted.removeprefix("eval_")
        known = [*self.benchmark.metrics, *([] if self.kind == "continuation" else ["loss"])]
        if name not in known:
            raise ValueError(
                f"--metric_for_best_model {wanted} is unknown: {self.benchmark.name} has {', '.join(known)}"
            )
        return name, name != "loss"


def _labelled(rows: Rows, source: str) -> Rows:
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
