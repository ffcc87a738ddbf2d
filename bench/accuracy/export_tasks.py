"""Writes the real-text tasks to files, and a link to the encoder beside them, for `ept sweep` (`make worked-result`).

python -m bench.accuracy.export_tasks DIRECTORY
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ..text.real_text import load_task, minilm

WORKED = ("movies", "tweets", "news")
SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def export(directory: Path) -> None:
    """DIRECTORY/TASK/train.jsonl, validation.jsonl and test.jsonl with `text` and `label`, and DIRECTORY/minilm."""
    for name in WORKED:
        task = load_task(name)
        (directory / name).mkdir(parents=True, exist_ok=True)
        for part, split in SPLITS.items():
            labels: list[Any] = task.labels[part]
            if task.problem_type != "regression":
                labels = [task.label_names[label] for label in labels]
            rows = [{"text": text, "label": label} for text, label in zip(task.texts[part], labels, strict=True)]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (directory / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    link = directory / "minilm"
    if not link.exists():
        link.symlink_to(minilm())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    export(parser.parse_args().directory)
