"""The kernels compiled ahead of time for GPUs that are not there: nothing may get worse than kernel_resources.json.

The table is of one Triton version (its compiler brings its own ptxas and LLVM): with another, these tests skip.
"""

import json
import os

import pytest
from kernel_resources import TABLE, keys, measure, worse

triton = pytest.importorskip("triton")
TRITON = "3.7.1"
if triton.__version__ != TRITON:
    pytest.skip(f"the table is of Triton {TRITON}, this is {triton.__version__}", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled", allow_module_level=True)

SHORT = {
    "sm_90 d=4096 bf16+fp32 q=0",
    "gfx942 d=768 bf16+fp32 q=24",
    "layer sm_90 d=768 bf16+fp32 q=4",
    "factors sm_90 d=768 bf16+fp32 q=4",
}
OTHERS = ("default", "layer", "factors", "table", "columns")  # the keys that are not the input stage's
BEFORE = json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", [pytest.param(k, marks=[] if k in SHORT else [pytest.mark.full]) for k in keys()])
def test_nothing_got_worse(key):
    """If it is worth it, write the table anew: python tests/kernel_resources.py"""
    now = measure(key)
    assert {name: worse(row, BEFORE[key][name]) for name, row in now.items()} == {name: [] for name in now}


def test_the_input_stage_has_no_spills_wide_accesses_and_tensor_cores():
    for key, kernels in BEFORE.items():
        for name, row in kernels.items():
            if not key.startswith(OTHERS):
                assert row["spilled"] == 0, (key, name)
                assert row["tensor_core"] > 0, (key, name)
                assert row["loads"].get("128", 0) > 0 and row["stores"].get("128", 0) > 0, (key, name)


def test_the_default_preset_and_the_layers_update_have_no_spills_and_wide_accesses():
    for key, kernels in BEFORE.items():
        for name, row in kernels.items():
            if key.startswith(("default", "layer")):
                assert row["spilled"] == 0, (key, name)
                if name != "weights_kernel":  # it reads narrow tiles on gfx942
                    assert row["loads"].get("128", 0) > 0 and row["stores"].get("128", 0) > 0, (key, name)


def test_stacks_have_no_spills_and_wide_accesses():
    for key, kernels in BEFORE.items():
        for name, row in kernels.items():
            if key.startswith(("factors", "table")):
                # One has 8 bytes of stack at 72 registers, of 255 that it could have: not for want of them.
                assert row["spilled"] == 0 or (row["spilled"] == 8 and row["registers"] < 128), (key, name)
                if key != "table gfx942 d=384 bf16+fp32 q=24":  # two narrow rows for 256 lanes
                    assert row["loads"].get("128", 0) > 0 and row["stores"].get("128", 0) > 0, (key, name)
