"""The table of task kinds: every kind has a trainer, is found again from its adapter, and reads what a trainer collects."""

import numpy as np
import pytest
import torch
import transformers as hf

from ept.backbone.loading import architecture_of
from ept.tasks.kinds import (
    KINDS,
    Classification,
    Continuation,
    MultiLabel,
    Regression,
    Text2Text,
    TokenClassification,
    default_kind,
    kind_of_adapter,
)
from ept.tasks.metrics import METRICS
from ept.training.trainer import TRAINERS
from tiny_models import CONFIGS
from tiny_text import save_model, tokenizer


def test_every_kind_has_a_trainer_and_metrics_that_are_known():
    assert TRAINERS.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert kind.name == name and set(kind.evaluated) <= METRICS.keys() | {"loss"}
        assert kind.best_metric() == (kind.evaluated[0], kind.evaluated[0] != "loss")
    assert Regression.best_metric("eval_mse") == ("mse", False)


@pytest.mark.parametrize("name, settings, architecture", [
    ("bert", {}, "encoder"), ("distilbert", {}, "encoder"), ("bert", {"is_decoder": True}, "causal"),
    ("llama", {}, "causal"), ("gpt2", {}, "causal"), ("t5", {}, "seq2seq"), ("bart", {}, "seq2seq"),
])  # fmt: skip
def test_the_architecture_is_told_from_the_config(name, settings, architecture):
    config = CONFIGS[name]()
    for key, value in settings.items():
        setattr(config, key, value)
    assert architecture_of(config) == architecture


@pytest.mark.parametrize("name, auto, kinds", [
    ("bert", hf.AutoModel, (None, None)), ("llama", hf.AutoModelForCausalLM, (None, "continuation")),
    ("t5", hf.AutoModelForSeq2SeqLM, ("text2text", "text2text")),
])  # fmt: skip
def test_a_models_architecture_decides_its_kind_where_the_labels_do_not(name, auto, kinds, tmp_path):
    path = save_model(tmp_path / name, name, auto)
    assert tuple(default_kind(path, causal_continues=continues) for continues in (False, True)) == kinds


@pytest.mark.parametrize("kind, settings, record", [
    (Classification, {"base_model_class": "BertForSequenceClassification", "label_names": ["a", "b"]}, {}),
    (Classification, {"base_model_class": "MeanPoolingForSequenceClassification", "label_names": ["a", "b"]}, {}),
    (Regression, {"base_model_class": "BertForSequenceClassification", "problem_type": "regression"}, {}),
    (Text2Text, {"base_model_class": "T5ForConditionalGeneration"}, {}),
    (TokenClassification, {"base_model_class": "BertForTokenClassification", "label_names": ["a", "b"]}, {}),
    (Continuation, {"base_model_class": "LlamaForCausalLM"}, {"label_words": ["a", "b"]}),
])  # fmt: skip
def test_a_kind_is_found_again_from_its_adapter(kind, settings, record):
    restored = kind_of_adapter(settings, record, "adapter_config.json")
    assert type(restored) is kind
    assert restored.label_names == (("a", "b") if settings.get("label_names") or record else None)


@pytest.mark.parametrize("settings, message", [
    ({"base_model_class": "BertForSequenceClassification"}, "adapter_config.json names no labels"),
    ({"base_model_class": "LlamaForCausalLM"}, "names no label words"),
    ({"base_model_class": "BertForTokenClassification"}, "adapter_config.json names no labels"),
    ({"base_model_class": "BertForMaskedLM"}, "adapts a BertForMaskedLM"),
    ({}, "adapts a model of no known kind"),
])  # fmt: skip
def test_an_adapter_of_no_kind_or_without_labels_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        kind_of_adapter(settings, {}, "adapter_config.json")


def test_metrics_and_lines_of_each_kind():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    for kind in (Classification(("no", "yes")), Continuation(("no", "yes"))):
        assert kind.metrics(logits.numpy(), [0, 1, 1]) == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
        assert [line.split("\t")[0] for line in kind.lines(logits)] == ["no", "yes", "no"]
    values = Regression().metrics(np.array([[1.0], [2.0], [4.0]], dtype=np.float32), [1.0, 2.0, 3.0])
    assert values == {"pearson": pytest.approx(0.98198), "spearman": 1.0, "mse": pytest.approx(1 / 3)}
    assert Regression().metrics(torch.ones(2, 1), [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0, "mse": 0.5}
    assert list(Regression().lines(torch.tensor([[0.5], [2.0]]))) == ["0.5", "2"]
    assert Text2Text().metrics(["a b ", "c"], ["a b", "d"]) == {"exact_match": 0.5, "token_f1": 0.5}
    assert list(Text2Text().lines(["two\nlines"])) == ["two lines"]


def test_a_prediction_is_one_line_whatever_its_label_is_called():
    names = ("no\n", "yes\r\n", "may\rbe")
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    for kind in (Classification(names), Continuation(names), MultiLabel(names, 0.6)):
        assert [line.split("\t")[0] for line in kind.lines(logits)] == ["no ", "yes ", "may be"]
        assert [next(iter(record.values())) for record in kind.records(logits)][2] in ("may\rbe", ["may\rbe"])
    assert list(TokenClassification(names).lines([[0, 1], [2]])) == ["no  yes ", "may be"]


def test_written_texts_are_read_from_ids_and_from_logits_with_what_is_ignored_left_out():
    words = tokenizer("t5")
    ids = np.array([words("the film").input_ids, [*words("plot").input_ids, -100]])
    assert Text2Text().from_trainer(ids, words) == ["the film", "plot"]
    logits = np.zeros((1, 2, len(words)))
    logits[0, 0, ids[0, 0]] = logits[0, 1, ids[0, 1]] = 1.0
    assert Text2Text().from_trainer(logits, words) == ["the film"]


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_every_kind_can_be_padded_to_a_multiple_with_its_labels(name):
    """As for compiled training; what is padding is masked, and no label."""
    labels_of_row = {"token_classification": lambda n: [0] * n, "text2text": lambda n: [5] * (n + 1)}
    labels_of_row |= {"causal_text2text": lambda n: [-100, *[5] * (n - 1)]}
    labels_of_row |= {"multi_label": lambda n: [0.0, 1.0], "regression": lambda n: 0.5}
    labels = labels_of_row.get(name, lambda n: 1)
    rows = [{"input_ids": list(range(5, 5 + n)), "attention_mask": [1] * n, "labels": labels(n)} for n in (3, 9)]
    kind = KINDS[name](["dull", "great"])
    batch = kind.collator(tokenizer("t5"), torch.nn.Module(), 8)([dict(row) for row in rows])
    width = batch["input_ids"].shape[1]
    assert width == 16 and batch["attention_mask"].sum() >= 12
    assert not batch["attention_mask"][:, 12:].any()
    if batch["labels"].dim() == 2 and name != "multi_label":
        assert batch["labels"].shape[1] == 16
        assert (batch["labels"][:, 12:] == -100).all()
