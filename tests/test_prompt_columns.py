"""ept_kernels.prompt_columns: the torch implementation against the specification, and what both promise."""

import pytest
import torch

from ept_kernels import prompt_columns

# batch, L, S, dtype of the mask, with lengths, with labels, drops the first label
CASES = [
    (3, 9, 4, torch.bool, True, True, True),
    (1, 1, 1, torch.int64, False, False, False),
    (2, 1100, 7, torch.int32, True, True, False),
    (2, 0, 3, torch.int64, True, True, True),
    (0, 4, 2, torch.int64, False, True, False),
    (3, 5, 0, torch.uint8, False, False, False),
    (4, 6, 3, torch.int64, False, True, True),
]


def columns_case(batch, length, width, dtype, lengths, labels, drops):
    g = torch.Generator().manual_seed(length)
    mask = torch.rand(batch, length, generator=g) > 0.4
    mask[:1] = False  # a row of nothing but padding
    mask[1:2, : length // 2] = False
    mask[2:3] = True
    return dict(
        attention_mask=mask.to(dtype)
        if dtype == torch.bool
        else mask * torch.tensor(3).to(dtype),  # any number is text
        prompt_length=width,
        prompt_lengths=torch.randint(width + 1, (batch,), generator=g) if lengths else None,
        labels=torch.randint(90, (batch, length), generator=g) if labels else None,
        first_position=2 * lengths,
        drops_first_label=drops,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_equals_the_specification(case):
    arguments = columns_case(*case)
    got, want = (prompt_columns(**arguments, impl=impl) for impl in ("torch", "reference"))
    for name, value in want._asdict().items():
        assert value.dtype == getattr(got, name).dtype and torch.equal(getattr(got, name), value), name


def test_the_prompt_stands_directly_before_the_text():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    columns = prompt_columns(mask, 3, prompt_lengths=torch.tensor([3, 2]), labels=mask * 7, drops_first_label=True)
    assert columns.starts.tolist() == [2, 0]
    assert columns.mask.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 0]]
    assert columns.positions.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4, 5, 5]]
    assert columns.labels.tolist() == [[-100, -100, -100, -100, 0, 7, 7, 7], [-100, -100, -100, -100, 7, 7, 7, 0]]


MASK = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(attention_mask=MASK.float()), "additive masks"),
        (dict(attention_mask=MASK[0]), r"\[batch, length\]"),
        (dict(prompt_length=-1), "must not be negative"),
        (dict(labels=MASK[:, :2]), r"labels must be \[2, 4\]"),
        (dict(labels=MASK.float()), "labels must hold integers"),
        (dict(prompt_lengths=torch.ones(3).long()), r"prompt_lengths must be \[2\]"),
        (dict(impl="cuda"), "unknown"),
    ],
)
def test_what_cannot_be_right_is_refused(arguments, said):
    with pytest.raises((TypeError, ValueError), match=said):
        prompt_columns(**dict(attention_mask=MASK, prompt_length=2) | arguments)
