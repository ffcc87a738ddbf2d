"""The compiled gfx942 code on the CPU, with programs interleaved at random and a weak memory.

Needs the folder gpu-emulator: beside the repository in shared/, or where EPT_GPU_EMULATOR says.
"""

import functools
import json
import os
import sys

import layer_cases
import pytest
import stack_cases
import torch
from kernel_cases import errors, kernel_case, run, source_dtype
from kernel_mistakes import MISTAKES, TABLE, find_emulator, is_caught, schedule

pytest.importorskip("triton")
if not find_emulator().is_dir():
    pytest.skip("no emulator of gfx942 code: EPT_GPU_EMULATOR names its folder", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)
sys.path.insert(0, str(find_emulator()))

from emulate import emulate  # needs the path

DEFAULTS = dict(
    dtype=torch.float32, source_dtype=torch.float32, parts="all", mask="holes", start="second", activation="silu",
    switch="on", inputs=False, e=0.5,
)  # fmt: skip
# No float16: its stores use v_pack_b32_f16, which the emulator does not have. The interpreter rounds float16 right.
CASES = {
    "odd": dict(shape="odd"),
    "main case": dict(shape="odd", source_dtype=torch.bfloat16, mask="right", parts="paper"),
    "bfloat16": dict(shape="odd", dtype=torch.bfloat16, source_dtype=torch.bfloat16, mask="left", activation="gelu"),
    "inputs_embeds": dict(shape="odd", inputs=True, mask="none", activation="relu"),
    "wide": dict(shape="tiles", mask="left", start="by row"),
    "no fusion": dict(shape="tiles", switch="no fusion", parts="lowrank", inputs=True),
    "spaces": dict(shape="no text", parts="spaces", start="first"),
    "tokens": dict(shape="long", parts="token", mask="right", inputs=True),
    "default preset": dict(shape="odd", source_dtype=torch.bfloat16, parts="token", mask="left", start="by row"),
}
SHORT = {"main case": "wave", "inputs_embeds": True, "layer": "wave"}
STACK_DEFAULTS = dict(
    shape="plain", dtype=torch.float32, source_dtype=torch.float32, lowrank="factors", token=True, text="holes", start="by row",
    lengths=True, index=torch.int64, inputs=False, activation="silu", e=0.5,
)  # fmt: skip
STACK_CASES = {
    "stack": {},
    "stack, bfloat16": dict(shape="many ranks", source_dtype=torch.bfloat16, text="positions"),
    "stack, table": dict(shape="odd", lowrank="table", text="left", activation="gelu", inputs=True, index=torch.int32),
}


LAYER_DEFAULTS = dict(
    shape="", dtype=torch.float32, source_dtype=torch.float32, activation="silu", scale="number", strides="plain",
)  # fmt: skip
# Tokens enough for several shares of a slice, whose last one adds them up.
LAYER_CASES = {
    "layer": dict(adapters=None, sizes=dict(batch=2, columns=140, d=40, q=5)),
    "layer, bfloat16": dict(
        adapters=None, source_dtype=torch.bfloat16, strides="turned", sizes=dict(batch=3, columns=100, d=70, q=4)
    ),
    "layer, adapters": dict(adapters=2, scale="by adapter", sizes=dict(batch=9, columns=33, d=40, q=3)),
}


def check(name, seeds, weak):
    if name in LAYER_CASES:
        case = layer_cases.layer_case(0, **LAYER_DEFAULTS | LAYER_CASES[name])
        compute, wrong = functools.partial(layer_cases.run, case, "triton"), layer_cases.errors
    elif name in STACK_CASES:
        case = stack_cases.stack_case(0, **STACK_DEFAULTS | STACK_CASES[name])

        def compute():
            return dict(out=stack_cases.run(case, "triton"))

        def wrong(case, got):
            return stack_cases.errors(case, got["out"])

    else:
        case = kernel_case(0, **DEFAULTS | CASES[name])
        compute, wrong = functools.partial(run, case, "triton", source_dtype(case)), errors
    bits = None
    for seed in seeds:
        with emulate(**schedule(seed, weak)):
            got = compute()
        assert wrong(case, got) == {}, f"seed {seed}"
        assert bits is None or all(torch.equal(bits[key], value) for key, value in got.items()), f"seed {seed}"
        bits = got


@pytest.mark.parametrize(("name", "weak"), SHORT.items())
def test_any_schedule_gives_the_right_numbers_and_the_same_bits(name, weak):
    check(name, range(2), weak)


@pytest.mark.full
@pytest.mark.parametrize("weak", [True, "wave"])
@pytest.mark.parametrize("name", [*CASES, *LAYER_CASES, *STACK_CASES])
def test_many_schedules(name, weak):
    check(name, [*range(6), *range(12, 18)], weak)


@pytest.mark.full
def test_roles_one_after_another_give_the_same_bits(monkeypatch):
    case = kernel_case(1, **DEFAULTS | CASES["odd"])
    with emulate(**schedule(0, "wave")) as emu:
        single = run(case, "triton", torch.float32)
        monkeypatch.setenv("EPT_LAUNCH", "sequence")
        sequence = run(case, "triton", torch.float32)
    assert len(emu.launches) == (1 + 2) + (4 + 2)
    for name, value in single.items():
        assert torch.equal(value, sequence[name]), name


def test_a_mistake_is_caught(tmp_path):
    mistake, loaded = next(m for m in MISTAKES if m.name == "arrival threshold one too low"), dict(folder=tmp_path)
    assert any(is_caught(mistake, seed, loaded) for seed in range(3))


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistakes_are_caught_as_the_table_says(mistake, tmp_path):
    """At least once in as many schedules as make a miss improbable at the rate in the table; the others never."""
    row, loaded = json.loads(TABLE.read_text(encoding="utf-8"))[mistake.name], dict(folder=tmp_path)
    assert bool(row["caught"]) != bool(mistake.never)
    caught = (is_caught(mistake, seed, loaded) for seed in range(row["schedules"]))
    assert any(caught) == bool(row["caught"])
