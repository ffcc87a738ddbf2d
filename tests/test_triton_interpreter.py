"""The kernels' arithmetic in Triton's interpreter, which has to be chosen before Triton is imported: in processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
SHARDS = 2  # processes of the long form, one for each core
FILES = {
    "input": ["interpreted_kernels.py"],
    "layers and stacks": ["interpreted_layer_update.py", "interpreted_stacks.py"],
}


def run_interpreted(files, *arguments):
    env = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    env.pop("PYTEST_XDIST_WORKER", None)
    pytest_once = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [*pytest_once, *(f"tests/{file}" for file in files)]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("files", FILES)
def test_short_matrix(files):
    run_interpreted(FILES[files], "-m", "not full")


@pytest.mark.full
@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_full_matrix(shard, files, monkeypatch):
    monkeypatch.setenv("EPT_SHARD", f"{shard}/{SHARDS}")
    run_interpreted(FILES[files], "-m", "full")
