"""Causal models learn to write: from files with prompts and completions, or conversations, to generated answers."""

import itertools
import json
import shutil

import pytest
import torch
import transformers as hf

import tiny_text
from ept import AutoEPTModel
from ept.cli import main
from ept.cli.predict_output import Output
from ept.data.chats import checked_chat
from ept.data.columns import Columns, choose_writing_columns, holds_text_to_write
from ept.data.streaming import RowStream, TokenStream
from ept.data.tables import read_file
from ept.tasks.kinds import KINDS, CausalText2Text, asked_kind, kind_of_adapter
from ept.tasks.predicting import answer_loss, answer_predictor
from ept.tasks.task import Task
from ept.tasks.writing import (
    Exchange,
    encode_exchanges,
    left_padded,
    packed,
    prompt_of,
    read_chat,
    read_pair,
    read_question,
)
from tiny_models import backbone, wrapped
from tiny_text import reviews

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SMALL = ["--prompt_length", "4", "--token_rank", "6", "--token_dropout", "0", "--disable_tqdm", "true", "--use_cpu"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def words():
    tokenizer = tiny_text.tokenizer("t5")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def learned(row: dict) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def decoded(words, ids) -> str:
    return " ".join(words.convert_ids_to_tokens(ids))


# ---------------------------------------------------------------------- rows as tokens


def test_of_a_pair_the_completion_and_the_end_of_text_are_learned(words):
    pair = read_pair(words, "the film was", "very funny", "row 1")
    (row,), cut, cut_answers = encode_exchanges(words, [pair], None, 10)
    assert decoded(words, row["input_ids"]) == "the film [UNK] very funny </s>"
    assert row["labels"] == [-100] * 3 + row["input_ids"][3:] and (cut, cut_answers) == (0, 0)
    assert prompt_of(row) == row["input_ids"][:3] == encode_exchanges(
        words, [read_question(words, "the film was", "row 1", in_chat=False)], None, 0
    )[0][0]["input_ids"]  # fmt: skip


def test_of_a_conversation_every_answer_is_learned_and_of_a_conversational_pair_the_completion(words):
    messages = [user("the film"), assistant("great"), user("the plot"), assistant("dull")]
    whole = "[UNK] the film </s> [UNK] great </s> [UNK] the plot </s> [UNK] dull </s>"
    chat = read_chat(words, messages, "row 1")
    pair = read_pair(words, messages[:3], messages[3:], "row 1")
    assert chat.reference == pair.reference == "dull"
    rows, _, _ = encode_exchanges(words, [chat, pair], None, 10)
    assert [decoded(words, row["input_ids"]) for row in rows] == [whole, whole]
    assert decoded(words, learned(rows[0])) == "great </s> dull </s>"
    assert decoded(words, learned(rows[1])) == "dull </s>"
    asked = read_question(words, messages, "row 1", in_chat=True)
    (question,), _, _ = encode_exchanges(words, [asked], None, 0)
    assert prompt_of(rows[0]) == prompt_of(rows[1]) == question["input_ids"]
    line = read_question(words, "the film", "line 1", in_chat=True)
    assert line.context == [("user the film </s> assistant ", False)]


def test_a_template_that_writes_thoughts_in_the_last_answer_alone_is_learned_turn_by_turn(words):
    thoughts = "{% if loop.last and m['role'] == 'assistant' %}quoted plot {% endif %}"
    words.chat_template = TEMPLATE.replace("{{ m['content'] }}", thoughts + "{{ m['content'] }}")
    messages = [user("the film"), assistant("great"), user("the plot"), assistant("dull")]
    chat = read_chat(words, messages, "row 1")
    (row,), _, _ = encode_exchanges(words, [chat], None, 10)
    whole = words.apply_chat_template(messages, tokenize=False)
    assert row["input_ids"] == words(whole, add_special_tokens=False).input_ids
    assert decoded(words, learned(row)) == "great </s> quoted plot dull </s>" and chat.reference == "quoted plot dull"
    question = read_question(words, messages, "row 1", in_chat=True)
    assert encode_exchanges(words, [question], None, 0)[0][0]["input_ids"] == prompt_of(row)


def test_what_the_template_writes_after_an_answer_is_learned_and_its_end_is_added_where_it_has_none(words):
    words.chat_template = TEMPLATE.replace("</s>", "quoted")
    (row,), _, _ = encode_exchanges(words, [read_chat(words, [user("film"), assistant("great")], "row 1")], None, 10)
    assert decoded(words, learned(row)) == "great quoted </s>"


def test_a_long_text_keeps_its_end_and_its_first_token_and_a_long_answer_its_beginning(words):
    pair = read_pair(words, "the film plot cast story", "great lovely superb", "row 1")
    (row,), cut, cut_answers = encode_exchanges(words, [pair], 2, 2)
    assert decoded(words, row["input_ids"]) == "cast story great lovely" and (cut, cut_answers) == (1, 1)
    assert decoded(words, learned(row)) == "great lovely"
    words.bos_token = "[CLS]"
    asked = Exchange([("[CLS] the film plot cast", False)], None, "", begins=False)
    (row,), _, _ = encode_exchanges(words, [asked], 3, 0)
    assert decoded(words, row["input_ids"]) == "[CLS] plot cast"


@pytest.mark.parametrize("read, message", [
    (lambda words: read_chat(words, [assistant("great"), user("why")], "rows, row 7"), "row 7: the last message is the user's"),
    (lambda words: read_chat(words, "great", "rows, row 7"), "rows, row 7 is no conversation"),
    (lambda words: checked_chat([{"role": "user", "content": None}], "rows, row 7"), "content of message 1"),
    (lambda words: read_pair(words, "the film", None, "rows, row 7"), "row 7: prompt and completion must be two texts"),
    (lambda words: read_question(words, [assistant("great")], "rows, row 7", in_chat=True), "row 7 holds answers alone"),
])  # fmt: skip
def test_rows_that_hold_no_answer_are_named(read, message, words):
    with pytest.raises(ValueError, match=message):
        read(words)


def test_a_template_that_rewrites_earlier_answers_and_a_tokenizer_without_one_or_without_an_end_are_refused(words):
    shown = "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }} </s> {% endif %}"
    words.chat_template = "{% for m in messages %}" + shown + "{% endfor %}"
    with pytest.raises(ValueError, match="writes message 2 otherwise once another follows"):
        read_chat(words, [user("film"), assistant("great"), user("plot"), assistant("dull")], "row 1")
    words.chat_template = TEMPLATE.replace("}assistant {", "}assistant quoted {")
    with pytest.raises(ValueError, match="does not write message 2 as it begins an answer that is asked for"):
        read_chat(words, [user("film"), assistant("great")], "row 1")
    words.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        read_chat(words, [user("film"), assistant("great")], "row 1")
    words.eos_token = None
    with pytest.raises(ValueError, match="names no end of text"):
        encode_exchanges(words, [read_pair(words, "film", "great", "row 1")], None, 10)


# ---------------------------------------------------------------------- columns and kinds


@pytest.mark.parametrize("row, wanted, columns", [
    ({"prompt": "a", "completion": "b"}, {}, Columns("prompt", None, "completion")),
    ({"id": 1, "messages": [user("a"), assistant("b")]}, {}, Columns("messages")),
    ({"prompt": "a", "messages": [user("a"), assistant("b")]}, {}, Columns("messages")),
    ({"talk": [user("a"), assistant("b")], "label": "x"}, {"text": "talk"}, Columns("talk")),
    ({"ask": "a", "say": "b"}, {"text": "ask", "label": "say"}, Columns("ask", None, "say")),
    ({"prompt": "a", "say": "b"}, {"label": "say"}, Columns("prompt", None, "say")),
    ({"messages": "a", "label": "b"}, {}, Columns("messages", None, "label")),
    ({"sentence": "a", "label": "b"}, {}, Columns("sentence", None, "label")),
])  # fmt: skip
def test_columns_are_found_by_the_names_that_trl_gives_them_or_as_wanted(row, wanted, columns, tmp_path):
    table = read_file(jsonl(tmp_path / "rows.jsonl", [row] * 2))
    assert choose_writing_columns(table, "rows.jsonl", Columns(**wanted)) == columns


@pytest.mark.parametrize("row, holds", [
    ({"prompt": "a", "completion": "b"}, True), ({"messages": [user("a")]}, True), ({"messages": "a"}, False),
    ({"prompt": "a", "completion": "b", "label": True}, False), ({"prompt": "a"}, False),
])  # fmt: skip
def test_a_file_is_told_to_hold_text_to_write_by_its_columns(row, holds, tmp_path):
    assert holds_text_to_write(read_file(jsonl(tmp_path / "rows.jsonl", [row] * 2))) is holds


def test_text2text_asks_for_the_kind_that_the_model_is_of(tmp_path):
    causal = tiny_text.save_model(tmp_path / "llama", "llama")
    seq2seq = tiny_text.save_model(tmp_path / "t5", "t5", hf.AutoModelForSeq2SeqLM)
    assert KINDS[asked_kind("text2text", causal)] is CausalText2Text
    assert asked_kind("text2text", seq2seq) == "text2text" and asked_kind("continuation", causal) == "continuation"
    settings = {"base_model_class": "LlamaForCausalLM"}
    kind = kind_of_adapter(settings, {"task": "text2text", "reads_chat": True}, "adapter_config.json")
    assert type(kind) is CausalText2Text and kind.reads_chat


def test_labels_that_all_occur_once_are_asked_about_and_spoken_of(tmp_path, capsys):
    table = read_file(jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": f"b{i}"} for i in range(12)]))
    with pytest.raises(ValueError, match=r'12 of 12 rows .* `kind="text2text"`.*`kind="classification"`'):
        Task.of_table(table, "rows.jsonl", Columns())
    assert len(Task.of_table(table, "rows.jsonl", Columns(), "classification").kind.label_names) == 12
    assert "12 of 12 rows have a label ('label') that no other row has" in capsys.readouterr().err
    Task.of_table(table.select(range(9)), "rows.jsonl", Columns())  # too few to say


# ---------------------------------------------------------------------- metrics and predictions


def test_answers_are_judged_by_exact_match_and_the_f1_of_their_words():
    metrics = CausalText2Text().metrics(["The film.", "a dull plot", "", "x"], ["film", "dull, dull ending", "", "y"])
    assert metrics == {"exact_match": 0.25, "token_f1": pytest.approx((1 + 2 * 1 / 5 + 1 + 0) / 4)}


def test_the_loss_is_the_mean_over_the_answers_tokens_and_answers_do_not_depend_on_the_batch(words):
    model = wrapped(backbone("llama", hf.AutoModelForCausalLM))
    kind = CausalText2Text()
    pairs = [read_pair(words, a, b, "row") for a, b in (("the film", "great"), ("the plot and the cast", "very dull"))]
    rows, _, _ = encode_exchanges(words, pairs, None, 10)
    collate = kind.collator(words, model)
    expected = 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected -= sum(logits[i - 1, label].item() for i, label in enumerate(labels.tolist()) if label != -100)
    assert answer_loss(model, rows, collate, 1) == pytest.approx(expected / 5, rel=1e-5)
    for words.padding_side in ("left", "right"):
        assert answer_loss(model, rows, collate, 2) == pytest.approx(expected / 5, rel=1e-5)
    write = answer_predictor(model, words, 4)
    assert write(rows) == write(rows[:1]) + write(rows[1:])
    assert left_padded([[5], [6, 7]], 0)["input_ids"].tolist() == [[0, 5], [6, 7]]


def test_packed_rows_have_the_loss_of_their_examples_alone_and_no_more_tokens_than_there_is_room(words):
    model = wrapped(backbone("llama", hf.AutoModelForCausalLM))
    pairs = [read_pair(words, " ".join(["film"] * n), "very dull", "row") for n in (1, 2, 3, 4, 5)]
    rows, _, _ = encode_exchanges(words, pairs, None, 10)  # of 4 to 8 tokens
    together = packed(rows, 24, 5)
    assert [len(row["input_ids"]) + 5 * row["position_ids"].count(0) for row in together] == [24, 22, 9]
    collate = CausalText2Text().collator(words, model)
    assert answer_loss(model, together, collate, 3) == pytest.approx(answer_loss(model, rows, collate, 5), rel=1e-5)
    with pytest.raises(ValueError, match="packing is for causal models that write"):
        KINDS["text2text"]().packed(rows, 24, 5)


# ---------------------------------------------------------------------- the command line


def command(*argv) -> int:
    return main([str(word) for word in argv])


def last_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A causal model with a chat template (llama/), prompts and completions, and conversations."""
    place = tmp_path_factory.mktemp("writing")
    tiny_text.save_model(place / "llama", "llama", hf.AutoModelForCausalLM, eos_token_id=4, initializer_range=0.3)
    tokenizer = tiny_text.tokenizer("t5")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "llama")
    rows = [(f"{text} Answer:", f"very {label}") for text, label in reviews(64)]
    jsonl(place / "rows.jsonl", [{"prompt": text, "completion": label} for text, label in rows])
    jsonl(
        place / "chats.jsonl", [{"id": f"n{i}", "messages": [user(a), assistant(b)]} for i, (a, b) in enumerate(rows)]
    )
    tiny_text.write_csv(place / "rows.csv", rows, header=("question", "answer"))
    return place


@pytest.fixture(scope="module")
def adapter(place):
    """An adapter that was trained on prompts and completions."""
    out = place / "adapter"
    files = ["--train_file", place / "rows.jsonl", "--validation_file", place / "rows.jsonl"]
    more = ["--preset", "deep", "--max_steps", 150, "--eval_strategy", "no", "--max_target_length", 4]
    assert command("train", "--model_name_or_path", place / "llama", *files, "--output_dir", out, *more, *SMALL) == 0
    return out


def test_a_causal_model_learns_from_prompts_and_completions_to_write(adapter, place, capsys):
    record = json.loads((adapter / "run.json").read_text())
    assert record["task"] == "text2text" and record["label_words"] is None and not record["reads_chat"]
    assert Columns(**record["columns"]) == Columns("prompt", None, "completion")
    assert list(record["metrics"])[:2] == ["eval_exact_match", "eval_token_f1"] and "eval_loss" in record["metrics"]
    assert record["metrics"]["eval_exact_match"] > 0.8
    words = ["--test_file", place / "rows.jsonl", "--max_target_length", 4]
    assert command("eval", "--adapter", adapter, *words) == 0
    metrics = last_json(capsys)
    assert list(metrics) == ["exact_match", "token_f1", "loss", "rows"] and metrics["rows"] == 64
    assert metrics["exact_match"] == pytest.approx(record["metrics"]["eval_exact_match"])
    assert metrics["loss"] == pytest.approx(record["metrics"]["eval_loss"], rel=0.05)  # the mean of the batches' means


def test_a_stream_of_answers_gives_the_rows_that_are_read_at_once_and_names_a_bad_one(place, words, tmp_path, capsys):
    kind, path = CausalText2Text(), place / "chats.jsonl"
    for file, columns in ((path, Columns("messages")), (place / "rows.jsonl", Columns("prompt", None, "completion"))):
        whole, _, _ = kind.encode_table(read_file(file), str(file), columns, words, 12, 4)
        encode = kind.stream_encoder(str(file), columns, words, 16, 4)
        stream = TokenStream(RowStream(str(file)), columns, None, words, max_length=16, max_target_length=4, batch=4,
                             shuffle_buffer=100, seed=0, encode=encode)  # fmt: skip
        rows = list(itertools.islice(stream, 64))
        key = lambda row: (row["input_ids"], row["labels"])  # noqa: E731
        assert sorted(map(key, rows)) == sorted(map(key, whole))
    model = ["--model_name_or_path", place / "llama", "--streaming", "--max_steps", 2, *SMALL]
    assert command("train", *model, "--train_file", path, "--output_dir", tmp_path / "out") == 0
    bad = jsonl(tmp_path / "bad.jsonl", [{"messages": [user("a"), assistant("b")]}] * 2 + [{"messages": [user("a")]}])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command("train", *model, "--train_file", bad, "--output_dir", tmp_path / "bad")
    assert "bad.jsonl, row 3: 'messages': the last message is the user's" in capsys.readouterr().err


def test_conversations_are_learned_and_other_columns_by_their_names(place, tmp_path, capsys):
    model = ["--model_name_or_path", place / "llama", "--max_steps", 2, *SMALL]
    assert command("train", *model, "--train_file", place / "chats.jsonl", "--output_dir", tmp_path / "chat") == 0
    record = json.loads((tmp_path / "chat" / "run.json").read_text())
    assert record["reads_chat"] and Columns(**record["columns"]) == Columns("messages")
    capsys.readouterr()
    assert command("eval", "--adapter", tmp_path / "chat", "--test_file", place / "chats.jsonl") == 0
    assert last_json(capsys)["rows"] == 64
    packing = ["--packing", "--output_dir", tmp_path / "packed"]
    assert command("train", *model, "--train_file", place / "rows.jsonl", *packing) == 0
    assert "text2text: 64 train rows packed into " in capsys.readouterr().err
    names = ["--text_column", "question", "--label_column", "answer", "--task", "text2text"]
    assert command("train", *model, "--train_file", place / "rows.csv", *names, "--output_dir", tmp_path / "csv") == 0
    assert json.loads((tmp_path / "csv" / "run.json").read_text())["columns"]["label"] == "answer"


@pytest.mark.parametrize("more, message", [
    (["--streaming", "--packing"], "--packing chooses among all rows, which --streaming does not hold"),
    (["--text_pair_column", "completion"], "leave out --text_pair_column"),
    (["--generation_max_length", "60"], "--generation_max_length 60 does not fit in 60 tokens"),
    (["--task_name", "rte"], "rte: a causal model learns a benchmark's labels as the continuation"),
])  # fmt: skip
def test_what_a_writing_causal_model_cannot_do_is_refused_before_training(more, message, place, tmp_path, capsys):
    data = [] if "--task_name" in more else ["--train_file", place / "rows.jsonl"]
    with pytest.raises(SystemExit):
        command("train", "--model_name_or_path", place / "llama", *data, "--output_dir", tmp_path / "out",
                "--task", "text2text", "--max_steps", 1, *SMALL, *more)  # fmt: skip
    assert message in capsys.readouterr().err


def predict(adapter, *options) -> int:
    return command("predict", "--adapter", adapter, "--max_target_length", 4, *options)


def test_answers_are_written_for_lines_tables_and_conversations(adapter, place, tmp_path, capsys):
    texts = [json.loads(line)["prompt"] for line in (place / "rows.jsonl").read_text().splitlines()][:6]
    (tmp_path / "lines.txt").write_text("".join(f"{text}\n" for text in texts))
    assert predict(adapter, "--input_file", tmp_path / "lines.txt") == 0
    written = capsys.readouterr()
    lines = written.out.splitlines()
    assert len(lines) == 6 and set(lines) == {"very positive", "very negative"} and "Predicting" in written.err
    jsonl(tmp_path / "in.jsonl", [{"idx": f"n{i}", "prompt": text} for i, text in enumerate(texts)])
    tiny_text.write_csv(tmp_path / "in.csv", [(text, "x") for text in texts], header=("prompt", "other"))
    for name, ids in (("in.jsonl", [f"n{i}" for i in range(6)]), ("in.csv", [1, 2, 3, 4, 5, 6])):
        out = tmp_path / f"{name}.out.jsonl"
        assert predict(adapter, "--input_file", tmp_path / name, "--output_file", out) == 0
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert records == [{"id": id, "text": text} for id, text in zip(ids, lines, strict=True)]
    jsonl(tmp_path / "chat.jsonl", [{"messages": [user(text), assistant("great")]} for text in texts])
    assert predict(adapter, "--input_file", tmp_path / "chat.jsonl") == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


class Killed(BaseException):
    pass


def predict_and_die(batches: int, *arguments) -> None:
    """Runs `predict` until some batches are written."""
    write, left = Output.write, iter(range(batches))

    def write_or_die(*batch):
        if next(left, None) is None:
            raise Killed
        write(*batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Output, "write", write_or_die)
        predict(*arguments)


def test_predictions_go_on_where_they_were_interrupted_with_what_one_run_would_have_written(
    adapter, place, tmp_path, capsys, monkeypatch
):
    run = ["--input_file", place / "rows.jsonl", "--batch_size", 8]
    for name in ("whole.jsonl", "whole.txt"):
        out = tmp_path / name
        assert predict(adapter, *run, "--output_file", out) == 0
        whole, part = out.read_bytes(), tmp_path / f"part{out.suffix}"
        predict_and_die(2, adapter, *run, "--output_file", part)
        assert part.read_bytes() == b"".join(whole.splitlines(keepends=True)[:16])
        begun = (tmp_path / f"{part.name}.partial.json").read_text()
        with open(part, "ab") as file:
            file.write(b'{"id": 17, "te')  # a kill in mid-line
        capsys.readouterr()
        assert predict(adapter, *run, "--output_file", part) == 0
        assert part.read_bytes() == whole and "part" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial.json"))
    (tmp_path / "part.txt.partial.json").write_text(begun)  # a kill after the last row
    monkeypatch.setattr("ept.pretrained.SavedAdapter.load", None)  # nothing is left to do
    assert predict(adapter, *run, "--output_file", part) == 0 and not list(tmp_path.glob("*.partial.json"))
    with pytest.raises(SystemExit):  # a finished file
        predict(adapter, *run, "--output_file", part)
    assert "part.txt.partial.json is not beside it" in capsys.readouterr().err


def test_only_what_an_interrupted_run_of_the_same_adapter_input_and_options_left_is_gone_on_with(
    adapter, place, tmp_path, capsys, monkeypatch
):
    out, run = tmp_path / "out.jsonl", ["--input_file", place / "rows.jsonl"]
    predict_and_die(1, adapter, *run, "--batch_size", 8, "--output_file", out)
    retrained = shutil.copytree(adapter, tmp_path / "retrained")
    model = AutoEPTModel.from_pretrained(adapter)
    with torch.no_grad():
        model.ept.prompt += 1
    model.save_pretrained(retrained)
    rows = (place / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join(rows[::-1]))
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    (tmp_path / "stub.txt").write_text("no end of line")
    monkeypatch.setattr("ept.pretrained.SavedAdapter.load", None)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for arguments, message in (
        ((retrained, *run), "was left by an interrupted run with another adapter: give another name"),
        ((adapter, "--input_file", tmp_path / "more.jsonl"), "with another input"),
        ((adapter, *run, "--max_seq_length", 9), "with another --max_seq_length"),
        ((adapter,), "which standard input cannot go on with"),
        ((adapter, *run, "--output_file", tmp_path / "notes.txt"), "notes.txt exists, and no interrupted ept predict"),
        ((adapter, *run, "--output_file", tmp_path / "stub.txt"), "--overwrite_output_file, which writes over it"),
    ):
        with pytest.raises(SystemExit):
            predict(arguments[0], "--output_file", out, *arguments[1:])
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    out.write_text('{"id": 9, "text": "x"}\n')  # put in place of what the run left
    with pytest.raises(SystemExit):
        predict(adapter, *run, "--output_file", out)
    assert "line 1 has the id 9, not 1" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (["--all_probabilities"], "--all_probabilities: text2text has no classes"),
    (["--text_column", "body"], "has no column 'body' (--text_column); it has: prompt, completion"),
    (["--id_column", "key"], "has no column 'key' (--id_column)"),
    (["--text_pair_column", "completion"], "leave out --text_pair_column"),
    (["--output_file", "other.jsonl"], "other.jsonl exists, and no interrupted ept predict left it"),
    (["--output_file", "absent/out.txt"], "there is no such directory"),
    (["--output_file", "."], "--output_file . is a directory"),
    (["--input_file", "lines.txt", "--output_file", "lines.txt"], "is the --input_file"),
    (["--input_file", "rows.jsonl"], "rows.jsonl, row 2: the text ('prompt') is missing"),
    (["--input_file", "two.jsonl"], "say which column is the text with --text_column; it has: a, b"),
    (["--input_file", "lines.txt", "--text_column", "a"], "--text_column is for tables"),
    (["--input_file", "empty.csv"], "holds no rows"),
])  # fmt: skip
def test_bad_input_is_one_line_before_the_model_is_loaded(
    options, message, adapter, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ept.pretrained.SavedAdapter.load", None)
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "the film"}, {"prompt": None}])
    jsonl(tmp_path / "two.jsonl", [{"a": "the film", "b": "the plot"}])
    jsonl(tmp_path / "other.jsonl", [{"id": 9, "text": "x"}])
    (tmp_path / "lines.txt").write_text("the film\n")
    (tmp_path / "empty.csv").write_text("prompt\n")
    with pytest.raises(SystemExit):
        predict(adapter, "--input_file", place / "rows.jsonl", *options)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
