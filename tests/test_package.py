"""The package as a newcomer meets it: it imports without what is optional, and says what a command lacks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_package_imports_without_triton_and_the_torch_implementation_runs():
    code = """
import sys
sys.modules["triton"] = None  # what an import of a missing package looks like
import torch, ept, ept.training, ept_kernels
out = ept_kernels.prompt_embed(
    torch.zeros(1, 2, dtype=torch.int64), None, torch.ones(3, 4), torch.ones(1, 4), None, None, None, None, None, scale=1.0
)
assert out.shape == (1, 3, 4)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_the_trainers_are_offered_and_loaded_when_they_are_asked_for():
    code = """
import sys, ept
assert not {"ept.training", "transformers.trainer"} & set(sys.modules)
names = [name for name in dir(ept) if name.startswith("EPT") and "Train" in name]
from ept import training
assert len(names) == 5 and all(getattr(ept, name) is getattr(training, name) for name in names)
assert set(names) < set(ept.__all__)
try:
    ept.EPTTrainr
except AttributeError as error:
    assert "EPTTrainr" in str(error)
else:
    raise AssertionError
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_commands_that_read_no_tables_run_without_datasets():
    code = """
import sys
sys.modules["datasets"] = None  # what an import of a missing package looks like
from ept.cli import main
for command in ("doctor", "inspect", "fold", "import", "report", "plan"):
    try:
        main([command, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0, command
try:
    main(["train", "--help"])
except SystemExit as stopped:
    assert stopped.code == 2
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == ["ept train: error: datasets is not installed: pip install 'ept[train]'"]
