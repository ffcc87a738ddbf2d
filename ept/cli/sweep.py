"""`ept sweep`: every method on every task, with several rates and seeds."""

from dataclasses import dataclass, field
from pathlib import Path

from ept.cli.errors import bad_input_is_one_line
from ept.cli.parser import OptionParser, option
from ept.compare.methods import ABLATIONS, METHODS
from ept.compare.results import finished, key_of
from ept.compare.sweep import Unfit, grid, keep, name_of_run, read_tasks, run_job, run_on_ray
from ept.console import say

__all__ = ["SweepArguments", "run"]


@dataclass
class SweepArguments:
    _argument_group_name = "sweep"

    model_name_or_path: str = field(metadata={"help": "Hub name or directory of the pretrained model."})
    tasks: list[str] = field(metadata={
        "help": "Names of GLUE's and SuperGLUE's tasks (ept train --help lists them), and directories: with own train, "
        "validation and test files (csv, tsv, jsonl or parquet), or with a task's published files, by its name."
    })  # fmt: skip
    results: str = field(metadata={"help": "File for the runs' JSON lines; what stands there is not run again."})
    data_dir: str | None = option("Where the named tasks' directories are; without it they come from the hub.")
    methods: list[str] = field(
        default_factory=lambda: [*METHODS, *ABLATIONS],
        metadata={"help": f"Of {', '.join([*METHODS, *ABLATIONS])}; by default all."},
    )
    learning_rates: list[float] = field(default_factory=list, metadata={
        "help": "Factors on EPT's rates, or a peer's rates themselves; by default three of each method's own."
    })  # fmt: skip
    middle_rate: bool = option("Of each method's own three learning rates only the middle one.", False)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds; by default 0 1 2."})
    max_steps: int = option("Updates of a run.", 1000)
    batch_size: int = option("Rows of an update.", 32)
    max_seq_length: int = option("Cut texts to this many tokens.", 256)
    budget: int | None = option("Trained parameters without the head; by default those of a 100-token prompt.")
    dtype: str = option(
        "Type of the frozen weights; auto: as saved, but for bfloat16 on a CPU without its instructions. What is trained is "
        "float32: BitFit and full always load that.",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )
    engine: str = option(
        "Runs one after the other, or through Ray Tune on all of its devices.", "process", choices=("process", "ray")
    )
    cpus_per_run: float = option("CPU cores that Ray gives each run.", 1.0)
    gpus_per_run: float = option("GPUs that Ray gives each run; a part lets several share one.", 0.0)


def run(argv: list[str]) -> None:
    """`ept sweep`: the grid's missing runs."""
    with bad_input_is_one_line("sweep"):
        (options,) = OptionParser("sweep", "Trains every method on every task; ept report makes the table.",
                                  SweepArguments).parse(argv)  # fmt: skip
        jobs = grid(options)
        path = Path(options.results)
        if path.is_dir():
            raise ValueError(f"--results {path} is a directory: give a file")
        done = {key_of(record) for record in finished(path)}
        missing = [job for job in jobs if key_of(job) not in done]
        say(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished in {path}")
        read_tasks(missing)  # bad rows, and a file that cannot be written, are said before the first run
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if options.engine == "ray":
            run_on_ray(missing, path, cpus_per_run=options.cpus_per_run, gpus_per_run=options.gpus_per_run)
            return
    unfit: dict[str, str] = {}
    for number, job in enumerate(missing, start=1):
        if job["method"] in unfit:
            continue
        say(f"run {number} of {len(missing)}: {name_of_run(job)}, {job['steps']} steps")
        try:
            keep(path, run_job(job, name_of_run(job)))
        except Unfit as error:
            unfit[job["method"]] = str(error)
    if unfit:
        with bad_input_is_one_line("sweep"):
            reasons = "; ".join(f"{method}: {reason}" for method, reason in unfit.items())
            raise ValueError(f"not run, since the model cannot have it: {reasons}")
