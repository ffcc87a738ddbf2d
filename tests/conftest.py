"""What holds for every test."""

import gc

import pytest

LONGEST = ("test_triton_interpreter.py", "test_scaling.py")  # each has processes of its own, of up to a minute


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leaves what the imports made out of garbage collection.

    Every training of transformers' Trainer collects garbage; going through all of torch's objects takes it 0.4 s each time.
    """
    gc.collect()
    gc.freeze()
