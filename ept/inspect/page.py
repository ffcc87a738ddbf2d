"""The findings of `ept inspect` as pictures, and as one page of HTML."""

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ept.inspect.findings import Findings
from ept.inspect.text import sections
from ept.plots import plot_attention, plot_gates, plot_singular_values

__all__ = ["write_page"]


def write_page(findings: Findings, output_dir: str | Path) -> list[Path]:
    """Writes PNG files of the parts that can be drawn, and inspect.html, which holds the texts and the pictures by itself."""
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[Callable[..., Any], Tensor | None]] = {
        "gates.png": (plot_gates, findings.gate),
        "singular_values.png": (plot_singular_values, findings.singular_values),
        "attention.png": (plot_attention, findings.attention),
    }
    written = []
    for name, (draw, values) in pictures.items():
        if values is not None:
            draw(values, path=directory / name)
            written.append(directory / name)
    title = html.escape(f"EPT adapter {findings.directory}")
    body = [f"<h2>{html.escape(name)}</h2>\n<pre>{html.escape(text)}</pre>" for name, text in sections(findings)]
    for path in written:
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(f'<h2>{path.name}</h2>\n<img alt="{path.name}" src="data:image/png;base64,{data}">')
    page = directory / "inspect.html"
    page.write_text(
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title></head>\n<body>\n'
        f"<h1>{title}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return [*written, page]
