"""What a kind of task must know: the base class of `ept.tasks.kinds`."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ept.tasks.glue import BenchmarkTask, Rows
from ept.tasks.metrics import Answers, is_better_higher, metrics_of
from ept.tasks.predicting import Predictor, logits_predictor, padding_collator

if TYPE_CHECKING:
    from datasets import Dataset

    from ept.data.columns import Columns

__all__ = ["TaskKind", "Texts", "answers_cut", "one_line"]

Texts = list[tuple[Any, ...]]  # one or two texts a row, or a conversation


def answers_cut(cut: int, rows: int, max_target_length: int) -> str:
    """Says how many rows' answers were cut."""
    return f"{cut} of {rows} answers were cut to {max_target_length} tokens (max_target_length)"


def one_line(text: str) -> str:
    """Returns a text with a space for each of its line ends."""
    return " ".join(re.split(r"\r\n|\r|\n", text))


class TaskKind(ABC):
    """A kind of task with its labels.

    Args:
        label_names: the classes' names, or the words whose continuation is scored; None for kinds without.

    Class attributes:
        name: as in KINDS.
        asked_as: as in `--task` and in run.json; by default the name.
        evaluated: what an evaluation gives, "loss" or a metric; the first tells the best checkpoint.
        label_form: "classification", "regression" or "multi_label", what `Labels.of` makes of the label column; "words": a
            label for each word, as `Labels.of_words` reads them; None: text to write.
        has_head: whether the backbone has a head that is trained.
        writes_text: whether predictions are texts that the model generates.
        can_stream: whether a TokenStream can make its rows.
        reads_one_text: whether a row has one text, or a conversation in its place, and no second.
        reads_words: whether a row has one text, or a list of words in its place, and no second.

    Attributes:
        reads_chat: whether texts are messages of a conversation, which a chat template writes.
    """

    name: ClassVar[str]
    asked_as: ClassVar[str]
    evaluated: ClassVar[tuple[str, ...]]
    label_form: ClassVar[str | None]
    has_head: ClassVar[bool] = False
    writes_text: ClassVar[bool] = False
    can_stream: ClassVar[bool] = True
    reads_one_text: ClassVar[bool] = False
    reads_words: ClassVar[bool] = False

    def __init_subclass__(cls, **settings: Any):
        super().__init_subclass__(**settings)
        if "name" in cls.__dict__ and "asked_as" not in cls.__dict__:
            cls.asked_as = cls.name

    def __init__(self, label_names: Sequence[str] | None = None, *, reads_chat: bool = False):
        self.label_names = None if label_names is None else tuple(label_names)
        self.reads_chat = reads_chat

    @property
    def words(self) -> list[str]:
        """`label_names` of a kind that has some; ValueError where they are missing."""
        if self.label_names is None:
            raise ValueError(f"{self.name} has no label names: give them")
        return list(self.label_names)

    @property
    def gives_probabilities(self) -> bool:
        """Whether `records` has all classes' probabilities."""
        return self.label_names is not None

    @property
    def recorded_words(self) -> list[str] | None:
        """The label words that a run's record keeps, where the adapter's config has no place for them."""
        return None

    def with_threshold(self, threshold: float) -> "TaskKind":
        """Returns the kind with another probability above which a row has a label; ValueError where a row has one label."""
        raise ValueError(f"`threshold` is for rows with several labels, and the adapter learned {self.name}")

    # ------------------------------------------------------------------ the model

    @abstractmethod
    def load_backbone(self, name_or_path: str, *, head: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        """Loads the pretrained model that learns this kind; `head` and `dtype` as in `load_classifier`.

        Raises:
            ValueError, OSError: there is no such model, or it does not do this.
        """

    @classmethod
    @abstractmethod
    def adapts(cls, model_class: str, problem_type: str | None) -> bool:
        """Tells whether an adapter of a model of this class learned this kind."""

    @classmethod
    @abstractmethod
    def saved_label_names(cls, settings: dict[str, Any], record: dict[str, Any], config_file: str) -> list[str] | None:
        """Returns the label names in an adapter's config (`settings`) or run record. ValueError where they are missing."""

    # ------------------------------------------------------------------ a benchmark's task

    @classmethod
    def benchmark_labels(cls, task: BenchmarkTask) -> tuple[str, ...] | None:
        """Returns the label names that a benchmark's task has for this kind."""
        return None

    def benchmark_templates(self, task: BenchmarkTask) -> tuple[str, ...]:
        """Returns the templates of the texts that a model is shown."""
        return (task.prompt,)

    def benchmark_label(self, task: BenchmarkTask, label: float) -> float | str:
        """Returns a row's label as the label column holds it."""
        return task.word(label)

    @abstractmethod
    def benchmark_values(self, task: BenchmarkTask, predictions: Any, rows: Rows) -> list[float]:
        """Returns the class numbers or scores that predictions stand for."""

    # ------------------------------------------------------------------ rows

    @classmethod
    def choose_columns(cls, table: "Dataset", source: str, wanted: "Columns") -> "Columns":
        """Chooses the columns to read, those wanted and the only possible ones; ValueError where there are none or several."""
        from ept.data.columns import choose_columns  # `datasets`, which it imports, is optional

        return choose_columns(table, source, wanted)

    @classmethod
    def of_texts(cls, table: "Dataset", columns: "Columns") -> "TaskKind":
        """Makes a kind without labels, for the training rows of a table."""
        return cls()

    def target_limit(self, max_length: int | None, max_target_length: int) -> int:
        """Returns how many tokens may be written where a row has at most `max_length`."""
        return max_target_length

    def text_limit(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, max_target_length: int = 0
    ) -> int | None:
        """Returns how many of `max_length` tokens are left to the text."""
        return max_length

    def encode_table(
        self,
        table: "Dataset",
        source: str,
        columns: "Columns",
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        max_target_length: int,
    ) -> tuple["Dataset", list[Any], list[str]]:
        """Encodes a table's rows; returns them with labels, what predictions are judged by, and sentences on what was cut."""
        truth, labels, cut_answers = self.targets(table, source, columns.chosen_label, tokenizer, max_target_length)
        data, cut = self.tokens(table, source, columns, tokenizer, limit, labels)
        remarks = [f"{cut} of {len(data)} rows were cut to {limit} tokens"] if cut else []
        if cut_answers:
            remarks.append(answers_cut(cut_answers, len(data), max_target_length))
        empty = sum(not text.strip() for text in table[columns.text])
        if empty:
            remarks.append(f"warning: {empty} of {len(data)} rows have an empty text ({columns.text!r})")
        return data, truth, remarks

    def count_tokens(self, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> list[int]:
        """Counts the tokens of each row's texts, uncut."""
        return [len(row["input_ids"]) for row in self.encode_texts(tokenizer, texts, None)]

    def encode_texts(self, tokenizer: PreTrainedTokenizerBase, texts: Texts, limit: int | None) -> list[dict[str, Any]]:
        """Encodes texts as rows of at most `limit` tokens, not padded."""
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        encoded = tokenizer(*map(list, zip(*texts, strict=True)), verbose=False, **cut)
        return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]

    def targets(
        self, table: "Dataset", source: str, column: str, tokenizer: PreTrainedTokenizerBase, max_target_length: int
    ) -> tuple[list[Any], list[Any], int]:
        """Returns what a label column's predictions are judged by, the labels that the model trains on, and how many of
        these were cut."""
        from ept.data.labels import Labels  # `datasets`, which it imports, is optional

        labels = Labels(self.label_names, self.label_form == "multi_label").encode(table, source, column)
        return labels, labels, 0

    def tokens(
        self,
        table: "Dataset",
        source: str,
        columns: "Columns",
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        labels: list[Any],
    ) -> tuple["Dataset", int]:
        """Encodes a table's texts as rows of at most `limit` tokens with `labels`; returns them, and how many rows were cut."""
        from ept.data.tokens import tokenize  # as above

        return tokenize(table, source, columns, tokenizer, limit, labels)

    def stream_encoder(
        self,
        source: str,
        columns: "Columns",
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        max_target_length: int,
    ) -> Callable[[list[tuple[int, dict[str, Any]]]], list[dict[str, Any]]] | None:
        """Returns what encodes rows of a stream, each with its number for the errors; None: as a TokenStream does itself."""
        return None

    def packed(self, rows: Any, room: int, apart: int) -> Any:
        """Packs several encoded rows into each of at most `room` tokens, of which every one takes `apart` more.

        Raises:
            ValueError: the kind has one prediction a row, or an encoder that reads all of it.
        """
        raise ValueError(f"packing is for causal models that write (text2text), not for {self.asked_as}: leave it out")

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, multiple: int | None = None) -> Any:
        """Returns what makes a padded batch of encoded rows; with `multiple`, to a multiple of so many tokens."""
        return padding_collator(model, tokenizer, multiple)

    # ------------------------------------------------------------------ predictions

    def predictor(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
        """Returns the function that predicts for rows of tokens: logits [rows, labels], label scores, or written texts."""
        return logits_predictor(model, tokenizer)

    def loss(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Any, batch_size: int) -> float | None:
        """Computes the loss on encoded rows with labels; None for a kind whose evaluation reports none."""
        return None

    def from_trainer(self, predictions: Any, tokenizer: PreTrainedTokenizerBase, labels: Any = None) -> Any:
        """Turns predictions that transformers' Trainer collected, beside the rows' labels, into what `predictor` gives."""
        return predictions

    @abstractmethod
    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        """Pairs predictions with the truth, for the metrics."""

    def metrics(self, predictions: Any, truth: list[Any]) -> dict[str, float]:
        """Computes the metrics in `evaluated`, in their order."""
        names = [name for name in self.evaluated if name != "loss"]
        return metrics_of(names, self.answers(predictions, truth))

    @classmethod
    def best_metric(cls, metric_for_best_model: str | None = None) -> tuple[str, bool]:
        """Returns the metric that tells the best checkpoint, by default the first, and whether more of it is better."""
        name = cls.evaluated[0] if metric_for_best_model is None else metric_for_best_model.removeprefix("eval_")
        if name not in cls.evaluated:
            raise ValueError(
                f"`metric_for_best_model`: {metric_for_best_model} is unknown: {cls.name} has {', '.join(cls.evaluated)}"
            )
        return name, is_better_higher(name)

    def lines(self, predictions: Any) -> Iterator[str]:
        """Yields each prediction as a line of text."""
        yield from map(one_line, self.as_text(predictions))

    @abstractmethod
    def as_text(self, predictions: Any) -> Iterator[str]:
        """Yields each prediction as text, in which names of classes and what was written may have line ends."""

    @abstractmethod
    def records(self, predictions: Any) -> Iterator[dict[str, Any]]:
        """Yields each prediction as an object for JSON; of a kind with classes, with all their `probabilities` by name."""
