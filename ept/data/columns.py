"""The columns of a table: which hold text and label, and their values."""

from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset

from ept.data.chats import ends_with_answer, is_chat
from ept.data.rows import listed

__all__ = [
    "NAMES_NOT_MARKS",
    "Columns",
    "choose_columns",
    "choose_pair_columns",
    "choose_tagged_columns",
    "choose_writing_columns",
    "element_of",
    "holds_lists",
    "holds_tagged_words",
    "holds_text_to_write",
    "label_lists",
    "label_strings",
    "labels_in",
    "split_cell",
    "split_labels",
    "tags_of",
    "texts_of",
    "words_in",
    "words_of",
]

# What is guessed: a label column by these names, capitals or not, and, once it and a row number are set aside, a lone text
# column or one of these pairs. Whatever else a file holds must be said.
LABEL_NAMES = ("label", "labels")
ROW_NUMBER_NAMES = ("idx", "id", "index", "", "Unnamed: 0")  # the last two are an index as pandas writes it
WORD_NAMES, TAG_NAMES = ("tokens", "words"), ("ner_tags", "tags", "labels", "label")
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"),
)  # fmt: skip

NAMES_NOT_MARKS = "a list names a row's labels, it does not hold a zero or a one for each class"


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; None: not given (text, label) or not there (text_pair).

    `label_separator` stands between the labels of a row that may have several; None: the column holds one, or lists.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    label_separator: str | None = None

    @property
    def chosen_label(self) -> str:
        """The label's column; ValueError while none is chosen."""
        if self.label is None:
            raise ValueError("no column is chosen as the label: see choose_columns")
        return self.label


def choose_columns(table: Dataset, source: str, wanted: Columns) -> Columns:
    """Chooses the columns to read: those wanted, and where one is left open the only one that is possible.

    Raises:
        ValueError: a wanted column is missing, or what was left open has no choice or several.
    """
    names = table.column_names
    there = f"it has: {listed(names)}"
    for field, name in (("text", wanted.text), ("text_pair", wanted.text_pair), ("label", wanted.label)):
        if name is not None and name not in names:
            raise ValueError(f"{source} has no column {name!r} (`Columns.{field}`); {there}")
    label = wanted.label
    if label is None:
        candidates = [name for name in names if name.lower() in LABEL_NAMES]
        if len(candidates) != 1:
            raise ValueError(f"{source}: say which column is the label with `Columns.label`; {there}")
        label = candidates[0]
    for field, name in (("text", wanted.text), ("text_pair", wanted.text_pair)):
        if name == label:
            raise ValueError(
                f"{source}: column {name!r} cannot be both the label and the text: give another `Columns.label` or "
                f"`Columns.{field}`; {there}"
            )
    if wanted.text is not None:
        return replace(wanted, label=label)
    rest = [
        name
        for name in names
        if name.lower() not in LABEL_NAMES and name not in (label, wanted.text_pair, *ROW_NUMBER_NAMES)
    ]
    if len(rest) == 1:
        return replace(wanted, text=rest[0], label=label)
    for text, pair in PAIRS:
        if wanted.text_pair is None and set(rest) == {text, pair}:
            return replace(wanted, text=text, text_pair=pair, label=label)
    raise ValueError(
        f"{source}: say which column is the text with `Columns.text` (and the second with `Columns.text_pair`); {there}"
    )


def choose_writing_columns(table: Dataset, source: str, wanted: Columns) -> Columns:
    """Chooses as `choose_columns`, for texts and the answers to them; `label` is None where conversations hold both.

    By themselves are found `prompt` and `completion`, and `messages`.
    """
    if wanted.text_pair is not None:
        raise ValueError(
            f"{source}: a causal model that writes reads one text, not a pair: put both into one column and leave out "
            "`Columns.text_pair`"
        )
    names = table.column_names
    text, label = wanted.text, wanted.label
    if text is None and label is None and _has_messages(table) and "completion" not in names:
        return replace(wanted, text="messages")
    if text in names and label is None and ends_with_answer(table[0][text]):
        return wanted
    return choose_pair_columns(table, source, wanted)


def choose_pair_columns(table: Dataset, source: str, wanted: Columns) -> Columns:
    """Chooses as `choose_columns`, for texts and what is to be written: by themselves `prompt` and `completion`."""
    names, text, label = table.column_names, wanted.text, wanted.label
    if text is None and "prompt" in names:
        text = "prompt"
    if label is None and "completion" in names:
        label = "completion"
    return choose_columns(table, source, replace(wanted, text=text, label=label))


def holds_text_to_write(table: Dataset) -> bool:
    """Tells whether a table has the columns of texts and answers, prompt and completion or messages, and none of labels."""
    names = set(table.column_names)
    return names.isdisjoint(LABEL_NAMES) and ({"prompt", "completion"} <= names or _has_messages(table))


def choose_tagged_columns(table: Dataset, source: str, wanted: Columns) -> Columns:
    """Chooses as `choose_columns`, for words and their labels: by themselves `tokens` or `words`, and `ner_tags` or `tags`."""
    if wanted.text_pair is not None:
        raise ValueError(f"{source}: labels of words are of one text, not of a pair: leave out `Columns.text_pair`")
    names = table.column_names
    text = wanted.text or next((name for name in WORD_NAMES if name in names), None)
    label = wanted.label or next((name for name in TAG_NAMES if name in names), None)
    return choose_columns(table, source, replace(wanted, text=text, label=label))


def holds_tagged_words(table: Dataset, wanted: Columns) -> bool:
    """Tells whether a table has a list of words in each row, and a list of labels."""
    names = table.column_names
    text = wanted.text or next((name for name in WORD_NAMES if name in names), None)
    label = wanted.label or next((name for name in TAG_NAMES if name in names), None)
    if (
        text is None
        or label is None
        or not {text, label} <= set(names)
        or not (holds_lists(table, text) and holds_lists(table, label))
    ):
        return False
    return all(isinstance(word, str) for word in table[0][text] or ())


def words_of(table: Dataset, source: str, column: str) -> list[list[str]]:
    """Returns the words of each row. ValueError names the first row that has no list of them."""
    return [words_in(cell, f"{source}, row {row}", column) for row, cell in enumerate(table[column], start=1)]


def words_in(cell: Any, at: str, column: str) -> list[str]:
    """Returns the words in a cell, a list of them; ValueError where it is none. `at` names the row."""
    if not isinstance(cell, list):
        problem = "missing" if cell is None else f"{type(cell).__name__} {cell!r}"
        raise ValueError(
            f'{at}: the text ({column!r}) must be a list of words, ["Ada", "wrote", …] in jsonl or parquet, and is {problem}'
        )
    for number, word in enumerate(cell, start=1):
        if not isinstance(word, str) or not word.strip():
            raise ValueError(
                f"{at}: word {number} ({column!r}) is {'empty' if word is None or word == '' else repr(word)}: leave it out"
            )
    return cell


def tags_of(table: Dataset, source: str, columns: Columns) -> list[list[str]]:
    """Returns the label of each word as a word, by name where the table has names.

    Raises:
        ValueError: the first row that has no list of labels, or not as many as words.
    """
    column = columns.chosen_label
    element, rows = element_of(table.features[column]), []
    for row, (words, cell) in enumerate(zip(table[str(columns.text)], table[column], strict=True), start=1):
        at = f"{source}, row {row}"
        if not isinstance(cell, list) or None in cell or "" in cell:
            problem = (
                "is missing" if cell is None else "is missing for a word" if isinstance(cell, list) else f"is {cell!r}"
            )
            raise ValueError(
                f'{at}: the label ({column!r}) {problem}: give a list with one label a word, such as ["O", "B-PER"]'
            )
        if isinstance(words, list) and len(words) != len(cell):
            raise ValueError(
                f"{at}: {len(words)} words ({columns.text!r}) and {len(cell)} labels ({column!r}): give one a word"
            )
        rows.append([element.int2str(int(tag)) if isinstance(element, ClassLabel) else str(tag) for tag in cell])
    return rows


def _has_messages(table: Dataset) -> bool:
    return "messages" in table.column_names and is_chat(table[0]["messages"])


def texts_of(table: Dataset, source: str, column: str) -> list[str]:
    """Returns a column's texts. ValueError names the first row without one."""
    texts = list(table[column])
    for row, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            problem = "missing" if text is None else f"{type(text).__name__} {text!r}, not text"
            raise ValueError(f"{source}, row {row}: the text ({column!r}) is {problem}")
    return texts


def label_strings(table: Dataset, source: str, column: str) -> list[str]:
    """Returns a column's labels as words, by name where the table has names. ValueError names the first row without one."""
    feature, values = table.features[column], []
    for row, value in enumerate(table[column], start=1):
        if value is None or value == "":
            raise ValueError(f"{source}, row {row}: the label ({column!r}) is missing")
        if isinstance(value, dict):
            raise ValueError(
                f"{source}, row {row}: the label ({column!r}) is an object, {value!r}: give a word or a number"
            )
        has_name = isinstance(feature, ClassLabel) and value >= 0
        values.append(feature.int2str(value) if has_name else str(value))
    return values


def holds_lists(table: Dataset, column: str) -> bool:
    """Whether a column's cells are lists."""
    return element_of(table.features[column]) is not None


def label_lists(table: Dataset, source: str, column: str) -> list[list[str]]:
    """Reads each row's labels as words where a row may have several, or none.

    Raises:
        ValueError: the first row whose cell is no list of different labels, with its number.
    """
    element, rows = element_of(table.features[column]), []
    for row, cell in enumerate(table[column], start=1):
        labels = labels_in(cell, f"{source}, row {row}", column)
        rows.append([element.int2str(int(label)) for label in labels] if isinstance(element, ClassLabel) else labels)
    return rows


def labels_in(cell: Any, at: str, column: str) -> list[str]:
    """Returns the labels in a cell that is a list; ValueError where it is none, or holds one twice. `at` names the row."""
    if cell is None:
        raise ValueError(f"{at}: the label ({column!r}) is missing: an empty list says that a row has none")
    if not isinstance(cell, list):
        raise ValueError(
            f"{at}: the label {cell!r} is no list: say what stands between a row's labels with "
            "`Columns.label_separator`, or write lists in jsonl or parquet"
        )
    if None in cell or "" in cell:
        raise ValueError(f"{at}: a label in the list ({column!r}) is missing")
    labels = list(map(str, cell))
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{at}: the label {label!r} stands twice in the list {cell!r}: {NAMES_NOT_MARKS}")
    return labels


def split_labels(table: Dataset, columns: Columns) -> Dataset:
    """Makes lists of labels where `label_separator` stands between them; an empty cell has none. Returns the table."""
    separator = columns.label_separator
    if separator is None:
        return table
    column = columns.chosen_label
    cells = [split_cell(cell, separator) for cell in table[column]]
    return table.remove_columns(column).add_column(column, cells)


def split_cell(cell: Any, separator: str | None) -> Any:
    """Splits a cell into a list of labels; what is a list or missing, and all without a separator, stays as it is."""
    if separator is None or cell is None or isinstance(cell, list):
        return cell
    return [part.strip() for part in str(cell).split(separator) if part.strip()]


def element_of(feature: Any) -> Any:
    """Returns the type of a list's elements; None for what is no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
