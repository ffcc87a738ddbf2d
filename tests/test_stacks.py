"""prompt_embed with the constants of several adapters, and with each row's own column for the prompt, in torch."""

import pytest
import torch
from kernel_cases import covering_cases
from stack_cases import AXES, double, errors, run, stack_case
from test_prompt_embed import make_case

from ept_kernels import layer_update, prompt_embed, reconstruct_prompt

PLAIN = dict(
    shape="plain", dtype=torch.float64, source_dtype=torch.float64, lowrank="factors", token=True, text="holes",
    start="by row", lengths=True, index=torch.int64, inputs=False, activation="silu", e=0.5,
)  # fmt: skip


def test_torch_error_is_at_most_twice_that_of_the_plain_formula():
    for seed, axes in enumerate(covering_cases(0, 60, AXES)):
        case = stack_case(seed, **axes)
        got = run(case, "torch")
        assert errors(case, got) == {}, axes
        assert got.dtype == axes["source_dtype"]


@pytest.mark.parametrize("lowrank", ["factors", "table"])
def test_a_row_is_that_row_with_its_adapter_alone(lowrank):
    case = stack_case(
        1, **PLAIN | dict(lowrank=lowrank, dtype=torch.float32, source_dtype=torch.float32, lengths=False)
    )
    out = run(double(case), "torch")
    for row, adapter in enumerate(case["adapter_index"].tolist()):
        own = {name: case[name][adapter] for name in ("prompt", "token_down", "token_up")}
        if lowrank == "factors":
            own |= dict(lowrank_a=case["lowrank_a"][adapter], lowrank_b=case["lowrank_b"][adapter])
        else:  # A·B as the product of the table in units of e and a unit matrix
            own |= dict(lowrank_a=case["lowrank_a"][adapter] / 0.5, lowrank_b=torch.eye(20), scale=1.0)
        own["prompt"] = own["prompt"] / 0.5
        start = int(case["prompt_start"][row])
        rows = {name: case[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        alone = case | rows | own | dict(prompt_start=start, adapter_index=None, fusion=False)
        torch.testing.assert_close(out[row : row + 1], prompt_embed(**double(alone), impl="reference"))


def test_one_adapters_constants_give_what_its_tensors_give():
    case = make_case(2, dtype=torch.float64, e=0.5)
    of_text = ("input_ids", "attention_mask", "embedding_weight", "token_down", "token_up")
    prompt, _ = reconstruct_prompt(**{name: value for name, value in case.items() if name not in of_text})
    stacked = {name: case[name][None] for name in ("lowrank_a", "lowrank_b", "token_down", "token_up")}
    constants = dict(prompt=prompt[None], space_down=None, space_up=None, gate_weight=None) | stacked
    torch.testing.assert_close(prompt_embed(**case | constants), prompt_embed(**case))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_each_row_may_have_its_prompt_at_a_column_of_its_own(impl):
    case, starts = make_case(3, dtype=torch.float64), torch.tensor([9, 0, 4])
    out = prompt_embed(**case, prompt_start=starts, impl=impl)
    for row, start in enumerate(starts.tolist()):
        torch.testing.assert_close(out[row], prompt_embed(**case, prompt_start=start, impl=impl)[row])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_positions_may_be_integers_of_any_width(dtype):
    case = stack_case(5, **PLAIN | dict(text="positions"))
    case["text_positions"].clamp_(min=0)
    narrow = case | dict(text_positions=case["text_positions"].to(dtype))
    assert torch.equal(run(narrow, "torch"), run(case, "torch"))


def test_gradients_pass_gradcheck():
    case = stack_case(4, **PLAIN)
    case["prompt"] = case["prompt"].contiguous()
    names = [name for name in ("prompt", "lowrank_a", "lowrank_b", "token_down", "token_up")]

    def of(*values):
        return prompt_embed(**case | dict(zip(names, values, strict=True)), impl="torch")

    assert torch.autograd.gradcheck(of, tuple(case[name].requires_grad_() for name in names), fast_mode=True)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_layer_update_takes_a_pair_for_each_row(impl):
    g = torch.Generator().manual_seed(0)
    hidden, down, up = (
        torch.randn(size, generator=g, dtype=torch.float64) for size in ((3, 5, 8), (3, 2, 8), (3, 2, 8))
    )
    got = layer_update(hidden, down, up, hidden_scale=2.0, impl=impl)
    for row in range(3):
        want = layer_update(hidden[row : row + 1], down[row], up[row], hidden_scale=2.0, impl=impl)
        torch.testing.assert_close(got[row : row + 1], want)


STACK = dict(
    prompt=torch.zeros(2, 3, 8), lowrank_a=None, lowrank_b=None, space_down=None, space_up=None, gate_weight=None,
    adapter_index=torch.tensor([0, 1]), input_ids=torch.zeros(2, 4, dtype=torch.int64), attention_mask=None,
    embedding_weight=torch.zeros(5, 8), scale=1.0,
)  # fmt: skip
ONES = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(adapter_index=None), "needs adapter_index"),
        (dict(adapter_index=torch.tensor([0, 2])), r"adapter_index holds 2, but must be in 0 … 1"),
        (dict(adapter_index=torch.tensor([-1, 0])), "adapter_index holds -1"),
        (dict(adapter_index=torch.tensor([0.0, 1.0])), "must hold integers"),
        (dict(adapter_index=torch.tensor([0])), r"must be \[2\]"),
        (dict(prompt_lengths=torch.tensor([1])), r"prompt_lengths must be \[2\]"),
        (dict(prompt_lengths=torch.tensor([1, -1])), "must be 0 or more"),
        (dict(lowrank_b=torch.zeros(2, 1, 8)), "without lowrank_a"),
        (dict(lowrank_a=torch.zeros(2, 6, 3)), r"lowrank_a must be \[2, N, 8\]"),
        (dict(token_down=torch.zeros(2, 1, 8)), "token_down given without token_up"),
        (dict(space_down=torch.zeros(2, 1, 8)), "no spaces"),
        (dict(embedding_weight=torch.zeros(5, 9)), "another backbone"),
        (dict(attention_mask=ONES, text_positions=ONES), "give one of them"),
        (dict(text_positions=-3 * ONES), "text_positions holds -3"),
        (dict(prompt_start=torch.tensor([0, 5])), "prompt_start=5 is not a column"),
        (dict(prompt_start=torch.tensor([0])), r"prompt_start must be \[2\]"),
        (dict(prompt=torch.zeros(3, 8)), "adapter_index needs a stack"),
        (dict(prompt=torch.zeros(0, 3, 8)), "at least one adapter"),
    ],
)
def test_what_cannot_be_right_is_refused(change, said):
    with pytest.raises((TypeError, ValueError, IndexError), match=said):
        prompt_embed(**STACK | change)
