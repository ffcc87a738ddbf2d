"""A save killed at any moment leaves a whole adapter: the old one or the new one."""

import os
import subprocess
import sys

import pytest
import torch

from ept.files import adapter_dir

OLD, NEW = {"x": torch.zeros(3)}, {"x": torch.ones(3)}
SETTINGS = {"method": "EPT"}

# The calls of a save that change the disk, in order; the process dies just before the n-th.
KILLED = """
import os, signal, sys
import torch
from ept.files import adapter_dir

left = int(sys.argv[2])

def dying(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

os.replace = dying(os.replace)
os.fsync = dying(os.fsync)
adapter_dir.write_adapter(sys.argv[1], {"method": "EPT"}, {"x": torch.ones(3)})
"""


@pytest.mark.parametrize("before_call", range(4))
def test_a_save_killed_before_each_of_its_steps_leaves_a_whole_adapter(before_call, tmp_path):
    adapter_dir.write_adapter(tmp_path, SETTINGS, OLD)
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(before_call)], capture_output=True)
    assert result.returncode == -9, result.stderr
    _, tensors = adapter_dir.read_adapter(tmp_path)
    committed = before_call >= 3  # two files are synced, then the config is replaced: from then on it is the new one
    assert torch.equal(tensors["x"], (NEW if committed else OLD)["x"])
    # A second save killed at its first step must not lose what the first one committed.
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "0"], capture_output=True)
    assert torch.equal(adapter_dir.read_adapter(tmp_path)[1]["x"], tensors["x"])
    adapter_dir.write_adapter(tmp_path, SETTINGS, NEW)
    assert torch.equal(adapter_dir.read_adapter(tmp_path)[1]["x"], NEW["x"])
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give a directory"):
        adapter_dir.write_adapter(tmp_path / "file", SETTINGS, OLD)
