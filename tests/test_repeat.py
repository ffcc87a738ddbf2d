"""Repeated launches: later calls hand the compiled kernels what the first call's binder handed them.

A driver that compiles and launches nothing stands in for a GPU, so what is compared is each launch's arguments.
"""

import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
from counted_operations import Operations
from kernel_compiler import compiling_for

triton = pytest.importorskip("triton")
from ept_kernels import layer_update, prompt_columns, prompt_embed  # noqa: E402
from ept_kernels.layer_update import triton_backward as layer_backward  # noqa: E402
from ept_kernels.layer_update import triton_forward as layer_forward  # noqa: E402
from ept_kernels.layer_update import triton_op as layer_op  # noqa: E402
from ept_kernels.prompt_columns import triton_forward as columns_forward  # noqa: E402
from ept_kernels.prompt_columns import triton_op as columns_op  # noqa: E402
from ept_kernels.prompt_embed import triton_backward, triton_by_row, triton_forward, triton_op  # noqa: E402

KERNELS = [
    triton_by_row.by_row_kernel, columns_forward.columns_kernel,
    triton_forward.forward_kernel, triton_backward.reduce_kernel, triton_backward.weights_kernel,
    layer_forward.forward_kernel, layer_backward.hidden_kernel, layer_backward.weights_kernel,
]  # fmt: skip


class Compiled:
    """Stands in for a compiled kernel, which takes seconds to make; `run` is what launches."""

    function = packed_metadata = None

    def __init__(self, launches):
        self._launches = launches

    def launch_metadata(self, *args):
        return None

    def run(self, programs, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        self._launches.append((programs, args))


@pytest.fixture
def launches(monkeypatch):
    """What the compiled kernels are called with: programs and arguments, launch by launch."""
    launches = []

    def compile_kernel(kernel, key, signature, device, *rest):
        compiled = kernel.device_caches[device][0][key] = Compiled(launches)
        return compiled

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", compile_kernel)
    with compiling_for("sm_90") as kernels:
        yield launches, kernels
    for kernel in KERNELS:
        kernel.device_caches.clear()  # of what was not compiled


def weight(*shape):
    return torch.randn(shape).requires_grad_()


def all_parts(mask_dtype=torch.int64):
    d, ids = 32, torch.randint(10, (2, 6))
    weights = [weight(3, d), weight(8, 4), weight(4, d), weight(2, 3, d), weight(2, 3, d), weight(2, d)]
    tokens = {"token_down": weight(4, d), "token_up": weight(4, d)}
    table, mask = torch.randn(10, d).bfloat16(), torch.ones(2, 6).to(mask_dtype)
    inputs = [ids, mask, table, *weights, *tokens.values()]
    return inputs, lambda: prompt_embed(ids, mask, table, *weights, scale=0.5, impl="triton", **tokens)


def prompt_alone():
    ids, table, prompt = torch.randint(10, (2, 6)), torch.randn(10, 32), weight(3, 32)
    return [ids, table, prompt], lambda: prompt_embed(ids, None, table, prompt, *[None] * 5, scale=1.0, impl="triton")


def default_preset():
    ids, mask, table = torch.randint(10, (2, 6)), torch.ones(2, 6).long(), torch.randn(10, 32).bfloat16()
    prompt, down, up = weight(3, 32), weight(4, 32), weight(4, 32)
    tokens = {"token_down": down, "token_up": up}
    inputs = [ids, mask, table, prompt, down, up]
    return inputs, lambda: prompt_embed(ids, mask, table, prompt, *[None] * 5, scale=1.0, impl="triton", **tokens)


def layer(index=None, trained=True):
    stack = () if index is None else (3,)
    hidden = torch.randn(2, 5, 32).bfloat16().requires_grad_()
    down, up = (weight(*stack, 4, 32).requires_grad_(trained) for _ in range(2))
    inputs = [hidden, down, up] + ([] if index is None else [index])
    return inputs, lambda: layer_update(hidden, down, up, hidden_scale=2.0, adapter_index=index, impl="triton")


def stack(part_of_prompts=False):
    ids, table = torch.randint(10, (2, 6)), torch.randn(10, 32).bfloat16()
    mask, index, lengths = torch.ones(2, 6).bool(), torch.tensor([0, 2]), torch.tensor([3, 2, 3])
    prompts = torch.randn(3, 5, 32)[:, 2:] if part_of_prompts else torch.randn(3, 3, 32)
    constants = [prompts, torch.randn(3, 8, 4), torch.randn(3, 4, 32)]
    tokens = {"token_down": torch.randn(3, 4, 32), "token_up": torch.randn(3, 4, 32)}
    rows = {"adapter_index": index, "prompt_lengths": lengths}
    inputs = [ids, mask, table, *constants, *tokens.values(), *rows.values()]
    return inputs, lambda: prompt_embed(
        ids, mask, table, *constants, None, None, None, scale=0.5, impl="triton", **tokens, **rows
    )


def columns(mask_dtype=torch.int64):
    mask, labels, lengths = torch.ones(2, 6).to(mask_dtype), torch.randint(10, (2, 6)), torch.tensor([3, 2])
    inputs = [mask, labels, lengths]
    return inputs, lambda: prompt_columns(mask, 3, prompt_lengths=lengths, labels=labels, impl="triton")


def step(inputs, call, launched):
    """The launches of a forward, then of its backward, in words, and all tensors that have a name."""
    out = call()
    results = out if isinstance(out, tuple) else (out,)
    named = {f"input {i}": t for i, t in enumerate(inputs)} | {f"result {i}": t for i, t in enumerate(results)}
    if results[0].grad_fn is None:
        return in_words(launched, named), ([], []), named
    named |= {f"kept {i}": t for i, t in enumerate(out.grad_fn.saved_tensors) if t is not None}
    forward = in_words(launched, named)
    launched.clear()
    named["gradient"] = torch.ones_like(out)
    leaves = list({id(t): t for t in inputs if t.requires_grad}.values())
    grads = torch.autograd.grad(out, leaves, named["gradient"], retain_graph=True)
    named |= {f"gradient {i}": t for i, t in enumerate(grads)}
    return forward, in_words(launched, named), named


def in_words(launched, named):
    """Each argument: a number as it is, a tensor by its name, or as scratch. Then the scratch: addresses, and bytes."""
    words, scratch = [], []
    names = {t.data_ptr(): name for name, t in named.items() if t.numel()}
    for programs, args in launched:
        words.append(["programs", programs])
        for arg in args:
            if isinstance(arg, torch.Tensor):
                scratch += [(arg.data_ptr(), arg.nbytes)] if arg.numel() and arg.data_ptr() not in names else []
                arg = arg.data_ptr()
            elif type(arg) is int and arg > 1 << 32:
                scratch += [(arg, None)] if arg not in names else []
            words[-1].append(names.get(arg, "scratch") if type(arg) is int and arg > 1 << 32 else arg)
    return words, scratch


CASES = {
    "all parts": all_parts,
    "a mask of bools": lambda: all_parts(torch.bool),
    "the prompt alone": prompt_alone,
    "the default preset": default_preset,
    "a layer": layer,
    "a layer whose D and W are constants": lambda: layer(trained=False),
    "several adapters": lambda: layer(index=torch.tensor([0, 2])),
    "a stack": stack,
    "a stack of parts of prompts": lambda: stack(part_of_prompts=True),
    "columns": columns,
    "columns of a mask of bools": lambda: columns(torch.bool),
}


LAUNCHES = {  # forward, backward
    "all parts": (1, 2),
    "a mask of bools": (1, 2),
    "the prompt alone": (1, 2),
    "the default preset": (1, 2),
    "a layer": (1, 2),
    "a layer whose D and W are constants": (1, 1),
    "several adapters": (1, 2),
    "a stack": (1, 0),
    "a stack of parts of prompts": (1, 0),
    "columns": (1, 0),
    "columns of a mask of bools": (1, 0),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_an_operator_is_one_launch_forward_and_at_most_two_backward_and_no_other_operation(case, launches, monkeypatch):
    """So the operators that tests/test_launches.py counts are launches."""
    launched, _ = launches
    others = Operations()

    def watched(call, key, function, tensors):
        with others:
            return function(*tensors)

    for operators in (triton_op, layer_op, columns_op):
        monkeypatch.setattr(operators, "repeat", watched)
    for _ in range(2):  # a stream's counters are made in the first call
        launched.clear(), others.names.clear()
        forward, backward, _ = step(*CASES[case](), launched)
    assert (len(forward[0]), len(backward[0])) == LAUNCHES[case]
    assert others.names == []


@pytest.mark.parametrize("case", CASES)
def test_later_calls_launch_what_the_first_one_launched_on_their_own_tensors(case, launches):
    launched, kernels = launches
    steps = []
    for repeated in (False, True, True):
        launched.clear(), kernels.clear()
        steps.append(step(*CASES[case](), launched))
        assert (len(kernels) == 0) is repeated  # Triton's binder launched nothing
    for way in (0, 1):
        first, *later = (result[way] for result in steps)
        for words, scratch in later:
            assert words == first[0]
            sizes = [size for _, size in first[1]]
            spans = sorted({(start, start + size) for (start, _), size in zip(scratch, sizes, strict=True)})
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_what_triton_compiles_another_kernel_for_goes_through_its_binder(launches):
    _, kernels = launches
    weights = weight(4, 32), weight(4, 32)
    storage = torch.randn(2 * 5 * 32 + 1)

    def call(start):
        kernels.clear()
        layer_update(storage[start : start + 320].view(2, 5, 32), *weights, impl="triton")
        return len(kernels)

    assert [call(start) for start in (0, 0, 1, 1, 0)] == [1, 0, 1, 1, 0]
    triton.knobs.runtime.launch_enter_hook.add(print)
    try:
        assert call(0) == 1  # a profiler sees it
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(print)
    assert call(0) == 0
    with pytest.raises(ValueError, match="down must be"):
        layer_update(torch.randn(2, 5, 33), *weights, impl="triton")


def test_a_result_of_a_repeated_call_is_a_new_tensor_each_time(launches):
    for case in ("a layer", "all parts", "a stack", "columns"):
        _, call = CASES[case]()
        results = [call() for _ in range(3)]
        outs = [result if isinstance(result, torch.Tensor) else result.positions for result in results]
        assert len({out.data_ptr() for out in outs}) == 3
        assert all((out.grad_fn is not None) is (case in ("a layer", "all parts")) for out in outs)


def test_what_a_repeated_call_is_not_to_check_again_is_checked_in_the_first(launches):
    _, call = stack()
    call(), call()
    inputs, _ = stack()
    ids, mask, table, *constants, down, up, index, lengths = inputs

    def again(**others):
        tokens = {"token_down": down, "token_up": up, "adapter_index": index, "prompt_lengths": lengths} | others
        prompt_embed(ids, mask, table, *constants, None, None, None, scale=0.5, impl="triton", **tokens)

    for others, error, said in (
        (dict(token_down=down[:, :3]), ValueError, "token_up must be"),
        (dict(adapter_index=index.float()), TypeError, "adapter_index must hold integers"),
        (dict(adapter_index=index + 1), IndexError, "adapter_index holds 3"),  # values, in each call
        (dict(prompt_lengths=lengths - 4), IndexError, "prompt_lengths holds -2"),
    ):
        with pytest.raises(error, match=said):
            again(**others)
    with pytest.raises(TypeError, match="labels must hold integers"):
        prompt_columns(mask, 3, labels=mask.float(), impl="triton")


def test_one_tensor_passed_twice_and_two_of_its_shape_are_told_apart(launches):
    launched, _ = launches
    hidden, down, up = torch.randn(2, 5, 32), weight(4, 32), weight(4, 32)
    for pair in ((down, down), (down, up), (up, down)):
        layer_update(hidden, *pair, impl="triton")
        addresses = [a if isinstance(a, int) else a.data_ptr() for a in launched.pop()[1][1:3]]
        assert addresses == [t.data_ptr() for t in pair]


def arguments_of_tritons_launcher():
    """The names of what Triton's compiled launcher for NVIDIA parses, in their order, from its source in C."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    source = (Path(driver.__file__).parent / "driver.c").read_text()
    if hasattr(driver, "make_launcher"):  # Triton 3.6 writes a launcher for each signature
        source = driver.make_launcher({}, {0: "*fp32"}, None)
    (names,) = re.findall(r'PyArg_ParseTuple\(args,\s*"[^"]*",\s*(&gridX,[^)]*)\)', source)
    return [name.strip(" \n&") for name in names.split(",")]


def test_tritons_launcher_is_given_by_a_repeated_call_what_the_binder_gives_it(launches, monkeypatch):
    """What is used of Triton is no interface of its own: another release may take its arguments in another order."""
    from triton.backends.nvidia.driver import CudaLauncher

    calls = []
    launcher = object.__new__(CudaLauncher)
    vars(launcher).update(
        num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
        launch_cooperative_grid=False, launch_pdl=False, arg_annotations="annotations", kernel_signature="signature",
        launch=lambda *args: calls.append(args),
    )  # fmt: skip
    monkeypatch.setattr(Compiled, "run", property(lambda compiled: launcher))
    monkeypatch.setattr(Compiled, "function", 11)
    monkeypatch.setattr(Compiled, "packed_metadata", (4, 1, 1024))
    names = arguments_of_tritons_launcher()
    layer()[1]()
    layer()[1]()
    by_binder, by_repeat = (dict(zip(names, in_order(call, names), strict=False)) for call in calls)
    for name in ("gridX", "gridY", "gridZ", "_stream", "_function", "num_warps", "kernel_metadata", "shared_memory"):
        assert by_repeat.get(name) == by_binder.get(name), name
    for name in ("launch_metadata", "launch_enter_hook", "launch_exit_hook", "global_scratch_obj"):
        assert by_repeat[name] is None, name
    assert by_repeat["_function"] == 11 and by_repeat["gridY"] == 1
    assert by_repeat.get("kernel_metadata", (4, 1, 1024)) == (4, 1, 1024) and by_repeat.get("num_warps", 4) == 4
    of_kernel = [call[-1] if "kernel_args" in names else call[len(names) - 1 :] for call in calls]
    assert len(of_kernel[0]) == len(of_kernel[1])
    for bound, repeated in zip(*of_kernel, strict=True):
        assert type(repeated) is int if isinstance(bound, torch.Tensor) else repeated == bound


def in_order(call, names):
    """The arguments of a launch, those of the packed metadata one by one where the launcher parses them so."""
    values = []
    for value in call:
        values += value if isinstance(value, tuple) and "num_warps" in names else [value]
    return values


def test_torchs_own_compiled_code_allocates_as_a_repeated_call_does():
    from torch._inductor.codegen import wrapper

    assert "torch._C._dynamo.guards._empty_strided_cuda" in inspect.getsource(wrapper)
    assert hasattr(torch._C._dynamo.guards, "_empty_strided_cuda")
    made = torch._C._dynamo.guards._empty_strided_cpu((2, 3), (4, 1), torch.bfloat16)
    assert made.shape == (2, 3) and made.stride() == (4, 1) and made.dtype == torch.bfloat16
