"""Conversations as a column's values: lists of messages, each with a role and its content."""

from typing import Any

__all__ = ["checked_chat", "ends_with_answer", "is_chat"]

Message = dict[str, Any]


def is_chat(value: Any) -> bool:
    """Tells whether a value is meant as a conversation: a list of objects with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def ends_with_answer(value: Any) -> bool:
    """Tells whether a value is a conversation whose last message is the assistant's."""
    return is_chat(value) and value[-1]["role"] == "assistant"


def checked_chat(value: Any, place: str) -> list[Message]:
    """Returns a conversation without the keys that other rows of its table have.

    Args:
        value: what a column holds.
        place: file, row and column, for the error.

    Raises:
        ValueError: it is no conversation, or a message has no text.
    """
    if not is_chat(value):
        raise ValueError(f'{place} is no conversation: give a list of {{"role": …, "content": …}}')
    for number, message in enumerate(value, start=1):
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{place}: the content of message {number} ({message['role']}) is missing or not text")
    return [{name: entry for name, entry in message.items() if entry is not None} for message in value]
