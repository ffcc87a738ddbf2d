"""ept_kernels.layer_update: the implementations against a formula written here in float64, and what they promise."""

import math

import pytest
import torch
from counted_operations import Operations
from test_prompt_embed import assert_no_worse_than_plain

from ept_kernels import ACTIVATIONS, layer_update

SIGMA = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "identity": lambda x: x,
}
IMPLS = ("torch", "reference")


def formula(hidden, down, up, hidden_scale=1.0, activation="silu", adapter_index=None):
    """Token by token, in float64."""
    hidden, down, up = hidden.double(), down.double(), up.double()
    out = hidden.clone()
    for row in range(hidden.shape[0]):
        adapter = None if adapter_index is None else int(adapter_index[row])
        if adapter == -1:
            continue
        d, w = (down, up) if adapter is None else (down[adapter], up[adapter])
        h = torch.as_tensor(hidden_scale, dtype=torch.float64)
        h = h[adapter] if h.dim() else h
        for column in range(hidden.shape[1]):
            x = hidden[row, column] / h
            out[row, column] += h * (SIGMA[activation]((d * x).sum(1))[:, None] * w).sum(0)
    return out


def make_case(seed, *, adapters=None, batch=4, columns=6, d=24, q=3, dtype=torch.float32, hidden_dtype=None, h=3.0):
    g = torch.Generator().manual_seed(seed)
    stack = () if adapters is None else (adapters,)

    def draw(*shape, std):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    case = dict(
        hidden=draw(batch, columns, d, std=h).to(hidden_dtype or dtype),
        down=draw(*stack, q, d, std=d**-0.5).to(dtype),
        up=draw(*stack, q, d, std=0.3).to(dtype),
        hidden_scale=h,
    )
    if adapters is not None:
        case["adapter_index"] = torch.tensor([1, -1, 0, 1, 2][:batch], dtype=torch.int64) % adapters
        case["adapter_index"][1:2] = -1
    return case


def results(case, function=layer_update, **settings):
    """The result and the gradients of hidden, down and up for one fixed gradient of the result."""
    names = ("hidden", "down", "up")
    leaves = {name: case[name].detach().clone().requires_grad_() for name in names}
    out = function(**case | leaves, **settings)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = torch.autograd.grad(out, list(leaves.values()), weight.bfloat16().to(out))
    return dict(out=out.detach()) | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("adapters", [None, 3])
def test_result_and_gradients_are_the_formulas_in_float64(impl, activation, adapters):
    scales = [0.5, torch.tensor(0.5), 1.0] + ([torch.tensor([0.5, 2.0, 7.0])] if adapters else [])
    for hidden_scale in scales:
        case = make_case(0, adapters=adapters, dtype=torch.float64) | dict(hidden_scale=hidden_scale)
        want = results(case, formula, activation=activation)
        for name, value in results(case, activation=activation, impl=impl).items():
            torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("adapters", [None, 2])
def test_torch_error_is_at_most_twice_that_of_the_plain_formula(adapters, dtype, hidden_dtype):
    for seed, sizes in enumerate((dict(), dict(batch=1, columns=1, d=1, q=1), dict(columns=40, d=129, q=17))):
        case = make_case(seed, adapters=adapters, dtype=dtype, hidden_dtype=hidden_dtype, **sizes)
        truth, plain = results(case, formula), results(case, impl="reference")
        got = results(case, impl="torch")
        for name, value in got.items():
            assert value.dtype == (hidden_dtype if name in ("out", "hidden") else dtype)
            if value.dtype == torch.float64 == truth[name].dtype:
                torch.testing.assert_close(value, truth[name].to(value), rtol=1e-12, atol=1e-11)
            else:
                assert_no_worse_than_plain(value, plain[name], truth[name].double())


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fp32_arithmetic_rounded_once(hidden_dtype):
    case = make_case(1, hidden_dtype=hidden_dtype, d=96, columns=30)
    wide = case | dict(hidden=case["hidden"].float())
    assert torch.equal(layer_update(**case, impl="torch"), layer_update(**wide, impl="torch").to(hidden_dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("adapters", [None, 2])
def test_gradcheck(impl, adapters):
    case = make_case(2, adapters=adapters, dtype=torch.float64, batch=2, columns=2, d=5, q=2)
    names = ("hidden", "down", "up")

    def run(*values):
        return layer_update(**case | dict(zip(names, values, strict=True)), impl=impl)

    values = tuple(case[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize("adapters", [None, 2])
def test_a_backward_through_the_backward_beside_half_precision(adapters):
    case = make_case(3, adapters=adapters, hidden_dtype=torch.bfloat16)
    grads = {}
    for impl in IMPLS:
        hidden, up = case["hidden"].clone().requires_grad_(), case["up"].clone().requires_grad_()
        out = layer_update(**case | dict(hidden=hidden, up=up), impl=impl)
        (grad,) = torch.autograd.grad(out.float().square().sum(), hidden, create_graph=True)
        grads[impl] = torch.autograd.grad(grad.float().square().sum(), up)[0]
    # Both round a hidden state and its gradient to bf16, whose unit in the last place is 2^-8 of a value.
    scale = grads["reference"].abs().max().item()
    torch.testing.assert_close(grads["torch"], grads["reference"], rtol=2**-6, atol=2**-6 * scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_of_a_mixed_batch_equals_the_row_alone(impl):
    case = make_case(4, adapters=2, dtype=torch.float64, h=0.5)
    out = layer_update(**case, impl=impl)
    for row, adapter in enumerate(case["adapter_index"].tolist()):
        alone = case["hidden"][row : row + 1]
        if adapter >= 0:
            alone = layer_update(alone, case["down"][adapter], case["up"][adapter], hidden_scale=0.5, impl=impl)
        torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_no_adapter_stay_whatever_the_adapters_hold(impl, dtype):
    case = make_case(5, adapters=2, hidden_dtype=dtype)
    case["down"][:] = float("nan")
    case["up"][:] = float("inf")
    case["hidden"][1, 2, 3] = float("inf")
    assert torch.equal(layer_update(**case, impl=impl)[1], case["hidden"][1])
    nobody = case | dict(adapter_index=torch.full((4,), -1))
    out = layer_update(**nobody, impl=impl)
    assert torch.equal(out, case["hidden"]) and out.data_ptr() != case["hidden"].data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
def test_every_integer_type_is_an_index(impl):
    case = make_case(6, adapters=2)
    case["adapter_index"] = torch.tensor([1, 0, 0, 1])
    want = layer_update(**case, impl=impl)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        case["adapter_index"] = case["adapter_index"].to(dtype)
        assert torch.equal(layer_update(**case, impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("adapters", [None, 2])
def test_strided_and_expanded_inputs_give_the_same_numbers_and_stay_as_they_were(impl, adapters):
    case = make_case(7, adapters=adapters)
    want = layer_update(**case, impl=impl)
    strided = {}
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            value = torch.stack([value, torch.full_like(value, -1)], dim=-1)[..., 0]
            assert not value.is_contiguous()
        strided[name] = value
    before = {name: value.clone() for name, value in strided.items() if isinstance(value, torch.Tensor)}
    torch.testing.assert_close(layer_update(**strided, impl=impl), want)
    turned = case | dict(hidden=case["hidden"].transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(layer_update(**turned, impl=impl), want)
    for name, value in before.items():
        assert torch.equal(strided[name], value)
    if adapters is None:
        out = layer_update(**case | dict(hidden=case["hidden"][:1].expand(4, -1, -1)), impl=impl)
        assert torch.equal(out[0], out[3])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("adapters", [None, 2])
@pytest.mark.parametrize("sizes", [dict(batch=0), dict(columns=0)])
def test_nothing_in_gives_nothing_out(impl, adapters, sizes):
    for hidden_dtype in (torch.float32, torch.bfloat16):
        case = make_case(8, adapters=adapters, hidden_dtype=hidden_dtype, **sizes)
        got = results(case, impl=impl) if sizes.get("batch") != 0 else dict(out=layer_update(**case, impl=impl))
        assert got["out"].shape == case["hidden"].shape
        assert not any(value.any() for value in got.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_reach_inside(impl):
    case = make_case(9)
    want = layer_update(**case, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer_update(**case, impl=impl), want)


def test_the_number_of_threads_changes_nothing():
    case = make_case(10, columns=64, d=256)
    threads = torch.get_num_threads()
    try:
        got = []
        for count in (1, 2):
            torch.set_num_threads(count)
            got.append(layer_update(**case))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(got[0], got[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_three_operations_forward_and_six_backward_beside_casts(hidden_dtype):
    case = make_case(11, hidden_dtype=hidden_dtype, h=1.0)
    leaves = {name: case[name].requires_grad_() for name in ("hidden", "down", "up")}
    with Operations() as forward:
        out = layer_update(**case, impl="torch")
    grad = torch.ones_like(out)
    with Operations() as backward:
        torch.autograd.grad(out, list(leaves.values()), grad)
    counts = [len([name for name in seen.names if name != "_to_copy"]) for seen in (forward, backward)]
    assert counts[0] <= 3 and counts[1] <= 6, (forward.names, backward.names)


def test_no_fp32_copy_of_a_half_precision_hidden_state_is_kept():
    case = make_case(12, hidden_dtype=torch.bfloat16, d=256)
    leaves = {name: case[name].requires_grad_() for name in ("hidden", "down", "up")}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_update(**case | leaves, impl="torch")
    tokens, (q, d) = 4 * 6, case["down"].shape
    beside = [t for t in kept if t.numel() == tokens * d]
    assert [t.dtype for t in beside] == [torch.bfloat16]
    assert sum(t.numel() for t in kept) - tokens * d <= tokens * q + 2 * q * d


def test_torch_func_and_compile_go_through():
    case = make_case(13, hidden_dtype=torch.bfloat16)
    want = results(case, impl="torch")

    def loss(up):
        out = layer_update(**case | dict(up=up), impl="torch")
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (out.double() * weight.bfloat16().double()).sum()

    torch.testing.assert_close(torch.func.grad(loss)(case["up"]), want["up"], rtol=2**-7, atol=2**-7)
    compiled = torch.compile(layer_update, fullgraph=True, dynamic=True, backend="aot_eager")
    for adapters in (None, 2):
        case = make_case(13, adapters=adapters, hidden_dtype=torch.bfloat16)
        got = results(case, compiled, impl="torch")
        for name, value in results(case, impl="torch").items():
            torch.testing.assert_close(got[name], value, rtol=2**-7, atol=2**-7)


def one(**change):
    return None, change


def many(**change):
    return 2, change


BAD = {
    "unknown impl": (*one(impl="cuda"), ValueError, "impl='cuda'"),
    "unknown activation": (*one(activation="tanh"), ValueError, "activation='tanh'"),
    "2-d hidden": (*one(hidden=torch.zeros(6, 24)), ValueError, "hidden must be [batch, columns, d]"),
    "integer hidden": (*one(hidden=torch.zeros(4, 6, 24, dtype=torch.int64)), TypeError, "hidden must be"),
    "D of another width": (*one(down=torch.zeros(3, 23)), ValueError, "down must be [q, 24]"),
    "stacked D without an index": (*one(down=torch.zeros(2, 3, 24)), ValueError, "down must be [q, 24]"),
    "one D with an index": (*many(down=torch.zeros(3, 24)), ValueError, "down must be [adapters, q, 24]"),
    "W of another shape": (*one(up=torch.zeros(2, 24)), ValueError, "up must be [3, 24]"),
    "integer W": (*one(up=torch.zeros(3, 24, dtype=torch.int64)), TypeError, "up must be"),
    "another device": (*one(up=torch.zeros(3, 24, device="meta")), ValueError, "up is on meta"),
    "hidden_scale of zero": (*one(hidden_scale=0.0), ValueError, "hidden_scale=0.0"),
    "negative hidden_scale": (*one(hidden_scale=torch.tensor(-1.0)), ValueError, "hidden_scale=-1.0"),
    "NaN as hidden_scale": (*many(hidden_scale=torch.tensor([1.0, math.nan])), ValueError, "hidden_scale=nan"),
    "integer hidden_scale": (*one(hidden_scale=torch.tensor(1)), TypeError, "hidden_scale must be"),
    "scales without an index": (*one(hidden_scale=torch.ones(2)), ValueError, "needs adapter_index"),
    "too many scales": (*many(hidden_scale=torch.ones(3)), ValueError, "hidden_scale must be [2]"),
    "float index": (*many(adapter_index=torch.zeros(4)), TypeError, "adapter_index must hold integers"),
    "bool index": (*many(adapter_index=torch.zeros(4, dtype=torch.bool)), TypeError, "adapter_index"),
    "index of another batch": (*many(adapter_index=torch.zeros(3, dtype=torch.int64)), ValueError, "adapter_index"),
    "index too high": (*many(adapter_index=torch.tensor([0, 1, 2, 0])), IndexError, "adapter_index holds 2"),
    "index too low": (*many(adapter_index=torch.tensor([0, 1, -2, 0])), IndexError, "adapter_index holds -2"),
    "index elsewhere": (
        *many(adapter_index=torch.zeros(4, dtype=torch.int64, device="meta")), ValueError, "adapter_index is on meta",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_one_or_two_lines(name):
    adapters, change, error, words = BAD[name]
    with pytest.raises(error) as caught:
        layer_update(**make_case(14, adapters=adapters) | change)
    assert words in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_triton_implementation_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match=r'impl="triton" cannot run: .* Use impl="torch"'):
        layer_update(**make_case(15), impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_stay_are_out_of_all_gradients(dtype):
    index = torch.tensor([1, -1])
    hidden, down, up = torch.randn(2, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    down[0], up[0] = torch.nan, torch.nan  # the adapter that no row has
    hidden[1] = torch.inf  # the row that stays
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (hidden, down, up)]
    out = layer_update(*tensors, adapter_index=index, impl="torch")
    grads = torch.autograd.grad(out[0].sum() + out[1].nan_to_num(0, 0, 0).sum(), tensors)
    assert grads[0].isfinite().all() and all(grad[1].isfinite().all() and not grad[0].any() for grad in grads[1:])
