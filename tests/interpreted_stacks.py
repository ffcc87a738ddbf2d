"""Stacks of adapters, and the columns of left-padded rows, in Triton's interpreter: see test_triton_interpreter.py."""

import os

import pytest
import torch
import torch._dynamo.testing
from kernel_cases import bytes_of, counted_accesses, covering_cases, fenced_buffers, matrix
from stack_cases import AXES, errors, run, stack_case
from test_prompt_columns import CASES as COLUMNS
from test_prompt_columns import columns_case

from ept_kernels import prompt_columns, prompt_embed

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before the first import of Triton", allow_module_level=True)

SHORT, FULL = 20, 200
CASES = covering_cases(0, FULL, AXES)
PLAIN = dict(
    shape="plain", dtype=torch.float32, source_dtype=torch.float32, lowrank="factors", token=True, text="holes",
    start="by row", lengths=True, index=torch.int64, inputs=False, activation="silu", e=0.5,
)  # fmt: skip


@pytest.mark.parametrize(("seed", "axes"), matrix(CASES, SHORT))
def test_error_is_at_most_twice_that_of_the_plain_formula(seed, axes):
    case = stack_case(seed, **axes)
    before = {name: value.clone() for name, value in case.items() if isinstance(value, torch.Tensor)}
    with fenced_buffers():
        got = run(case, "triton")
    assert errors(case, got, truncates=True) == {}
    assert got.dtype == axes["source_dtype"]
    for name, value in before.items():
        assert torch.equal(case[name], value), f"{name} was changed"


def test_every_axis_of_the_matrix_is_in_its_short_form():
    for axis, values in AXES.items():
        if axis != "dtypes":
            assert {case[axis] for case in CASES[:SHORT]} == set(values)


@pytest.mark.parametrize("lowrank", ["factors", "table"])
def test_a_row_of_a_mixed_batch_has_the_bits_of_the_row_alone(lowrank):
    case = stack_case(1, **PLAIN | dict(lowrank=lowrank))
    out, batch = run(case, "triton"), len(case["input_ids"])
    for row in range(batch):
        alone = case | {
            name: case[name][row : row + 1] for name in ("input_ids", "attention_mask", "prompt_start", "adapter_index")
        }
        assert torch.equal(run(alone, "triton"), out[row : row + 1])
        adapter = int(alone["adapter_index"])
        stacked = ("prompt", "lowrank_a", "lowrank_b", "token_down", "token_up", "prompt_lengths")
        own = {name: case[name][adapter : adapter + 1] for name in stacked if case[name] is not None}
        assert torch.equal(run(alone | own | dict(adapter_index=None), "triton"), out[row : row + 1])


def test_other_adapters_and_padding_may_hold_anything():
    case = stack_case(2, **PLAIN | dict(lengths=False))
    case["adapter_index"] = torch.tensor([0, 2, 0, 2])
    out = run(case, "triton")
    for name in ("prompt", "lowrank_a", "lowrank_b", "token_down", "token_up"):
        case[name] = case[name].clone()
        case[name][1] = float("nan")
    assert torch.equal(run(case, "triton"), out)


def test_an_index_that_names_no_adapter_gives_nan_and_reads_no_other_memory():
    from ept_kernels.prompt_embed import triton_op
    from ept_kernels.prompt_embed.arguments import Settings, Stack, Text

    case = stack_case(3, **PLAIN)
    index = torch.tensor([1, 7, -1, 0])  # past the check, as on a GPU, where it would wait for the values
    text = Text(case["input_ids"], case["embedding_weight"], case["attention_mask"], case["prompt_start"])
    names = ("prompt", "lowrank_a", "lowrank_b", "token_down", "token_up")
    with fenced_buffers():
        out = triton_op.prompt_embed_by_row(text, Stack(*(case[name] for name in names), index), Settings(1.0))
    assert out[1].isnan().all() and out[2].isnan().all() and not out[0].isnan().any()


def operator_arguments(case):
    from ept_kernels.prompt_embed.arguments import Settings, Stack, Text

    text = Text(case["input_ids"], case["embedding_weight"].contiguous(), case["attention_mask"], case["prompt_start"])
    names = ("prompt", "lowrank_a", "lowrank_b", "token_down", "token_up", "adapter_index", "prompt_lengths")
    stack = Stack(*(None if case[name] is None else case[name].contiguous() for name in names))
    return (*text, *stack, *Settings(0.5, 2.0))


def test_opcheck():
    from ept_kernels.prompt_columns.arguments import Rows, Settings
    from ept_kernels.prompt_columns.triton_op import prompt_columns_op
    from ept_kernels.prompt_embed.triton_op import prompt_embed_by_row_op

    torch.library.opcheck(prompt_embed_by_row_op, operator_arguments(stack_case(4, **PLAIN)))
    mask = torch.rand(3, 9) > 0.4
    rows = Rows(mask.long(), torch.tensor([1, 3, 0]), torch.randint(9, (3, 9)))
    torch.library.opcheck(prompt_columns_op, (*rows, *Settings(4, 2)))


def test_compile_traces_one_graph_for_all_lengths():
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    case = stack_case(5, **PLAIN)
    of_text = ("input_ids", "attention_mask", "prompt_start", "adapter_index")

    def run_once(mask, rows):
        columns = prompt_columns(mask.long(), 3, impl="triton")
        return prompt_embed(**case | rows, impl="triton") * 2, columns.mask, columns.positions

    compiled = torch.compile(run_once, fullgraph=True, dynamic=True, backend=graphs)
    frames = None
    for batch, length in ((8, 6), (11, 9)):  # no size twice: torch takes equal sizes for the same one
        ids, mask = torch.randint(9, (batch, length)), torch.rand(batch, length) > 0.3
        index = torch.randint(3, (batch,))
        rows = dict(zip(of_text, (ids, mask, torch.zeros(batch, dtype=torch.int64), index), strict=True))
        for got, want in zip(compiled(mask, rows), run_once(mask, rows), strict=True):
            torch.testing.assert_close(got, want)
        frames = frames or graphs.frame_count
        assert graphs.frame_count == frames


def test_a_gradient_is_refused_and_auto_takes_torch_for_it():
    case = stack_case(6, **PLAIN)
    prompt = case["prompt"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match='use impl="torch"'):
        run(case | dict(prompt=prompt), "triton")
    grads = [
        torch.autograd.grad(run(case | dict(prompt=prompt), impl).sin().sum(), prompt)[0]
        for impl in ("auto", "reference")
    ]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        assert not run(case | dict(prompt=prompt), "triton").requires_grad


def test_traffic_is_what_the_model_says():
    """E is read and X is written once; P* for each row that has it; the mask by each program that stands before or on it."""
    from ept_kernels.prompt_embed import traffic

    case = stack_case(7, **PLAIN | dict(lengths=False, text="all"))
    batch, length = case["input_ids"].shape
    d = case["embedding_weight"].shape[1]
    case["embedding_weight"] = torch.randn(
        batch * length, d
    )  # every token has its own row, so that they can be told apart
    case["input_ids"] = torch.arange(batch * length).view(batch, length)
    case["prompt"] = case["prompt"].contiguous()
    x = traffic.Shapes(
        batch=batch, length=length, d=d, s=3, n=7, r=3, q=2, masked=False, source_bytes=4
    )  # fmt: skip
    predicted = traffic.by_row(x, adapters=3).memory
    with counted_accesses() as (loads, stores):
        out = run(case, "triton")
    assert bytes_of(loads, case["embedding_weight"]) == predicted["rows of E"]
    assert bytes_of(stores, out) == predicted["X"] + predicted["P* in every row"]
    assert bytes_of(loads, case["prompt"]) == batch * 3 * d * 4
    assert bytes_of(stores) == bytes_of(stores, out)


def test_rows_of_e_beyond_two_to_the_31_numbers():
    """Three rows, 2³⁰ + 8 numbers apart, in memory of which only their pages are ever touched."""
    case = stack_case(8, **PLAIN | dict(shape="many ranks", source_dtype=torch.float16))
    d, apart = case["embedding_weight"].shape[1], 2**30 + 8
    far = torch.empty(2 * apart + d, dtype=torch.float16).as_strided((3, d), (apart, 1))
    far.copy_(case["embedding_weight"][:3])
    case["input_ids"] %= 3
    assert torch.equal(run(case | dict(embedding_weight=far), "triton"), run(case, "triton"))


@pytest.mark.parametrize("case", COLUMNS, ids=str)
def test_columns_are_those_of_the_specification(case):
    arguments = columns_case(*case)
    before = [t.clone() for t in arguments.values() if isinstance(t, torch.Tensor)]
    with fenced_buffers():
        got = prompt_columns(**arguments, impl="triton")
    for name, value in prompt_columns(**arguments, impl="reference")._asdict().items():
        assert value.dtype == getattr(got, name).dtype and torch.equal(getattr(got, name), value), name
    after = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_traffic_of_the_columns_is_what_the_model_says():
    from ept_kernels.prompt_columns import traffic

    mask, labels = (torch.rand(3, 40) > 0.4).long(), torch.randint(9, (3, 40))
    with counted_accesses() as (loads, stores):
        columns = prompt_columns(mask, 5, labels=labels, impl="triton")
    predicted = traffic.forward(3, 40, 5, labels=True).memory
    assert bytes_of(loads, mask) == 2 * predicted["mask"]  # once from the cache
    assert bytes_of(stores, columns.positions) == predicted["positions"]
    assert bytes_of(stores) == sum(predicted.values()) - predicted["mask"] - labels.nbytes
