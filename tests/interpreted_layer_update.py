"""layer_update's kernels in Triton's interpreter. Run by test_triton_interpreter.py in processes with TRITON_INTERPRET=1."""

import os

import pytest
import torch
import torch._dynamo.testing
from kernel_cases import bytes_of, counted_accesses, covering_cases, fenced_buffers, last_programs, matrix
from layer_cases import AXES, errors, layer_case, run
from torch.utils._python_dispatch import TorchDispatchMode

from ept_kernels import layer_update
from ept_kernels.common.triton_launch import counters

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before the first import of Triton", allow_module_level=True)

SHORT, FULL = 20, 200
CASES = covering_cases(0, FULL, AXES)


def plain_case(seed=0, **changes):
    axes = dict(
        shape="odd", dtype=torch.float32, source_dtype=torch.float32, activation="silu", adapters=None,
        scale="number", strides="plain",
    )  # fmt: skip
    return layer_case(seed, **axes | changes)


@pytest.mark.parametrize(("seed", "axes"), matrix(CASES, SHORT))
def test_error_is_at_most_twice_that_of_the_plain_formula(seed, axes):
    case = layer_case(seed, **axes)
    before = {name: value.clone() for name, value in case.items() if isinstance(value, torch.Tensor)}
    with fenced_buffers():
        got = run(case, "triton")
    assert errors(case, got, truncates=True) == {}
    assert got["out"].dtype == case["hidden"].dtype
    for name, value in before.items():
        assert torch.equal(case[name], value), f"{name} was changed"
    for buffer in counters.of_stream.values():
        assert not buffer.any()


def test_every_axis_of_the_matrix_is_in_its_short_form():
    for axis, values in AXES.items():
        if axis != "dtypes":
            assert {case[axis] for case in CASES[:SHORT]} == set(values)


@pytest.mark.parametrize("adapters", [None, 3])
def test_two_runs_and_a_call_without_gradients_give_the_same_bits(adapters):
    case = plain_case(1, adapters=adapters, sizes=dict(batch=3, columns=19, d=36, q=2))
    first, second = (run(case, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert torch.equal(layer_update(**case, impl="triton"), first["out"])


def test_a_row_of_a_mixed_batch_has_the_bits_of_the_row_alone():
    case = plain_case(2, adapters=3, sizes=dict(batch=4, columns=18, d=40, q=2))
    case["adapter_index"] = torch.tensor([2, -1, 0, 2])
    out = layer_update(**case, impl="triton")
    for row, adapter in enumerate([2, -1, 0, 2]):
        alone = case["hidden"][row : row + 1]
        if adapter >= 0:
            down, up = case["down"][adapter], case["up"][adapter]
            alone = layer_update(alone, down, up, hidden_scale=case["hidden_scale"], impl="triton")
        assert torch.equal(out[row : row + 1], alone)


def test_rows_of_no_adapter_stay_whatever_the_adapters_hold():
    case = plain_case(3, adapters=2)
    case["down"][:], case["up"][:] = float("nan"), float("inf")
    case["adapter_index"] = torch.tensor([1, -1, 0])
    case["hidden"][1, 2, 3] = float("inf")
    assert torch.equal(layer_update(**case, impl="triton")[1], case["hidden"][1])


@pytest.mark.parametrize("trained", [("hidden",), ("down",), ("down", "up"), ("hidden", "up")])
@pytest.mark.parametrize("adapters", [None, 2])
def test_gradients_of_some_of_the_tensors(adapters, trained):
    case = plain_case(4, adapters=adapters)
    grads = {}
    for impl in ("triton", "reference"):
        leaves = {name: case[name].clone().requires_grad_() for name in trained}
        out = layer_update(**case | leaves, impl=impl)
        grads[impl] = torch.autograd.grad(out.sin().sum(), list(leaves.values()))
    for got, want in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def operator_arguments(case):
    hidden_scale = case["hidden_scale"]
    scales = hidden_scale if isinstance(hidden_scale, torch.Tensor) else None
    tensors = [case["hidden"], case["down"], case["up"]]
    tensors = [t.detach().contiguous().requires_grad_() for t in tensors]
    number = 1.0 if scales is not None else hidden_scale
    return (*tensors, case.get("adapter_index"), scales, number, case["activation"], True)


@pytest.mark.parametrize(
    ("adapters", "scale"),
    [(None, "number"), (2, "by adapter"), pytest.param(None, "tensor", marks=pytest.mark.full)],
)
def test_opcheck(adapters, scale):
    from ept_kernels.layer_update.triton_op import layer_update_op

    case = plain_case(5, adapters=adapters, scale=scale, sizes=dict(batch=3, columns=2, d=7, q=2))
    torch.library.opcheck(layer_update_op, operator_arguments(case))


@pytest.mark.parametrize("adapters", [None, 2])
def test_compile_traces_one_graph_for_all_lengths(adapters):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def run_once(case):
        return layer_update(**case, impl="triton") * 2

    compiled = torch.compile(run_once, fullgraph=True, dynamic=True, backend=graphs)
    frames = None
    for batch, columns in ((7, 5), (8, 6)):  # no size twice: torch takes equal sizes for the same one
        case = plain_case(6, adapters=adapters, sizes=dict(batch=batch, columns=columns, d=24, q=4))
        up = case["up"].requires_grad_()
        out = compiled(case)
        want = run_once(case)
        torch.testing.assert_close(out, want)
        got = torch.autograd.grad(out.sum(), up)
        torch.testing.assert_close(got, torch.autograd.grad(want.sum(), up))
        frames = frames or graphs.frame_count
        assert graphs.frame_count == frames


def test_what_is_refused_says_so():
    case = plain_case(7)
    up = case["up"].requires_grad_()
    (grad,) = torch.autograd.grad(layer_update(**case, impl="triton").sin().sum(), up, create_graph=True)
    with pytest.raises(RuntimeError, match='use impl="torch"'):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda up: layer_update(**case | dict(up=up), impl="triton").sum())(up.detach())


def test_eager_calls_and_the_operator_are_one(monkeypatch):
    from ept_kernels.common import operators
    from ept_kernels.layer_update import triton_op

    case = plain_case(8, adapters=2, sizes=dict(batch=2, columns=3, d=20, q=2))
    eager = run(case, "triton")
    for module in (operators, triton_op):
        monkeypatch.setattr(module, "is_eager", lambda *tensors: False)
    for name, value in run(case, "triton").items():
        assert torch.equal(value, eager[name]), name


def test_who_intercepts_operators_sees_them():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **kwargs or {})

    names, case = [], plain_case(9)
    case["up"].requires_grad_()
    with Seen():
        layer_update(**case, impl="triton").sum().backward()
    assert [name for name in names if name.startswith("ept_kernels")] == [
        "ept_kernels.layer_update.default",
        "ept_kernels.layer_update_backward.default",
    ]


def test_autocast_does_not_reach_inside():
    case = plain_case(10)
    want = layer_update(**case, impl="triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer_update(**case, impl="triton"), want)


def test_an_index_that_names_no_adapter_gives_nan_and_reads_no_other_memory():
    from ept_kernels.layer_update import triton_op
    from ept_kernels.layer_update.arguments import Settings, Update

    case = plain_case(11, adapters=2)
    index = torch.tensor([1, 7, -1])  # past the check, as on a GPU, where it would wait for the values
    with fenced_buffers():
        update = Update(case["hidden"], case["down"], case["up"], index)
        out = triton_op.layer_update(update, Settings())
    assert out[1].isnan().all() and torch.equal(out[2], case["hidden"][2])


@pytest.mark.parametrize("adapters", [None, 3])
def test_traffic_is_what_the_model_says(adapters):
    """x is read and the result written once; in the backward g is read twice, x once, and dx written once."""
    from ept_kernels.layer_update import traffic, triton_backward, triton_forward
    from ept_kernels.layer_update.arguments import Settings, Update

    case = plain_case(12, adapters=adapters, sizes=dict(batch=3, columns=21, d=70, q=2))
    if adapters:
        case["adapter_index"] = torch.tensor([2, 0, 2])
    update = Update(case["hidden"], case["down"], case["up"], case.get("adapter_index"))
    x = traffic.Shapes(batch=3, columns=21, d=70, q=2, adapters=adapters or 1, hidden_bytes=4)
    with counted_accesses() as (loads, stores):
        out, z = triton_forward.forward(update, Settings(), save=True)
    predicted = traffic.forward(x).memory
    assert bytes_of(loads, case["hidden"]) == predicted["x"]
    assert bytes_of(stores, out) == predicted["out"]
    assert bytes_of(stores, z) == predicted["z"]
    grad = torch.randn_like(out)
    with counted_accesses() as (loads, stores):
        grads = triton_backward.backward(grad, update, z, Settings(), input_grad=True, weight_grad=True)
    predicted = traffic.backward(x).memory
    assert bytes_of(loads, grad) == predicted["g"]
    assert bytes_of(loads, case["hidden"]) == predicted["x"]
    assert bytes_of(stores, grads.hidden) == predicted["dx"]
    assert bytes_of(stores, grads.down) + bytes_of(stores, grads.up) == predicted["dD and dW"]


def test_hidden_states_beyond_two_to_the_31_numbers():
    """Three rows, 2³⁰ + 8 numbers apart, in memory of which only their pages are ever touched."""
    case = plain_case(13, source_dtype=torch.float16, sizes=dict(batch=3, columns=2, d=24, q=3))
    apart = 2**30 + 8
    far = torch.empty(2 * apart + 48, dtype=torch.float16).as_strided((3, 2, 24), (apart, 24, 1))
    far.copy_(case["hidden"])
    near = run(case, "triton")
    for name, value in run(case | dict(hidden=far), "triton").items():
        assert torch.equal(value, near[name]), name


def test_results_and_gradients_beyond_two_to_the_31_numbers(monkeypatch):
    """The end of the last of 2,049 batch rows, behind 2³¹ numbers of the result, of its gradient and of that of hidden."""
    from ept_kernels.layer_update import triton_backward, triton_forward
    from ept_kernels.layer_update.arguments import Settings, Update

    monkeypatch.setattr(triton_backward, "MOST_SHARES", 1)  # one program adds up a slice of dD and dW
    sizes = dict(batch=1, columns=1024, d=1024, q=2)
    case = plain_case(14, adapters=2, source_dtype=torch.float16, sizes=sizes)
    grad, kept = torch.randn(1024, 1024).half(), torch.randn(1024, 2)
    computed = 2  # programs of a few tokens each

    def ends(batch):
        index = torch.zeros(batch, dtype=torch.int32)
        index[-1] = 1
        update = Update(case["hidden"].expand(batch, -1, -1), case["down"], case["up"], index)
        grad_out, z = torch.empty(update.hidden.shape, dtype=torch.float16), torch.zeros(batch, 1024, 2)
        grad_out[-1], z[-1] = grad, kept
        grads = triton_backward.empty_grads(update, False, True)
        with last_programs(forward_kernel=computed, hidden_kernel=computed, weights_kernel=1):
            out = triton_forward.forward(update, Settings(), save=False).out
            dx = triton_backward.backward(grad_out, update, z, Settings(), input_grad=True, weight_grad=False).hidden
            triton_backward._launch_weights(grad_out, update, z, z, Settings(), grads)
        tokens, columns = computed * triton_forward.Tiling.of(update).rows, triton_backward.COLUMN_TILE
        of_weights = (grad[1, :, -columns:] for grad in (grads.down, grads.up))
        return out.numel(), out[-1, -tokens:].clone(), dx[-1, -tokens:].clone(), *of_weights

    size, *far = ends(2049)
    assert size - grad.numel() >= 2**31
    for got, want in zip(far, ends(1)[1:], strict=True):
        assert want.isfinite().all() and torch.equal(got, want)
