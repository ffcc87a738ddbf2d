"""Several labels a row on the command line: from files of each form to metrics and predictions."""

import io
import json
import sys

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from test_cli import SMALL, last_json, refused

from ept.cli import main
from ept.tasks.kinds import MultiLabel, kind_of_adapter
from tiny_text import BAD, FILLER, GOOD, save_model


def topics(n: int) -> list[tuple[str, list[str]]]:
    """Texts with the labels of the words in them: one, both or none."""
    rows = []
    for i in range(n):
        words = [*([GOOD[i % 5]] if i % 2 else []), FILLER[i % 7], *([BAD[i % 3]] if i % 4 > 1 else [])]
        rows.append((" ".join(words), [name for name, there in (("good", i % 2), ("bad", i % 4 > 1)) if there]))
    return rows


def write(path, rows) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "labels": labels}) + "\n" for text, labels in rows))
    else:
        path.write_text("text,labels\n" + "".join(f"{text},{'|'.join(labels)}\n" for text, labels in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("multi_label")
    save_model(place / "mean", pooling=True)
    for suffix in ("jsonl", "csv"):
        write(place / f"rows.{suffix}", topics(48))
    return place


def train(place, output, *more, file="rows.jsonl", steps=60):
    return main([
        "train", "--model_name_or_path", str(place / "mean"), "--train_file", str(place / file), "--output_dir", str(output),
        "--max_steps", str(steps), *SMALL, *map(str, more),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def adapter(place):
    rate = ["--head_learning_rate", 0.05, "--learning_rate", 0.05]
    assert train(place, place / "adapter", "--validation_file", place / "rows.jsonl", *rate) == 0
    return place / "adapter"


def test_lists_are_learned_named_and_judged(adapter, place, capsys):
    settings, record = (json.loads((adapter / name).read_text()) for name in ("adapter_config.json", "run.json"))
    assert settings["label_names"] == ["bad", "good"] and settings["problem_type"] == "multi_label_classification"
    assert record["task"] == "multi_label" and record["metrics"]["eval_micro_f1"] > 0.9
    assert main(["eval", "--adapter", str(adapter), "--test_file", str(place / "rows.jsonl")]) == 0
    metrics = last_json(capsys)
    assert list(metrics) == ["micro_f1", "macro_f1", "exact_match", "rows"]
    assert metrics["exact_match"] == record["metrics"]["eval_exact_match"]


def test_predict_prints_every_label_above_the_threshold_with_its_probability(adapter, capsys, monkeypatch):
    texts = "\n".join(text for text, _ in topics(4)).encode()  # of no label, one, one and both

    def predict(*more):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts)))
        assert main(["predict", "--adapter", str(adapter), *more]) == 0
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    none, good, bad, both = predict()
    assert none == [""] and good[::2] == ["good"] and bad[::2] == ["bad"] and sorted(both[::2]) == ["bad", "good"]
    assert float(both[1]) >= float(both[3]) > 0.5
    assert all(sorted(line[::2]) == ["bad", "good"] for line in predict("--threshold", "0"))
    assert predict("--threshold", "0.999999") == [[""]] * 4


def test_a_separator_gives_what_lists_give(place, tmp_path, capsys):
    more = ["--label_separator", "|", "--validation_file", place / "rows.csv"]
    assert train(place, tmp_path / "a", *more, file="rows.csv", steps=2) == 0
    assert (
        train(place, tmp_path / "b", "--task", "multi_label", "--validation_file", place / "rows.jsonl", steps=2) == 0
    )
    a, b = (json.loads((tmp_path / name / "run.json").read_text())["metrics"] for name in "ab")
    assert a["eval_loss"] == b["eval_loss"]
    capsys.readouterr()
    assert main(["eval", "--adapter", str(tmp_path / "a"), "--test_file", str(place / "rows.csv")]) == 0
    assert last_json(capsys)["rows"] == 48  # the separator is remembered


def test_a_stream_of_lists_is_learned(place, tmp_path):
    more = ["--streaming", "--test_file", place / "rows.jsonl"]
    assert train(place, tmp_path / "out", *more, steps=4) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]["test_loss"] > 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["label_names"] == ["bad", "good"]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--task", "classification"], "are lists, of which classification makes nothing: leave --task out"),
        (["--task", "regression"], "are lists, of which regression makes nothing"),
        (["--task", "classification", "--label_separator", ";"], "--label_separator is for several labels a row"),
        (["--label_column", "text", "--text_column", "labels"], "row 1: the text ('labels') is list"),
    ],
)
def test_lists_are_refused_by_other_tasks(more, said, place, tmp_path, capsys):
    command = ["train", "--model_name_or_path", place / "mean", "--train_file", place / "rows.jsonl"]
    assert said in refused(capsys, [*command, "--output_dir", tmp_path / "out", "--use_cpu", *more])


def test_a_threshold_is_refused_where_a_row_has_one_label(adapter, place, capsys):
    command = ["eval", "--adapter", adapter, "--test_file", place / "rows.jsonl"]
    assert "--threshold 1.0: a probability" in refused(capsys, [*command, "--threshold", 1])
    config = dict(base_model_class="BertForSequenceClassification", label_names=["a", "b"])
    with pytest.raises(ValueError, match="learned classification"):
        kind_of_adapter(config, {}, "adapter_config.json").with_threshold(0.4)


def test_the_metrics_are_scikit_learns():
    torch.manual_seed(0)
    logits, truth = torch.randn(40, 5), torch.randint(0, 2, (40, 5))
    predicted = (logits.sigmoid() > 0.3).int()
    metrics = MultiLabel(list("abcde"), threshold=0.3).metrics(logits.numpy(), truth.float().tolist())
    assert metrics["micro_f1"] == pytest.approx(f1_score(truth, predicted, average="micro"))
    assert metrics["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert metrics["exact_match"] == pytest.approx(accuracy_score(truth, predicted))
