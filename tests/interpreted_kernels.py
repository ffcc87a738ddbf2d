"""The kernels in Triton's interpreter. Run by test_triton_interpreter.py in processes with TRITON_INTERPRET=1."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo.testing
from kernel_cases import (
    AXES,
    bytes_of,
    counted_accesses,
    covering_cases,
    errors,
    fenced_buffers,
    kernel_case,
    last_programs,
    matrix,
    run,
    source_dtype,
)
from test_prompt_embed import PARTS, make_case
from torch.utils._python_dispatch import TorchDispatchMode

from ept_kernels import prompt_embed, reconstruct_prompt
from ept_kernels.common.triton_launch import counters
from ept_kernels.common.triton_rows import UNROLLED
from ept_kernels.prompt_embed.arguments import Settings, Text, Weights

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before the first import of Triton", allow_module_level=True)

SHORT, FULL = 14, 300
CASES = covering_cases(0, FULL)


@pytest.mark.parametrize(("seed", "axes"), matrix(CASES, SHORT))
def test_error_is_at_most_twice_that_of_the_plain_formula(seed, axes):
    case = kernel_case(seed, **axes)
    with fenced_buffers():
        got = run(case, "triton", source_dtype(case))
    assert errors(case, got, truncates=True) == {}
    assert got["out"].dtype == source_dtype(case)
    for buffer in counters.of_stream.values():
        assert not buffer.any()


SMALL = dict(s=3, n=4, d=20, length=3)  # one tile of everything
SEVERAL = dict(s=18, n=34, d=40, length=18)  # two or more, the last of them not full


# Each shape and each part in the short form, and all of their pairs in the long one.
ROLES = [
    pytest.param(parts, shape, marks=[] if (shape is SEVERAL) == (parts in ("paper", "none")) else [pytest.mark.full])
    for parts in PARTS
    for shape in (SMALL, SEVERAL)
]


@pytest.mark.parametrize(("parts", "shape"), ROLES)
def test_roles_one_after_another_give_the_same_bits(monkeypatch, parts, shape):
    for mask in (True, False):
        case = make_case(0, parts=parts, e=0.5, **shape)
        if not mask:
            case["attention_mask"] = None
        single = prompt_embed(**case, impl="triton")
        monkeypatch.setenv("EPT_LAUNCH", "sequence")
        assert torch.equal(prompt_embed(**case, impl="triton"), single)
        monkeypatch.delenv("EPT_LAUNCH")


def test_two_runs_give_the_same_bits():
    case = make_case(1, **SEVERAL | dict(n=18, d=34), batch=1)
    first, second = (run(case, "triton", torch.float32) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("parts", ["paper", "spaces", "lowrank", "none"])
def test_reconstruct_prompt_and_its_gate_have_gradients(parts):
    case = {name: value for name, value in make_case(2, parts=parts, **SEVERAL).items() if name != "input_ids"}
    for name in ("attention_mask", "embedding_weight"):
        del case[name]
    results = {}
    for impl in ("triton", "reference"):
        leaves = {n: v.clone().requires_grad_() for n, v in case.items() if isinstance(v, torch.Tensor)}
        prompt_star, gate = reconstruct_prompt(**case | leaves, impl=impl)
        loss = prompt_star.sin().sum() + gate.exp().sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        results[impl] = (prompt_star, gate, *grads)
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-4, atol=1e-5)


def test_embedding_weight_of_other_strides_and_a_result_that_is_expanded():
    case = make_case(3)
    want = prompt_embed(**case, impl="torch")
    wide = torch.full((50, 40), float("nan"))
    wide[:, :24] = case["embedding_weight"]
    for weight in (wide[:, :24], case["embedding_weight"].T.contiguous().T):
        torch.testing.assert_close(prompt_embed(**case | dict(embedding_weight=weight), impl="triton"), want)
    prompt = case["prompt"].requires_grad_()
    prompt_embed(**case, impl="triton").sum().backward()  # the gradient of a sum has stride 0
    got = prompt.grad.clone()
    prompt.grad = None
    prompt_embed(**case, impl="torch").sum().backward()
    torch.testing.assert_close(got, prompt.grad, rtol=1e-4, atol=1e-4)


def test_every_axis_of_the_matrix_is_in_its_short_form():
    for axis, values in AXES.items():
        if axis != "dtypes":
            assert {case[axis] for case in CASES[:SHORT]} == set(values)


@pytest.mark.parametrize(
    ("mask", "token", "embeds"),
    [
        (True, True, False),
        (False, False, True),
        *(
            pytest.param(m, t, e, marks=pytest.mark.full)
            for m, t, e in ((True, False, False), (False, True, False), (True, True, True))
        ),
    ],
)
def test_opcheck(mask, token, embeds):
    from ept_kernels.prompt_embed.triton_op import prompt_embed_op

    case = make_case(4, **SMALL, batch=2)
    weights = [case[n] for n in ("prompt", "lowrank_a", "lowrank_b", "space_down", "space_up", "gate_weight")]
    weights += [case["token_down"], case["token_up"]] if token else [None, None]
    weights = [None if w is None else w.requires_grad_() for w in weights]
    mask = case["attention_mask"] if mask else None
    starts = torch.tensor([3, 1]) if token else None
    args = (mask, starts, *weights, 1.0, 0.5, "silu", 1, True, True, True)
    text = (None, case["embedding_weight"][case["input_ids"]].requires_grad_())
    torch.library.opcheck(
        prompt_embed_op, (*(text if embeds else (case["input_ids"], case["embedding_weight"])), *args)
    )


def test_compile_traces_one_graph_for_all_lengths():
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run_once(ids, mask, case):
        return prompt_embed(ids, mask, **case, impl="triton") * 2

    compiled = torch.compile(run_once, fullgraph=True, dynamic=True, backend=graphs)
    case = make_case(5, s=6)
    del case["input_ids"], case["attention_mask"]
    case["prompt"].requires_grad_()
    frames = None
    for batch, length in ((7, 9), (8, 11)):  # no size twice: torch takes equal sizes for the same one
        ids, mask = torch.randint(50, (batch, length)), torch.rand(batch, length) > 0.3
        out = compiled(ids, mask, case)
        out.sum().backward()
        torch.testing.assert_close(out, run_once(ids, mask, case))
        frames = frames or graphs.frame_count
        assert graphs.frame_count == frames


def test_what_is_refused_says_so():
    case = make_case(6)
    prompt = case["prompt"].requires_grad_()
    (grad,) = torch.autograd.grad(prompt_embed(**case, impl="triton").sin().sum(), prompt, create_graph=True)
    with pytest.raises(RuntimeError, match='use impl="torch"'):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda p: prompt_embed(**case | dict(prompt=p), impl="triton").sum())(prompt.detach())


def test_eager_calls_and_the_operator_are_one(monkeypatch):
    from ept_kernels.common import operators
    from ept_kernels.prompt_embed import triton_op

    def results(case):
        prompt = case["prompt"].clone().requires_grad_()
        out = prompt_embed(**case | dict(prompt=prompt), impl="triton")
        first = torch.autograd.grad(out.sin().sum(), prompt, retain_graph=True)
        (again,) = torch.autograd.grad(out.sin().sum(), prompt, create_graph=True)
        with pytest.raises(RuntimeError, match='use impl="torch"'):
            again.sum().backward()
        with torch.no_grad():
            return out.grad_fn.name(), [out, *first, again, prompt_embed(**case, impl="triton")]

    case = make_case(10, **SMALL)
    name, eager = results(case)
    assert name == "PromptEmbedBackward"
    for module in (operators, triton_op):
        monkeypatch.setattr(module, "is_eager", lambda *tensors: False)
    name, operator = results(case)
    assert name == "GeneratedBackwardFor_ept_kernels_prompt_embed_defaultBackward"
    for one, other in zip(eager, operator, strict=True):
        assert torch.equal(one, other)


def test_who_intercepts_operators_sees_them():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **kwargs or {})

    names, case = [], make_case(11)
    case["prompt"].requires_grad_()
    with Seen():
        prompt_embed(**case, impl="triton").sum().backward()
    assert [name for name in names if name.startswith("ept_kernels")] == [
        "ept_kernels.prompt_embed.default",
        "ept_kernels.prompt_embed_backward.default",
    ]


def test_autocast_does_not_reach_inside():
    case = make_case(7)
    want = prompt_embed(**case, impl="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prompt_embed(**case, impl="triton"), want)


def test_threads_that_launch_at_once_get_what_one_gets():
    """Forward and backward in four threads that start together, with sizes that share one buffer of counters."""
    cases = [make_case(seed, **SMALL, batch=1) for seed in range(4)]
    want = [run(case, "triton", torch.float32) for case in cases]
    start = threading.Barrier(len(cases))

    def in_thread(case):
        start.wait()
        return run(case, "triton", torch.float32)

    with ThreadPoolExecutor(len(cases)) as pool:
        got = list(pool.map(in_thread, cases))
    for one, other in zip(got, want, strict=True):
        for name, value in other.items():
            assert torch.equal(one[name], value), name


def test_a_launch_that_raises_leaves_no_dirty_counters():
    with pytest.raises(KeyboardInterrupt), counters.take(4, torch.device("cpu")) as counter:
        counter[0] = 3
        raise KeyboardInterrupt
    with counters.take(4, torch.device("cpu")) as counter:
        assert not counter.any()


@pytest.mark.parametrize(("parts", "q"), [("paper", 0), ("all", 5), ("token", 5), ("token", 9)])
@pytest.mark.parametrize("masked", [True, False])
def test_traffic_is_what_the_model_says(masked, parts, q):
    """E and dX are read, X is written as often as predicted: E once more from the cache if its rows leave the registers."""
    from ept_kernels.prompt_embed import traffic, triton_backward, triton_forward

    prompt = dict(n=34, r=5, k=3, h=2)
    x = traffic.Shapes(
        batch=3, length=19, d=40, s=18, **{} if parts == "token" else prompt, q=q, masked=masked, source_bytes=4
    )
    sizes = prompt | dict(s=x.s, q=max(q, 1), d=x.d, length=x.length, batch=x.batch)
    case = make_case(8, parts=parts, **sizes)
    weights = Weights(*(case.get(name) for name in Weights._fields))
    mask = case["attention_mask"] if masked else None
    # Every token has its own row, so that the rows of E can be told apart.
    source = torch.randn(x.batch * x.length, x.d)
    ids = torch.arange(x.batch * x.length).view(x.batch, x.length)
    text, settings = Text(ids, source, mask), Settings(scale=1.0)
    with counted_accesses() as (loads, stores):
        out, _, kept = triton_forward.forward(text, weights, settings, save=True)
    predicted = traffic.forward(x).memory
    assert bytes_of(loads, source) == predicted["rows of E"] * (
        1 if q == 0 or (parts == "token" and q <= UNROLLED) else 2
    )
    assert bytes_of(stores, out) == predicted["X"] + predicted["P* in every row"]
    kept_bytes = sum(bytes_of(stores, t) for t in kept if t.is_floating_point())
    assert kept_bytes == predicted["kept"]

    grad = torch.randn_like(out)
    with counted_accesses() as (loads, stores):
        triton_backward.backward(grad, None, text, weights, kept, settings, input_grad=False)
    predicted = traffic.backward(x).memory
    assert bytes_of(loads, grad) == predicted["dX"]
    assert bytes_of(loads, source) == (predicted["rows of E"] - 8 * ids.numel() if q else 0)


def test_rows_of_e_beyond_two_to_the_31_numbers():
    """Three rows, 2³⁰ + 8 numbers apart, in memory of which only their pages are ever touched."""
    case = make_case(9, dtype=torch.float16)
    d, apart = case["prompt"].shape[1], 2**30 + 8
    far = torch.empty(2 * apart + d, dtype=torch.float16).as_strided((3, d), (apart, 1))
    far.copy_(case["embedding_weight"][:3])
    case["input_ids"] %= 3
    near = prompt_embed(**case, impl="triton")
    assert torch.equal(prompt_embed(**case | dict(embedding_weight=far), impl="triton"), near)


@pytest.mark.parametrize(("parts", "q", "tokens", "columns"), [("token", 4, 4, 1024), ("lowrank", 0, 12, 64)])
def test_results_beyond_two_to_the_31_numbers(parts, q, tokens, columns, monkeypatch):
    """The end of the last of 2,049 batch rows, behind 2³¹ numbers, and its prompt: whole rows, and slices of columns."""
    monkeypatch.setenv("EPT_LAUNCH", "sequence")  # the text's last program is then a launch's last one
    case = make_case(14, parts=parts, q=q, d=1024, s=4, n=1020, length=1020, batch=1, dtype=torch.float16)
    case |= dict(attention_mask=None, fusion=False)

    def ends(batch):
        with last_programs(forward_kernel=1, by_row_kernel=2):
            out = prompt_embed(**case | dict(input_ids=case["input_ids"].expand(batch, -1)), impl="triton")
        return out.numel(), out[-1, :4, -columns:].clone(), out[-1, -tokens:, -columns:].clone()

    (far_size, *far), (size, *near) = ends(2049), ends(1)
    assert far_size - size >= 2**31
    for got, want in zip(far, near, strict=True):
        assert want.isfinite().all() and want.any() and torch.equal(got, want)


def test_gradients_of_inputs_beyond_two_to_the_31_numbers():
    """The end of the last of 33 batch rows of 65,536 columns, behind 2³¹ numbers of dX and of the inputs' gradient."""
    from ept_kernels.prompt_embed import triton_backward, triton_forward

    case = make_case(15, parts="token", q=4, d=1024, s=4, batch=1, dtype=torch.float16)
    weights = Weights(*(case.get(name) for name in Weights._fields))
    length, tokens = 65532, 12  # of the last tile of slots
    dx, z = torch.randn(tokens, 1024).half(), torch.randn(tokens, 4)

    def end(batch):
        text = Text(None, torch.zeros(1, 1, 1024, dtype=torch.float16).expand(batch, length, -1), None)
        _, _, kept = triton_forward.empty_results(text, weights, Settings(scale=1.0), save=True)
        grad_out = torch.empty(batch, 4 + length, 1024, dtype=torch.float16)
        grad_out[-1, -tokens:], kept.inner[-1, -tokens:] = dx, z
        with last_programs(reduce_kernel=1, weights_kernel=0):
            grads = triton_backward.backward(grad_out, None, text, weights, kept, Settings(scale=1.0), input_grad=True)
        return grads.source.numel(), grads.source[-1, -tokens:].clone()

    (size, far), (_, near) = end(33), end(1)
    assert size - far.numel() > 2**31
    assert near.isfinite().all() and not torch.equal(near, dx) and torch.equal(far, near)
