"""The kinds of tasks, one class each, and the table of them.

A kind knows all that differs between them: the backbone it needs, its rows as tokens, its batches, its predictions, how
they are judged and how a line of them reads. A new kind is a new class and a row in KINDS; its trainer is a row in
`ept.training.trainer.TRAINERS`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ept.backbone.loading import architecture_of, load_causal, load_classifier, load_seq2seq, read_config
from ept.files.run_record import RUN_NAME
from ept.tasks.continuation import ContinuationCollator, candidates, contexts
from ept.tasks.glue import BenchmarkTask, Rows
from ept.tasks.kind import TaskKind, Texts
from ept.tasks.metrics import Answers
from ept.tasks.predicting import Predictor, score_predictor, text_predictor

if TYPE_CHECKING:
    from datasets import Dataset

    from ept.data.columns import Columns

__all__ = [
    "KINDS",
    "Classification",
    "Continuation",
    "MultiLabel",
    "Regression",
    "Text2Text",
    "default_kind",
    "kind_of_adapter",
]


class _Headed(TaskKind):
    """A model with a head whose output is a number for each label."""

    has_head = True

    def benchmark_templates(self, task: BenchmarkTask) -> tuple[str, ...]:
        return task.texts

    @classmethod
    def benchmark_labels(cls, task: BenchmarkTask) -> tuple[str, ...] | None:
        return task.labels or None


class Classification(_Headed):
    """A head with a logit for each class."""

    name = "classification"
    evaluated: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "loss")
    label_form = "classification"
    problem_type: ClassVar[str] = "single_label_classification"

    def load_backbone(self, name_or_path: str, *, head: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        _refuse_seq2seq(name_or_path)
        model = load_classifier(name_or_path, len(self.words), self.problem_type, head=head, dtype=dtype)
        model.config.id2label = dict(enumerate(self.words))
        model.config.label2id = {name: number for number, name in enumerate(self.words)}
        return model

    @classmethod
    def adapts(cls, model_class: str, problem_type: str | None) -> bool:
        others = ("regression", MultiLabel.problem_type)
        return model_class.endswith("ForSequenceClassification") and problem_type not in others

    @classmethod
    def saved_label_names(cls, settings: dict[str, Any], record: dict[str, Any], config_file: str) -> list[str] | None:
        if not settings.get("label_names"):
            raise ValueError(f"{config_file} names no labels: the file is damaged, copy it again")
        return settings["label_names"]

    def benchmark_values(self, task: BenchmarkTask, predictions: Any, rows: Rows) -> list[float]:
        return _chosen(predictions)

    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        return Answers(truth, _chosen(predictions), num_classes=predictions.shape[-1])

    def lines(self, predictions: Tensor) -> Iterator[str]:
        """The likeliest label and its probability with a tab between."""
        return _label_lines(self.words, predictions)


class MultiLabel(Classification):
    """A head with a logit for each class, of which a row has any number: those whose probability is above a threshold.

    Args:
        threshold: the probability above which a row has a label.
    """

    name = "multi_label"
    evaluated = ("micro_f1", "macro_f1", "exact_match", "loss")
    label_form = "multi_label"
    problem_type = "multi_label_classification"

    def __init__(self, label_names: Sequence[str] | None = None, threshold: float = 0.5):
        super().__init__(label_names)
        self.threshold = threshold

    def with_threshold(self, threshold: float) -> "MultiLabel":
        if not 0 <= threshold < 1:
            raise ValueError(f"`threshold={threshold}`: a probability is at least 0 and below 1")
        return MultiLabel(self.label_names, threshold)

    @classmethod
    def adapts(cls, model_class: str, problem_type: str | None) -> bool:
        return model_class.endswith("ForSequenceClassification") and problem_type == cls.problem_type

    @classmethod
    def benchmark_labels(cls, task: BenchmarkTask) -> tuple[str, ...] | None:
        return None

    def benchmark_values(self, task: BenchmarkTask, predictions: Any, rows: Rows) -> list[float]:
        raise ValueError(f"{task.name} has one label a row, which {self.name} does not judge")

    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        chosen = torch.as_tensor(predictions).sigmoid() > self.threshold
        return Answers(torch.tensor(truth).int().tolist(), chosen.int().tolist(), num_classes=chosen.shape[-1])

    def lines(self, predictions: Tensor) -> Iterator[str]:
        """Writes every label above the threshold with its probability, the likeliest first; a row without has an empty line."""
        for row in predictions.sigmoid():
            order = row.argsort(descending=True)
            pairs = [(self.words[i], p) for i, p in zip(order.tolist(), row[order].tolist(), strict=True)]
            yield "\t".join(f"{label}\t{p:.6f}" for label, p in pairs if p > self.threshold)


class Regression(_Headed):
    """A head with one value."""

    name = "regression"
    evaluated = ("pearson", "spearman", "mse", "loss")
    label_form = "regression"

    def load_backbone(self, name_or_path: str, *, head: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        _refuse_seq2seq(name_or_path)
        return load_classifier(name_or_path, 1, "regression", head=head, dtype=dtype)

    @classmethod
    def adapts(cls, model_class: str, problem_type: str | None) -> bool:
        return model_class.endswith("ForSequenceClassification") and problem_type == "regression"

    @classmethod
    def saved_label_names(cls, settings: dict[str, Any], record: dict[str, Any], config_file: str) -> list[str] | None:
        return None

    def benchmark_label(self, task: BenchmarkTask, label: float) -> float | str:
        return float(label)

    def benchmark_values(self, task: BenchmarkTask, predictions: Any, rows: Rows) -> list[float]:
        return torch.as_tensor(predictions).double().flatten().tolist()

    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        return Answers([float(value) for value in truth], torch.as_tensor(predictions).double().flatten().tolist())

    def lines(self, predictions: Tensor) -> Iterator[str]:
        """The value with six digits."""
        yield from (f"{value:.6g}" for value in predictions.flatten().tolist())


class Text2Text(TaskKind):
    """An encoder-decoder that writes the label, or any text."""

    name = "text2text"
    evaluated = ("loss", "exact_match")
    label_form = None
    writes_text = True

    def load_backbone(self, name_or_path: str, *, head: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        if architecture_of(read_config(name_or_path)) != "seq2seq":
            raise ValueError(
                f"{name_or_path} is no encoder-decoder: text2text needs one (T5, BART); "
                'a causal language model learns labels with `kind="continuation"`'
            )
        return load_seq2seq(name_or_path, dtype)

    @classmethod
    def adapts(cls, model_class: str, problem_type: str | None) -> bool:
        return model_class in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()

    @classmethod
    def saved_label_names(cls, settings: dict[str, Any], record: dict[str, Any], config_file: str) -> list[str] | None:
        return None

    def benchmark_values(self, task: BenchmarkTask, predictions: Any, rows: Rows) -> list[float]:
        truth = rows.known_labels()
        return [task.read_word(text, label) for text, label in zip(predictions, truth, strict=True)]

    def targets(
        self, table: "Dataset", source: str, column: str, tokenizer: PreTrainedTokenizerBase, max_target_length: int
    ) -> tuple[list[Any], list[Any]]:
        from ept.data.tokens import tokenize_targets  # as above

        return list(table[column]), tokenize_targets(table, source, column, tokenizer, max_target_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> Any:
        return DataCollatorForSeq2Seq(tokenizer)

    def predictor(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
        return text_predictor(model, tokenizer, max_new_tokens)

    def from_trainer(self, predictions: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        if predictions.ndim == 3:  # with predict_with_generate=False, the logits of the given text
            predictions = predictions.argmax(-1)
        ids = torch.as_tensor(predictions)
        return tokenizer.batch_decode(ids.masked_fill(ids < 0, tokenizer.pad_token_id), skip_special_tokens=True)

    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        return Answers([text.strip() for text in truth], [text.strip() for text in predictions])

    def lines(self, predictions: list[str]) -> Iterator[str]:
        """The text, its line ends as spaces."""
        yield from (" ".join(text.split("\n")) for text in predictions)


class Continuation(TaskKind):
    """A causal language model that scores each label's words after the text, see `ept.tasks.continuation`."""

    name = "continuation"
    evaluated = ("accuracy", "f1")  # scores of labels have no loss
    label_form = "classification"
    can_stream = False

    @property
    def recorded_words(self) -> list[str] | None:
        return self.words

    def load_backbone(self, name_or_path: str, *, head: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        _refuse_seq2seq(name_or_path)
        if architecture_of(read_config(name_or_path)) != "causal":
            raise ValueError(f"{name_or_path} is no causal language model, which continuation needs: leave out `kind`")
        return load_causal(name_or_path, dtype)

    @classmethod
    def adapts(cls, model_class: str, problem_type: str | None) -> bool:
        return model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    @classmethod
    def saved_label_names(cls, settings: dict[str, Any], record: dict[str, Any], config_file: str) -> list[str] | None:
        words = record.get("label_words")
        if not (isinstance(words, list) and len(words) > 1 and all(isinstance(word, str) for word in words)):
            raise ValueError(
                f"{settings.get('base_model_class')} has no head, and {RUN_NAME} beside the adapter names no label words: "
                "load it with EPTModel.from_pretrained, or train it with ept train"
            )
        return words

    @classmethod
    def benchmark_labels(cls, task: BenchmarkTask) -> tuple[str, ...] | None:
        return task.words

    def benchmark_values(self, task: BenchmarkTask, predictions: Any, rows: Rows) -> list[float]:
        chosen = _chosen(predictions)
        return [float(self.words[number]) for number in chosen] if task.is_regression else chosen

    def text_limit(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
        return None if max_length is None else max_length - max(map(len, candidates(tokenizer, self.words)))

    def encode_texts(self, tokenizer: PreTrainedTokenizerBase, texts: Texts, limit: int | None) -> list[dict[str, Any]]:
        ids = contexts(tokenizer, [" ".join(parts) for parts in texts], limit)
        return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]

    def tokens(
        self,
        table: "Dataset",
        source: str,
        columns: "Columns",
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        labels: list[Any],
    ) -> tuple["Dataset", int]:
        """As `TaskKind.tokens`; texts that are cut are not counted, so that the number is 0."""
        from datasets import Dataset

        texts = [table[name] for name in (columns.text, columns.text_pair) if name is not None]
        rows = self.encode_texts(tokenizer, list(zip(*texts, strict=True)), limit)
        return Dataset.from_list(rows).add_column("labels", labels), 0

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> Any:
        return ContinuationCollator(tokenizer, candidates(tokenizer, self.words))

    def predictor(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
        return score_predictor(model, self.collator(tokenizer, model))

    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        return Answers(truth, _chosen(predictions), num_classes=predictions.shape[-1])

    def lines(self, predictions: Tensor) -> Iterator[str]:
        """The likeliest label and its probability among the labels with a tab between."""
        return _label_lines(self.words, predictions)


KINDS: dict[str, type[TaskKind]] = {
    kind.name: kind for kind in (Classification, MultiLabel, Regression, Text2Text, Continuation)
}


def default_kind(name_or_path: str, *, causal_continues: bool) -> str | None:
    """Returns the name of the kind that a model's architecture alone decides; None where the labels decide.

    Args:
        causal_continues: whether a causal model scores the labels' words where nothing else is asked for.
    """
    by_architecture = {"seq2seq": Text2Text.name, "causal": Continuation.name if causal_continues else None}
    return by_architecture.get(architecture_of(read_config(name_or_path)))


def kind_of_adapter(settings: dict[str, Any], record: dict[str, Any], config_file: str) -> TaskKind:
    """Returns the kind that a trained adapter learned, with its labels.

    Args:
        settings, record: the adapter's config and its run record.
        config_file: where the config is, for the errors.

    Raises:
        ValueError: the adapter's model does none of the kinds, or the labels are not known.
    """
    model_class = settings.get("base_model_class") or ""
    for kind in (Text2Text, Continuation, Regression, MultiLabel, Classification):
        if kind.adapts(model_class, settings.get("problem_type")):
            return kind(kind.saved_label_names(settings, record, config_file))
    raise ValueError(
        f"{config_file} adapts a {model_class or 'model of no known kind'}: load it with EPTModel.from_pretrained"
    )


def _chosen(predictions: Any) -> list[Any]:
    """Returns the number of the highest of each row's logits or scores [rows, labels]."""
    return torch.as_tensor(predictions).argmax(-1).tolist()


def _label_lines(words: list[str], predictions: Tensor) -> Iterator[str]:
    best = predictions.softmax(-1).max(-1)
    for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        yield f"{words[label]}\t{probability:.6f}"


def _refuse_seq2seq(name_or_path: str) -> None:
    if architecture_of(read_config(name_or_path)) == "seq2seq":
        raise ValueError(
            f'{name_or_path} is an encoder-decoder: use `kind="text2text"`, with the labels written as text'
        )
