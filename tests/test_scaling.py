"""Training in several processes: the weights of one, the same files, going on in another number; what may befall a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM

import accelerate
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from packaging.version import Version
from safetensors.torch import load_file

import parallel_run
from tiny_text import reviews, save_model, write_csv

HERE = Path(__file__).parent
PATIENCE = 1800  # seconds; a safety net alone: the processes end by themselves
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    "HF_HUB_OFFLINE": "1",
}

ONE, TWO, FSDP2, FOUR, FSDP2_OF_FOUR = (
    dict(kind="ddp", processes=1, batch=4),
    dict(kind="ddp", processes=2, batch=2),
    dict(kind="fsdp2", processes=2, batch=2),
    dict(kind="ddp", processes=4, batch=1),
    dict(kind="fsdp2", processes=4, batch=1),
)
RUNS = [
    {"name": "one"} | ONE,
    {"name": "two"} | TWO,
    {"name": "fsdp2"} | FSDP2,
    {"name": "one, causal", "model": "causal"} | ONE,
    {"name": "two, causal", "model": "causal"} | TWO,
    {"name": "fsdp2, causal", "model": "causal"} | FSDP2,
    {"name": "one, dropout", "dropout": 0.25} | ONE,
    {"name": "two, dropout", "dropout": 0.25} | TWO,
    {"name": "fsdp2, dropout", "dropout": 0.25} | FSDP2,
    {"name": "one, second", "second": True} | ONE,
    {"name": "two, second", "second": True} | TWO,
    # accelerate 1.7 prepares a sharded model once more for a second training, which torch refuses.
    *(
        [{"name": "fsdp2, second", "second": True} | FSDP2]
        if Version(accelerate.__version__) >= Version("1.15")
        else []
    ),
    {"name": "two, then one", "steps": 3} | TWO,
    {"name": "two, then one", "resume": True} | ONE,
    {"name": "one, then fsdp2", "steps": 3} | ONE,
    {"name": "one, then fsdp2", "resume": True} | FSDP2,
    {"name": "fsdp2, then two", "steps": 3} | FSDP2,
    {"name": "fsdp2, then two", "resume": True} | TWO,
    {"name": "four, then fsdp2 of four", "steps": 3} | FOUR,
    {"name": "four, then fsdp2 of four", "resume": True} | FSDP2_OF_FOUR,
    {"name": "one lost of two", "signal": [1, 4, SIGKILL], "ends": [1, -SIGKILL]} | TWO,
    {"name": "one lost of two", "resume": True} | TWO,
    {"name": "SIGTERM to one of two", "signal": [1, 3, SIGTERM], "ends": [143, 143]} | TWO,
    {"name": "SIGTERM to one of two", "resume": True} | TWO,
    {"name": "SIGTERM", "signal": [0, 1, SIGTERM], "ends": [143]} | ONE,
    {"name": "SIGTERM", "resume": True} | ONE,
    {"name": "no room for the adapter", "disk": [5, 3000], "ends": [1]} | ONE,
    {"name": "no room for the adapter", "resume": True} | ONE,
    {"name": "no room for the optimiser", "disk": [5, 12000], "ends": [1]} | ONE,
    {"name": "no room for the optimiser", "resume": True} | ONE,
    *({"name": f"room for {room}", "disk": [5, room], "ends": [1]} | ONE for room in (0, 3000, 12000)),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where each of RUNS has trained; what they wrote to stderr is in the file "stderr"."""
    directory = tmp_path_factory.mktemp("parallel")
    runs = [{key: run[key] for key in run if key != "ends"} for run in RUNS]
    process = subprocess.run(
        [sys.executable, HERE / "parallel_run.py", directory, json.dumps(runs)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    (directory / "stderr").write_text(process.stderr)  # not by the process, some of whose files cannot grow
    assert process.returncode == 0, process.stderr
    for run, ended in zip(RUNS, json.loads(process.stdout.splitlines()[-1]), strict=True):
        assert ended == run.get("ends", [0] * run["processes"]), f"{run}: {process.stderr[-5000:]}"
    return directory


OF_ONE = {"one", "one, causal", "one, dropout", "one, second"}
FULL = {run["name"] for run in RUNS if run["name"].startswith("room for")}  # and not resumed


@pytest.mark.parametrize("name", sorted({run["name"] for run in RUNS} - OF_ONE - FULL))
def test_processes_give_the_weights_of_one_with_their_batches_together(name, directory):
    same_kind = f"one, {name.split(', ')[-1]}"
    one = same_kind if same_kind in OF_ONE else "one"
    want, got = (load_file(directory / n / "adapter_model.safetensors") for n in (one, name))
    assert want.keys() == got.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype
        # A gradient is summed over the rows in another order: a few units in the last place. Six steps of 0.001 carry
        # that into weights of up to 3, whose own last place is 2e-7.
        torch.testing.assert_close(got[key], want[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["SIGTERM", "no room for the adapter", "no room for the optimiser"])
def test_what_ended_a_run_in_between_changes_no_bit(name, directory):
    want, got = (load_file(directory / n / "adapter_model.safetensors") for n in ("one", name))
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_sigterm_leaves_a_checkpoint_after_the_step_it_came_in(directory):
    assert (directory / "SIGTERM" / "checkpoint-2").is_dir()
    assert (directory / "SIGTERM to one of two" / "checkpoint-4").is_dir()


def test_a_full_disk_leaves_no_half_of_a_file(directory):
    """From step 5 on no file can grow beyond some bytes, so that the second checkpoint fails in one of its files."""
    errors = (directory / "stderr").read_text()
    assert len(FULL) == 3
    for name in FULL:
        assert errors.count(f"OSError: {directory / name}") == 1
        assert f"{directory / name / 'checkpoint-6'} could not be written" in errors
        assert [path.name for path in (directory / name).iterdir()] == ["checkpoint-3"]


# ---------------------------------------------------------------------- accelerate's configs

CONFIGS = HERE.parent / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_takes_the_config(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == {"one_gpu": 1}.get(file.stem, 8)
    args = launch_command_parser().parse_args(["--config_file", str(file), "-m", "ept", "train"])
    args = _validate_launch_command(args)[0]
    assert args.mixed_precision == "no" and args.training_script == "ept" and args.training_script_args == ["train"]
    if file.stem == "fsdp2":
        assert args.use_fsdp and str(args.fsdp_version) == "2"
        told = prepare_multi_gpu_env(args)
        tried = {name: value.lower() for name, value in parallel_run.FSDP2.items()}  # what the runs above were told
        assert {name: told[name].lower() for name in tried} == tried


@pytest.mark.full
def test_two_processes_by_torchrun_train_as_one_and_start_again_when_one_is_lost(tmp_path):
    save_model(tmp_path / "bert", pooling=True)  # a head without dropout
    write_csv(tmp_path / "train.csv", reviews(64))
    given = [
        "-m", "ept", "train", "--model_name_or_path", tmp_path / "bert", "--train_file", tmp_path / "train.csv",
        "--max_steps", 6, "--save_steps", 2, "--use_cpu", "--disable_tqdm", "true", "--prompt_length", 4, "--token_rank", 6,
        "--token_dropout", 0,  # one is lost while a checkpoint is written, which may lack its random state
        "--learning_rate", 0.001, "--prompt_learning_rate", 0.001, "--head_learning_rate", 0.001,
        "--resume_from_checkpoint", "auto",
    ]  # fmt: skip

    def launch(name, batch, *launcher, **environment):
        words = [*launcher, *given, "--output_dir", tmp_path / name, "--per_device_train_batch_size", batch]
        return subprocess.run(
            [sys.executable, *map(str, words)], env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=PATIENCE
        )  # fmt: skip

    two = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone")
    restarted = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--max_restarts", 1, "--standalone")
    (tmp_path / "sitecustomize.py").write_text(LOSE_ONE)
    with_a_loss = dict(
        PYTHONPATH=os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]]), LOST=str(tmp_path / "lost"),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # else the new processes may read the lost one's address
    )  # fmt: skip
    for process in (launch("one", 8), launch("two", 4, *two), launch("lost", 4, *restarted, **with_a_loss)):
        assert process.returncode == 0, process.stderr[-5000:]
    assert (tmp_path / "lost" / "was_lost").is_file()
    want = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name in ("two", "lost"):
        got = load_file(tmp_path / name / "adapter_model.safetensors")
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-6)  # steps of 0.001, as above


# Python runs it at its start: the second process kills itself once, when the first checkpoint is there.
LOSE_ONE = """
import os, signal, threading, time
from pathlib import Path

def lose():
    run = Path(os.environ["LOST"])
    while not (run / "checkpoint-2" / "trainer_state.json").is_file():
        time.sleep(0.01)
    if not (run / "was_lost").is_file():
        (run / "was_lost").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1":
    threading.Thread(target=lose, daemon=True).start()
"""
