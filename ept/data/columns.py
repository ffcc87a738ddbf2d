"""The columns of a table: which hold text and label, and their values."""

from dataclasses import dataclass, replace

from datasets import ClassLabel, Dataset

from ept.data.chats import ends_with_answer, is_chat
from ept.data.rows import listed

__all__ = ["Columns", "choose_columns", "choose_writing_columns", "holds_text_to_write", "label_strings", "texts_of"]

# What is guessed: a label column by these names, and, once it and a row number are set aside, a lone text column or
# one of these pairs. Whatever else a file holds must be said.
LABEL_NAMES = ("label", "labels")
ROW_NUMBER_NAMES = ("idx", "id", "index")
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"),
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; None: not given (text, label) or not there (text_pair)."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None

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
        candidates = [name for name in names if name in LABEL_NAMES]
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
    rest = [name for name in names if name not in (label, wanted.text_pair, *ROW_NUMBER_NAMES, *LABEL_NAMES)]
    if len(rest) == 1:
        return replace(wanted, text=rest[0], label=label)
    for text, pair in PAIRS:
        if wanted.text_pair is None and set(rest) == {text, pair}:
            return Columns(text, pair, label)
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
        return Columns("messages")
    if text in names and label is None and ends_with_answer(table[0][text]):
        return Columns(text)
    if text is None and "prompt" in names:
        text = "prompt"
    if label is None and "completion" in names:
        label = "completion"
    return choose_columns(table, source, Columns(text, None, label))


def holds_text_to_write(table: Dataset) -> bool:
    """Tells whether a table has the columns of texts and answers, prompt and completion or messages, and none of labels."""
    names = set(table.column_names)
    return names.isdisjoint(LABEL_NAMES) and ({"prompt", "completion"} <= names or _has_messages(table))


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
        has_name = isinstance(feature, ClassLabel) and value >= 0
        values.append(feature.int2str(value) if has_name else str(value))
    return values
