"""Reading labelled text: every kind of file, and what is said about one that is wrong."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from ept.data.columns import Columns, choose_columns, split_labels
from ept.data.labels import LabelCounts, Labels
from ept.data.streaming import RowStream
from ept.data.tables import read_file
from ept.data.tokens import tokenize
from ept.tasks.kinds import CausalText2Text, Classification, Text2Text
from ept.tasks.task import Task
from tiny_text import reviews, tokenizer, write_csv

ROWS = [("a great film", "positive"), ('"quoted" plot, with a comma', "negative"), ("the scene é", "positive")]


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(path, rows) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        write_csv(path, ROWS, ("text", "label"))
    elif kind == "tsv":
        write(path, "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS))
    elif kind == "parquet":
        texts, labels = zip(*ROWS, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path)
    else:
        jsonl(path, [{"text": text, "label": label} for text, label in ROWS])
    table = read_file(path)
    assert list(zip(table["text"], table["label"], strict=True)) == ROWS


@pytest.mark.parametrize("header", ["Text,Label", " text , label", ",text,label", "Unnamed: 0,text,labels"])
def test_columns_are_found_by_any_capitals_and_beside_an_index_without_a_name(header, tmp_path):
    index = "7," if header.count(",") == 2 else ""
    table = read_file(write(tmp_path / "x.csv", f"{header}\n{index}good,1\n{index}bad,0\n"))
    columns = choose_columns(table, "x.csv", Columns())
    assert list(table[columns.text]) == ["good", "bad"] and list(table[columns.label]) == ["1", "0"]


def test_prompt_and_completion_are_found_by_an_encoder_decoder_too(tmp_path):
    table = read_file(jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}]))
    assert Text2Text.choose_columns(table, "x", Columns()) == Columns("prompt", None, "completion")


def test_a_label_that_is_an_object_is_refused_and_empty_texts_are_counted(tmp_path, capsys):
    table = read_file(jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": {"x": n}} for n in range(2)]))
    with pytest.raises(ValueError, match=r"x, row 1: the label \('label'\) is an object, \{'x': 0\}"):
        Labels.of(table, "x", "label")
    table = read_file(write(tmp_path / "x.csv", "text,label\na,1\n ,0\n"))
    Task(Classification(("0", "1")), Columns("text", None, "label")).encode(table, "x", tokenizer(), 9, 9)
    assert "x: warning: 1 of 2 rows have an empty text ('text')" in capsys.readouterr().err


def test_quotation_marks_in_tsv_are_characters(tmp_path):
    path = write(tmp_path / "x.tsv", 'text\tlabel\n"It begins\t1\nand "never" ends"\t0\n')
    assert list(read_file(path)["text"]) == ['"It begins', 'and "never" ends"']


def test_quoted_csv_texts_may_run_over_lines_and_words_that_mean_nothing_stay_words(tmp_path):
    path = write(tmp_path / "x.csv", 'text,label\n"two\nlines",NA\nnull,None\n')
    table = read_file(path)
    assert list(table["text"]) == ["two\nlines", "null"] and list(table["label"]) == ["NA", "None"]


@pytest.mark.parametrize("sign", [";", "\t"])
def test_semicolons_and_tabs_divide_a_csv_whose_header_has_no_comma(sign, tmp_path):
    path = write(tmp_path / "x.csv", f'text{sign}label\n"good{sign} really, yes"{sign}1\nso, so{sign}0\n')
    assert read_file(path)[1] == {"text": "so, so", "label": "0"}
    bare = write(tmp_path / "bare.csv", f"a text{sign}1\n")
    with pytest.raises(ValueError, match=r"bare\.csv: its first line has .* and no comma"):
        read_file(bare, header=False)
    one = write(tmp_path / "one.csv", f'"a text{sign} and more"\n')
    assert read_file(one, header=False)[0] == {"0": f"a text{sign} and more"}


def test_without_a_header_columns_are_numbered(tmp_path):
    path = write(tmp_path / "cola.tsv", "gj04\t1\t\tThe film ends.\nbc81\t0\t*\tThe film end.\n")
    table = read_file(path, header=False)
    columns = choose_columns(table, path, Columns(text="3", label="1"))
    assert list(table[columns.text]) == ["The film ends.", "The film end."] and list(table["1"]) == ["1", "0"]


def test_a_byte_order_mark_and_windows_line_ends_are_not_text(tmp_path):
    table = read_file(write(tmp_path / "x.csv", b"\xef\xbb\xbftext,label\r\na,1\r\nb,0\r\n"))
    assert table.column_names == ["text", "label"] and list(table["label"]) == ["1", "0"]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.csv", b"", "x.csv is empty"),
        ("x.csv", b"text,label\n", "holds no rows, only a header"),
        ("x.jsonl", b"\n\n", "holds no rows"),
        ("x.csv", b"text,label\na,1\ncaf\xe9,0\n", "line 3: byte 0xe9 is not UTF-8"),
        ("x.tsv", "text\tlabel\na\t1\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("x.csv", b"text,label\na,1\nb, with a comma,0\n", "line 3: 3 fields where the first line has 2"),
        ("x.tsv", b"text\tlabel\na\n", "line 2: 1 fields where the first line has 2"),
        ("x.csv", b'text,label\n"never closed,1\n', "not valid csv"),
        ("x.csv", b"text,text\na,1\n", "names a column twice"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", \n', "line 2: not valid JSON"),
        ("x.jsonl", b'["a", 1]\n', "line 1: not an object"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: its keys text are not those"),
        (
            "x.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "b", "label": "c"}\n',
            "the column 'label' holds values of different types, 1 (row 1) and 'c' (row 2)",
        ),
        ("x.parquet", b"PAR1 but not really", "not a parquet file or is damaged"),
        ("x.txt", b"a\n", "unknown extension '.txt'"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(name, content, said, tmp_path):
    with pytest.raises(ValueError) as error:
        read_file(write(tmp_path / name, content))
    assert said in str(error.value) and name in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.csv: no such file"):
        read_file(tmp_path / "absent.csv")


def test_no_header_is_refused_where_columns_have_names(tmp_path):
    with pytest.raises(ValueError, match="`header=False` is for csv and tsv"):
        read_file(jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": 1}]), header=False)


# ---------------------------------------------------------------------- columns


def table_of(tmp_path, names):
    return read_file(write_csv(tmp_path / "x.csv", [["a"] * len(names)], names))


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["sentence", "label"], Columns("sentence", None, "label")),
        (["idx", "text", "label"], Columns("text", None, "label")),
        (["labels", "review"], Columns("review", None, "labels")),
        (["premise", "hypothesis", "label", "idx"], Columns("premise", "hypothesis", "label")),
        (["question", "sentence", "label"], Columns("question", "sentence", "label")),
    ],
)
def test_columns_are_found_where_there_is_one_choice(names, chosen, tmp_path):
    assert choose_columns(table_of(tmp_path, names), "x.csv", Columns()) == chosen


@pytest.mark.parametrize(
    "names, wanted, said",
    [
        (["text", "title", "label"], Columns(), "`Columns.text`"),
        (["text", "score"], Columns(), "`Columns.label`"),
        (["text", "label", "labels"], Columns(), "`Columns.label`"),
        (["text", "label"], Columns(text="body"), "no column 'body'"),
        (["text", "label"], Columns(text_pair="body"), "`Columns.text_pair`"),
        (["text", "label"], Columns(label="class"), "no column 'class'"),
        (["text", "label"], Columns(text="text", label="text"), "both the label and the text"),
        (["text", "label"], Columns(text="label"), "both the label and the text"),
        (["text", "title", "label"], Columns(text="text", text_pair="title", label="title"), "`Columns.text_pair`"),
        (["text", "label"], Columns(label="text"), "`Columns.text`"),
    ],
)
def test_a_missing_or_ambiguous_column_lists_those_there_are(names, wanted, said, tmp_path):
    with pytest.raises(ValueError) as error:
        choose_columns(table_of(tmp_path, names), "x.csv", wanted)
    assert said in str(error.value) and str(error.value).endswith(f"it has: {', '.join(names)}")


# ---------------------------------------------------------------------- labels


def labelled(tmp_path, labels, kind="csv"):
    if kind == "jsonl":
        return read_file(jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": label} for label in labels]))
    return read_file(write_csv(tmp_path / "x.csv", [("a", label) for label in labels], ("text", "label")))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "labels, names",
    [
        (["yes", "no", "yes"], ("no", "yes")),
        ([10, 2, 2], ("2", "10")),
        ([-1, 1, 1], ("-1", "1")),
        (["1e3", "20"], ("20", "1e3")),
        ([True, False], ("False", "True")),
        ([0.5, 1.0, 2.25], None),
    ],
)
def test_words_and_whole_numbers_are_classes_and_decimal_numbers_are_values(labels, names, kind, tmp_path):
    table = labelled(tmp_path, labels, kind)
    found = Labels.of(table, "x", "label")
    assert found.names == names
    expected = labels if names is None else [names.index(str(label)) for label in labels]
    assert found.encode(table, "x", "label") == expected


def test_whole_numbers_are_values_when_the_task_says_so(tmp_path):
    table = labelled(tmp_path, [1, 2, 5])
    found = Labels.of(table, "x", "label", "regression")
    assert found.names is None and found.encode(table, "x", "label") == [1.0, 2.0, 5.0]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_whole_numbers_written_as_floats_are_classes_and_match_either_form(kind, tmp_path):
    table = labelled(tmp_path, [0.0, 2.0, 1.0, 2.0, 10.0], kind)
    labels = Labels.of(table, "x", "label")
    assert labels.names == ("0", "1", "2", "10") and labels.encode(table, "x", "label") == [0, 2, 1, 2, 3]
    assert labels.encode(labelled(tmp_path, [2, 10], kind), "x", "label") == [2, 3]


@pytest.mark.parametrize("labels", [[401.9, 250.0, 428.0, 401.9] * 3, list(range(60))], ids=["codes", "numbers"])
def test_numbers_that_could_be_classes_as_well_as_values_are_asked_about(labels, tmp_path):
    table = labelled(tmp_path, labels)
    with pytest.raises(ValueError, match=r'`kind="classification"`\) or values \(`kind="regression"`\)'):
        Labels.of(table, "x", "label")
    assert Labels.of(table, "x", "label", "regression").names is None
    assert len(Labels.of(table, "x", "label", "classification").names) == len(set(labels))


def test_the_counts_name_the_classes_and_what_looks_like_a_slip():
    said = LabelCounts({"positive": 6, "negative": 3, "positive ": 2, "Positive": 2, "meh": 1}).lines()
    assert said[0] == (
        "5 classes: positive (6 rows), negative (3 rows), Positive (2 rows), 'positive ' (2 rows), meh (1 row)"
    )
    assert "'positive', 'Positive', 'positive ' differ in capitals or in spaces" in said[1] and "meh" in said[2]
    assert len(said) == 3 and len(LabelCounts({"a": 2, "b": 3}).lines()) == 1
    assert "every class has one row" in LabelCounts({f"text {i}": 1 for i in range(40)}).lines()[1]


def lists(tmp_path, cells):
    return read_file(jsonl(tmp_path / "lists.jsonl", [{"text": "a", "label": cell} for cell in cells]))


def test_lists_are_several_labels_a_row(tmp_path):
    table = lists(tmp_path, [["b", "a"], [], ["c"]])
    labels = Labels.of(table, "x", "label")
    assert labels == Labels(("a", "b", "c"), several=True)
    assert labels.encode(table, "x", "label") == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert LabelCounts.of(table, "x", "label").rows == {"b": 1, "a": 1, "c": 1}
    with pytest.raises(ValueError, match="x, row 3: label 'c' is not among the known labels a, b"):
        Labels(("a", "b"), several=True).encode(table, "x", "label")
    numbered = lists(tmp_path, [[10, 2], [2]])
    assert Labels.of(numbered, "x", "label").names == ("2", "10")
    features = Features(text=Value("string"), label=[ClassLabel(names=["no", "yes"])])
    named = Dataset.from_dict({"text": ["a"], "label": [[1]]}, features=features)
    assert Labels.of(named, "x", "label").encode(named, "x", "label") == [[1.0]]


def test_a_separator_stands_between_the_labels_of_a_cell(tmp_path):
    path = write_csv(tmp_path / "x.csv", [("a", "b; a"), ("b", ""), ("c", "c;")], ("text", "label"))
    table = split_labels(read_file(path), Columns("text", None, "label", ";"))
    assert list(table["label"]) == [["b", "a"], [], ["c"]]
    stream = RowStream(path)
    assert stream.label_counts(Columns("text", None, "label", ";")) == LabelCounts({"b": 1, "a": 1, "c": 1}, True)


@pytest.mark.parametrize(
    "cells, kind, said",
    [
        ([[1, 0, 0], [0, 1, 0]], None, "stands twice in the list .* a zero or a one for each class"),
        (
            [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]],
            None,
            "every row of 'label' has the labels 0, 1, .* a one for each class",
        ),
        (
            [["b", "a"], ["a", "b"]],
            "multi_label",
            "every row of 'label' has the labels a, b, .* nothing to tell apart$",
        ),
        ([["a", None]], None, "row 1: a label in the list .* is missing"),
        ([["a"], None], None, "row 2: the label .* is missing"),
        ([["a"], ["b"]], "classification", "are lists, of which classification makes nothing"),
        ([[], []], None, "no row of 'label' has a label"),
        (["a;b", "c"], "multi_label", "row 1: the label 'a;b' is no list.*`Columns.label_separator`"),
        (["['a']", "['a', 'b']"], None, "look like lists that are written as text"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(cells, kind, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        Labels.of(lists(tmp_path, cells), "x", "label", kind)
    if "every row" in said:
        counts = RowStream(str(tmp_path / "lists.jsonl")).label_counts(Columns("text", None, "label"))
        assert counts.alike and counts.several


def test_a_single_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every row of 'label' has the label 'yes'"):
        Labels.of(labelled(tmp_path, ["yes", "yes"]), "x.csv", "label")


def test_an_unknown_label_is_named_with_its_row_and_the_known_ones(tmp_path):
    table = labelled(tmp_path, ["yes", "no", "maybe"])
    with pytest.raises(ValueError, match=r"val\.csv, row 3: label 'maybe' is not among the known labels no, yes"):
        Labels(("no", "yes")).encode(table, "val.csv", "label")


@pytest.mark.parametrize("bad", ["high", "nan", "inf", "1e400"])
def test_a_label_that_is_no_number_is_named_in_regression(bad, tmp_path):
    with pytest.raises(ValueError, match=f"x.csv, row 2: label '{bad}' is not a finite number"):
        Labels.of(labelled(tmp_path, [0.5, bad]), "x.csv", "label", "regression")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("others", [[0.5, 1.25], [0, 1]])
def test_nan_and_infinity_among_numbers_do_not_make_classes_of_them(bad, others, kind, tmp_path):
    table = labelled(tmp_path, [*others, bad], kind)
    with pytest.raises(ValueError, match=f"x, row 3: label '{bad}' is not a finite number.*`kind=\"classification\"`"):
        Labels.of(table, "x", "label")
    assert str(bad) in Labels.of(table, "x", "label", "classification").names


def test_a_missing_label_or_text_is_named_with_its_row(tmp_path):
    with pytest.raises(ValueError, match="row 2: the label"):
        Labels.of(labelled(tmp_path, ["yes", ""]), "x.csv", "label")
    for text, said in ((None, "missing"), (["a"], "not text")):
        path = jsonl(tmp_path / "y.jsonl", [{"text": text, "label": 1}])
        with pytest.raises(ValueError, match=f"row 1: the text .* is .*{said}"):
            tokenize(read_file(path), path, Columns("text", None, "label"), tokenizer(), None)


# ---------------------------------------------------------------------- tokens


def test_texts_are_cut_to_the_limit_counted_and_not_padded(tmp_path):
    path = write_csv(tmp_path / "x.csv", [("the film", 0), ("the film with a very very moving plot", 1)])
    data, cut = tokenize(read_file(path), path, Columns("sentence", None, "label"), tokenizer(), 6, [0, 1])
    assert cut == 1 and [len(row) for row in data["input_ids"]] == [4, 6]
    assert [row[-1] for row in data["input_ids"]] == [3, 3]  # [SEP] survives the cut
    assert list(data["labels"]) == [0, 1]
    assert set(data.column_names) >= {"input_ids", "attention_mask", "labels"}


def test_pairs_are_joined_and_cut_together(tmp_path):
    path = write_csv(tmp_path / "x.csv", [("the film", "a very very long long scene", 0)], ("text1", "text2", "label"))
    columns = Columns("text1", "text2", "label")
    whole, cut = tokenize(read_file(path), path, columns, tokenizer(), None)
    assert cut == 0 and len(whole["input_ids"][0]) == 2 + 6 + 3 and 1 in whole["token_type_ids"][0]
    short, cut = tokenize(read_file(path), path, columns, tokenizer(), 8)
    assert cut == 1 and len(short["input_ids"][0]) == 8 and short["input_ids"][0].count(3) == 2


def test_answers_that_are_cut_are_counted_whatever_model_writes_them(tmp_path, capsys):
    path = jsonl(
        tmp_path / "x.jsonl", [{"prompt": "the film", "completion": text} for text in ("great", "a very dull plot")]
    )
    columns, lengths = Columns("prompt", None, "completion"), {}
    for kind in (Text2Text(), CausalText2Text()):
        rows = Task(kind, columns).encode(read_file(path), path, tokenizer("t5"), None, 3).data
        lengths[kind.name] = [sum(label >= 0 for label in row) for row in rows["labels"]]
        assert f"{path}: 1 of 2 answers were cut to 3 tokens (max_target_length)" in capsys.readouterr().err
        Task(kind, columns).encode(read_file(path), path, tokenizer("t5"), None, 5)
        assert "cut" not in capsys.readouterr().err
    assert lengths == {"text2text": [2, 3], "causal_text2text": [2, 3]}


def test_the_same_file_read_twice_gives_the_same_tokens_whatever_was_read_before(tmp_path):
    path = tmp_path / "x.csv"
    for seed in (0, 1):
        rows = reviews(6, seed)
        write_csv(path, rows)
        table = read_file(path)
        assert list(table["sentence"]) == [text for text, _ in rows]
        data, _ = tokenize(table, str(path), Columns("sentence", None, "label"), tokenizer(), None)
        assert [len(row) - 2 for row in data["input_ids"]] == [len(text.split()) for text, _ in rows]
