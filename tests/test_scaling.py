"""Training in several processes: the same weights as in one, the same files, and going on in another number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    "HF_HUB_OFFLINE": "1",
}

ONE, TWO, FSDP2 = (
    dict(kind="ddp", processes=1, batch=4),
    dict(kind="ddp", processes=2, batch=2),
    dict(kind="fsdp2", processes=2, batch=2),
)
RUNS = [
    {"name": "one"} | ONE,
    {"name": "two"} | TWO,
    {"name": "fsdp2"} | FSDP2,
    {"name": "one, causal", "model": "causal"} | ONE,
    {"name": "two, causal", "model": "causal"} | TWO,
    {"name": "fsdp2, causal", "model": "causal"} | FSDP2,
    {"name": "two, then one", "steps": 3} | TWO,
    {"name": "two, then one", "resume": True} | ONE,
    {"name": "one, then fsdp2", "steps": 3} | ONE,
    {"name": "one, then fsdp2", "resume": True} | FSDP2,
    {"name": "fsdp2, then two", "steps": 3} | FSDP2,
    {"name": "fsdp2, then two", "resume": True} | TWO,
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where each of RUNS has trained."""
    directory = tmp_path_factory.mktemp("parallel")
    process = subprocess.run(
        [sys.executable, HERE / "parallel_run.py", directory, json.dumps(RUNS)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for run, status in zip(RUNS, json.loads(process.stdout.splitlines()[-1]), strict=True):
        assert status == [0] * run["processes"], f"{run}: {process.stderr[-5000:]}"
    return directory


@pytest.mark.parametrize("name", sorted({run["name"] for run in RUNS} - {"one", "one, causal"}))
def test_processes_give_the_weights_of_one_with_their_batches_together(name, directory):
    one = "one, causal" if name.endswith("causal") else "one"
    want, got = (load_file(directory / n / "adapter_model.safetensors") for n in (one, name))
    assert want.keys() == got.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype
        # A gradient is summed over the rows in another order: a few units in the last place. Six steps of 0.001 carry
        # that into weights of up to 3, whose own last place is 2e-7.
        torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-7)
