"""docs/architecture.md names every file of the package, and every path that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def test_the_tree_names_every_file_of_the_package():
    tree = re.search(r"```text\n(.*?)```", PAGE, re.S)[1]
    named = set(re.findall(r"[a-z_]+", tree))
    files = [path for path in (ROOT / "ept").rglob("*.py") if not path.stem.startswith("__")]
    assert len(files) > 50 and not {path.stem for path in files} - named


def test_every_path_on_the_page_exists():
    paths = re.findall(r"`((?:ept|ept_kernels|docs|tests|bench)/[\w/]+\.(?:py|md))", PAGE)
    assert len(paths) > 25 and not [path for path in paths if not (ROOT / path).exists()]


def test_the_names_that_follow_a_path_are_defined_there():
    names = re.findall(r"`((?:ept|ept_kernels)/[\w/]+\.py):(\w+)", PAGE)
    assert names
    for path, name in names:
        assert re.search(rf"^ *(?:class|def) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.M), (path, name)
