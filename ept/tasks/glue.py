"""The paper's thirteen tasks of GLUE and SuperGLUE: their published files, inputs, label words and metrics.

A task's rows are read from GLUE's tsv, SuperGLUE's jsonl or the hub's parquet (or from the hub itself) into the same
fields, and shown to a model as texts: one or two for an encoder, one (T5's form) for a text-to-text or a causal model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ept.tasks.metrics import Answers, metrics_of

__all__ = ["BENCHMARK_TASKS", "BenchmarkTask", "Rows", "benchmark_task"]


@dataclass(frozen=True)
class Rows:
    """A split of a task.

    Attributes:
        fields: each row's texts by the task's field names.
        labels: class numbers, or scores; None where a file has none, as the benchmarks' test files.
        groups: what MultiRC's answers are grouped by, one (paragraph, question) a row; else None.
    """

    fields: list[dict[str, str]]
    labels: list[int | float | None]
    groups: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.fields)

    def known_labels(self) -> list[int | float]:
        """Returns the labels of rows that all have one; ValueError otherwise."""
        labels = [label for label in self.labels if label is not None]
        if len(labels) < len(self):
            raise ValueError(f"{len(self) - len(labels)} of {len(self)} rows have no label")
        return labels


@dataclass(frozen=True)
class BenchmarkTask:
    """What a task's files hold, and how its rows are shown to a model and judged.

    Attributes:
        name: also the hub's configuration.
        folders: names that the benchmark's own archive gives its directory.
        hub: the hub's data set.
        columns: each text field, with the names of the column that holds it, in the order of a file without a header.
        texts: for an encoder: one or two texts, made of the fields.
        prompt: for a text-to-text or causal model: T5's input.
        cut: the fields that give way where a row is too long (several: the longer ones first).
        labels: the classes' names, which T5 writes, in the order of the hub's numbers; empty for a regression.
        metrics: names in `ept.tasks.metrics.METRICS`, that of published results first.
        label_columns: names of the column that holds the label.
        prepare: makes the texts' fields from a row's columns where they are not the columns themselves.
    """

    name: str
    folders: tuple[str, ...]
    hub: str
    columns: dict[str, tuple[str, ...]]
    texts: tuple[str, ...]
    prompt: str
    cut: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    label_columns: tuple[str, ...] = ("label",)
    prepare: Callable[[dict[str, Any]], dict[str, str]] | None = None

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def words(self) -> tuple[str, ...]:
        """What a model writes: the labels, or the numbers from 0.0 to 5.0 in steps of 0.2."""
        return self.labels or tuple(f"{i / 5:.1f}" for i in range(26))

    def word(self, label: float) -> str:
        """Returns the word for a class number, or the nearest number word for a score."""
        return f"{round(label * 5) / 5:.1f}" if self.is_regression else self.labels[int(label)]

    def read_word(self, text: str, truth: float) -> float:
        """Returns the label that a written text stands for. What is no label counts as wrong: as a class other than the true
        one, or as the score -1 (T5's convention)."""
        text = text.strip()
        if not self.is_regression:
            return self.labels.index(text) if text in self.labels else (int(truth) + 1) % len(self.labels)
        try:
            value = float(text)
        except ValueError:
            return -1.0
        return value if 0 <= value <= 5 else -1.0

    def judge(self, predicted: list[float], rows: Rows) -> dict[str, float]:
        """Computes the task's metrics of predicted class numbers or scores, in the order of `metrics`."""
        number = len(self.labels)
        return metrics_of(self.metrics, Answers(list(rows.labels), list(predicted), number, range(number), rows.groups))


def benchmark_task(name: str) -> BenchmarkTask:
    """Returns the task of a name, in any case and with or without hyphens (SST-2, sst2)."""
    task = BENCHMARK_TASKS.get(re.sub(r"[-_ ]", "", name.lower()))
    if task is None:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(BENCHMARK_TASKS)}")
    return task


# ---------------------------------------------------------------------- the tasks


def _mark(text: str, *spans: tuple[int, int, str]) -> str:
    """Puts a sign before and after each span of characters (start, end, sign); spans may lie in each other."""
    signs = []  # at one place: what ends before what begins, of two that begin the longer first
    for start, end, sign in spans:
        signs += [(start, 1, -end, f"{sign} "), (end, 0, -start, f" {sign}")]
    for at, _, _, sign in sorted(signs, reverse=True):
        text = text[:at] + sign + text[at:]
    return text


def _wic(row: dict[str, Any]) -> dict[str, str]:
    """Returns the sentences, and the same with a sign around the word, by its characters' positions."""
    fields = {name: row[name] for name in ("word", "sentence1", "sentence2")}
    for n in "12":
        text, start, end = row[f"sentence{n}"], int(row[f"start{n}"]), int(row[f"end{n}"])
        if not 0 <= start < end <= len(text):
            raise ValueError(f"the word's characters {start} to {end} are not in sentence{n} of {len(text)} characters")
        fields[f"marked{n}"] = _mark(text, (start, end, "*"))
    return fields


def _span(text: str, span: str, index: int) -> tuple[int, int]:
    """Characters of a span of words that stands at word `index`: where its text is found nearest to that word, since
    some published indices are off by a few words; else the words themselves."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    near = words[index][0] if 0 <= index < len(words) else None
    places = [m.span() for m in re.finditer(rf"(?<!\w){re.escape(span)}(?!\w)", text, re.IGNORECASE)] if span else []
    if places:
        return min(places, key=lambda place: abs(place[0] - (near or 0)))
    if near is None:
        raise ValueError(f"the span {span!r} is not in the text, which has {len(words)} words and no word {index}")
    return near, words[min(len(words), index + max(1, len(span.split()))) - 1][1]


def _wsc(row: dict[str, Any]) -> dict[str, str]:
    """Returns the text with * around the noun and # around the pronoun, and what follows the last of them."""
    text = row["text"]
    spans = [(*_span(text, row[f"span{n}_text"], int(row[f"span{n}_index"])), sign) for n, sign in ((1, "*"), (2, "#"))]
    last = max(end for _, end, _ in spans)
    return {
        "marked": _mark(text[:last], *spans),
        "rest": text[last:],
        "noun": row["span1_text"],
        "pronoun": row["span2_text"],
    }


def _multirc(row: dict[str, Any]) -> dict[str, str]:
    """Returns the paragraph without its markup, the question and the answer."""
    paragraph = re.sub(r"</?b>", "", re.sub(r"<br\s*/?>", " ", row["paragraph"]))
    return {"paragraph": paragraph, "question": row["question"], "answer": row["answer"]}


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


_BOOLS = ("False", "True")
_ENTAILS = ("entailment", "not_entailment")
_PREMISE: dict[str, tuple[str, ...]] = {"premise": ("premise", "sentence1"), "hypothesis": ("hypothesis", "sentence2")}
_PAIR = ("{sentence1}", "{sentence2}")

BENCHMARK_TASKS = {task.name: task for task in (
    BenchmarkTask("mnli", ("MNLI",), "glue", _PREMISE, ("{premise}", "{hypothesis}"),
        "mnli hypothesis: {hypothesis} premise: {premise}", ("premise",), ("entailment", "neutral", "contradiction"),
        label_columns=("label", "gold_label")),
    BenchmarkTask("qqp", ("QQP",), "glue", _same("question1", "question2"), ("{question1}", "{question2}"),
        "qqp question1: {question1} question2: {question2}", ("question1", "question2"), ("not_duplicate", "duplicate"),
        ("accuracy", "f1"), ("label", "is_duplicate")),
    BenchmarkTask("qnli", ("QNLI",), "glue", _same("question", "sentence"), ("{question}", "{sentence}"),
        "qnli question: {question} sentence: {sentence}", ("sentence",), _ENTAILS),
    BenchmarkTask("sst2", ("SST-2",), "glue", _same("sentence"), ("{sentence}",),
        "sst2 sentence: {sentence}", ("sentence",), ("negative", "positive")),
    BenchmarkTask("stsb", ("STS-B",), "glue", _same("sentence1", "sentence2"), _PAIR,
        "stsb sentence1: {sentence1} sentence2: {sentence2}", ("sentence1", "sentence2"), (),
        ("pearson", "spearman"), ("label", "score")),
    BenchmarkTask("mrpc", ("MRPC",), "glue",
        {"sentence1": ("sentence1", "#1 String"), "sentence2": ("sentence2", "#2 String")}, _PAIR,
        "mrpc sentence1: {sentence1} sentence2: {sentence2}", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"),
        ("accuracy", "f1"), ("label", "Quality")),
    BenchmarkTask("rte", ("RTE",), "glue", _PREMISE, ("{premise}", "{hypothesis}"),
        "rte sentence1: {premise} sentence2: {hypothesis}", ("premise",), _ENTAILS),
    BenchmarkTask("cola", ("CoLA",), "glue", _same("sentence"), ("{sentence}",),
        "cola sentence: {sentence}", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    BenchmarkTask("multirc", ("MultiRC",), "super_glue", _same("paragraph", "question", "answer"),
        ("{paragraph}", "{question} {answer}"),
        "multirc question: {question} answer: {answer} paragraph: {paragraph}", ("paragraph",), _BOOLS,
        ("f1", "exact_match"), prepare=_multirc),
    BenchmarkTask("boolq", ("BoolQ",), "super_glue", _same("passage", "question"), ("{question}", "{passage}"),
        "boolq passage: {passage} question: {question}", ("passage",), _BOOLS),
    BenchmarkTask("wic", ("WiC",), "super_glue", _same("word", "sentence1", "sentence2", "start1", "end1", "start2", "end2"),
        ("{word}: {marked1}", "{marked2}"),
        "wic sentence1: {sentence1} sentence2: {sentence2} word: {word}", ("sentence1", "sentence2", "marked1", "marked2"),
        _BOOLS, prepare=_wic),
    BenchmarkTask("wsc", ("WSC", "wsc.fixed"), "super_glue",
        _same("text", "span1_text", "span2_text", "span1_index", "span2_index"),
        ("{marked}{rest}", "{pronoun}: {noun}"),
        "wsc text: {marked}{rest}", ("rest",), _BOOLS, prepare=_wsc),
    BenchmarkTask("cb", ("CB",), "super_glue", _same("premise", "hypothesis"), ("{premise}", "{hypothesis}"),
        "cb hypothesis: {hypothesis} premise: {premise}", ("premise",), ("entailment", "contradiction", "neutral"),
        ("accuracy", "f1")),
)}  # fmt: skip
