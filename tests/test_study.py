"""The accuracy study: GLUE's tasks from files, tasks as text to write, and what is said where something is missing."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf

from bench.accuracy import stage_table, study
from bench.accuracy.bootstrap import scores_of
from bench.accuracy.study import decode_predictions, encode_predictions
from bench.text import language_models, real_text
from bench.text.written import collator_of, judge, text_loss, written_rows
from tiny_models import backbone
from tiny_text import reviews, tokenizer


def write_tsv(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def cola_lines(count, source):
    return [(source, n % 2, "", f"sentence {source} {n}") for n in range(count)]


def test_few_training_rows_keep_four_fifths_where_a_dev_part_is_taken_from_them(tmp_path):
    for name, count in (("train", 300), ("dev", 6)):
        write_tsv(tmp_path / "CoLA" / f"{name}.tsv", cola_lines(count, name))
    task = real_text.load_task("cola", tmp_path)
    assert {part: len(texts) for part, texts in task.texts.items()} == {"train": 240, "dev": 60, "test": 6}


def test_a_test_file_with_labels_in_some_rows_is_refused(tmp_path):
    for name in ("train", "dev", "test"):
        write_tsv(
            tmp_path / "SST-2" / f"{name}.tsv", [("sentence", "label"), *((f"{name} {n}", n % 2) for n in range(9))]
        )
    assert len(real_text.load_task("sst2", tmp_path).labels["test"]) == 9
    rows = [("sentence", "label"), ("one", 1), ("two", -1), ("three", 0)]
    write_tsv(tmp_path / "SST-2" / "test.tsv", rows)
    with pytest.raises(ValueError, match="1 of 3 rows in sst2's test file have no label"):
        real_text.load_task("sst2", tmp_path)


def test_a_constant_prediction_correlates_with_nothing():
    assert scores_of(np.ones((2, 4)), np.array([[0, 1, 0, 1], [1, 0, 1, 1]]), "matthews").tolist() == [0, 0]


def test_cola_without_labels_in_its_test_file_is_judged_on_both_dev_files_and_has_dev_rows_off_the_training_rows(
    tmp_path,
):
    for name, count in (("train", 520), ("dev", 6), ("out_of_domain_dev", 4)):
        write_tsv(tmp_path / "CoLA" / f"{name}.tsv", cola_lines(count, name))
    write_tsv(tmp_path / "CoLA" / "test.tsv", [("index", "sentence"), (0, "a sentence")])
    task = real_text.load_task("cola", tmp_path)
    assert {part: len(texts) for part, texts in task.texts.items()} == {"train": 20, "dev": 500, "test": 10}
    assert task.texts["test"][0] == "sentence dev 0" and task.texts["test"][-1] == "sentence out_of_domain_dev 3"
    assert not set(task.texts["train"]) & set(task.texts["dev"]) and task.labels["test"][:2] == [0, 1]
    assert (task.metric, task.label_names, task.pairs) == ("matthews", ["unacceptable", "acceptable"], None)
    assert task.prompts["test"][0] == "cola sentence: sentence dev 0"


def test_a_task_whose_test_file_has_labels_is_judged_on_it(tmp_path):
    for name, count in (("train", 5), ("dev", 4), ("test", 3)):
        header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
        write_tsv(
            tmp_path / "MRPC" / f"{name}.tsv", [header, *((n % 2, 1, 2, f"a {n}", f"b {n}") for n in range(count))]
        )
    task = real_text.load_task("mrpc", tmp_path / "MRPC")
    assert {part: len(texts) for part, texts in task.texts.items()} == {"train": 5, "dev": 4, "test": 3}
    assert task.texts["dev"][1] == "a 1" and task.pairs["dev"][1] == "b 1" and task.labels["dev"] == [0, 1, 0, 1]


def test_a_stage_with_tasks_of_glue_asks_for_their_directory_and_a_missing_model_is_one_line(monkeypatch, capsys):
    def refused(stage):
        monkeypatch.setattr(sys, "argv", ["study", *stage])
        with pytest.raises(SystemExit) as stopped:
            study.main()
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "paper_search has tasks of GLUE: give the directory of its files (--glue DIRECTORY)" in refused(
        ["paper_search"]
    )
    assert "sst2" in refused(["paper_search", "--glue", "absent"])
    # Of this module alone: transformers keeps for good what it once found missing.
    without = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(language_models, "importlib", without)
    monkeypatch.setattr(study, "read", lambda stage: [])
    monkeypatch.setattr(study, "load_task", lambda name, glue=None: None)
    monkeypatch.setattr(language_models, "cache", lambda: language_models.Path("absent"))
    assert "gguf is not installed: pip install -e '.[bench-lm]'" in refused(["gemma3"])


def written_task():
    parts = {part: reviews(12, seed=n) for n, part in enumerate(("train", "dev", "test"))}
    texts = {part: [text for text, _ in rows] for part, rows in parts.items()}
    labels = {part: [int(label == "positive") for _, label in rows] for part, rows in parts.items()}
    return real_text.Task("tiny", "single_label_classification", ["negative", "positive"], texts, labels)


def test_a_written_task_is_judged_by_the_likeliest_label_the_whole_answer_and_its_loss():
    task, made = written_task(), tokenizer("llama")
    model = backbone("llama", hf.AutoModelForCausalLM).eval()
    rows, collate = written_rows(task, "dev", made, 16), collator_of(task, made)
    assert all(len(row["input_ids"]) <= 16 for row in rows)
    found = judge(model, rows, collate, task, "dev")
    losses, right, scores = [], [], []
    for row in rows:
        by_label = []
        for label in (0, 1):
            batch = collate([row | {"labels": label}])
            with torch.no_grad():
                output = model(**batch)
            wanted = batch["labels"][0, 1:] != -100
            by_label.append(-float(output.loss) * int(wanted.sum()))
            if label == row["labels"]:
                losses.append(float(output.loss))
                likeliest = output.logits[0, :-1].argmax(-1)
                right.append(bool((likeliest == batch["labels"][0, 1:])[wanted].all()))
        scores.append(by_label)
    assert found.predictions == np.argmax(scores, axis=1).tolist()
    assert found.score == np.mean(np.array(found.predictions) == task.labels["dev"])
    assert found.exact_match == np.mean(right) and found.answer_loss == pytest.approx(np.mean(losses), rel=1e-4)
    text = task.texts["test"][0]
    ids = made(text, return_tensors="pt").input_ids
    assert text_loss(model, made, [text], 64) == pytest.approx(
        float(model(input_ids=ids, labels=ids).loss.detach()), rel=1e-4
    )


def test_a_text_that_is_written_is_judged_by_the_loss_of_each_row(monkeypatch, tmp_path):
    folder = tmp_path / "sport"
    folder.mkdir()
    for n in range(1300):
        (folder / f"{n}.txt").write_text(f"Title {n % 7}\n\n  The  lead {n} of a story, {'and more ' * 20}\n\nThe end.")
    (folder / "again.txt").write_bytes((folder / "0.txt").read_bytes())  # a copy counts once
    (folder / "empty.txt").write_text("A title alone\n")
    monkeypatch.setattr(real_text, "_topics", lambda: [folder])
    task, made = real_text.load_task("headlines"), tokenizer("llama")
    assert {part: len(texts) for part, texts in task.texts.items()} == {"train": 200, "dev": 500, "test": 600}
    text, answer = task.texts["dev"][0], task.answers["dev"][0]
    lead, cue = text.split("\n")
    assert len(lead.split()) == real_text.LEAD_WORDS and cue == "Headline:"
    number = int(lead.split()[2])
    assert lead.startswith(f"The lead {number} of a story,") and answer == f" Title {number % 7}"

    model = backbone("llama", hf.AutoModelForCausalLM).eval()
    rows, collate = written_rows(task, "dev", made, 64)[:40], collator_of(task, made)
    found = judge(model, rows, collate, task, "dev")
    losses = []
    for row in rows:
        with torch.no_grad():
            losses.append(float(model(**collate([row])).loss))
    assert found.predictions == pytest.approx([1000 * loss for loss in losses], rel=1e-3)
    assert found.score == pytest.approx(np.mean(losses), rel=1e-4) and found.exact_match == 0
    stored = decode_predictions(encode_predictions(np.asarray(found.predictions))).astype(float)
    assert scores_of(stored, np.zeros(40), "loss") == pytest.approx(found.score, abs=1e-3)


def test_a_stages_table_has_every_arm_and_the_differences_from_the_first(tmp_path, monkeypatch, capsys):
    labels = np.arange(40) % 2
    task = real_text.Task("sst2", "single_label_classification", ["a", "b"], {}, {"test": labels.tolist()})
    lines = []
    for arm, wrong in (("EPT", 4), ("LoRA", 8)):
        for seed in range(3):
            predictions = labels.copy()
            predictions[:wrong] = 1 - predictions[:wrong]
            lines.append(
                {"arm": arm, "task": "sst2", "seed": seed, "score": 1 - wrong / 40, "trained_parameters": 1200, "steps": 9,
                 "predictions": study.encode_predictions(predictions), "machine": {"device": "a CPU"}}
            )  # fmt: skip
    (tmp_path / "paper_search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(stage_table, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "load_task", lambda name, glue: task)
    arguments = ["stage_table", "paper_search", "--draws", "200"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        stage_table.main()
    assert "give the directory of its files (--glue DIRECTORY)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--glue", str(tmp_path)])
    stage_table.main()
    table = (tmp_path / "paper_search.md").read_text()
    assert "| EPT | 1,200 | 0.9000 ± 0.0000 (3 seeds) |" in table and "| LoRA | 1,200 | 0.8000" in table
    assert "| EPT − LoRA | +10.00 | +" in table and "steps 9" in table and "device a CPU" in table
    assert "rows alone" not in table
    assert (tmp_path / "paper_search.png").stat().st_size
    # Other files, whose test part has another number of rows, do not give other differences from the same lines.
    fewer = real_text.Task("sst2", "single_label_classification", ["a", "b"], {}, {"test": labels[:30].tolist()})
    monkeypatch.setattr(study, "load_task", lambda name, glue: fewer)
    with pytest.raises(ValueError, match="a line of EPT has 40 predictions, but sst2's test part has 30 rows"):
        stage_table.main()
