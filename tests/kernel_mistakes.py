"""Deliberate mistakes in the kernels: what is changed, and what should notice. Used by test_triton_emulator.py.

python tests/kernel_mistakes.py     # makes each of them in 12 schedules and writes kernel_mistakes.json
"""

import dataclasses
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".json")
PACKAGE = ROOT / "ept_kernels"
MAX_INSTRUCTIONS = 4_000_000  # some ten times what a right launch of these shapes takes


@dataclasses.dataclass(frozen=True)
class Mistake:
    """`old` becomes `new` in one file. `never`: why no schedule can show it, for those that are never caught.

    A mistake in a stem's own files is looked for in its launches, any other in the input stage's.
    """

    name: str
    file: str
    old: str
    new: str
    weak: bool | str = True
    never: str = ""


C = "common/triton_device.py"
F = "prompt_embed/triton_forward.py"
FP, FT = (F.replace(".py", role) for role in ("_prompt.py", "_text.py"))
L = "layer_update/triton_backward.py"
S, P = "prompt_embed/triton_by_row.py", "prompt_columns/triton_forward.py"
BR, BW = (f"prompt_embed/triton_backward_{launch}.py" for launch in ("reduce", "weights"))
BARRIER = "        )\n    tl.debug_barrier()"
WAIT = "    if AMD:\n        lanes"
RESET = "    if last:\n        tl.store(counter, 0)"
TICKET = 'tl.atomic_add(counter + TICKET, 1, sem="relaxed") if WAITS else'
FINISH = "    if arrive(arrived, parts, AMD):\n        finish"
PARTIAL = "partial + (block * parts + part) * ROWS * PARTIAL"
STRIDE = "* (num_rows + length) + start + rows"
DONE = 'if tl.atomic_add(counter + DONE, 1, sem="acq_rel") == total - 1:'
MISTAKES = [
    Mistake("control: no mistake", C, "pass", "pass", "wave", "it is right"),
    Mistake("no barrier before a flag", C, BARRIER, "        )", "wave"),
    Mistake("no wait for stores before the barrier", C, WAIT, WAIT.replace("AMD", "False"), "wave"),
    Mistake("neither barrier nor wait before a flag", C, "    finish_stores(AMD)\n", "", "wave"),
    Mistake("flag raised relaxed", C, 'tl.atomic_add(counter, 1, sem="release")', 'tl.atomic_add(counter, 1, sem="relaxed")'),
    Mistake("flag read relaxed", C, 'tl.atomic_add(counter, 0, sem="acquire")', 'tl.atomic_add(counter, 0, sem="relaxed")'),
    Mistake("arrival relaxed", C, 'sem="acq_rel") == expected - 1', 'sem="relaxed") == expected - 1'),
    Mistake("arrival without release", C, 'sem="acq_rel") == expected - 1', 'sem="acquire") == expected - 1'),
    Mistake("arrival without acquire", C, 'sem="acq_rel") == expected - 1', 'sem="release") == expected - 1'),
    Mistake("arrival threshold one too low", C, "== expected - 1", "== tl.maximum(expected - 2, 0)"),
    Mistake("arrival threshold one too high", C, "== expected - 1", "== expected"),
    Mistake("arrivals not set back", C, RESET, RESET.replace("last", "False")),
    Mistake("program id in place of the ticket", F, TICKET, "tl.program_id(0) if True else"),
    Mistake("ticket not set back", F, "            tl.store(counter + TICKET, 0)\n", ""),
    Mistake("count of finished programs not set back", F, "            tl.store(counter + DONE, 0)\n", ""),
    Mistake("count of ordered rows not set back", F, "            tl.store(counter + ORDERED, 0)\n", ""),
    Mistake("flags not set back", F, "                tl.store(flags + block, 0)", "                pass"),
    Mistake("counters set back one program early", F, DONE, DONE.replace("total - 1", "total - 2")),
    Mistake("flag before its data", FP, FINISH, FINISH.replace("finish", "release(flag, AMD)\n        finish")),
    Mistake("prompt does not wait", F, 'if MIXES and ROLE == "all":', "if False:"),
    Mistake("text does not wait for its slots", FT, "    if WAITS:", "    if False:"),
    Mistake("text waits for one row too few", FT, "wait(ordered, batch)", "wait(ordered, batch - 1)"),
    Mistake("stride of X without the prompt", FP, STRIDE, STRIDE.replace("(num_rows + length)", "length")),
    Mistake("stride of the partial sums", FP, PARTIAL, PARTIAL.replace("* PARTIAL", "* (PARTIAL - 1)")),
    Mistake("scale twice in the backward", BR, "        dy *= scale / D**0.5", "        dy *= scale * scale / D**0.5"),
    Mistake("one arrival too few in the second launch", BW, "        arrivals += 1", "        arrivals += 0"),
    Mistake("one share of dB not added", BW, "for share in range(shares):", "for share in range(shares - 1):"),
    Mistake("layer: shares added up by the first to arrive", L, "if arrive(counter + wanted * SLICES + part, shares, AMD):",
            "if arrive(counter + wanted * SLICES + part, 1, AMD):"),
    Mistake("layer: one share of dD and dW not added", L, "in tl.range(0, shares, loop", "in tl.range(0, shares - 1, loop"),
    Mistake("layer: arrivals of adapters in one counter", L, "counter + wanted * SLICES + part", "counter + part"),
    Mistake("stack: the first adapter's low-rank pair for all rows", S, "own_b = lowrank_b + safe * R * D", "own_b = lowrank_b"),
    Mistake("stack: text before a program's columns not counted", S, "position = before + tl.cumsum", "position = tl.cumsum"),
    Mistake("stack: text behind a prompt as if it had all rows", S, "column >= start, own, 0", "column >= start, num_rows, 0"),
    Mistake("stack: stride of X without the prompt", S, "first_row = row * (num_rows + length)", "first_row = row * length"),
    Mistake("columns: positions not counted on", P, "        before += tl.sum", "        before += 0 * tl.sum"),
    Mistake("columns: first text token of the last chunk alone", P, "tl.minimum(start, tl.min(", "tl.minimum(length, tl.min("),
    Mistake("columns: filling behind the prompt", P, "behind_start >= width - own", "behind_start < own"),
    Mistake("last program's count relaxed", F, DONE, DONE.replace("acq_rel", "relaxed"), "wave",
            "nothing is read after it, and the zeros it lets through are only read by the next launch"),
]  # fmt: skip


def load(mistake: Mistake, folder: str):
    """forward and backward (None where there is none) of a copy of the package with the mistake in it."""
    package = Path(folder) / f"mistaken_{MISTAKES.index(mistake)}"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = package / mistake.file
    text = source.read_text(encoding="utf-8")
    assert mistake.old in text, f"{mistake.name}: {mistake.old!r} is no longer in {mistake.file}"
    source.write_text(text.replace(mistake.old, mistake.new), encoding="utf-8")
    folder_of_stem = mistake.file.partition("/")[0]
    stem = f"{package.name}.{'prompt_embed' if folder_of_stem == 'common' else folder_of_stem}"
    sys.path.insert(0, folder)
    try:
        forward = importlib.import_module(
            f"{stem}.{'triton_by_row' if mistake.file == S else 'triton_forward'}"
        ).forward
        alone = mistake.file in (S, P)
        backward = None if alone else importlib.import_module(f"{stem}.triton_backward").backward
    finally:
        sys.path.remove(folder)
    return forward, backward


def schedule(seed: int, weak: bool | str) -> dict:
    """Start orders, resident programs and lengths of turns in all combinations, over 24 seeds."""
    return dict(
        seed=seed, weak=weak, resident=[None, 2, 1, 5][seed % 4], order=["random", "reverse", "forward"][seed % 3],
        quantum=[40, 7][seed // 12 % 2], poison_empty=True, max_instructions=MAX_INSTRUCTIONS,
    )  # fmt: skip


def is_caught(mistake: Mistake, seed: int, folder_of: dict) -> bool:
    """Whether two forwards and a backward in one schedule end in an error or in wrong numbers."""
    from emulate import emulate
    from gfx942 import EmulatorError

    if mistake.name not in folder_of:
        folder_of[mistake.name] = load(mistake, tempfile.mkdtemp(dir=folder_of["folder"]))
    launches = {L: _layer_launches, S: _stack_launches, P: _columns_launches}.get(mistake.file, _input_launches)
    launch = launches(*folder_of[mistake.name], seed)
    try:
        with emulate(**schedule(seed, mistake.weak)):
            for got, expected in launch():
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    except (EmulatorError, AssertionError):
        return True
    return False


def _input_launches(forward, backward, seed: int):
    """A function that yields pairs of a result and what it must be, of prompt_embed."""
    from test_prompt_embed import make_case

    from ept_kernels import prompt_embed
    from ept_kernels.prompt_embed.arguments import Settings, Text, Weights

    case = make_case(seed, parts="paper", s=18, n=20, r=33, k=5, h=8, d=70, length=20, batch=2)
    leaves = [case[name].requires_grad_() for name in Weights._fields[:6]]  # all but D and W
    want = prompt_embed(**case, impl="torch")
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed))
    want_grads = torch.autograd.grad(want, leaves, grad)
    text = Text(case["input_ids"], case["embedding_weight"], case["attention_mask"])
    weights, settings = Weights(*(leaf.detach() for leaf in leaves)), Settings(case["scale"])

    def launch():
        for _ in range(2):
            out, _, kept = forward(text, weights, settings, save=True)
            yield out, want.detach()
        grads = backward(grad, None, text, weights, kept, settings, input_grad=False)
        yield from zip(grads.weights[:6], want_grads, strict=True)

    return launch


def _layer_launches(forward, backward, seed: int):
    """The same of layer_update, with several adapters and several shares of the tokens."""
    from ept_kernels import layer_update
    from ept_kernels.layer_update.arguments import Settings, Update

    g = torch.Generator().manual_seed(seed)
    index = torch.tensor([0, 1, -1, 1, 0, 1, 0, 0, 1])
    leaves = [torch.randn(size, generator=g).requires_grad_() for size in ((9, 33, 20), (2, 3, 20), (2, 3, 20))]
    want = layer_update(*leaves, hidden_scale=4.0, adapter_index=index, impl="torch")
    grad = torch.randn(want.shape, generator=g)
    want_grads = torch.autograd.grad(want, leaves, grad)
    update, settings = Update(*(leaf.detach() for leaf in leaves), index), Settings(4.0)

    def launch():
        for _ in range(2):
            out, z = forward(update, settings, save=True)
            yield out, want.detach()
        grads = backward(grad, update, z, settings, input_grad=True, weight_grad=True)
        yield from zip(grads, want_grads, strict=True)

    return launch


def _stack_launches(forward, backward, seed: int):
    """The same of stacks of adapters, with text before the columns of some programs."""
    from stack_cases import stack_case

    from ept_kernels import prompt_embed
    from ept_kernels.prompt_embed.arguments import Settings, Stack, Text

    case = stack_case(
        seed, shape="plain", dtype=torch.float32, source_dtype=torch.float32, lowrank="factors", token=True, text="holes",
        start="by row", lengths=True, index=torch.int64, inputs=False, activation="silu", e=1.0,
    )  # fmt: skip
    case["adapter_index"], case["prompt_lengths"] = torch.tensor([2, 0, 1, 2]), torch.tensor([3, 1, 2])
    want = prompt_embed(**case, impl="torch")
    text = Text(case["input_ids"], case["embedding_weight"].contiguous(), case["attention_mask"], case["prompt_start"])
    names = ("prompt", "lowrank_a", "lowrank_b", "token_down", "token_up", "adapter_index", "prompt_lengths")
    stack = Stack(*(case[name].contiguous() for name in names))

    def launch():
        yield forward(text, stack, Settings(case["scale"])), want

    return launch


def _columns_launches(forward, backward, seed: int):
    """The same of the columns of padded rows, of more than one chunk."""
    from ept_kernels import prompt_columns
    from ept_kernels.prompt_columns.arguments import Rows, Settings

    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(2, 1300, generator=g) > 0.4).long()
    mask[0, :100] = 0
    lengths = torch.tensor([3, 5])
    want = prompt_columns(mask, 5, prompt_lengths=lengths, impl="torch")

    def launch():
        got = forward(Rows(mask, lengths), Settings(5))
        yield from zip(got[:3], want[:3], strict=True)

    return launch


def find_emulator() -> Path:
    return Path(os.environ.get("EPT_GPU_EMULATOR", ROOT.parent / "shared" / "gpu-emulator"))


if __name__ == "__main__":
    sys.path[:0] = [str(find_emulator()), str(ROOT)]
    torch.set_num_threads(1)
    schedules, table = int(sys.argv[1]) if len(sys.argv) > 1 else 12, {}
    with tempfile.TemporaryDirectory() as folder:
        for mistake in MISTAKES:
            loaded = dict(folder=folder)
            caught = sum(is_caught(mistake, seed, loaded) for seed in range(schedules))
            table[mistake.name] = dict(weak=mistake.weak, caught=caught, schedules=schedules)
            if mistake.never:
                table[mistake.name]["never"] = mistake.never
            print(f"{caught:3} of {schedules}  {mistake.name}", flush=True)
            TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
