"""A save killed at any moment leaves a whole adapter: the old one or the new one."""

import os
import signal

import pytest
import torch

from ept.files import adapter_dir

OLD, NEW = {"x": torch.zeros(3)}, {"x": torch.ones(3)}
SETTINGS = {"method": "EPT"}


def save_killed(directory, before_call: int) -> None:
    """Saves NEW in a child that dies just before the n-th of the calls that change the disk."""
    pid = os.fork()
    if pid == 0:
        left = before_call

        def dying(function):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        try:
            os.replace, os.fsync = dying(os.replace), dying(os.fsync)
            adapter_dir.write_adapter(directory, SETTINGS, NEW)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("before_call", range(4))
def test_a_save_killed_before_each_of_its_steps_leaves_a_whole_adapter(before_call, tmp_path):
    adapter_dir.write_adapter(tmp_path, SETTINGS, OLD)
    save_killed(tmp_path, before_call)
    _, tensors = adapter_dir.read_adapter(tmp_path)
    committed = before_call >= 3  # two files are synced, then the config is replaced: from then on it is the new one
    assert torch.equal(tensors["x"], (NEW if committed else OLD)["x"])
    # A second save killed at its first step must not lose what the first one committed.
    save_killed(tmp_path, 0)
    assert torch.equal(adapter_dir.read_adapter(tmp_path)[1]["x"], tensors["x"])
    adapter_dir.write_adapter(tmp_path, SETTINGS, NEW)
    assert torch.equal(adapter_dir.read_adapter(tmp_path)[1]["x"], NEW["x"])
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="give a directory"):
        adapter_dir.write_adapter(tmp_path / "file", SETTINGS, OLD)
