"""`ept predict` for classes and values: tables, probabilities of all classes, and objects in jsonl."""

import datetime
import decimal
import io
import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest

from ept.cli import main
from ept.cli.predict_input import Lines
from ept.cli.predict_output import Output
from tiny_text import reviews, save_model, write_csv


def command(*argv) -> int:
    return main([str(word) for word in argv])


def trained(place, name, rows, *more) -> str:
    data = write_csv(place / f"{name}.csv", rows, header=None)
    return trained_on(place, name, data, "--no_header", *more)


def trained_on(place, name, data, *more) -> str:
    assert command(
        "train", "--model_name_or_path", place / "model", "--train_file", data, "--output_dir", place / name,
        "--max_steps", 1, "--prompt_length", 4, "--token_rank", 6, "--disable_tqdm", "true", "--use_cpu",
        *more,
    ) == 0  # fmt: skip
    return str(place / name)


def trained_on_lines(place) -> str:
    """An adapter whose classes' names end with a line end."""
    data = place / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": f"{label}\n"}) + "\n" for text, label in reviews(8)))
    return trained_on(place, "lines", data)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model and adapters that one step trained: single/, pairs/ and scores/."""
    place = tmp_path_factory.mktemp("predict")
    save_model(place / "model")
    rows = reviews(8)
    trained(place, "single", rows, "--text_column", 0, "--label_column", 1)
    pairs = [(*text.split(" ", 1), label) for text, label in rows]
    trained(place, "pairs", pairs, "--text_column", 0, "--text_pair_column", 1, "--label_column", 2)
    trained(place, "scores", [(text, len(text) + 0.5) for text, _ in rows], "--text_column", 0, "--label_column", 1)
    return place


def test_a_table_is_read_as_one_and_its_label_and_header_are_no_text(place, tmp_path, capsys):
    text = 'text,label\n"the film was good, so good",positive\na dull plot,negative\n'
    (tmp_path / "test.csv").write_text(text)
    adapter = ["--adapter", place / "single"]
    (tmp_path / "lines.txt").write_text("the film was good, so good\na dull plot\n")
    assert command("predict", *adapter, "--input_file", tmp_path / "lines.txt") == 0
    lines = capsys.readouterr().out
    # The adapter was trained on a file without a header; this one has one, and its first row is named by number.
    assert command("predict", *adapter, "--input_file", tmp_path / "test.csv") == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    settings = json.loads((place / "single" / "run.json").read_text()) | {"no_header": False, "columns": {}}
    (place / "single" / "run.json").write_text(json.dumps(settings))
    assert command("predict", *adapter, "--input_file", tmp_path / "test.csv") == 0
    assert capsys.readouterr().out == lines


def test_all_probabilities_are_written_on_request(place, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"id": "x", "text": "the film"}\n{"id": "y", "text": "a plot"}\n')
    run = ["predict", "--adapter", place / "single", "--input_file", tmp_path / "in.jsonl", "--text_column", "text"]
    assert command(*run, "--all_probabilities") == 0
    for line in capsys.readouterr().out.splitlines():
        label, probability, *all_of_them = line.split("\t")
        values = {name: float(value) for name, value in (entry.split("=") for entry in all_of_them)}
        assert values[label] == float(probability) == max(values.values()) and sum(values.values()) == pytest.approx(1)
    for more, keys in (
        ([], ["id", "label", "probability"]),
        (["--all_probabilities"], ["id", "label", "probability", "probabilities"]),
    ):
        out = tmp_path / f"out{len(more)}.jsonl"
        assert command(*run, "--output_file", out, *more) == 0
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [list(record) for record in records] == [keys, keys] and [r["id"] for r in records] == ["x", "y"]
    assert records[0]["probabilities"][records[0]["label"]] == records[0]["probability"]
    assert command(*run, "--output_file", out, "--overwrite_output_file") == 0
    assert len(out.read_text().splitlines()) == 2 and "probabilities" not in out.read_text()


def test_a_run_goes_on_by_rows_where_a_label_has_a_line_end(place, tmp_path, monkeypatch):
    adapter = trained_on_lines(place)
    rows = "".join(json.dumps({"text": text}) + "\n" for text, _ in reviews(6))
    (tmp_path / "in.jsonl").write_text(rows)
    run = [
        "predict",
        "--adapter",
        adapter,
        "--input_file",
        tmp_path / "in.jsonl",
        "--batch_size",
        2,
        "--all_probabilities",
    ]
    assert command(*run, "--output_file", tmp_path / "whole.txt") == 0
    whole = (tmp_path / "whole.txt").read_text().splitlines()
    write, batches = Output.write, iter(range(2))

    def write_or_stop(*batch):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        write(*batch)

    monkeypatch.setattr(Output, "write", write_or_stop)
    assert command(*run, "--output_file", tmp_path / "part.txt") == 130
    monkeypatch.setattr(Output, "write", write)
    assert command(*run, "--output_file", tmp_path / "part.txt") == 0
    assert (tmp_path / "part.txt").read_text().splitlines() == whole and len(whole) == 6


def test_a_byte_order_mark_is_no_part_of_the_first_line(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "plain.txt").write_bytes(b"great\r\ngreat\r\n")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfgreat\r\ngreat\r\n")
    assert [row.texts for row in Lines(str(tmp_path / "marked.txt"), pairs=False)] == [("great",), ("great",)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "marked.txt").read_bytes())))
    assert list(Lines(None, pairs=False)) == list(Lines(str(tmp_path / "plain.txt"), pairs=False))


def test_ids_that_json_has_no_form_for_are_written_as_text_or_null(place, tmp_path):
    ids = [datetime.date(2020, 1, 2), None]
    moments = [datetime.datetime(2020, 1, 2, 3, 4), datetime.datetime(2021, 1, 2)]
    columns = {
        "dates": (ids, ["2020-01-02", None]),
        "moments": (moments, ["2020-01-02T03:04:00", "2021-01-02T00:00:00"]),
        "floats": ([float("nan"), 1.5], [None, 1.5]),
        "sums": ([decimal.Decimal("1.50"), decimal.Decimal("2.25")], ["1.50", "2.25"]),
        "marks": ([b"a", b"b"], ["b'a'", "b'b'"]),
    }
    table = {name: values for name, (values, _) in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(table | {"text": ["the film", "a plot"]}), tmp_path / "in.parquet")
    run = ["predict", "--adapter", place / "single", "--input_file", tmp_path / "in.parquet", "--text_column", "text"]
    for name, (_, written) in columns.items():
        out = tmp_path / f"{name}.jsonl"
        assert command(*run, "--id_column", name, "--output_file", out) == 0
        assert [json.loads(line, parse_constant=pytest.fail)["id"] for line in out.read_text().splitlines()] == written


@pytest.mark.parametrize("device", ["/dev/full", "a pipe"])
def test_a_device_or_a_pipe_is_refused_as_the_output_file_before_the_model_is_loaded(
    device, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ept.pretrained.SavedAdapter.load", None)
    (tmp_path / "in.txt").write_text("the film\n")
    if device == "a pipe":
        device = tmp_path / "pipe"
        os.mkfifo(device)
    with pytest.raises(SystemExit):
        command("predict", "--adapter", place / "single", "--input_file", tmp_path / "in.txt", "--output_file", device)
    assert f"--output_file {device} is a device or a pipe" in capsys.readouterr().err


def test_pairs_and_values_of_a_table(place, tmp_path, capsys):
    (tmp_path / "in.tsv").write_text("a\tb\nthe film\tthe plot\n")
    run = ["predict", "--input_file", tmp_path / "in.tsv", "--no_header"]
    assert command(*run, "--adapter", place / "pairs", "--text_column", 0, "--text_pair_column", 1) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    out = tmp_path / "out.jsonl"
    assert command(*run, "--adapter", place / "scores", "--text_column", 0, "--output_file", out) == 0
    assert [list(json.loads(line)) for line in out.read_text().splitlines()] == [["id", "value"]] * 2
