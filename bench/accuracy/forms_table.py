"""The tables of the forms side by side, from their lines alone: python -m bench.accuracy.forms_table [--draws 2000]

Reads the lines of each question (FILES) in bench/results/accuracy and writes forms.md beside them: of every form whose seeds
are complete its scores, and the difference from the question's first form.
"""

import argparse
import statistics
from pathlib import Path

from ..text.real_text import load_task
from .arms import ALL_ROWS
from .bootstrap import INTERVAL, Bootstrap, Record, runs_by
from .forms import FINAL_SEEDS, QUESTIONS
from .study import RESULTS, read

TITLES = {
    "layers": "Forms of the updates in the layers",
    "glue": "The same on GLUE's tasks",
    "paper": "The paper's parts",
}
FILES = {"layers": "forms", "glue": "forms_glue", "paper": "forms_paper"}


def table(records: list[Record], forms: list[str], bootstrap: Bootstrap) -> list[str]:
    """One size's rows: the forms that have every seed of every task that the first one has."""
    runs = runs_by(records, lambda record: record["form"])
    first = next(form for form in forms if form in runs)
    tasks = [name for name, seeds in runs[first].items() if len(seeds) == len(FINAL_SEEDS)]
    [rows] = {record["rows"] for record in records}
    size = "all rows" if rows == ALL_ROWS else f"{rows:,} rows"
    lines = [
        f"| {size} | trained, without the head | {' | '.join(tasks)} | mean | points | {INTERVAL} | pairs of runs |",
        "|---" * (len(tasks) + 6) + "|",
    ]
    for form in forms:
        own = runs.get(form, {})
        if not tasks or any(len(own.get(task, ())) < len(FINAL_SEEDS) for task in tasks):
            continue
        scores = {task: [record["score"] for record in own[task].values()] for task in tasks}
        cells = [f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" for values in scores.values()]
        mean = statistics.mean(statistics.mean(values) for values in scores.values())
        trained = own[tasks[0]][FINAL_SEEDS[0]]["trained_parameters"]
        compared = "– | – | –" if form == first else str(bootstrap.difference(own, runs[first]))
        lines.append(f"| {form} | {trained:,} | {' | '.join(cells)} | {mean:.4f} | {compared} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.forms_table", description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--glue", type=Path, metavar="DIRECTORY", help="of GLUE's files, for its tasks")
    options = parser.parse_args()
    text, machines = [], set()
    for question, title in TITLES.items():
        records = [record for record in read(FILES[question]) if record["part"] == "test"]
        for rows in sorted({record["rows"] for record in records}, reverse=True):
            of_size = [record for record in records if record["rows"] == rows]
            tasks = {name: load_task(name, options.glue) for name in dict.fromkeys(r["task"] for r in of_size)}
            body = table(of_size, list(QUESTIONS[question].forms), Bootstrap(tasks, options.draws))
            text += [f"## {title}", "", *body, ""]
        machines |= {tuple(sorted(record["machine"].items())) for record in records}
    text += [
        "The difference is that from the first form; mean ± deviation over seeds; protocol in `bench/accuracy/README.md`."
    ]
    text += ["; ".join(f"{name} {value}" for name, value in machine) for machine in sorted(machines)]
    (RESULTS / "forms.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
