"""`ept inspect`: what is in an adapter, as text, and as pictures with one page of HTML."""

import base64
import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from ept.config import EPTConfig
from ept.console import say, without_load_reports
from ept.files.adapter_dir import check_weights, read_adapter
from ept.layer.folded import FoldedLayer
from ept.layer.layer import EPTLayer

__all__ = ["Findings", "examine", "write_page"]

SHADES = " ░▒▓█"
COLUMNS = 64  # of a heat map in the terminal


@dataclass
class Findings:
    """An adapter's content. Tensors are None where the part is off, or folded away.

    Attributes:
        directory, settings, record: where it is, its adapter_config.json, its run.json (empty if there is none).
        config, embed_dim: the settings, and d.
        folded: whether it holds P* and C in place of the trained tensors.
        prompt: P* [s, d]. gate: [s, K]. singular_values: of C in units of e, largest first. attention: the fusion's, [s, N].
        words: for each prompt row its nearest words with their cosines; None without the backbone.
    """

    directory: str
    settings: dict[str, Any]
    record: dict[str, Any]
    config: EPTConfig
    embed_dim: int
    folded: bool
    prompt: Tensor
    gate: Tensor | None
    singular_values: Tensor | None
    attention: Tensor | None
    words: list[list[tuple[str, float]]] | None = None


@torch.no_grad()
def examine(directory: str, name_or_path: str | None = None, nearest: int = 3) -> Findings:
    """Reads an adapter; its backbone's embeddings, for the nearest words, only if `nearest` is above 0.

    Raises ValueError or OSError if the adapter is damaged, or if the backbone that `name_or_path` names cannot be read;
    one that only the adapter names may be gone.
    """
    settings, tensors = read_adapter(directory)
    known = set(EPTConfig.__dataclass_fields__)
    config = EPTConfig(**{name: value for name, value in settings.items() if name in known})
    if "prompt" not in tensors or tensors["prompt"].dim() != 2:
        raise ValueError(f"{directory} holds no prompt [s, d]: it is damaged, copy it again")
    embed_dim, folded = tensors["prompt"].shape[1], bool(settings.get("folded"))
    layer = (FoldedLayer if folded else EPTLayer)(config, embed_dim)
    try:
        layer.load_state_dict({name: t for name, t in tensors.items() if not name.startswith("head.")})
    except RuntimeError as error:
        raise ValueError(f"{directory}: the tensors do not fit the config: {error}") from error
    check_weights(directory)
    prompt, gate = layer.reconstruct()
    found = Findings(
        directory, settings, _record(Path(directory)), config, embed_dim, folded, prompt,
        gate if gate.shape[1] else None, _singular_values(layer), _attention(layer),
    )  # fmt: skip
    if nearest > 0:
        found.words = _nearest_words(found, name_or_path, nearest)
    return found


def _record(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy it again, or remove it") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no run: copy it again, or remove it")
    return record


def _singular_values(layer: EPTLayer | FoldedLayer) -> Tensor | None:
    """Of C in units of e: at most r of them are not zero."""
    config = layer.config
    if isinstance(layer, FoldedLayer):
        update = layer.text_update
        return None if update is None else torch.linalg.svdvals(update.double() / layer.embed_scale)[: config.rank]
    if layer.lowrank_a is None or layer.lowrank_b is None:
        return None
    _, a = torch.linalg.qr(layer.lowrank_a.double())  # an r by r problem in place of N by d
    _, b = torch.linalg.qr(layer.lowrank_b.double().T)
    return torch.linalg.svdvals(config.scale * a @ b.T)


def _attention(layer: EPTLayer | FoldedLayer) -> Tensor | None:
    """softmax(P·Cᵀ/√d), step 3 of docs/method.md."""
    if isinstance(layer, FoldedLayer) or layer.lowrank_a is None or layer.lowrank_b is None:
        return None
    if not layer.config.fusion:
        return None
    c = layer.config.scale * layer.lowrank_a.double() @ layer.lowrank_b.double()
    return torch.softmax(layer.prompt.double() @ c.T / layer.embed_dim**0.5, dim=1)


def _nearest_words(found: Findings, name_or_path: str | None, nearest: int) -> list[list[tuple[str, float]]] | None:
    """The vocabulary's words whose embeddings have the largest cosine with each row of P*."""
    source = name_or_path or found.settings.get("base_model_name_or_path")
    if not source:
        say("the adapter does not say what model it was trained on: --model_name_or_path gives its nearest words")
        return None
    try:
        with without_load_reports():
            embedding = AutoModel.from_pretrained(source).get_input_embeddings()
        has_tokenizer = (Path(found.directory) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(found.directory if has_tokenizer else source)
    except (OSError, ValueError) as error:
        if name_or_path is not None:
            raise
        say(f"no nearest words: {source} cannot be loaded ({' '.join(str(error).split())[:200]}); --model_name_or_path")
        return None
    vocab = len(embedding.weight)
    table = torch.cat([embedding(ids) for ids in torch.arange(vocab).split(8192)]).float()
    if table.shape[1] != found.embed_dim:
        raise ValueError(
            f"{source} has embeddings of width {table.shape[1]}, the adapter of {found.embed_dim}: give its own model"
        )
    cosines = F.normalize(found.prompt.float(), dim=1) @ F.normalize(table, dim=1).T
    best = cosines.topk(min(nearest, vocab), dim=1)
    return [
        [(str(tokenizer.decode([i])).strip() or f"#{i}", v) for i, v in zip(ids, values, strict=True)]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


# ---------------------------------------------------------------------- as text


def sections(found: Findings) -> list[tuple[str, str]]:
    """Titles and texts, in order."""
    parts = [("adapter", _about(found)), ("budget", _budget(found))]
    if found.record:
        parts.append(("run", _run(found.record)))
    if found.gate is not None:
        parts.append(
            ("gate: weight of each space, by prompt row", _heat_map(found.gate, numbers=found.gate.shape[1] <= 8))
        )
    if found.singular_values is not None:
        parts.append(("singular values of C, in units of e", _bars(found.singular_values)))
    if found.attention is not None:
        title = f"attention of the fusion: prompt rows over the {found.attention.shape[1]} rows of C"
        parts.append((title, _heat_map(found.attention) + "\n" + _most_attended(found.attention)))
    if found.words is not None:
        lines = [f"{row:4}  " + "  ".join(f"{w} {v:+.2f}" for w, v in words) for row, words in enumerate(found.words)]
        parts.append(("nearest words to the rows of P*, with their cosine", "\n".join(lines)))
    return parts


def _about(found: Findings) -> str:
    settings, config = found.settings, found.config
    backbone = settings.get("backbone") or {}
    layers = f", {backbone['num_hidden_layers']} layers" if "num_hidden_layers" in backbone else ""
    lines = {
        "directory": found.directory,
        "method": method_of(config) + (", folded" if found.folded else ""),
        "backbone": f"{settings.get('base_model_name_or_path') or 'not said'} ({settings.get('base_model_class')})",
        "": f"{backbone.get('model_type', 'unknown')}, width {found.embed_dim}{layers}",
        "sizes": _sizes(config),
        "unit e": f"{config.known_embed_scale:.6g} (RMS of the backbone's embeddings)",
        "P*": f"RMS {found.prompt.float().square().mean().sqrt().item() / config.known_embed_scale:.4g} e",
    }
    if settings.get("head"):
        labels = settings.get("label_names") or []
        lines["head"] = ", ".join(settings["head"]) + (f": {', '.join(map(str, labels))}" if labels else "")
    if settings.get("prompt_sha256"):
        lines["P* sha256"] = settings["prompt_sha256"]
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def method_of(config: EPTConfig) -> str:
    """The method's name by the parts that are on."""
    update, fusion = config.has_lowrank and config.lowrank_update, config.has_lowrank and config.fusion
    parts = [
        name
        for name, on in (
            ("low-rank update", update), ("fusion", fusion), ("spaces", config.has_spaces),
            ("token-conditioned update", config.has_token_update), ("deep updates", bool(config.deep_layers)),
        )
        if on
    ]  # fmt: skip
    if not parts:
        return "prompt tuning (a soft prompt alone)"
    name = "DePT" if parts == ["low-rank update"] else "EPT"
    return f"{name}: short prompt, {', '.join(parts)}"


def _sizes(config: EPTConfig) -> str:
    sizes = [f"s = {config.prompt_length}"]
    if config.has_lowrank:
        sizes += [f"N = {config.max_text_length}", f"r = {config.rank}", f"alpha = {config.alpha:g}"]
    if config.has_spaces:
        sizes += [f"K = {config.num_spaces}", f"h = {config.space_dim}"]
    if config.has_token_update:
        sizes.append(f"q = {config.token_rank}")
    if config.deep_layers:
        sizes.append(f"deep layers = {config.deep_layers}")
    return ", ".join(sizes)


def _budget(found: Findings) -> str:
    parts = found.config.parameters_by_part(found.embed_dim)
    total = sum(parts.values())
    rows = [*parts.items(), ("together", total)]
    return "\n".join(f"{name:<10} {count:>10,} {100 * count / total:6.1f} %" for name, count in rows)


def _run(record: dict[str, Any]) -> str:
    metrics = record.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    scores = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    told = ("command", "task", "steps", "seed", "max_seq_length")
    lines: dict[str, Any] = {name: record[name] for name in told if name in record}
    lines |= {
        name: f"{value:.4g}"
        for name, value in scores.items()
        if not name.endswith(("_runtime", "_per_second", "epoch", "_ratio"))
    }
    if isinstance(record.get("versions"), dict):
        lines["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    width = max((len(name) for name in lines), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _heat_map(weights: Tensor, numbers: bool = False) -> str:
    """Rows of shaded cells between 0 and the largest weight; more than COLUMNS columns are joined by their maximum."""
    cells = weights.float()
    if cells.shape[1] > COLUMNS:
        cells = F.adaptive_max_pool1d(cells.unsqueeze(0), COLUMNS)[0]
    highest = cells.max().clamp(min=1e-30)
    lines = []
    for row, (shades, values) in enumerate(
        zip((cells / highest * (len(SHADES) - 1)).round().int().tolist(), weights.tolist(), strict=True)
    ):
        drawn = "".join(SHADES[shade] * (4 if numbers else 1) for shade in shades)
        lines.append(f"{row:4} |{drawn}|" + ("  " + "  ".join(f"{v:.3f}" for v in values) if numbers else ""))
    return "\n".join(lines)


def _bars(values: Tensor) -> str:
    highest = max(values.max().item(), 1e-30)
    return "\n".join(f"{i:4}  {v:10.4g}  {'█' * round(40 * v / highest)}" for i, v in enumerate(values.tolist()))


def _most_attended(attention: Tensor) -> str:
    best = attention.topk(min(3, attention.shape[1]), dim=1)
    effective = torch.exp(-(attention * attention.clamp(min=1e-30).log()).sum(1))
    lines = ["row   as many positions as   the most attended"]
    for row, (count, at, weights) in enumerate(
        zip(effective.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    ):
        said = ", ".join(f"{i} ({w:.3f})" for i, w in zip(at, weights, strict=True))
        lines.append(f"{row:4}  {count:20.1f}   {said}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- as pictures


def write_page(found: Findings, output_dir: str | Path) -> list[Path]:
    """PNG files of the parts that can be drawn, and inspect.html, which holds the texts and the pictures by itself."""
    from ept.plots import plot_attention, plot_gates, plot_singular_values

    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[Callable[..., Any], Tensor | None]] = {
        "gates.png": (plot_gates, found.gate),
        "singular_values.png": (plot_singular_values, found.singular_values),
        "attention.png": (plot_attention, found.attention),
    }
    written = []
    for name, (draw, values) in pictures.items():
        if values is not None:
            draw(values, path=directory / name)
            written.append(directory / name)
    title = html.escape(f"EPT adapter {found.directory}")
    body = [f"<h2>{html.escape(name)}</h2>\n<pre>{html.escape(text)}</pre>" for name, text in sections(found)]
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


# ---------------------------------------------------------------------- ept inspect
