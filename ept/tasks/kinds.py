"""The kinds of tasks, one class each, and the table of them.

A kind knows all that differs between them: the backbone it needs, its rows as tokens, its batches, its predictions, how
they are judged and how a line of them reads. A new kind is a new class and a row in KINDS; its trainer is a row in
`ept.training.trainer.TRAINERS`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ept.backbone.loading import (
    architecture_of,
    load_causal,
    load_classifier,
    load_seq2seq,
    load_token_classifier,
    read_config,
)
from ept.backbone.traits import IGNORE_INDEX
from ept.console import say
from ept.data.chats import is_chat
from ept.files.run_record import RUN_NAME
from ept.tasks.continuation import ContinuationCollator, candidates, contexts
from ept.tasks.glue import BenchmarkTask, Rows
from ept.tasks.kind import TaskKind, Texts, answers_cut
from ept.tasks.metrics import Answers
from ept.tasks.predicting import (
    Predictor,
    answer_loss,
    answer_predictor,
    score_predictor,
    text_predictor,
    word_predictor,
)
from ept.tasks.tagging import encode_words, spans_of
from ept.tasks.writing import Exchange, ExchangeCollator, encode_exchanges, packed, read_chat, read_pair, read_question

if TYPE_CHECKING:
    from datasets import Dataset

    from ept.data.columns import Columns

__all__ = [
    "ASKED",
    "KINDS",
    "CausalText2Text",
    "Classification",
    "Continuation",
    "MultiLabel",
    "Regression",
    "Text2Text",
    "TokenClassification",
    "asked_kind",
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


class _OfOneClass(TaskKind):
    """A row has one class: the one with the highest of its logits or scores [rows, classes]."""

    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        return Answers(truth, _chosen(predictions), num_classes=predictions.shape[-1])

    def as_text(self, predictions: Tensor) -> Iterator[str]:
        """The likeliest label and its probability among the labels with a tab between."""
        words, best = self.words, predictions.softmax(-1).max(-1)
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield f"{words[label]}\t{probability:.6f}"

    def records(self, predictions: Tensor) -> Iterator[dict[str, Any]]:
        """Yields the likeliest `label` of each row, its `probability`, and all `probabilities` by name."""
        words = self.words
        for row in predictions.softmax(-1).tolist():
            best, row = max(range(len(row)), key=row.__getitem__), [round(value, 6) for value in row]
            yield {
                "label": words[best],
                "probability": row[best],
                "probabilities": dict(zip(words, row, strict=True)),
            }


class Classification(_Headed, _OfOneClass):
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

    def as_text(self, predictions: Tensor) -> Iterator[str]:
        """Writes every label above the threshold with its probability, the likeliest first; a row without has an empty line."""
        for row in predictions.sigmoid():
            order = row.argsort(descending=True)
            pairs = [(self.words[i], p) for i, p in zip(order.tolist(), row[order].tolist(), strict=True)]
            yield "\t".join(f"{label}\t{p:.6f}" for label, p in pairs if p > self.threshold)

    def records(self, predictions: Tensor) -> Iterator[dict[str, Any]]:
        """Yields the `labels` above the threshold, the likeliest first, and all `probabilities` by name."""
        for row in predictions.sigmoid().tolist():
            probabilities = {name: round(value, 6) for name, value in zip(self.words, row, strict=True)}
            chosen = [name for name, value in zip(self.words, row, strict=True) if value > self.threshold]
            yield {
                "labels": sorted(chosen, key=probabilities.__getitem__, reverse=True),
                "probabilities": probabilities,
            }


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

    def as_text(self, predictions: Tensor) -> Iterator[str]:
        """The value with six digits."""
        yield from (f"{value:.6g}" for value in predictions.flatten().tolist())

    def records(self, predictions: Tensor) -> Iterator[dict[str, Any]]:
        """Yields the `value`."""
        yield from ({"value": value} for value in predictions.flatten().tolist())


class TokenClassification(_Headed):
    """A head with logits for each token, of which the first of every word says the word's label, see `ept.tasks.tagging`."""

    name = "token_classification"
    evaluated = ("entity_f1", "entity_precision", "entity_recall", "word_accuracy", "loss")
    label_form = "words"
    can_stream = False
    reads_words = True

    @property
    def gives_probabilities(self) -> bool:
        return False  # they are of words, and not of a row

    def load_backbone(self, name_or_path: str, *, head: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        if architecture_of(read_config(name_or_path)) == "seq2seq":
            raise ValueError(
                f"{name_or_path} is an encoder-decoder, which labels no words (`kind=token_classification`): take an encoder, "
                "such as BERT or ModernBERT"
            )
        if head == "mean":
            raise ValueError(
                "`head=mean` gives one label a row, and token_classification labels each word: leave it out"
            )
        model = load_token_classifier(name_or_path, len(self.words), dtype=dtype)
        model.config.id2label = dict(enumerate(self.words))
        model.config.label2id = {name: number for number, name in enumerate(self.words)}
        return model

    @classmethod
    def adapts(cls, model_class: str, problem_type: str | None) -> bool:
        return model_class.endswith("ForTokenClassification")

    @classmethod
    def saved_label_names(cls, settings: dict[str, Any], record: dict[str, Any], config_file: str) -> list[str] | None:
        return Classification.saved_label_names(settings, record, config_file)

    def benchmark_values(self, task: BenchmarkTask, predictions: Any, rows: Rows) -> list[float]:
        raise ValueError(f"{task.name} has one label a row, which {self.name} does not judge")

    @classmethod
    def choose_columns(cls, table: "Dataset", source: str, wanted: "Columns") -> "Columns":
        from ept.data.columns import choose_tagged_columns  # `datasets`, which it imports, is optional

        return choose_tagged_columns(table, source, wanted)

    def encode_table(
        self,
        table: "Dataset",
        source: str,
        columns: "Columns",
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        max_target_length: int,
    ) -> tuple["Dataset", list[Any], list[str]]:
        """As `TaskKind.encode_table`; a row is judged by the labels of the words that are left of it."""
        from datasets import Dataset

        from ept.data.columns import words_of
        from ept.data.labels import Labels

        words = words_of(table, source, str(columns.text))
        labels = Labels(self.label_names).encode_words(table, source, columns)
        rows, cut = encode_words(tokenizer, words, labels, limit)
        truth = [[self.words[label] for label in row["labels"] if label != IGNORE_INDEX] for row in rows]
        remarks = (
            [f"{cut} of {len(rows)} rows were cut to {limit} tokens; words after them are not judged"] if cut else []
        )
        return Dataset.from_list(rows), truth, remarks

    def encode_texts(self, tokenizer: PreTrainedTokenizerBase, texts: Texts, limit: int | None) -> list[dict[str, Any]]:
        rows = [text.split() if isinstance(text, str) else text for (text,) in texts]
        encoded, cut = encode_words(tokenizer, rows, None, limit)
        if cut:
            say(f"{cut} texts were cut to {limit} tokens: the words after them get no label")
        return encoded

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, multiple: int | None = None) -> Any:
        return DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=multiple)

    def predictor(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
        return word_predictor(model, tokenizer)

    def from_trainer(self, predictions: Any, tokenizer: PreTrainedTokenizerBase, labels: Any = None) -> list[list[int]]:
        chosen = torch.as_tensor(predictions).argmax(-1)
        return [row[mark != IGNORE_INDEX].tolist() for row, mark in zip(chosen, torch.as_tensor(labels), strict=True)]

    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        return Answers(truth, [[self.words[number] for number in row] for row in predictions])

    def as_text(self, predictions: list[list[int]]) -> Iterator[str]:
        """The label of each word with spaces between."""
        yield from (" ".join(self.words[number] for number in row) for row in predictions)

    def records(self, predictions: list[list[int]]) -> Iterator[dict[str, Any]]:
        """Yields the `labels` of the words, and the `entities` among them: label, first word, first word after it."""
        for row in predictions:
            labels = [self.words[number] for number in row]
            entities = [{"label": label, "start": start, "end": end} for label, start, end in spans_of(labels)]
            yield {"labels": labels, "entities": entities}


class Text2Text(TaskKind):
    """An encoder-decoder that writes the label, or any text."""

    name = "text2text"
    evaluated: ClassVar[tuple[str, ...]] = ("loss", "exact_match", "token_f1")
    label_form = None
    writes_text = True

    def load_backbone(self, name_or_path: str, *, head: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        if architecture_of(read_config(name_or_path)) != "seq2seq":
            raise ValueError(
                f"{name_or_path} is no model that writes: text2text needs one (T5, BART) or a causal language model "
                "(GPT-2, Llama)"
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

    @classmethod
    def choose_columns(cls, table: "Dataset", source: str, wanted: "Columns") -> "Columns":
        from ept.data.columns import choose_pair_columns  # `datasets`, which it imports, is optional

        return choose_pair_columns(table, source, wanted)

    def targets(
        self, table: "Dataset", source: str, column: str, tokenizer: PreTrainedTokenizerBase, max_target_length: int
    ) -> tuple[list[Any], list[Any], int]:
        from ept.data.tokens import tokenize_targets  # as above

        return list(table[column]), *tokenize_targets(table, source, column, tokenizer, max_target_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, multiple: int | None = None) -> Any:
        return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)

    def predictor(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
        return text_predictor(model, tokenizer, max_new_tokens)

    def loss(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Any, batch_size: int) -> float | None:
        """Takes the mean over the tokens to be written."""
        return answer_loss(model, rows, self.collator(tokenizer, model), batch_size)

    def from_trainer(self, predictions: Any, tokenizer: PreTrainedTokenizerBase, labels: Any = None) -> list[str]:
        if predictions.ndim == 3:  # with predict_with_generate=False, the logits of the given text
            predictions = predictions.argmax(-1)
        ids = torch.as_tensor(predictions)
        return tokenizer.batch_decode(ids.masked_fill(ids < 0, tokenizer.pad_token_id), skip_special_tokens=True)

    def answers(self, predictions: Any, truth: list[Any]) -> Answers:
        return Answers([text.strip() for text in truth], [text.strip() for text in predictions])

    def as_text(self, predictions: list[str]) -> Iterator[str]:
        """The text as it was written."""
        yield from predictions

    def records(self, predictions: list[str]) -> Iterator[dict[str, Any]]:
        """Yields the `text` as it was written."""
        yield from ({"text": text} for text in predictions)


class CausalText2Text(Text2Text):
    """A causal language model that writes the answer to a text or to a conversation, see `ept.tasks.writing`."""

    name = "causal_text2text"
    asked_as = Text2Text.name
    reads_one_text = True

    def load_backbone(self, name_or_path: str, *, head: str = "auto", dtype: str = "auto") -> PreTrainedModel:
        return load_causal(name_or_path, dtype)

    @classmethod
    def adapts(cls, model_class: str, problem_type: str | None) -> bool:
        return model_class in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    @classmethod
    def benchmark_labels(cls, task: BenchmarkTask) -> tuple[str, ...] | None:
        raise ValueError(
            f"{task.name}: a causal model learns a benchmark's labels as the continuation of the text: "
            '`kind="continuation"`, or with a head: `kind="classification"`'
        )

    @classmethod
    def choose_columns(cls, table: "Dataset", source: str, wanted: "Columns") -> "Columns":
        from ept.data.columns import choose_writing_columns  # `datasets`, which it imports, is optional

        return choose_writing_columns(table, source, wanted)

    @classmethod
    def of_texts(cls, table: "Dataset", columns: "Columns") -> "CausalText2Text":
        return cls(reads_chat=is_chat(table[0][columns.text]))

    def target_limit(self, max_length: int | None, max_target_length: int) -> int:
        """Allows at most three quarters of a row, so that a quarter is left to the text."""
        return max_target_length if max_length is None else min(max_target_length, max_length * 3 // 4)

    def text_limit(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, max_target_length: int = 0
    ) -> int | None:
        return None if max_length is None else max_length - self.target_limit(max_length, max_target_length)

    def encode_table(
        self,
        table: "Dataset",
        source: str,
        columns: "Columns",
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        max_target_length: int,
    ) -> tuple["Dataset", list[Any], list[str]]:
        """As `TaskKind.encode_table`; a row holds text and answer, and its labels the answer's tokens alone."""
        from datasets import Dataset

        exchanges = self._exchanges(enumerate(table, start=1), source, columns, tokenizer)
        rows, cut, cut_answers = encode_exchanges(tokenizer, exchanges, limit, max_target_length)
        remarks = [f"{cut} of {len(rows)} texts were cut to their last {limit} tokens"] if cut else []
        if cut_answers:
            remarks.append(answers_cut(cut_answers, len(rows), max_target_length) + ", without their end")
        return Dataset.from_list(rows), [exchange.reference for exchange in exchanges], remarks

    def stream_encoder(
        self,
        source: str,
        columns: "Columns",
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        max_target_length: int,
    ) -> Callable[[list[tuple[int, dict[str, Any]]]], list[dict[str, Any]]]:
        longest = self.target_limit(max_length, max_target_length)
        limit = self.text_limit(tokenizer, max_length, longest)

        def encode(numbered: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
            return encode_exchanges(tokenizer, self._exchanges(numbered, source, columns, tokenizer), limit, longest)[0]

        return encode

    @staticmethod
    def _exchanges(
        numbered: Iterable[tuple[int, Any]], source: str, columns: "Columns", tokenizer: PreTrainedTokenizerBase
    ) -> list[Exchange]:
        """Reads rows with their numbers, for the errors."""
        exchanges = []
        for number, row in numbered:
            place, text = f"{source}, row {number}", row.get(columns.text)
            if columns.label is None:
                exchanges.append(read_chat(tokenizer, text, f"{place}: {columns.text!r}"))
            else:
                exchanges.append(read_pair(tokenizer, text, row.get(columns.label), place))
        return exchanges

    def encode_texts(self, tokenizer: PreTrainedTokenizerBase, texts: Texts, limit: int | None) -> list[dict[str, Any]]:
        asked = [read_question(tokenizer, row[0], "a text", in_chat=self.reads_chat) for row in texts]
        return encode_exchanges(tokenizer, asked, limit, 0)[0]

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, multiple: int | None = None) -> Any:
        return ExchangeCollator(tokenizer.pad_token_id, multiple or 1)

    def packed(self, rows: Any, room: int, apart: int) -> Any:
        from datasets import Dataset

        return Dataset.from_list(packed(list(rows), room, apart))

    def predictor(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
        return answer_predictor(model, tokenizer, max_new_tokens)


class Continuation(_OfOneClass):
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

    def text_limit(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, max_target_length: int = 0
    ) -> int | None:
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

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, multiple: int | None = None) -> Any:
        return ContinuationCollator(tokenizer, candidates(tokenizer, self.words), multiple or 1)

    def predictor(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Predictor:
        return score_predictor(model, self.collator(tokenizer, model))


KINDS: dict[str, type[TaskKind]] = {
    kind.name: kind
    for kind in (Classification, MultiLabel, Regression, TokenClassification, Text2Text, CausalText2Text, Continuation)
}
ASKED = tuple(dict.fromkeys(kind.asked_as for kind in KINDS.values()))


def asked_kind(asked: str, name_or_path: str) -> str:
    """Returns the name in KINDS of what is asked for: a causal model writes otherwise than an encoder-decoder."""
    causal = asked == Text2Text.name and architecture_of(read_config(name_or_path)) == "causal"
    return CausalText2Text.name if causal else asked


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
    if record.get("task") == Text2Text.name and CausalText2Text.adapts(model_class, None):
        return CausalText2Text(reads_chat=record.get("reads_chat") is True)
    for kind in (Text2Text, Continuation, Regression, MultiLabel, TokenClassification, Classification):
        if kind.adapts(model_class, settings.get("problem_type")):
            return kind(kind.saved_label_names(settings, record, config_file))
    raise ValueError(
        f"{config_file} adapts a {model_class or 'model of no known kind'}: load it with EPTModel.from_pretrained"
    )


def _chosen(predictions: Any) -> list[Any]:
    """Returns the number of the highest of each row's logits or scores [rows, labels]."""
    return torch.as_tensor(predictions).argmax(-1).tolist()


def _refuse_seq2seq(name_or_path: str) -> None:
    if architecture_of(read_config(name_or_path)) == "seq2seq":
        raise ValueError(
            f'{name_or_path} is an encoder-decoder: use `kind="text2text"`, with the labels written as text'
        )
