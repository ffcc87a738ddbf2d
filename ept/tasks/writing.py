"""A causal language model that writes: its rows are a text and the answer to it, of which the answer alone is learned.

A row is what comes before the last answer, and that answer with the end of text after it. Both are tokenised by
themselves, so that the model reads the same tokens in training and when it is asked. In a conversation the tokenizer's
chat template says how the messages are written, and the assistant's earlier answers are learned, too, where the whole
conversation is one column.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ept.backbone.traits import IGNORE_INDEX
from ept.data.chats import Message, checked_chat, is_chat

__all__ = [
    "Exchange",
    "ExchangeCollator",
    "encode_exchanges",
    "left_padded",
    "packed",
    "prompt_of",
    "read_chat",
    "read_pair",
    "read_question",
]


MARK = "\ue000"  # of Unicode's private use, so that no text holds it
OPEN_PACKS = 100  # packed rows that are still tried for another one; more cost time and save little


class Exchange(NamedTuple):
    """A text and the answer to it.

    Attributes:
        context: the pieces of text before the answer, each with whether it is learned.
        answer: the piece that is learned last, in a conversation with what the template writes after it; None: none.
        reference: the text that is to be written, without what the template writes after it.
        begins: whether the tokenizer's first token comes before all; a chat template writes its own.
    """

    context: list[tuple[str, bool]]
    answer: str | None
    reference: str
    begins: bool


def read_question(tokenizer: PreTrainedTokenizerBase, prompt: Any, place: str, *, in_chat: bool) -> Exchange:
    """Reads a text or a conversation to be answered.

    Args:
        prompt: text, or a conversation; answers at its end are left out.
        place: where it is from, for errors.
        in_chat: whether a text is a user's message, as the chat template writes it.
    """
    if isinstance(prompt, str) and not in_chat:
        return Exchange([(prompt, False)], None, "", begins=True)
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = checked_chat(prompt, place)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    if not messages:
        raise ValueError(f"{place} holds answers alone: begin with a user's message")
    return Exchange([(_written(tokenizer, messages, asks=True), False)], None, "", begins=False)


def read_pair(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, place: str) -> Exchange:
    """Reads a prompt and its completion, two texts or two conversations; only the completion is learned."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Exchange([(prompt, False)], completion, completion, begins=True)
    if not is_chat(prompt):
        raise ValueError(f"{place}: prompt and completion must be two texts or two conversations")
    messages, answers = checked_chat(prompt, place), completion
    if isinstance(completion, str):
        answers = [{"role": "assistant", "content": completion}]
    answers = checked_chat(answers, place)
    return _exchange(tokenizer, [*messages, *answers], place, learned_from=len(messages))


def read_chat(tokenizer: PreTrainedTokenizerBase, messages: Any, place: str) -> Exchange:
    """Reads a conversation, whose every answer is learned."""
    return _exchange(tokenizer, checked_chat(messages, place), place, learned_from=0)


def _exchange(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: str, *, learned_from: int
) -> Exchange:
    """Cuts a conversation into pieces; the assistant's messages from `learned_from` on are learned."""
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{place}: the last message is the {messages[-1]['role']}'s: end with an answer of the assistant"
        )
    whole, end, pieces = _written(tokenizer, messages), 0, []
    closing = _after(tokenizer, messages, len(messages) - 1)
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < learned_from:
            continue
        asked = _written(tokenizer, messages[:number], asks=True) if number else ""
        # A template may write thoughts in the last answer alone: what counts is the text as it stands in the whole.
        after = _after(tokenizer, messages, number)
        stands = whole.startswith(asked) and whole.endswith(after) and after.startswith(closing)
        if not (stands and end <= len(asked) <= len(whole) - len(after)):
            if message is messages[-1]:
                raise ValueError(
                    f"{place}: the chat template does not write message {number + 1} as it begins an answer that is asked "
                    "for: give the tokenizer a template that does"
                )
            raise ValueError(
                f"{place}: the chat template writes message {number + 1} otherwise once another follows: give each answer "
                "as a row of its own, with the messages before it as prompt and the answer as completion"
            )
        answer_end = len(whole) - len(after) + len(closing)
        pieces += [(whole[end : len(asked)], False), (whole[len(asked) : answer_end], True)]
        end = answer_end
    answer = pieces[-1][0]
    return Exchange(pieces[:-1], answer, answer[: len(answer) - len(closing)], begins=False)


def _after(tokenizer: PreTrainedTokenizerBase, messages: list[Message], number: int) -> str:
    """Returns what the chat template writes after the content of a message; the mark itself where it leaves that out."""
    marked = [*messages[:number], {**messages[number], "content": MARK}, *messages[number + 1 :]]
    text = _written(tokenizer, marked)
    return text.partition(MARK)[2] if text.count(MARK) == 1 else MARK


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, asks: bool = False) -> str:
    """Writes messages as the chat template does; `asks`: with the beginning of an answer."""
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, which conversations need: take the model's instruction-tuned form, or "
            "write prompts and completions as texts"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))


# ---------------------------------------------------------------------- tokens


def encode_exchanges(
    tokenizer: PreTrainedTokenizerBase, exchanges: Sequence[Exchange], limit: int | None, max_target_length: int
) -> tuple[list[dict[str, Any]], int, int]:
    """Encodes rows as `input_ids`, `attention_mask` and, of an answer, `labels`; counts the contexts and answers cut.

    Of a context that is longer than `limit` the end stays, after the tokenizer's first token. Of an answer longer than
    `max_target_length` the beginning stays, and no end is learned.

    Raises:
        ValueError: there are answers, and the tokenizer has no end of text to learn.
    """
    end = tokenizer.eos_token_id
    if end is None and any(exchange.answer is not None for exchange in exchanges):
        raise ValueError("the tokenizer names no end of text (eos_token), which every answer must end with")
    nothing = tokenizer.pad_token_id if end is None else end  # stands for an empty text
    begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    pieces = iter(_token_ids(tokenizer, exchanges))
    rows, cut_contexts, cut_answers = [], 0, 0
    for exchange in exchanges:
        ids = [tokenizer.bos_token_id] if exchange.begins and begins else []
        labels = [IGNORE_INDEX] * len(ids)
        for _, is_learned in exchange.context:
            piece = next(pieces)
            ids = ids + piece
            labels = labels + (piece if is_learned else [IGNORE_INDEX] * len(piece))
        if not ids:
            ids, labels = [nothing], [IGNORE_INDEX]
        if limit is not None and len(ids) > limit:
            first = min(limit, int(ids[0] == tokenizer.bos_token_id))
            ids, labels = (row[:first] + row[len(row) - limit + first :] for row in (ids, labels))
            cut_contexts += 1
        if exchange.answer is None:
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
            continue
        answer = next(pieces)
        if end not in answer:
            answer = [*answer, end]
        cut_answers += len(answer) > max_target_length
        answer = answer[:max_target_length]
        ids, labels = ids + answer, labels + answer
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows, cut_contexts, cut_answers


def _token_ids(tokenizer: PreTrainedTokenizerBase, exchanges: Sequence[Exchange]) -> list[list[int]]:
    """Returns the token ids of every piece in order, without special tokens that the text does not hold."""
    texts = []
    for exchange in exchanges:
        texts += [text for text, _ in exchange.context]
        texts += [] if exchange.answer is None else [exchange.answer]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def prompt_of(row: dict[str, Any]) -> list[int]:
    """Returns the token ids before a row's last answer; all of a row without labels."""
    ids, labels = list(row["input_ids"]), row.get("labels")
    if labels is None:
        return ids
    answer = next((n for n, label in enumerate(reversed(list(labels))) if label == IGNORE_INDEX), len(ids))
    return ids[: len(ids) - answer]


def packed(rows: Sequence[dict[str, Any]], room: int, apart: int) -> list[dict[str, Any]]:
    """Packs several encoded rows into one, each with `position_ids` that start anew, so that it sees itself alone.

    The longest row that still has room is taken next, so that few tokens of padding are left.

    Args:
        room: the most tokens of a packed row, with `apart` more for each row in it, its prompt's.
    """
    packs: list[list[int]] = []
    rooms: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True):
        size = len(rows[i]["input_ids"]) + apart
        place = next((n for n in range(max(0, len(packs) - OPEN_PACKS), len(packs)) if rooms[n] >= size), None)
        if place is None:
            packs.append([])
            rooms.append(room)
            place = len(packs) - 1
        packs[place].append(i)
        rooms[place] -= size
    return [_one_row([rows[i] for i in pack]) for pack in packs]


def _one_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: [value for one in rows for value in one[name]] for name in ("input_ids", "attention_mask")
    }
    row["labels"] = [label for one in rows for label in (IGNORE_INDEX, *one["labels"][1:])]
    row["position_ids"] = [position for one in rows for position in range(len(one["input_ids"]))]
    return row


class ExchangeCollator:
    """Makes a batch of encoded rows, packed or not, padded on the right to a multiple of `multiple` tokens."""

    def __init__(self, pad_token_id: int, multiple: int = 1):
        self.multiple = multiple
        self.padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX, "position_ids": 0}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        width = -(-width // self.multiple) * self.multiple
        return {
            name: torch.tensor([[*row[name], *[value] * (width - len(row[name]))] for row in rows])
            for name, value in self.padding.items()
            if name in rows[0]
        }


def left_padded(rows: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Makes `input_ids` and `attention_mask` [rows, longest] of token ids, padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
