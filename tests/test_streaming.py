"""`--streaming`: the same rows as read at once, in constant memory, in an order that seed and pass give; going on."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from ept.cli import main
from ept.data.columns import Columns
from ept.data.labels import Labels
from ept.data.streaming import RowStream, StreamError, TokenStream
from ept.training.trainer import EPTTrainer
from tiny_text import reviews, save_model, tokenizer, write_csv


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("streaming")
    save_model(place / "mean", pooling=True)
    write_csv(place / "train.csv", reviews(200))
    return place


def write(path, rows):
    table = Dataset.from_list([{"sentence": text, "label": label} for text, label in rows])
    if path.suffix == ".csv":
        write_csv(path, rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".tsv":
        path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    else:
        table.to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_file_of_every_kind_gives_its_rows(suffix, tmp_path):
    rows = reviews(30)
    stream = RowStream(write(tmp_path / f"x.{suffix}", rows))
    for _ in range(2):  # from the start each time
        assert [(row["sentence"], row["label"]) for row in stream] == rows
    assert stream.head(7)["sentence"] == [text for text, _ in rows[:7]]
    counts = stream.label_counts(Columns("sentence", None, "label"))
    assert counts.rows == {"negative": 15, "positive": 15} and not counts.several


def tokens(path, **settings):
    labels = Labels(("negative", "positive"))
    given = dict(max_length=16, max_target_length=8, batch=4, shuffle_buffer=40, seed=3) | settings
    return TokenStream(RowStream(path), Columns("sentence", None, "label"), labels, tokenizer(), **given)


def test_a_pass_holds_every_row_once_with_its_label_in_an_order_of_its_own(tmp_path):
    rows = reviews(100)
    stream, encode = tokens(write(tmp_path / "x.csv", rows)), tokenizer()
    read = [row for _, row in zip(range(200), stream, strict=False)]
    key = lambda row: (tuple(row["input_ids"]), row["labels"])  # noqa: E731
    want = sorted((tuple(encode(text)["input_ids"]), int(label == "positive")) for text, label in rows)
    assert sorted(map(key, read[:100])) == want == sorted(map(key, read[100:]))
    assert [key(r) for r in read[:100]] != [key(r) for r in read[100:]]
    assert [key(r) for _, r in zip(range(200), stream, strict=False)] == list(map(key, read))
    spread = [max(n) - min(n) for n in ([len(r["input_ids"]) for r in read[i : i + 4]] for i in range(0, 100, 4))]
    assert sum(spread) / len(spread) < 2  # batches of similar length: at random it is 4


def test_the_first_block_waits_for_no_more_rows_than_the_buffer(tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, reviews(40))
    with open(path, "a") as file:
        file.write("a,row,too long\n")
    stream = iter(tokens(str(path)))
    assert len([next(stream) for _ in range(40)]) == 40
    with pytest.raises(StreamError, match="line 42: 3 fields where the first line has 2"):
        next(stream)


@pytest.mark.parametrize("name, content, message", [
    ("x.csv", b"sentence,label\ncaf\xe9,1\n", "line 2: byte 0xe9 is not UTF-8"),
    ("x.tsv", b"text\ttext\na\tb\n", "names a column twice: text, text"),
    ("x.jsonl", b'{"text": "a"}\n{"label": 1}\n', "line 2: its keys label are not those of the first row, text"),
    ("x.jsonl", b'{"text": "a"}\n{\n', "line 2: not valid JSON"),
    ("x.parquet", b"PAR1 but not really", "not a parquet file or is damaged"),
])  # fmt: skip
def test_a_broken_file_is_a_stream_error_that_names_the_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StreamError, match=message):
        list(RowStream(str(tmp_path / name)))


@pytest.mark.parametrize(
    "line, said",
    [("the plot,so-so", "row 41: label 'so-so' is not among the known labels"), ("the plot,", "row 41: the label")],
)
def test_a_bad_row_is_named_by_its_number(line, said, tmp_path):
    path = tmp_path / "x.csv"
    write_csv(path, reviews(40))
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(StreamError, match=said):
        for _ in zip(range(41), tokens(str(path)), strict=False):
            pass


def train(place, output, *more):
    return main([
        "train", "--model_name_or_path", str(place / "mean"), "--train_file", str(place / "train.csv"), "--streaming",
        "--output_dir", str(output), "--prompt_length", "4", "--token_rank", "6", "--disable_tqdm", "true", "--use_cpu",
        "--shuffle_buffer", "64", *map(str, more),
    ])  # fmt: skip


def test_training_from_a_stream_learns_logs_its_rate_and_goes_on_after_sigterm_to_the_same_bits(
    place, tmp_path, monkeypatch
):
    write_csv(tmp_path / "test.csv", reviews(24, seed=5))
    given = ["--max_steps", 60, "--save_steps", 50, "--test_file", tmp_path / "test.csv", "--logging_steps", 20]
    assert train(place, tmp_path / "whole", *given) == 0
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["metrics"]["test_accuracy"] > 0.7
    log = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
    assert [entry["num_input_tokens_seen"] > 0 for entry in log if "loss" in entry] == [True] * 3
    assert all(entry["train_tokens_per_second"] > 0 for entry in log if "loss" in entry)

    step = EPTTrainer.training_step

    def term(trainer, *args, **kwargs):
        if trainer.state.global_step == 33:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(EPTTrainer, "training_step", term)
    with pytest.raises(SystemExit) as stopped:
        train(place, tmp_path / "cut", *given, "--resume_from_checkpoint", "auto")
    assert stopped.value.code == 143 and not (tmp_path / "cut" / "adapter_config.json").exists()
    monkeypatch.undo()
    assert train(place, tmp_path / "cut", *given, "--resume_from_checkpoint", "auto") == 0
    want, got = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(want[key], got[key]) for key in want)


def test_a_stream_without_a_number_of_steps_is_refused(place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(place, tmp_path / "run")
    assert "--streaming needs --max_steps" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_file(tmp_path):
    """The highest resident memory after a file of 1 MB was read, and how far one of 16 MB raises it."""
    program = """
import resource, sys
from test_streaming import tokens
peaks = []
for path, rows in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    for _ in zip(range(rows), tokens(path, shuffle_buffer=200)): pass
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[1] - peaks[0])
"""
    given = []
    for rows in (400, 6_400):
        given += [write_csv(tmp_path / f"{rows}.csv", [("film" * 600, "positive")] * rows), str(rows)]
    here = os.path.dirname(__file__)
    process = subprocess.run(
        [sys.executable, "-c", program, *given], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(here), here])},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.splitlines()[-1]) < 5e6  # a third of what the larger file alone has more
