"""Labels of words (NER): words as tokens, spans and their scores, and the command line from a file to predictions."""

import io
import json
import sys

import pytest
import transformers as hf
from test_cli import SMALL, last_json, refused
from tokenizers import Tokenizer, models, pre_tokenizers

from ept.cli import main
from ept.tasks.kinds import TokenClassification
from ept.tasks.tagging import encode_words, spans_of
from tiny_text import FILLER, GOOD, save_model, tokenizer

NAMES = ("B-GOOD", "I-GOOD", "O")


def sentences(n: int) -> list[dict]:
    """Words, of which some are a span of one or two."""
    rows = []
    for i in range(n):
        span = [GOOD[i % 5], *([GOOD[(i + 1) % 5]] if i % 2 else [])]
        words = [FILLER[i % 7], *span, FILLER[i % 11], FILLER[i % 3]]
        rows.append({"tokens": words, "ner_tags": ["O", "B-GOOD", *["I-GOOD"] * (len(span) - 1), "O", "O"]})
    return rows


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("tagging")
    save_model(place / "bert")
    write(place / "rows.jsonl", sentences(48))
    return place


def train(place, output, *more, steps=24):
    return main([
        "train", "--model_name_or_path", str(place / "bert"), "--train_file", str(place / "rows.jsonl"),
        "--output_dir", str(output), "--max_steps", str(steps), *SMALL, *map(str, more),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def adapter(place):
    rates = ["--head_learning_rate", 0.05, "--learning_rate", 0.05]
    assert train(place, place / "adapter", "--validation_file", place / "rows.jsonl", *rates) == 0
    return place / "adapter"


def test_lists_of_words_and_labels_are_learned_named_and_judged(adapter, place, capsys):
    settings, record = (json.loads((adapter / name).read_text()) for name in ("adapter_config.json", "run.json"))
    assert settings["label_names"] == list(NAMES) and settings["base_model_class"] == "BertForTokenClassification"
    assert record["task"] == "token_classification" and record["metrics"]["eval_entity_f1"] > 0.9
    assert main(["eval", "--adapter", str(adapter), "--test_file", str(place / "rows.jsonl")]) == 0
    metrics = last_json(capsys)
    assert list(metrics) == ["entity_f1", "entity_precision", "entity_recall", "word_accuracy", "rows"]
    trained = {name.removeprefix("eval_"): value for name, value in record["metrics"].items()}
    assert all(metrics[name] == pytest.approx(trained[name]) for name in list(metrics)[:-1])


def test_predictions_are_a_label_a_word_from_lines_and_from_tables_alike(adapter, place, tmp_path, capsys, monkeypatch):
    rows = sentences(7)
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(" ".join(r["tokens"]) + "\n" for r in rows).encode()))
    )
    capsys.readouterr()
    assert main(["predict", "--adapter", str(adapter)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.split()) for line in lines] == [len(row["tokens"]) for row in rows]
    file, out = (
        write(tmp_path / "new.jsonl", [{"id": f"r{i}", "tokens": r["tokens"]} for i, r in enumerate(rows)]),
        tmp_path / "out.jsonl",
    )
    assert main(["predict", "--adapter", str(adapter), "--input_file", file, "--output_file", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["id"] for record in records] == [f"r{i}" for i in range(7)]
    assert [" ".join(record["labels"]) for record in records] == lines
    assert records[1]["labels"] == rows[1]["ner_tags"] and records[1]["entities"] == [
        {"label": "GOOD", "start": 1, "end": 3}
    ]
    assert main(["predict", "--adapter", str(adapter), "--input_file", file, "--max_seq_length", "4"]) == 0
    cut = capsys.readouterr()
    assert [len(line.split()) for line in cut.out.splitlines()] == [2] * 7  # beside two special tokens
    assert "\n7 texts were cut to 4 tokens: the words after them get no label\n" in cut.err.replace("\r", "\n")
    assert "no classes of rows" in refused(capsys, ["predict", "--adapter", adapter, "--all_probabilities"])


@pytest.mark.parametrize("row, message", [
    ({"tokens": ["the", "film"], "ner_tags": ["O"]}, "row 3: 2 words ('tokens') and 1 labels ('ner_tags')"),
    ({"tokens": ["the", ""], "ner_tags": ["O", "O"]}, "row 3: word 2 ('tokens') is empty"),
    ({"tokens": ["the", "film"], "ner_tags": ["O", None]}, "row 3: the label ('ner_tags') is missing for a word"),
    ({"tokens": ["the", "film"], "ner_tags": None}, "row 3: the label ('ner_tags') is missing"),
])  # fmt: skip
def test_rows_that_are_not_words_with_a_label_each_are_refused_before_training(row, message, place, tmp_path, capsys):
    command = ["train", "--model_name_or_path", place / "bert", "--output_dir", tmp_path / "out", "--train_file"]
    for number, rows in ((3, [*sentences(2), row]), (1, [row, *sentences(2)])):
        file = write(tmp_path / "rows.jsonl", rows)
        assert message.replace("row 3", f"row {number}") in refused(capsys, [*command, file])


def test_what_goes_with_rows_alone_is_refused(place, tmp_path, capsys):
    command = ["train", "--model_name_or_path", place / "bert", "--output_dir", tmp_path / "out"]
    rows = [*command, "--train_file", place / "rows.jsonl"]
    assert "--head mean gives one label a row" in refused(capsys, [*rows, "--head", "mean"])
    assert "--streaming is not for token_classification" in refused(capsys, [*rows, "--streaming", "--max_steps", 2])
    text = tmp_path / "text.csv"
    text.write_text("text,label\nthe film,O\n")
    refusal = refused(capsys, [*command, "--train_file", text, "--task", "token_classification"])
    assert "must be a list of words" in refusal or "give a list with one label a word" in refusal


def test_an_encoder_decoder_is_told_which_models_label_words(place, tmp_path, capsys):
    model = save_model(tmp_path / "t5", "t5", hf.AutoModelForSeq2SeqLM, eos_token_id=4)
    command = ["train", "--model_name_or_path", model, "--output_dir", tmp_path / "out"]
    file = ["--train_file", write(tmp_path / "x.jsonl", sentences(4))]
    for task in ([], ["--task", "token_classification"]):
        refusal = refused(capsys, [*command, *file, *task])
        assert "labels no words (--task token_classification): take an encoder, such as BERT" in refusal


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token a byte, a space before a word among them; it has no unknown token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return hf.PreTrainedTokenizerFast(tokenizer_object=made)


def test_a_label_stands_at_the_first_token_of_its_word():
    words = ["the", "film", "zero\u200bwidth"]
    (row,), cut = encode_words(tokenizer(), [words], [[3, 4, 5]], None)
    assert row["labels"] == [-100, 3, 4, 5, -100] and cut == 0
    (row,), cut = encode_words(tokenizer(), [words], [[3, 4, 5]], 4)
    assert row["labels"] == [-100, 3, 4, -100] and cut == 1
    (row,), _ = encode_words(byte_tokenizer(), [["ab", "c", "de"]], [[1, 2, 3]], None)
    assert row["labels"] == [1, -100, -100, 2, -100, 3, -100]  # a space is a token here, and begins no word


def test_a_word_that_the_tokenizer_leaves_out_is_an_unknown_one():
    from tokenizers import normalizers

    cleaning = tokenizer()
    cleaning.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    (row,), _ = encode_words(cleaning, [["the", "\u200b", "film"]], [[3, 4, 5]], None)
    assert row["labels"] == [-100, 3, 4, 5, -100] and row["input_ids"][2] == cleaning.unk_token_id


@pytest.mark.parametrize("labels, spans", [
    ("O B-A I-A O", [("A", 1, 3)]),
    ("B-A B-A I-B I-B", [("A", 0, 1), ("A", 1, 2), ("B", 2, 4)]),
    ("I-A I-A O I-A", [("A", 0, 2), ("A", 3, 4)]),
    ("NOUN VERB VERB O", [("NOUN", 0, 1), ("VERB", 1, 2), ("VERB", 2, 3)]),
    ("B-A-1 I-A-1", [("A-1", 0, 2)]),
    ("", []),
])  # fmt: skip
def test_labels_of_words_stand_for_spans(labels, spans):
    assert spans_of(labels.split()) == spans


def test_spans_are_right_where_label_and_both_ends_are():
    kind = TokenClassification(("B-A", "I-A", "O"))
    truth = [["B-A", "I-A", "O", "B-A"], ["O"]]
    metrics = kind.metrics([[0, 2, 2, 0], [2]], truth)
    expected = {"entity_f1": 0.5, "entity_precision": 0.5, "entity_recall": 0.5, "word_accuracy": 0.8}
    assert metrics == pytest.approx(expected)
    assert set(kind.metrics([[]], [[]]).values()) == {0.0}
