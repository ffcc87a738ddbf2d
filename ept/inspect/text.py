"""The findings of `ept inspect` as text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ept.config import EPTConfig
from ept.inspect.findings import Findings
from ept.parts import PARTS

__all__ = ["method_of", "sections"]

SHADES = " ░▒▓█"
COLUMNS = 64  # of a heat map in the terminal


def sections(findings: Findings) -> list[tuple[str, str]]:
    """Returns titles and texts, in order."""
    parts = [("adapter", _about(findings)), ("budget", _budget(findings))]
    if findings.record:
        parts.append(("run", _run(findings.record)))
    if findings.gate is not None:
        parts.append(
            ("gate: weight of each space, by prompt row", _heat_map(findings.gate, numbers=findings.gate.shape[1] <= 8))
        )
    if findings.singular_values is not None:
        parts.append(("singular values of C, in units of e", _bars(findings.singular_values)))
    if findings.attention is not None:
        title = f"attention of the fusion: prompt rows over the {findings.attention.shape[1]} rows of C"
        parts.append((title, _heat_map(findings.attention) + "\n" + _most_attended(findings.attention)))
    if findings.words is not None:
        lines = [
            f"{row:4}  " + "  ".join(f"{w} {v:+.2f}" for w, v in words) for row, words in enumerate(findings.words)
        ]
        parts.append(("nearest words to the rows of P*, with their cosine", "\n".join(lines)))
    return parts


def _about(findings: Findings) -> str:
    settings, config = findings.settings, findings.config
    backbone = settings.get("backbone") or {}
    layers = f", {backbone['num_hidden_layers']} layers" if "num_hidden_layers" in backbone else ""
    lines = {
        "directory": findings.directory,
        "method": method_of(config) + (", folded" if findings.folded else ""),
        "backbone": f"{settings.get('base_model_name_or_path') or 'not said'} ({settings.get('base_model_class')})",
        "": f"{backbone.get('model_type', 'unknown')}, width {findings.embed_dim}{layers}",
        "sizes": _sizes(config),
        "unit e": f"{config.known_embed_scale:.6g} (RMS of the backbone's embeddings)",
        "P*": f"RMS {findings.prompt.float().square().mean().sqrt().item() / config.known_embed_scale:.4g} e",
    }
    if settings.get("head"):
        labels = settings.get("label_names") or []
        lines["head"] = ", ".join(settings["head"]) + (f": {', '.join(map(str, labels))}" if labels else "")
    if settings.get("prompt_sha256"):
        lines["P* sha256"] = settings["prompt_sha256"]
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def method_of(config: EPTConfig) -> str:
    """Returns the method's name by the parts that are on."""
    labels: list[str] = []
    for part in PARTS:
        if part.name == "lowrank" and part.is_on(config):
            labels += ["low-rank update"] * config.lowrank_update + ["fusion"] * config.fusion
        elif part.name != "prompt" and part.is_on(config):
            labels.append(part.label)
    if not labels:
        return "prompt tuning (a soft prompt alone)"
    name = "DePT" if labels == ["low-rank update"] else "EPT"
    return f"{name}: short prompt, {', '.join(labels)}"


def _sizes(config: EPTConfig) -> str:
    return ", ".join(size for part in PARTS if part.is_on(config) for size in part.sizes(config))


def _budget(findings: Findings) -> str:
    parts = findings.config.parameters_by_part(findings.embed_dim, findings.layer_dim)
    total = sum(parts.values())
    rows = [*parts.items(), ("together", total)]
    return "\n".join(f"{name:<10} {count:>10,} {100 * count / total:6.1f} %" for name, count in rows)


def _run(record: dict[str, Any]) -> str:
    metrics = record.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    scores = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    shown = ("command", "task", "steps", "seed", "max_seq_length")
    lines: dict[str, Any] = {name: record[name] for name in shown if name in record}
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
    """Draws rows of shaded cells between 0 and the largest weight; more than COLUMNS columns are joined by their maximum."""
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
        positions = ", ".join(f"{i} ({w:.3f})" for i, w in zip(at, weights, strict=True))
        lines.append(f"{row:4}  {count:20.1f}   {positions}")
    return "\n".join(lines)
