"""The thirteen tasks: their published files with the odd lines they have, their inputs and metrics, end to end."""

import json

import pytest
import torch
import transformers as hf
from datasets import Dataset

from ept import EPTConfig, get_ept_model
from ept.cli import main
from ept.console import without_load_reports
from ept.tasks.continuation import ContinuationCollator, candidates, contexts, label_scores
from ept.tasks.fitting_text import fit_texts
from ept.tasks.glue import BENCHMARK_TASKS, Rows, benchmark_task
from ept.tasks.glue_files import read_task
from ept.tasks.task import Task
from tiny_models import backbone
from tiny_text import GOOD, reviews, save_model, tokenizer

# What the benchmarks' archives hold: header and a labelled row, the test file's header and row, the fields and label.
GLUE = {
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
        "\tsentence1\tsentence2\tlabel1\tgold_label",
        '0\t1\t1e\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tHe said "no.\tHe agreed.\tneutral\tcontradiction',
        "index\tsentence1\tsentence2", "0\tA\tB", {"premise": 'He said "no.', "hypothesis": "He agreed."}, 2),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", '1\t2\t3\tWhat is "x?\tWhy?\t1', "id\tquestion1\tquestion2",
        "0\tA?\tB?", {"question1": 'What is "x?', "question2": "Why?"}, 1),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWho?\tIt was I.\tnot_entailment", "index\tquestion\tsentence", "0\tA?\tB",
        {"question": "Who?", "sentence": "It was I."}, 1),
    "sst2": ("sentence\tlabel", 'a "fine film \t1', "index\tsentence", "0\ta film", {"sentence": 'a "fine film '}, 1),
    "stsb": ("index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSR\t2012\t0001\tnone\tnone\tA plane.\tAn air plane.\t3.800",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
        "0\tmain\tMSR\t2012\t0001\tnone\tnone\tA\tB", {"sentence1": "A plane.", "sentence2": "An air plane."}, 3.8),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tHe said "so.\tSo he said.',
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\tA\tB",
        {"sentence1": 'He said "so.', "sentence2": "So he said."}, 1),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tRain fell.\tIt rained.\tentailment", "index\tsentence1\tsentence2",
        "0\tA\tB", {"premise": "Rain fell.", "hypothesis": "It rained."}, 0),
    "cola": (None, "gj04\t0\t*\tThem \"ran.", "index\tsentence", "0\tThey ran.", {"sentence": 'Them "ran.'}, 0),
}  # fmt: skip
SUPER_GLUE = {
    "boolq": ({"question": "is it so", "passage": "It is.", "idx": 0, "label": True},
        {"passage": "It is.", "question": "is it so"}, 1),
    "cb": ({"premise": "I think.", "hypothesis": "He is.", "label": "neutral", "idx": 0},
        {"premise": "I think.", "hypothesis": "He is."}, 2),
    "rte": ({"premise": "A.", "hypothesis": "B.", "label": "not_entailment", "idx": 0}, {"premise": "A.", "hypothesis": "B."}, 1),
    "wic": ({"word": "bank", "sentence1": "The bank shut.", "sentence2": "A river bank.", "idx": 0, "label": False, "start1": 4,
        "start2": 8, "end1": 8, "end2": 12, "version": 1.1},
        {"word": "bank", "marked1": "The * bank * shut.", "marked2": "A river * bank *."}, 0),
    "wsc": ({"text": "Mark told Pete that he, he alone, won.", 
        "target": {"span2_index": 5, "span1_index": 0, "span1_text": "Mark",
        "span2_text": "he"}, "idx": 0, "label": True},
        {"marked": "* Mark * told Pete that he, # he #", "rest": " alone, won.", "noun": "Mark", "pronoun": "he"}, 1),
}  # fmt: skip
MULTIRC = {
    "idx": 4,
    "version": 1.1,
    "passage": {
        "text": "<b>Sent 1: </b>Ann ran.<br><b>Sent 2: </b>Bo sat.<br>",
        "questions": [
            {"question": "Who ran?", "idx": 9, "answers": [
                {"text": "Ann", "idx": 20, "label": 1}, {"text": "Bo", "idx": 21, "label": 0}]},
            {"question": "Who sat?", "idx": 10, "answers": [{"text": "Bo", "idx": 22, "label": 1}]},
        ],
    },
}  # fmt: skip


def put(path, *lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(line for line in lines if line is not None) + "\n").encode())


def subset(fields: dict, wanted: dict) -> dict:
    return {name: fields[name] for name in wanted}


def test_the_table_has_the_papers_thirteen_tasks_with_the_metric_of_published_results_first():
    assert set(BENCHMARK_TASKS) == {*GLUE, *SUPER_GLUE, "multirc"} and len(BENCHMARK_TASKS) == 13
    firsts = {name: task.metrics[0] for name, task in BENCHMARK_TASKS.items()}
    assert firsts == dict.fromkeys(BENCHMARK_TASKS, "accuracy") | {
        "stsb": "pearson",
        "multirc": "f1",
        "cola": "matthews",
    }
    assert benchmark_task("SST-2").name == "sst2"
    with pytest.raises(ValueError, match="one of mnli, qqp"):
        benchmark_task("wnli")


@pytest.mark.parametrize("name", GLUE)
def test_glue_files_are_read_with_their_quotes_headers_and_unlabelled_test_rows(name, tmp_path):
    header, row, test_header, test_row, fields, label = GLUE[name]
    task = BENCHMARK_TASKS[name]
    dev = "dev_matched.tsv" if name == "mnli" else "dev.tsv"
    put(tmp_path / dev, header, row, row + "\r")
    put(tmp_path / task.folders[0] / "test.tsv", test_header, test_row)  # found one directory below, too
    rows, source = read_task(task, "validation", str(tmp_path))
    assert rows.labels == [label, label] and source.endswith(dev)
    assert [subset(each, fields) for each in rows.fields] == [fields, fields]
    test = read_task(task, "test", str(tmp_path))[0]
    assert test.labels == [None]
    assert read_task(task, "train", str(tmp_path)) is None


def test_a_short_line_is_left_out_and_counted_and_other_mistakes_name_their_line(tmp_path, capsys):
    header, row, *_ = GLUE["qqp"]
    put(tmp_path / "train.tsv", header, row, "5\t6\t7\tonly one question")
    assert len(read_task(BENCHMARK_TASKS["qqp"], "train", str(tmp_path))[0]) == 1
    assert "1 lines with too few fields are left out, the first is line 3" in capsys.readouterr().err
    put(tmp_path / "dev.tsv", header, row, row.replace("\t1", "\t7"))
    with pytest.raises(ValueError, match=r"dev.tsv, line 3: the label '7' is not one of not_duplicate, duplicate"):
        read_task(BENCHMARK_TASKS["qqp"], "validation", str(tmp_path))
    put(tmp_path / "dev.tsv", header, row, row.replace("\t1", " \tcut by a tab\t1"))
    with pytest.raises(ValueError, match="line 3: the label 'cut by a tab'"):
        read_task(BENCHMARK_TASKS["qqp"], "validation", str(tmp_path))
    assert (
        "1 lines have more fields than the header (a tab inside a text?), the first is line 3"
        in capsys.readouterr().err
    )
    put(tmp_path / "other" / "dev.tsv", *GLUE["rte"][:2])
    with pytest.raises(ValueError, match=r"dev.tsv, line 2: it has no question, only"):
        read_task(BENCHMARK_TASKS["qnli"], "validation", str(tmp_path / "other"))


def test_mrpc_comes_from_microsofts_own_file_too(tmp_path):
    put(tmp_path / "msr_paraphrase_train.txt", *GLUE["mrpc"][:2])
    assert read_task(BENCHMARK_TASKS["mrpc"], "train", str(tmp_path))[0].labels == [1]


@pytest.mark.parametrize("name", SUPER_GLUE)
def test_superglue_objects_are_read_with_their_spans_and_without_labels(name, tmp_path):
    row, fields, label = SUPER_GLUE[name]
    put(tmp_path / "val.jsonl", json.dumps(row))
    put(tmp_path / "test.jsonl", json.dumps({k: v for k, v in row.items() if k != "label"}))
    rows = read_task(BENCHMARK_TASKS[name], "validation", str(tmp_path))[0]
    assert rows.labels == [label] and subset(rows.fields[0], fields) == fields
    assert read_task(BENCHMARK_TASKS[name], "test", str(tmp_path))[0].labels == [None]


def test_a_span_with_a_wrong_index_is_found_by_its_text(tmp_path):
    row = json.loads(json.dumps(SUPER_GLUE["wsc"][0]))
    row["target"]["span2_index"] = 99
    put(tmp_path / "val.jsonl", json.dumps(row))
    assert read_task(BENCHMARK_TASKS["wsc"], "validation", str(tmp_path))[0].fields[0]["marked"].endswith("that # he #")
    row["target"]["span2_text"] = "she"
    put(tmp_path / "val.jsonl", json.dumps(row))
    with pytest.raises(ValueError, match=r"line 1: the span 'she' is not in the text"):
        read_task(BENCHMARK_TASKS["wsc"], "validation", str(tmp_path))


def test_a_pronoun_inside_the_noun_is_marked_inside_it(tmp_path):
    target = {"span1_index": 1, "span1_text": "his dog", "span2_index": 1, "span2_text": "his"}
    put(tmp_path / "val.jsonl", json.dumps({"text": "When his dog ran", "target": target, "label": False}))
    fields = read_task(BENCHMARK_TASKS["wsc"], "validation", str(tmp_path))[0].fields[0]
    assert fields["marked"] + fields["rest"] == "When * # his # dog * ran"


def test_multirc_gives_one_row_an_answer_grouped_by_question(tmp_path):
    put(tmp_path / "val.jsonl", json.dumps(MULTIRC))
    task = BENCHMARK_TASKS["multirc"]
    rows = read_task(task, "validation", str(tmp_path))[0]
    assert rows.labels == [1, 0, 1] and rows.groups == [(4, 9), (4, 9), (4, 10)]
    assert rows.fields[1] == {"paragraph": "Sent 1: Ann ran. Sent 2: Bo sat. ", "question": "Who ran?", "answer": "Bo"}
    # Right in the second question alone: answers' precision 2/3 and recall 1, one of two questions.
    assert task.judge([1, 1, 1], rows) == {"f1": pytest.approx(0.8), "exact_match": 0.5}


@pytest.mark.parametrize("name", ["mnli", "cb", "wsc", "multirc", "stsb"])
def test_the_hubs_parquet_with_numbers_for_labels_gives_the_same_rows(name, tmp_path):
    task = BENCHMARK_TASKS[name]
    made = {
        "mnli": {"premise": "A", "hypothesis": "B", "label": 1, "idx": 0},
        "cb": {"premise": "A", "hypothesis": "B", "label": 1, "idx": 0},
        "wsc": {"text": "Ann saw it .", "span1_index": 0, "span2_index": 2, "span1_text": "Ann", "span2_text": "it",
            "label": 1},
        "multirc": {"paragraph": "A", "question": "B", "answer": "C", "idx": {"paragraph": 3, "question": 4, "answer": 5},
            "label": 1},
        "stsb": {"sentence1": "A", "sentence2": "B", "label": 1.0, "idx": 0},
    }[name]  # fmt: skip
    split = "validation_matched" if name == "mnli" else "validation"
    for shard in range(2):
        Dataset.from_list([made, made | {"label": -1}]).to_parquet(tmp_path / f"{split}-0000{shard}-of-00002.parquet")
    rows = read_task(task, "validation", str(tmp_path))[0]
    assert rows.labels == [1, None, 1, None]
    assert rows.groups == ([(3, 4)] * 4 if name == "multirc" else None)


def test_metrics_are_the_benchmarks_and_a_text_that_is_no_label_is_wrong():
    def judged(name, predicted, truth):
        return BENCHMARK_TASKS[name].judge(predicted, Rows([{}] * len(truth), truth))

    assert judged("cola", [1, 1, 0, 0], [1, 0, 0, 0]) == {"accuracy": 0.75, "matthews": pytest.approx(3**-0.5)}
    assert judged("mrpc", [1, 0, 1], [1, 1, 1]) == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(0.8)}
    assert judged("cb", [0, 1, 1], [0, 1, 2])["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert judged("stsb", [1.0, 2.0, 3.0], [0.0, 1.0, 5.0])["spearman"] == pytest.approx(1)
    assert judged("stsb", [2.0, 2.0], [0.0, 1.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert BENCHMARK_TASKS["cb"].read_word("maybe", 2) != 2 and BENCHMARK_TASKS["rte"].read_word(" entailment", 1) == 0
    stsb = BENCHMARK_TASKS["stsb"]
    assert [stsb.word(score) for score in (3.25, 3.8, 0, 5)] == ["3.2", "3.8", "0.0", "5.0"]
    assert stsb.read_word("3.2", 1) == 3.2 and stsb.read_word("much", 1) == -1 and stsb.read_word("nan", 1) == -1


def test_the_best_checkpoint_is_judged_by_what_an_evaluation_gives():
    task = BENCHMARK_TASKS["mrpc"]
    assert Task.of_benchmark(task, None).best_metric() == ("accuracy", True)
    assert Task.of_benchmark(task, "text2text").best_metric("eval_loss") == ("loss", False)
    with pytest.raises(ValueError, match="loss is unknown: mrpc has accuracy, f1"):
        Task.of_benchmark(task, "continuation").best_metric("loss")  # scores of labels have no loss


def test_what_is_too_long_loses_the_passage_and_never_the_question():
    task = BENCHMARK_TASKS["boolq"]
    rows = Rows([{"passage": "a " * 50, "question": "is it so"}, {"passage": "a", "question": "b"}], [1, 0])

    def count(texts):
        return [sum(len(text.split()) for text in row) for row in texts]

    texts, cut = fit_texts(task, rows, (task.prompt,), count, 20)
    assert cut == 1 and texts[0][0].endswith("question: is it so") and count(texts)[0] == 20
    assert texts[1] == ("boolq passage: a question: b",)


def test_a_labels_score_is_the_sum_of_its_tokens_log_probabilities():
    model, words = backbone("llama", hf.AutoModelForCausalLM), tokenizer("t5")
    labels = candidates(words, ["positive", "negative quoted"])
    assert [len(ids) for ids in labels] == [2, 3]  # with the end of the text
    rows = contexts(words, ["a very dull film", "great"])
    scores = label_scores(model, rows, ContinuationCollator(words, labels), at_once=3)
    for row, context in enumerate(rows):
        for column, ids in enumerate(labels):
            logits = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
            expected = sum(logits[len(context) - 1 + i, token] for i, token in enumerate(ids))
            assert scores[row, column].item() == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(ValueError, match="same tokens"):
        candidates(words, ["unknown1", "unknown2"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny models, and sst2, rte, multirc and stsb that the words decide, in the published forms."""
    place = tmp_path_factory.mktemp("tasks")
    save_model(place / "bert", pooling=True)
    save_model(place / "t5", "t5", hf.AutoModelForSeq2SeqLM, eos_token_id=4)
    save_model(place / "llama", "llama", hf.AutoModelForCausalLM)
    for split, n in (("train", 48), ("dev", 24)):
        rows = reviews(n, seed=n)
        put(
            place / "sst2" / f"{split}.tsv",
            "sentence\tlabel",
            *(f"{t}\t{int(any(w in t for w in GOOD))}" for t, _ in rows),
        )
        put(place / "stsb" / f"{split}.tsv", "index\tsentence1\tsentence2\tscore",
            *(f"{i}\t{t}\tfilm\t{4.5 if label == 'positive' else 0.5}" for i, (t, label) in enumerate(rows)))  # fmt: skip
        objects = [{"idx": i, "passage": {"text": t, "questions": [{"question": "film", "idx": 0, "answers": [
            {"text": "great", "label": int(label == "positive")}, {"text": "dull", "label": int(label != "positive")}]}]}}
            for i, (t, label) in enumerate(rows[:16])]  # fmt: skip
        put(place / "multirc" / f"{'val' if split == 'dev' else split}.jsonl", *map(json.dumps, objects))
    return place


@pytest.mark.parametrize(
    "task, model, steps, metrics",
    [
        ("sst2", "bert", 3, ["accuracy"]),
        ("multirc", "bert", 3, ["f1", "exact_match"]),
        ("stsb", "bert", 3, ["pearson", "spearman"]),
        ("multirc", "t5", 2, ["f1", "exact_match"]),
        ("stsb", "t5", 2, ["pearson", "spearman"]),
        ("stsb", "llama", 2, ["pearson", "spearman"]),
    ],
)
def test_a_task_trains_by_its_name_and_eval_gives_the_same_metrics(
    task, model, steps, metrics, place, tmp_path, capsys
):
    command = ["train", "--task_name", task, "--data_dir", place / task, "--model_name_or_path", place / model,
        "--output_dir", tmp_path / "out", "--max_steps", steps, "--prompt_length", 4, "--token_rank", 6, "--use_cpu",
        "--disable_tqdm", "true", "--load_best_model_at_end", "true", "--max_target_length", 4]  # fmt: skip
    assert main(list(map(str, command))) == 0
    trained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(trained)[: len(metrics)] == [f"eval_{name}" for name in metrics]
    command = ["eval", "--task_name", task, "--data_dir", place / task, "--adapter", tmp_path / "out",
        "--model_name_or_path", place / model, "--max_target_length", 4]  # fmt: skip
    assert main(list(map(str, command))) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(evaluated) == [*metrics, "rows"]
    for name in metrics:
        assert evaluated[name] == pytest.approx(trained[f"eval_{name}"], abs=1e-6)


def test_a_causal_model_trains_on_the_labels_tokens_alone():
    words = tokenizer("t5")
    collate = ContinuationCollator(words, candidates(words, ["positive", "negative"]))
    rows = contexts(words, ["a very dull film", "great"])
    batch = collate([{"input_ids": ids, "labels": i} for i, ids in enumerate(rows)])
    for i, ids in enumerate(rows):
        kept = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert kept == collate.label_ids[i] and batch["input_ids"][i, : len(ids)].tolist() == ids
        assert batch["attention_mask"][i].sum() == len(ids) + len(kept)
    assert collate.separate(batch) == (rows, [0, 1])


def test_a_causal_models_adapter_predicts_label_words(place, tmp_path, capsys):
    command = ["train", "--task_name", "sst2", "--data_dir", place / "sst2", "--model_name_or_path", place / "llama",
        "--output_dir", tmp_path / "out", "--max_steps", 2, "--token_rank", 6, "--eval_strategy", "no", "--use_cpu",
        "--disable_tqdm", "true"]  # fmt: skip
    assert main(list(map(str, command))) == 0
    (tmp_path / "lines.txt").write_text("sst2 sentence: a superb film\nsst2 sentence: a dull film\n")
    assert main(["predict", "--adapter", str(tmp_path / "out"), "--input_file", str(tmp_path / "lines.txt")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert all(label in ("positive", "negative") and 0.5 <= float(probability) <= 1 for label, probability in lines)


def test_an_adapter_with_numbered_labels_is_judged_on_a_task_and_on_files_with_numbers(place, tmp_path, capsys):
    with without_load_reports():
        base = hf.AutoModelForSequenceClassification.from_pretrained(place / "bert")
    get_ept_model(base, EPTConfig.input_only(prompt_length=2, max_text_length=9)).save_pretrained(tmp_path / "adapter")
    common = ["eval", "--adapter", str(tmp_path / "adapter"), "--model_name_or_path", str(place / "bert")]
    assert main([*common, "--task_name", "sst2", "--data_dir", str(place / "sst2")]) == 0
    on_task = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*common, "--test_file", str(place / "sst2" / "dev.tsv")]) == 0
    on_file = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert on_task["accuracy"] == on_file["accuracy"]


@pytest.mark.parametrize("options, said", [
    (["--task_name", "sst2", "--data_dir", "{place}/sst2", "--max_seq_length", "2"], "raise --max_seq_length"),
    (["--task_name", "sst3"], "unknown task 'sst3'"),
    (["--task_name", "sst2", "--data_dir", "nowhere"], "nowhere is no directory"),
    (["--task_name", "sst2", "--data_dir", "{place}/stsb", "--train_file", "x.csv"], "brings its own rows"),
    (["--data_dir", "{place}/sst2"], "say which with --task_name"),
    (["--task_name", "rte", "--data_dir", "{place}/bert"], "holds no train file of rte"),
    (["--task_name", "stsb", "--data_dir", "{place}/stsb", "--task", "classification"], "stsb is a regression"),
])  # fmt: skip
def test_a_task_that_cannot_be_read_is_one_line(options, said, place, tmp_path, capsys):
    options = [word.format(place=place) for word in options]
    with pytest.raises(SystemExit):
        main(["train", "--model_name_or_path", str(place / "bert"), "--output_dir", str(tmp_path / "out"), *options])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and said in errors[0]
