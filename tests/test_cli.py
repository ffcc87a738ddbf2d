"""The command line from end to end on tiny models: train, eval, predict, resume, and one line for each bad input."""

import dataclasses
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import ept
from ept import EPTConfig, EPTModel
from ept.cli import main
from ept.cli.errors import as_options, bad_input_is_one_line
from ept.cli.options import AdapterArguments
from tiny_text import reviews, save_model, tokenizer, write_csv

SMALL = ["--prompt_length", "4", "--token_rank", "6", "--token_dropout", "0", "--disable_tqdm", "true", "--use_cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with tiny models (bert/, mean/, t5/, llama/) and labelled files."""
    place = tmp_path_factory.mktemp("cli")
    save_model(place / "bert")
    save_model(place / "mean", pooling=True)
    save_model(place / "t5", "t5", hf.AutoModelForSeq2SeqLM, eos_token_id=4)
    save_model(place / "llama", "llama", hf.AutoModelForCausalLM)
    for split, n in (("train", 64), ("validation", 24), ("test", 24)):
        write_csv(place / f"{split}.csv", reviews(n, seed=n + len(split)))
    return place


def train(place, output, *more, model="mean", steps=200):
    """Runs `ept train` on the reviews; options in `more` come last and so win."""
    return main([
        "train", "--model_name_or_path", str(place / model), "--train_file", str(place / "train.csv"),
        "--output_dir", str(output), "--max_steps", str(steps), *SMALL, *map(str, more),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def adapter(place):
    """A trained adapter, and its run's record."""
    output = place / "adapter"
    files = ["--validation_file", place / "validation.csv", "--test_file", place / "test.csv"]
    assert train(place, output, *files, "--eval_steps", 50, "--learning_rate", 0.02) == 0
    return output


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, argv) -> str:
    """The one line on standard error with which a command refuses its input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stopped.value.code == 2 and len(said) == 1 and said[0].startswith(f"ept {argv[0]}: error: ")
    return said[0]


def test_a_package_that_an_option_needs_is_named_in_its_librarys_words(capsys):
    words = "The 'deepspeed>=0.9.3' distribution was not found and is required by this application."
    with pytest.raises(SystemExit), bad_input_is_one_line("train"):
        raise PackageNotFoundError(words)
    assert capsys.readouterr().err == f"ept train: error: {words} Install it, or leave out the option that needs it\n"


# ---------------------------------------------------------------------- the three commands


def test_training_learns_the_task_and_writes_adapter_tokenizer_and_record(adapter):
    record = json.loads((adapter / "run.json").read_text())
    assert record["metrics"]["test_accuracy"] > 0.9 and record["metrics"]["eval_accuracy"] > 0.9
    assert record["seed"] == 42 and record["command"].startswith("ept train --model_name_or_path")
    assert record["versions"]["ept"] == ept.__version__ and record["steps"] == 200
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["label_names"] == ["negative", "positive"] and settings["num_labels"] == 2
    assert settings["problem_type"] == "single_label_classification"
    assert (adapter / "tokenizer.json").is_file() and not (adapter / "model.safetensors").exists()
    logged = json.loads((adapter / "trainer_state.json").read_text())["log_history"]
    # The evaluation after the last step is the final one: no second.
    assert [entry["step"] for entry in logged if "eval_accuracy" in entry] == [50, 100, 150, 200]
    assert 20 <= sum("loss" in entry for entry in logged) <= 40
    assert not any(name.startswith("gate_") for entry in logged for name in entry)  # the adapter has no gate


def test_eval_gives_the_metrics_of_the_training_run(adapter, place, capsys):
    trained = json.loads((adapter / "run.json").read_text())["metrics"]
    assert main(["eval", "--adapter", str(adapter), "--test_file", str(place / "test.csv")]) == 0
    metrics = last_json(capsys)
    assert list(metrics) == ["accuracy", "f1", "rows"] and metrics["rows"] == 24
    assert metrics["accuracy"] == pytest.approx(trained["test_accuracy"])
    assert metrics["f1"] == pytest.approx(trained["test_f1"])


class Bytes(io.TextIOWrapper):
    """Standard input that holds the given bytes."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))


@pytest.mark.parametrize("batch_size", [[], ["--batch_size", "3"]])
def test_predict_prints_label_and_probability_for_each_line_of_standard_input(adapter, batch_size, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Bytes(b"a superb film\nthe weak plot\n\nthe ending\r\n"))
    assert main(["predict", "--adapter", str(adapter), *batch_size]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [label for label, _ in lines[:2]] == ["positive", "negative"] and len(lines) == 4
    assert all(0.5 <= float(probability) <= 1 for _, probability in lines)


def test_predict_gives_from_a_file_what_it_gives_from_standard_input(adapter, tmp_path, capsys, monkeypatch):
    text = "\n".join(text for text, _ in reviews(40)) + "\n"
    (tmp_path / "lines.txt").write_text(text)
    assert main(["predict", "--adapter", str(adapter), "--input_file", str(tmp_path / "lines.txt")]) == 0
    batched = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    monkeypatch.setattr(sys, "stdin", Bytes(text.encode()))
    assert main(["predict", "--adapter", str(adapter)]) == 0
    single = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [label for label, _ in batched] == [label for label, _ in single]
    for (_, a), (_, b) in zip(batched, single, strict=True):
        assert float(a) == pytest.approx(float(b), abs=2e-6)  # six digits are printed


def test_an_adapter_whose_model_has_moved_is_told_where_it_is(adapter, place, tmp_path, capsys):
    moved, model = tmp_path / "adapter", tmp_path / "model"
    moved.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(model)
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    (moved / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    command = ["eval", "--adapter", moved, "--test_file", place / "test.csv"]
    assert "no such directory" in refused(capsys, command)
    assert main([str(word) for word in [*command, "--model_name_or_path", place / "mean"]]) == 0
    assert last_json(capsys)["accuracy"] > 0.9


def test_the_adapter_loads_in_python(adapter, place):
    encoder = hf.AutoModel.from_pretrained(place / "mean")
    base = ept.MeanPoolingForSequenceClassification(encoder, 2)
    model = EPTModel.from_pretrained(base, adapter).eval()
    batch = tokenizer()(["a superb film", "the weak plot"], return_tensors="pt", padding=True)
    assert model(**batch).logits.argmax(-1).tolist() == [1, 0]


@pytest.mark.parametrize(
    "model, head, kind",
    [
        ("mean", "auto", "MeanPoolingForSequenceClassification"),
        ("bert", "auto", "BertForSequenceClassification"),
        ("mean", "first", "BertForSequenceClassification"),
        ("bert", "mean", "MeanPoolingForSequenceClassification"),
        ("llama", "auto", "LlamaForSequenceClassification"),
    ],
)
def test_the_head_fits_the_model_or_the_wish_and_is_found_again(model, head, kind, place, tmp_path, capsys):
    assert train(place, tmp_path / "out", "--head", head, model=model, steps=2) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_class"] == kind
    assert main(["eval", "--adapter", str(tmp_path / "out"), "--test_file", str(place / "test.csv")]) == 0
    assert 0 <= last_json(capsys)["accuracy"] <= 1


def test_decimal_labels_are_regressed_on_and_predicted_as_values(place, tmp_path, capsys, monkeypatch):
    rows = [(text, 2.5 if label == "positive" else -2.5) for text, label in reviews(64)]
    data = write_csv(tmp_path / "scores.csv", rows)
    files = ["--train_file", data, "--validation_file", data]
    assert train(place, tmp_path / "out", *files, "--task", "regression") == 0
    assert last_json(capsys)["eval_pearson"] > 0.5  # 64 rows that say nothing reach 0.25 one time in twenty
    monkeypatch.setattr(sys, "stdin", Bytes(b"a superb film\nthe weak plot\n"))
    assert main(["predict", "--adapter", str(tmp_path / "out")]) == 0
    good, bad = map(float, capsys.readouterr().out.splitlines())
    assert good > 0.5 and bad < -0.5


def test_pairs_without_a_header_are_trained_on_and_predicted(place, tmp_path, capsys, monkeypatch):
    rows = [(i, *text.split(" ", 1), label) for i, (text, label) in enumerate(reviews(32))]
    data = write_csv(tmp_path / "pairs.csv", rows, header=None)
    columns = ["--no_header", "--text_column", 1, "--text_pair_column", 2, "--label_column", 3]
    assert train(place, tmp_path / "out", "--train_file", data, *columns, steps=2) == 0
    assert main(["eval", "--adapter", str(tmp_path / "out"), "--test_file", data]) == 0  # the columns are remembered
    assert last_json(capsys)["rows"] == 32
    monkeypatch.setattr(sys, "stdin", Bytes(b"a film\tthe plot\n"))
    assert main(["predict", "--adapter", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(sys, "stdin", Bytes(b"a film\tthe plot\nonly one\n"))
    assert "line 2" in refused(capsys, ["predict", "--adapter", tmp_path / "out"])


def test_text_to_text_trains_evaluates_and_writes(place, tmp_path, capsys, monkeypatch):
    data = ["--validation_file", place / "validation.csv", "--max_target_length", 5]
    assert train(place, tmp_path / "out", *data, "--task", "text2text", model="t5", steps=4) == 0
    metrics = last_json(capsys)
    assert 0 <= metrics["eval_exact_match"] <= 1 and metrics["eval_loss"] > 0
    command = ["eval", "--adapter", tmp_path / "out", "--test_file", place / "test.csv", "--max_target_length", 5]
    assert main([str(word) for word in command]) == 0
    evaluated = last_json(capsys)
    assert list(evaluated) == ["exact_match", "token_f1", "loss", "rows"] and evaluated["loss"] > 0
    monkeypatch.setattr(sys, "stdin", Bytes(b"a superb film\nthe weak plot\n"))
    assert main(["predict", "--adapter", str(tmp_path / "out"), "--max_target_length", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_long_texts_are_cut_to_what_the_model_has_room_for_and_counted_once(place, tmp_path, capsys):
    rows = [("the film " * 50 + word, label) for word, label in (("great", 1), ("dull", 0))] * 4
    assert train(place, tmp_path / "out", "--train_file", write_csv(tmp_path / "long.csv", rows), steps=2) == 0
    assert capsys.readouterr().err.count("8 of 8 rows were cut to 60 tokens") == 1  # 64 positions, 4 prompt rows


# ---------------------------------------------------------------------- the run


def test_the_same_command_gives_the_same_bits(place, tmp_path):
    for name in ("a", "b"):
        train(place, tmp_path / name, steps=6)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_from_a_checkpoint_ends_with_the_bits_of_the_whole_run(place, tmp_path):
    train(place, tmp_path / "whole", "--save_steps", 5, steps=12)
    train(place, tmp_path / "part", "--save_steps", 5, steps=12)
    for left in ("checkpoint-10", "checkpoint-12"):  # as if the run had ended before them
        for file in (tmp_path / "part" / left).glob("*"):
            file.unlink()
    train(place, tmp_path / "part", "--save_steps", 5, "--resume_from_checkpoint", "true", steps=12)
    whole, part = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)


def test_another_run_is_never_written_over_unless_told(place, tmp_path, capsys):
    out = tmp_path / "out"
    train(place, out, "--save_steps", 2, steps=4)
    before = (out / "adapter_model.safetensors").read_bytes()
    command = [
        "train",
        "--model_name_or_path",
        place / "mean",
        "--train_file",
        place / "train.csv",
        "--output_dir",
        out,
    ]
    command += [*SMALL, "--max_steps", "2"]
    assert "holds another run" in refused(capsys, command)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert main([str(word) for word in [*command, "--overwrite_output_dir"]]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]  # none is left of the other run


def test_a_directory_with_other_files_is_not_written_into(place, capsys):
    command = ["train", "--model_name_or_path", place / "bert", "--train_file", place / "train.csv"]
    assert "is not empty" in refused(capsys, [*command, "--output_dir", place / "bert"])


def test_the_best_checkpoint_is_kept_and_training_stops_early(place, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--validation_file", place / "validation.csv", "--load_best_model_at_end", "--early_stopping_patience", 2]
    more += ["--eval_steps", 10, "--save-steps=10"]
    assert train(place, out, *more, steps=400) == 0
    state = json.loads((out / "trainer_state.json").read_text())
    accuracies = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert state["global_step"] < 400 and state["best_metric"] == max(accuracies)
    assert len(accuracies) == state["global_step"] // 10  # the best one's metrics are known: no evaluation more
    best = load_file(Path(state["best_model_checkpoint"]) / "adapter_model.safetensors")
    final = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(best[key], final[key]) for key in best)
    assert last_json(capsys)["eval_accuracy"] == max(accuracies)


@pytest.mark.parametrize("save_steps", [6, 100])
def test_a_diverged_training_is_one_line_and_saves_nothing_over(save_steps, place, tmp_path, capsys):
    train(place, tmp_path / "out", steps=1)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    command = ["train", "--model_name_or_path", place / "mean", "--train_file", place / "train.csv", *SMALL]
    command += ["--output_dir", tmp_path / "out", "--overwrite_output_dir", "--max_steps", 6]
    command += ["--save_steps", save_steps, "--learning_rate", "1e38", "--prompt_learning_rate", "1e38"]
    assert "the training diverged, lower the learning rate" in refused(capsys, command)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()} == before


def test_presets_budgets_and_single_sizes_reach_the_adapter(place, tmp_path):
    def sizes(*options):
        out = tmp_path / "-".join(map(str, options)).replace("-", "")
        model = ["--model_name_or_path", place / "mean", "--train_file", place / "train.csv", "--output_dir", out]
        assert main([str(w) for w in ["train", *model, "--max_steps", 1, "--use_cpu", *options]]) == 0
        settings = json.loads((out / "adapter_config.json").read_text())
        known = {field.name for field in dataclasses.fields(EPTConfig)} - {"embed_scale"}
        return {key: value for key, value in settings.items() if key in known}

    def expected(config):
        return {key: value for key, value in config.to_dict().items() if key != "embed_scale"}

    assert sizes("--prompt_length", 3) == expected(EPTConfig(prompt_length=3, deep_layers=1))
    assert sizes("--preset", "input", "--prompt_length", 3) == expected(EPTConfig.input_only(prompt_length=3))
    paper = dict(rank=2, max_text_length=16, fusion=False)
    assert sizes(
        "--preset", "paper", "--rank", 2, "--max_text_length", 16, "--fusion", "false", "--prompt_length", 5
    ) == (expected(EPTConfig.paper(**paper, prompt_length=5)))
    assert sizes("--budget", 2000, "--preset", "paper", "--max_text_length", 16) == expected(
        EPTConfig.for_budget(2000, 32, preset="paper", max_text_length=16)
    )
    assert sizes("--preset", "deep") == expected(EPTConfig.deep(deep_layers=1))
    assert sizes("--budget", 2000, "--preset", "deep") == expected(
        EPTConfig.for_budget(2000, 32, preset="deep", deep_layers=1)
    )


def test_every_setting_of_the_config_is_an_option():
    options = {field.name for field in dataclasses.fields(AdapterArguments)}
    others = {"preset", "budget", "soft_prompt", "init_adapters"}
    assert options == {field.name for field in dataclasses.fields(EPTConfig)} | others


# ---------------------------------------------------------------------- starting from trained adapters


def test_training_starts_from_adapters_says_their_weights_and_is_resumed_without_them(adapter, place, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(adapter, source, ignore=shutil.ignore_patterns("checkpoint-*"))
    begun = [place, tmp_path / "out", "--init_adapters", source, "--save_steps", 1, "--seed", 7]
    assert train(*begun, steps=1) == 0
    said = capsys.readouterr().err
    assert f"started from {source} 1.00 (share of the labels' variance that each misses: fresh " in said
    record = json.loads((tmp_path / "out" / "run.json").read_text())["started_from"]
    assert record["weights"] == {str(source): 1.0} and record["errors"][str(source)] < record["errors"]["fresh"]
    tuned, start = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out", source))
    adapters = [name for name in start if not name.startswith("head.")]
    assert all(torch.equal(tuned[name], start[name]) for name in adapters)  # the first step's rate is 0
    shutil.rmtree(source)
    assert train(*begun, "--resume_from_checkpoint", "true", steps=2) == 0
    assert train(place, tmp_path / "out", "--resume_from_checkpoint", "true", "--seed", 7, steps=3) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["started_from"] == record
    state = tmp_path / "out" / "checkpoint-3" / "trainer_state.json"
    before = json.loads(state.read_text())  # a checkpoint that does not say it, as earlier versions wrote them
    state.write_text(
        json.dumps(before | {"stateful_callbacks": {"TrainerControl": before["stateful_callbacks"]["TrainerControl"]}})
    )
    assert (
        train(place, tmp_path / "out", "--resume_from_checkpoint", "true", "--seed", 7, "--save_steps", 1, steps=4) == 0
    )
    assert json.loads((tmp_path / "out" / "run.json").read_text())["started_from"] is None


def test_a_folded_adapter_keeps_its_own_tokenizer_and_the_record_of_its_run(adapter, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(adapter, own, ignore=shutil.ignore_patterns("checkpoint-*"))
    longer = hf.AutoTokenizer.from_pretrained(own)
    longer.add_tokens(["ownword"])
    longer.save_pretrained(own)
    assert main(["fold", "--adapter", str(own), "--output_dir", str(tmp_path / "folded")]) == 0
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "folded").get_vocab() == longer.get_vocab()
    assert (tmp_path / "folded" / "run.json").read_bytes() == (own / "run.json").read_bytes()


@pytest.mark.parametrize("options, said", [
    (["--init_adapters", "absent"], "absent holds no adapter_config.json"),
    (["--init_adapters", "ADAPTER", "ADAPTER/."], "ADAPTER/. twice"),
    (["--init_adapters", "ADAPTER", "--budget", "4000"], "--budget and --init_adapters"),
    (["--init_adapters", "ADAPTER", "--init", "normal"], "--init normal and --init_adapters"),
    (["--init_adapters", "ADAPTER", "--prompt_length", "5"], "prompt must be (5, 32)"),
    (["--init_adapters", "ADAPTER", "--model_name_or_path", "OTHER"], "backbone"),
    (["--init_adapters", "FOLDED"], "is folded, for inference only"),
    (["--init", "adapters"], "--init adapters needs trained adapters"),
])  # fmt: skip
def test_sources_that_cannot_be_started_from_are_one_line(options, said, adapter, place, tmp_path, capsys):
    other, folded = tmp_path / "other", tmp_path / "folded"
    if "OTHER" in options:
        save_model(other, hidden_size=16)
    if "FOLDED" in options:
        assert main(["fold", "--adapter", str(adapter), "--output_dir", str(folded)]) == 0
    places = {"ADAPTER": adapter, "ADAPTER/.": f"{adapter}/.", "OTHER": other, "FOLDED": folded}
    argv = [
        "train", "--model_name_or_path", place / "mean", "--train_file", place / "train.csv", "--output_dir", tmp_path / "out",
        "--use_cpu", *(places.get(word, word) for word in options),
    ]  # fmt: skip
    assert said.replace("ADAPTER", str(adapter)) in refused(capsys, argv)
    assert not (tmp_path / "out").exists()


def test_a_task_without_a_head_starts_from_one_adapter_as_it_is(place, tmp_path, capsys):
    more = ["--task", "continuation", "--max_seq_length", 24]
    for name in ("one", "two"):
        assert train(place, tmp_path / name, *more, model="llama", steps=1) == 0
    capsys.readouterr()
    assert train(place, tmp_path / "out", *more, "--init_adapters", tmp_path / "one", model="llama", steps=1) == 0
    assert f"started from {tmp_path / 'one'} 1.00\n" in capsys.readouterr().err
    argv = [
        "train", "--model_name_or_path", place / "llama", "--train_file", place / "train.csv", *more, "--use_cpu",
        "--output_dir", tmp_path / "no", "--init_adapters", tmp_path / "one", tmp_path / "two",
    ]  # fmt: skip
    assert "continuation has no such head: give one of them" in refused(capsys, argv)


# ---------------------------------------------------------------------- help and bad input


@pytest.mark.parametrize("message, line", [
    ("`max_length=62` does not fit", "--max_seq_length 62 does not fit"),
    ('classify with `kind="classification"`', "classify with --task classification"),
    ("x.jsonl: `header=False` is for csv", "x.jsonl: --no_header is for csv"),
    ("give `Columns.text_pair`", "give --text_pair_column"),
    ("`is_gradient_checkpointing` is deprecated", "`is_gradient_checkpointing` is deprecated"),
    ("train EPTConfig.input_only()", "train EPTConfig.input_only() (--preset input)"),
    ("prompt_length=0 must be in 1 … 10000", "prompt_length=0 must be in 1 … 10000"),
])  # fmt: skip
def test_parameters_in_an_error_become_the_options_that_set_them(message, line):
    assert as_options(message) == line


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_help_explains_our_options_first_and_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and max(map(len, said.splitlines())) <= 100
    if command == "train":
        order = [
            "--model_name_or_path",
            "--train_file",
            "--text_column",
            "--prompt_length",
            "--max_steps",
            "--adam_beta1",
        ]
        assert sorted(order, key=said.index) == order
    assert "--model-name-or-path" not in said and "(default: None)" not in said


def test_the_program_says_its_version_and_commands(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"ept {ept.__version__}\n"
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in ("train", "eval", "predict"))
    assert main([]) == 2 and "usage: ept" in capsys.readouterr().err
    assert main(["tune"]) == 2 and "unknown command 'tune'" in capsys.readouterr().err


EVALUATED = {"--validation_file": "dev.csv"}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"--output_dir": None}, "--output_dir"),
        ({"--train_file": None}, "--train_file"),
        ({"--model_name_or_path": None}, "--model_name_or_path"),
        ({"--model_name_or_path": "./absent"}, "./absent: no such directory"),
        ({"--train_file": "absent.csv"}, "absent.csv: no such file"),
        ({"--text_column": "body"}, "no column 'body'"),
        ({"--validation_file": "unknown.csv"}, "unknown.csv, row 2: label 'meh'"),
        ({"--test_file": "unknown.csv"}, "unknown.csv, row 2: label 'meh'"),
        ({"--train_file": "single.csv"}, "single.csv: every row"),
        ({"--train_file": "empty.csv"}, "empty.csv is empty"),
        ({"--train_file": "latin.csv"}, "latin.csv, line 2: byte 0xe9"),
        ({"--train_file": "ragged.csv"}, "ragged.csv, line 3: 3 fields"),
        ({"--task": "regression"}, "label 'negative' is not a finite number"),
        ({"--task": "text2text"}, "text2text needs one (T5, BART)"),
        ({"--prompt_length": "0"}, "prompt_length=0"),
        ({"--prompt_length": "64"}, "prompt"),
        ({"--prompt_length": "four"}, "invalid int value: 'four'"),
        ({"--max_seq_length": "63"}, "--max_seq_length 63 does not fit"),
        ({"--budget": "10"}, "a budget of 10"),
        ({"--init": "decompose"}, "soft_prompt"),
        ({"--impl": "cuda"}, "impl='cuda'"),
        ({"--eval_strategy": "epoch"}, "needs a --validation_file"),
        ({"--early_stopping_patience": "2"}, "--load_best_model_at_end"),
        ({"--load_best_model_at_end": "true"}, "needs a --validation_file"),
        ({"--resume_from_checkpoint": "true"}, "no whole checkpoint"),
        ({"--resume_from_checkpoint": "absent"}, "absent is not a whole checkpoint"),
        ({"--lr_scheduler_type": "stairs"}, "stairs"),
        ({"--lr_scheduler_type": "polynomial", "--max_steps": "1"}, "--warmup_steps"),
        ({"--lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_kwargs"),
        ({"--lr_scheduler_type": "warmup_stable_decay"}, "'num_decay_steps'"),
        ({"--lr_scheduler_kwargs": "min_lr"}, "--lr_scheduler_kwargs min_lr must be"),
        ({"--optim": "lomo"}, "lomo"),
        ({"--optim_args": "foo"}, "--optim_args foo must be name=value"),
        ({"--report_to": "dvclive"}, "dvclive"),
        ({"--use_liger_kernel": "true"}, "--use_liger_kernel would have no effect"),
        ({"--neftune_noise_alpha": "5"}, "--neftune_noise_alpha would have no effect"),
        ({"--sortish_sampler": "true"}, "--sortish_sampler would have no effect"),
        ({"--max_steps": "0"}, "--max_steps 0 is no number of updates"),
        ({"--impl": "triton"}, 'impl="torch"'),
        ({"--prompt_start": "300"}, "train.csv, row 1: "),
        ({"--max_seq_length": "-3"}, "--max_seq_length -3 must be at least 1"),
        ({"--per_device_train_batch_size": "0"}, "must be at least 1"),
        ({"--gradient_accumulation_steps": "0"}, "must be at least 1"),
        ({"--early_stopping_patience": "-1"}, "must be at least 1"),
        ({"--num_train_epochs": "-1"}, "--num_train_epochs -1.0 must be finite and above 0"),
        ({"--learning_rate": "nan"}, "--learning_rate nan must be finite and at least 0"),
        ({"--prompt_learning_rate": "inf"}, "--prompt_learning_rate inf must be finite and at least 0"),
        ({"--down_learning_rate": "-1"}, "--down_learning_rate -1.0 must be finite and at least 0"),
        ({"--head_learning_rate": "nan"}, "--head_learning_rate nan must be finite and at least 0"),
        ({"--bf16_full_eval": "true"}, "bf16_full_eval and fp16_full_eval would round"),
        ({"--fp16_full_eval": "true"}, "bf16_full_eval and fp16_full_eval would round"),
        ({"--weight_decay": "nan"}, "--weight_decay nan must be a number"),
        ({"--metric_for_best_model": "foo"}, "classification has accuracy, f1, loss"),
        ({"--label_column": "sentence", "--text_column": "sentence"}, "both the label and the text"),
        ({"--text_column": "label"}, "give another --label_column or --text_column; it has: sentence, label"),
        ({"--text_pair_column": "body"}, "has no column 'body' (--text_pair_column); it has: sentence, label"),
        ({"--train_file": "two.csv"}, "say which column is the text with --text_column (and the second with"),
        ({"--train_file": "score.csv"}, "--task classification"),
        ({"--train_file": "rows.jsonl", "--no_header": "true"}, "rows.jsonl: --no_header is for csv and tsv"),
        ({"--learning_rat": "1"}, "unknown option --learning_rat"),
        (EVALUATED | {"--eval_do_concat_batches": "false"}, "--eval_do_concat_batches false leaves the metrics"),
        (EVALUATED | {"--batch_eval_metrics": "true"}, "--batch_eval_metrics: the metrics are of all rows together"),
        (EVALUATED | {"--dataloader_drop_last": "true"}, "--dataloader_drop_last would leave rows out of the metrics"),
        (
            EVALUATED | {"--prediction_loss_only": "true", "--load_best_model_at_end": "true"},
            "--prediction_loss_only leaves out accuracy, by which the best checkpoint is chosen",
        ),
        (
            EVALUATED | {"--load_best_model_at_end": "true", "--eval_strategy": "no"},
            "--load_best_model_at_end needs evaluations while training",
        ),
        (
            {"--dataloader_prefetch_factor": "0", "--dataloader_num_workers": "1"},
            "--dataloader_prefetch_factor 0 must be at least 1",
        ),
        ({"--label_names": "label"}, "--label_names label: the rows' labels are called labels"),
        ({"--dataloader_drop_last": "true", "--per_device_train_batch_size": "99"}, "leaves none of 64 rows"),
        ({"--dataloader_persistent_workers": "true"}, "needs --dataloader_num_workers of at least 1"),
        ({"--push_to_hub": "true"}, "--push_to_hub needs a token of the hub"),
        ({"--debug": "underflow_overflow"}, "--debug underflow_overflow cannot look at masks"),
        (
            {"--train_file": "values.csv", "--task": "regression", "--label_smoothing_factor": "0.1"},
            "--label_smoothing_factor is for classification and encoder-decoders, not for regression",
        ),
    ],
    ids=lambda value: " ".join(map(str, itertools.chain(*value.items()))) if isinstance(value, dict) else "",
)
def test_bad_input_to_train_is_one_line_and_exit_code_2(options, said, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "unknown.csv", [("the film", "positive"), ("the plot", "meh")])
    write_csv(tmp_path / "single.csv", [("the film", "positive"), ("the plot", "positive")])
    write_csv(tmp_path / "two.csv", [("the film", "the plot", "positive")], ("text", "title", "label"))
    monkeypatch.setattr("ept.cli.training_checks.get_token", lambda: None)
    write_csv(tmp_path / "values.csv", [("the film", 0.5), ("the plot", 1.5)])
    write_csv(tmp_path / "dev.csv", reviews(4))
    write_csv(tmp_path / "score.csv", [("the film", 0.5), ("the plot", "nan")])
    (tmp_path / "rows.jsonl").write_text('{"sentence": "the film", "label": "positive"}\n')
    (tmp_path / "empty.csv").touch()
    (tmp_path / "latin.csv").write_bytes(b"sentence,label\ncaf\xe9,1\n")
    (tmp_path / "ragged.csv").write_bytes(b"sentence,label\na,1\nb, c,0\n")
    given = {
        "--model_name_or_path": place / "mean",
        "--train_file": place / "train.csv",
        "--output_dir": "out",
    } | options
    argv = [word for name, value in given.items() if value is not None for word in (name, value)]
    assert said in refused(capsys, ["train", *argv, "--use_cpu"])
    assert not any((tmp_path / "out").glob("*"))


def test_a_run_that_cannot_begin_leaves_the_checkpoints_that_it_was_to_write_over(place, tmp_path, capsys):
    train(place, tmp_path / "out", "--save_steps", 1, steps=1)
    command = ["train", "--model_name_or_path", place / "mean", "--train_file", place / "train.csv", *SMALL]
    command += ["--output_dir", tmp_path / "out", "--overwrite_output_dir"]
    assert "lomo" in refused(capsys, [*command, "--optim", "lomo"])
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").is_file()


def test_a_checkpoint_of_the_model_alone_is_not_gone_on_from(place, tmp_path, capsys):
    assert train(place, tmp_path / "out", "--save_only_model", "true", "--save_steps", 1, steps=1) == 0
    command = ["train", "--model_name_or_path", place / "mean", "--train_file", place / "train.csv", *SMALL]
    command += ["--output_dir", tmp_path / "out", "--resume_from_checkpoint", "true", "--max_steps", 2]
    assert "holds no optimizer.pt (save_only_model)" in refused(capsys, command)


def test_the_adapter_is_written_before_the_last_evaluation(place, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("the evaluation failed")

    monkeypatch.setattr("ept.training.trainer.EPTTrainer.evaluate", fails)
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        train(place, tmp_path / "out", "--test_file", place / "test.csv", steps=1)
    monkeypatch.undo()
    assert main(["eval", "--adapter", str(tmp_path / "out"), "--test_file", str(place / "test.csv")]) == 0


def test_a_schedule_by_a_plateau_is_judged_by_a_metric_that_the_task_has(place, tmp_path):
    more = ["--validation_file", place / "validation.csv", "--lr_scheduler_type", "reduce_lr_on_plateau"]
    assert (
        train(place, tmp_path / "out", *more, "--task", "continuation", "--eval_steps", 1, model="llama", steps=2) == 0
    )


@pytest.mark.parametrize("word", ["false", "No", "0"])
def test_the_best_model_is_not_loaded_where_that_is_turned_off(word, place, tmp_path):
    assert train(place, tmp_path / "out", "--load_best_model_at_end", word, steps=1) == 0
    assert train(place, tmp_path / "b", f"--load_best_model_at_end={word}", "--save_strategy", "no", steps=1) == 0
    assert not any((tmp_path / "b").glob("checkpoint-*"))


def test_a_lower_error_is_the_better_one(place, tmp_path):
    data = write_csv(tmp_path / "scores.csv", [(text, float(len(text)) + 0.5) for text, _ in reviews(16)])
    files = ["--train_file", data, "--validation_file", data, "--load_best_model_at_end"]
    more = ["--metric_for_best_model", "mse", "--eval_steps", 1]
    assert train(place, tmp_path / "out", *files, *more, steps=4) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(entry["eval_mse"] for entry in state["log_history"] if "eval_mse" in entry)


def test_an_encoder_decoder_is_not_given_a_classification_head(place, tmp_path, capsys):
    command = ["train", "--model_name_or_path", place / "t5", "--train_file", place / "train.csv"]
    said = refused(capsys, [*command, "--output_dir", tmp_path / "out", "--task", "classification"])
    assert "--task text2text" in said


def test_a_checkpoint_of_other_sizes_or_labels_is_not_resumed_from(place, tmp_path, capsys):
    out = tmp_path / "out"
    train(place, out, "--save_steps", 2, steps=2)
    command = ["train", "--model_name_or_path", place / "mean", "--output_dir", out, "--resume_from_checkpoint", "true"]
    same = [*command, "--train_file", place / "train.csv", *SMALL]
    assert "prompt_length 4, not 5" in refused(capsys, [*same, "--prompt_length", "5"])
    other = write_csv(tmp_path / "other.csv", [("the film", "a"), ("the plot", "b")])
    assert "was trained with the labels" in refused(capsys, [*command, "--train_file", other, *SMALL])


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_bad_input_to_eval_and_predict_is_one_line_and_exit_code_2(
    command, adapter, place, tmp_path, capsys, monkeypatch
):
    data = ["--test_file", place / "test.csv"] if command == "eval" else []
    monkeypatch.setattr(sys, "stdin", Bytes(b"the film\ncaf\xe9\n"))
    assert "adapter_config.json" in refused(capsys, [command, "--adapter", tmp_path, *data])
    said = refused(capsys, [command, "--adapter", adapter, "--model_name_or_path", other_model(tmp_path), *data])
    assert "another backbone" in said
    assert said.endswith("; give the backbone that the adapter was trained on, --model_name_or_path")
    for option in ("--batch_size", "--max_seq_length", "--max_target_length"):
        assert f"{option} 0 must" in refused(capsys, [command, "--adapter", adapter, *data, option, "0"])
    if command == "predict":
        assert "standard input, line 2: not UTF-8" in refused(capsys, [command, "--adapter", adapter])
        assert "no such file" in refused(capsys, [command, "--adapter", adapter, "--input_file", "absent.txt"])
    else:
        bad = write_csv(tmp_path / "bad.csv", [("the film", "meh")])
        assert "label 'meh'" in refused(capsys, [command, "--adapter", adapter, "--test_file", bad])
        assert "--test_file" in refused(capsys, [command, "--adapter", adapter])


@pytest.mark.parametrize("command", ["eval", "predict"])
@pytest.mark.parametrize(
    "name, damage",
    [
        ("run.json", "[]"),
        ("run.json", "{"),
        ("run.json", {"columns": None}),
        ("run.json", {"columns": {"text": 1}}),
        ("run.json", {"max_seq_length": "many"}),
        ("adapter_config.json", {"backbone": "bert"}),
        ("adapter_config.json", {"backbone": {"embedding_sha256": ""}}),
        ("adapter_config.json", {"base_model_class": 3}),
        ("adapter_config.json", {"base_model_name_or_path": ["a"]}),
        ("adapter_config.json", {"label_names": None}),
        ("adapter_config.json", {"label_names": [0, 1]}),
        ("adapter_config.json", {"prompt_length": "four"}),
    ],
    ids=str,
)
def test_a_damaged_adapter_is_one_line_that_names_the_file(command, name, damage, adapter, place, tmp_path, capsys):
    for file in adapter.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if isinstance(damage, dict):
        damage = json.dumps(json.loads((adapter / name).read_text()) | damage)
    (tmp_path / name).write_text(damage)
    data = ["--test_file", place / "test.csv"] if command == "eval" else ["--input_file", place / "test.csv"]
    assert str(tmp_path / name) in refused(capsys, [command, "--adapter", tmp_path, *data])


def other_model(tmp_path) -> str:
    return save_model(tmp_path / "other", seed=1)


def test_the_module_runs_as_a_program_and_a_closed_pipe_is_no_fault(adapter):
    here = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "ept", "predict", "--adapter", str(adapter)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    process.stdin.write("a superb film\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("positive\t")  # answered while the input is still open
    process.stdout.close()
    process.stdin.write("the weak plot\n" * 2)
    process.stdin.close()
    said = process.stderr.read()
    assert process.wait(1800) == 1 and "Traceback" not in said
