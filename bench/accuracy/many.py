"""Many adapters of one frozen encoder, trained at once: the run is a dimension of the batch.

Runs of a study differ in rows, rates, seeds and start values, not in the encoder. Here `runs` of them go through one
forward and backward pass, [runs, batch, L], and through one AdamW whose rates are [runs]. The formulas are those of
`ept` and of PEFT's LoRA (tests/test_many.py holds them to both); the plain torch here needs neither of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Encoder", "Rows", "Shape", "along_layers", "features", "fresh", "logits_of", "loss_of", "settings", "train"]

WARMUP = 0.06
PAD = 0
Tensors = dict[str, Tensor]
Rates = dict[str, float | list[float]]


# Every linear layer of a BERT's layer, by the names that LoRA is given them by.
LINEARS = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention.output.dense": "attention.output.dense", "intermediate.dense": "intermediate.dense",
    "output.dense": "output.dense",
}  # fmt: skip


ACTIVATIONS = {"silu": F.silu, "identity": lambda x: x}
ALPHA = 8  # EPTConfig's default


@dataclass(frozen=True)
class Shape:
    """What is trained in the encoder: EPT or LoRA.

    Attributes:
        method: "EPT" or "LoRA".
        rank: q of the updates in the layers, 0 for none; or LoRA's r.
        targets: LoRA's, names in LINEARS.
        lora_rank: r of LoRA beside EPT's updates, 0 for none.
        prompt_length: s, rows of the prompt.
        activation: of the updates and the spaces, a name in ACTIVATIONS.
        attention_only: whether a layer's attention alone reads its update, which does not stay in the residual stream.
        after_last: whether what the last layer gives is updated, too.
        affine: whether each update adds a trained bias and a multiple of every channel.
        sharing: how many neighbouring layers share a D.
        lowrank, positions: r and N of the paper's low-rank pair; r = 0: none.
        fusion: whether the prompt is fused with the pair.
        spaces: K and h of the paper's spaces; (0, 0): none.
    """

    method: str
    rank: int
    targets: tuple[str, ...] = ("query", "value")
    lora_rank: int = 0
    prompt_length: int = 2
    activation: str = "silu"
    attention_only: bool = False
    after_last: bool = False
    affine: bool = False
    sharing: int = 1
    lowrank: int = 0
    positions: int = 0
    fusion: bool = True
    spaces: tuple[int, int] = (0, 0)

    def sizes(self, encoder: "Encoder") -> dict[str, tuple[int, ...]]:
        """The trained tensors of one run by name, without the head."""
        layers, d = encoder.layers, encoder.width
        sizes: dict[str, tuple[int, ...]] = {}
        lora_rank = self.rank if self.method == "LoRA" else self.lora_rank
        for target in self.targets if lora_rank else ():
            outputs, inputs = encoder.weights[f"encoder.layer.0.{LINEARS[target]}.weight"].shape
            sizes[f"lora_a.{target}"] = (layers, lora_rank, inputs)
            sizes[f"lora_b.{target}"] = (layers, outputs, lora_rank)
        if self.method == "LoRA":
            return sizes
        updates = layers - 1 + self.after_last
        if self.prompt_length:
            sizes["prompt"] = (self.prompt_length, d)
        if self.rank:
            sizes |= {"token_down": (self.rank, d), "token_up": (self.rank, d)}
            sizes |= {"deep_down": (-(-updates // self.sharing), self.rank, d), "deep_up": (updates, self.rank, d)}
        if self.rank and self.affine:
            sizes |= {"token_bias": (d,), "token_gain": (d,), "deep_bias": (updates, d), "deep_gain": (updates, d)}
        if self.lowrank:
            sizes |= {"lowrank_a": (self.positions, self.lowrank), "lowrank_b": (self.lowrank, d)}
        number, width = self.spaces
        if number:
            sizes |= {"space_down": (number, width, d), "space_up": (number, width, d), "gate_weight": (number, d)}
        return sizes


@dataclass(frozen=True)
class Encoder:
    """A BERT's weights, and what an EPT layer measures on it: `embed_scale` (e) and `deep_scale` (h of every layer
    after the first)."""

    weights: Tensors
    num_heads: int
    embed_scale: float
    deep_scale: tuple[float, ...]
    eps: float = 1e-12

    @property
    def layers(self) -> int:
        return len(self.deep_scale) + 1

    @property
    def width(self) -> int:
        return self.weights["embeddings.word_embeddings.weight"].shape[1]

    def to(self, device: str, dtype: torch.dtype) -> "Encoder":
        """The encoder with its weights on another device, in another dtype."""
        weights = {name: weight.to(device, dtype) for name, weight in self.weights.items()}
        return Encoder(weights, self.num_heads, self.embed_scale, self.deep_scale, self.eps)

    def pooled(self, ids: Tensor, lengths: Tensor, shape: Shape, tensors: Tensors) -> Tensor:
        """[runs, batch, d] fp32: the mean of the text tokens' last hidden states.

        Args:
            ids: [runs, batch, L] padded on the right.
            lengths: [runs, batch] tokens of each row.
            tensors: of `shape`, [runs, …] each.
        """
        is_ept = shape.method == "EPT"
        is_text = torch.arange(ids.shape[2], device=ids.device) < lengths.unsqueeze(-1)
        hidden = F.embedding(ids, self.weights["embeddings.word_embeddings.weight"])
        prompt_rows = 0
        if is_ept:
            hidden, prompt_rows = self._input(hidden, shape, tensors)
        is_read = F.pad(is_text, (prompt_rows, 0), value=True)
        hidden = hidden + self.weights["embeddings.token_type_embeddings.weight"][0]
        hidden = hidden + self.weights["embeddings.position_embeddings.weight"][: hidden.shape[2]]
        hidden = self._norm(hidden, "embeddings.LayerNorm")
        for number in range(self.layers):
            attended = hidden
            if is_ept and shape.rank and number:
                attended = self._update(hidden, number - 1, shape, tensors)
            kept = hidden if shape.attention_only else attended
            hidden = self._layer(kept, attended, is_read, number, tensors)
        if is_ept and shape.rank and shape.after_last:
            hidden = self._update(hidden, self.layers - 1, shape, tensors)
        text = hidden[:, :, prompt_rows:].float() * is_text.unsqueeze(-1)
        return text.sum(2) / lengths.unsqueeze(-1)

    def _input(self, hidden: Tensor, shape: Shape, tensors: Tensors) -> tuple[Tensor, int]:
        """The text's embeddings [runs, batch, L, d] updated, with the prompt before them; and the prompt's rows."""
        d, e, activation = hidden.shape[-1], self.embed_scale, ACTIVATIONS[shape.activation]
        rows = None
        if shape.lowrank:
            rows = ALPHA / shape.lowrank**0.5 * tensors["lowrank_a"] @ tensors["lowrank_b"]  # C [runs, N, d]
            added = F.pad(rows[:, : hidden.shape[2]], (0, 0, 0, max(0, hidden.shape[2] - shape.positions)))
        if shape.rank:
            own = {name: tensors.get(f"token_{name}") for name in ("bias", "gain")}
            updated = _updated(hidden, tensors["token_down"], tensors["token_up"], e, activation, **own)
        else:
            updated = hidden
        if rows is not None:
            updated = (updated.float() + e * added.unsqueeze(1)).to(hidden.dtype)
        if not shape.prompt_length:
            return updated, 0
        prompt = whole = tensors["prompt"]
        if rows is not None and shape.fusion:
            whole = whole + (prompt @ rows.mT / d**0.5).softmax(-1) @ rows
        if shape.spaces[0]:
            units = torch.einsum("rsd,rkhd->rksh", prompt, tensors["space_down"])
            spaces = torch.einsum("rksh,rkhd->rskd", activation(units), tensors["space_up"])
            gate = (prompt @ tensors["gate_weight"].mT).softmax(-1)
            whole = whole + (gate.unsqueeze(-1) * spaces).sum(2)
        before = (e * whole).to(hidden.dtype).unsqueeze(1).expand(-1, hidden.shape[1], -1, -1)
        return torch.cat([before, updated], dim=2), shape.prompt_length

    def _update(self, hidden: Tensor, number: int, shape: Shape, tensors: Tensors) -> Tensor:
        """The hidden states before the layer `number` after the first; behind the last in the unit of the one before."""
        own = {name: tensors[f"deep_{name}"][:, number] if shape.affine else None for name in ("bias", "gain")}
        return _updated(
            hidden, tensors["deep_down"][:, number // shape.sharing], tensors["deep_up"][:, number],
            self.deep_scale[min(number, len(self.deep_scale) - 1)], ACTIVATIONS[shape.activation], **own,
        )  # fmt: skip

    def _layer(self, hidden: Tensor, attended: Tensor, is_read: Tensor, number: int, tensors: Tensors) -> Tensor:
        """The layer's result for its residual stream and what its attention reads, one and the same in a plain BERT."""
        runs, batch, columns, d = hidden.shape
        name = f"encoder.layer.{number}"

        def linear(x: Tensor, target: str) -> Tensor:
            path = f"{name}.{LINEARS[target]}"
            value = F.linear(x, self.weights[f"{path}.weight"], self.weights[f"{path}.bias"])
            if f"lora_a.{target}" not in tensors:
                return value
            a, b = tensors[f"lora_a.{target}"][:, number], tensors[f"lora_b.{target}"][:, number]
            low = x.float().view(runs, batch * columns, -1) @ a.mT @ b.mT
            return (value + 2 * low.view_as(value)).to(value.dtype)  # PEFT's alpha / r with alpha = 2·r

        def heads(target: str) -> Tensor:
            return linear(attended, target).view(runs * batch, columns, self.num_heads, -1).transpose(1, 2)

        mask = is_read.view(runs * batch, 1, 1, columns)
        mixed = _attention(heads("query"), heads("key"), heads("value"), mask)
        mixed = mixed.transpose(1, 2).reshape(runs, batch, columns, d)
        hidden = self._norm(linear(mixed, "attention.output.dense") + hidden, f"{name}.attention.output.LayerNorm")
        wide = F.gelu(linear(hidden, "intermediate.dense"))
        return self._norm(linear(wide, "output.dense") + hidden, f"{name}.output.LayerNorm")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], self.eps)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What the heads read, [rows, heads, columns, width]; `mask` is true where they may look.

    On a CPU in single operations: the backward of torch's fused attention takes half of a bfloat16 step there.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return scores.float().softmax(-1).to(value.dtype) @ value


def _updated(
    hidden: Tensor, down: Tensor, up: Tensor, scale: float, activation: Callable[[Tensor], Tensor], *,
    bias: Tensor | None, gain: Tensor | None,
) -> Tensor:  # fmt: skip
    """H + h·(σ((H/h)·Dᵀ)·W + bias) + gain·H for H [runs, batch, columns, d], D and W [runs, q, d], bias and gain [runs, d];
    computed in fp32."""
    runs, batch, columns, d = hidden.shape
    x = hidden.float().view(runs, batch * columns, d)
    total = x + scale * (activation(x @ (down / scale).mT) @ up)
    if bias is not None:
        total = total + scale * bias.unsqueeze(1)
    if gain is not None:
        total = total + gain.unsqueeze(1) * x
    return total.view_as(hidden).to(hidden.dtype)


@dataclass
class Rows:
    """Rows of one part of a task: token ids of each row, and labels (class numbers or values) [rows]."""

    ids: list[np.ndarray]
    labels: np.ndarray
    num_labels: int

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Sequence[int] | np.ndarray) -> "Rows":
        return Rows([self.ids[i] for i in index], self.labels[list(index)], self.num_labels)


class _Table:
    """The rows of every run on the device: tokens [runs, most rows, L], lengths and labels [runs, most rows]."""

    def __init__(self, rows: list[Rows], device: torch.device):
        self.lengths = np.ones((len(rows), max(len(run) for run in rows)), dtype=np.int64)  # a missing row has one pad
        for lengths, run in zip(self.lengths, rows, strict=True):
            lengths[: len(run)] = [len(row) for row in run.ids]
        ids = np.full((*self.lengths.shape, self.lengths.max()), PAD, dtype=np.int64)
        labels = np.zeros(self.lengths.shape, dtype=np.float32)
        for number, run in enumerate(rows):
            labels[number, : len(run)] = run.labels
            for row, values in enumerate(run.ids):
                ids[number, row, : len(values)] = values
        self._ids, self._labels = (torch.from_numpy(x).to(device) for x in (ids, labels))
        self._lengths = torch.from_numpy(self.lengths).to(device)

    def batch(self, index: np.ndarray, on_device: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [runs, batch, L], lengths and labels [runs, batch] of rows `index` [runs, batch], also as a tensor."""
        runs = torch.arange(len(index), device=on_device.device).unsqueeze(1)
        longest = int(np.take_along_axis(self.lengths, index, axis=1).max())
        longest = -(-longest // 4) * 4  # few shapes, so that memory is used again
        return self._ids[runs, on_device, :longest], self._lengths[runs, on_device], self._labels[runs, on_device]


def _batches(rows: Rows, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """[steps, batch] row numbers of every step's batch, shuffled each time round.

    Rows are sorted by length within fifty batches or a quarter of all, whichever is less, as transformers'
    `group_by_length` does. What fills no batch is left out of that round.
    """
    rng = np.random.default_rng([seed, 77])
    lengths, batches = np.array([len(row) for row in rows.ids]), list[np.ndarray]()
    share = max(1, min(len(rows) // (4 * batch_size), 50)) * batch_size
    while len(batches) < steps:
        order = rng.permutation(len(rows))
        parts = [
            part[np.argsort(-lengths[part], kind="stable")] for part in np.split(order, range(share, len(order), share))
        ]
        order = np.concatenate(parts)
        whole = len(order) // batch_size * batch_size
        batches += np.split(order[:whole], whole // batch_size)
    return np.stack(batches[:steps])


def fresh(shape: Shape, encoder: Encoder, seed: int, frequent_ids: np.ndarray) -> Tensors:
    """One run's start values: P from rows of frequent tokens, D and A random, W and B zero; the same at a seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    d, tensors = encoder.width, {}
    for name, size in shape.sizes(encoder).items():
        if name == "prompt":
            chosen = np.random.default_rng([seed, 5]).choice(frequent_ids, size[0], replace=False)
            table = encoder.weights["embeddings.word_embeddings.weight"]
            tensors[name] = table[torch.from_numpy(chosen).to(table.device)].float().cpu() / encoder.embed_scale
        elif name.endswith("down") or name == "gate_weight":
            tensors[name] = torch.randn(size, generator=generator) / d**0.5
        elif name == "lowrank_a":
            tensors[name] = torch.randn(size, generator=generator) / size[-1] ** 0.5
        elif name.startswith("lora_a"):
            tensors[name] = (2 * torch.rand(size, generator=generator) - 1) / size[-1] ** 0.5
        else:
            tensors[name] = torch.zeros(size)
    return tensors


def fresh_head(num_labels: int, d: int, seed: int) -> Tensors:
    """A linear head's start values, as transformers has them."""
    weight = 0.02 * torch.randn((num_labels, d), generator=torch.Generator().manual_seed(2000 + seed))
    return {"head_weight": weight, "head_bias": torch.zeros(num_labels)}


def logits_of(pooled: Tensor, tensors: Tensors) -> Tensor:
    """[runs, batch, labels] of every run's own head."""
    return torch.baddbmm(tensors["head_bias"].unsqueeze(1), pooled, tensors["head_weight"].mT)


def loss_of(logits: Tensor, labels: Tensor, num_labels: Tensor) -> Tensor:
    """[runs] mean squared error where a run has one label, cross entropy elsewhere; surplus logits do not count.

    Args:
        logits: [runs, batch, most labels]. labels: [runs, batch] fp32. num_labels: [runs].
    """
    squared = (logits[..., 0] - labels).square()
    surplus = torch.arange(logits.shape[-1], device=logits.device) >= num_labels[:, None, None]
    scores = logits.masked_fill(surplus, float("-inf")).log_softmax(-1)
    is_value = (num_labels == 1).unsqueeze(-1)
    classes = torch.where(is_value, 0, labels).long().unsqueeze(-1)
    return torch.where(is_value, squared, -scores.gather(-1, classes).squeeze(-1)).mean(1)


def train(
    encoder: Encoder, shape: Shape, starts: list[Tensors], rows: list[Rows],
    rates: Sequence[Mapping[str, float | list[float]]], seeds: list[int], *, steps: int, batch_size: int = 32,
    as_adapter: Callable[[Tensors], Tensors] = dict, averaged: float = 0.0, warmup: float = WARMUP,
) -> tuple[Tensors, Tensor]:  # fmt: skip
    """Trains every run on its rows: AdamW without decay, short warm-up, linear decay, each run's gradient cut at norm 1.

    Args:
        starts: the start values of each run, the head's too.
        rows: each run's training rows.
        rates: each run's learning rate for every tensor by name, one or one for each layer.
        seeds: each run's order of rows.
        as_adapter: makes the tensors of `shape` and of the head from what is trained, where that is something else.
        averaged: share of the steps, at the end, whose tensors are averaged; 0: the last step's.
        warmup: share of the steps, at the start, in which the rates rise.

    Returns:
        The trained tensors [runs, …] by name, and the last five steps' mean loss [runs].
    """
    device = encoder.weights["embeddings.word_embeddings.weight"].device
    most = max(run.num_labels for run in rows)
    starts = [start | _widened(start, most) for start in starts]
    tensors = {name: torch.stack([start[name] for start in starts]).to(device).requires_grad_() for name in starts[0]}
    rate = {
        name: torch.tensor([run[name] for run in rates], device=device).view(len(rates), -1, *[1] * (tensor.dim() - 2))
        for name, tensor in tensors.items()
    }
    first = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    num_labels = torch.tensor([run.num_labels for run in rows], device=device)
    table = _Table(rows, device)
    orders = np.stack([_batches(run, steps, batch_size, seed) for run, seed in zip(rows, seeds, strict=True)], axis=1)
    on_device = torch.from_numpy(orders).to(device)  # [steps, runs, batch]; nothing in a step waits for the device
    rising, last = max(1, round(warmup * steps)), []
    first_averaged, sums = steps - round(averaged * steps), {name: torch.zeros_like(t) for name, t in tensors.items()}
    for step in range(steps):
        ids, lengths, labels = table.batch(orders[step], on_device[step])
        adapter = as_adapter(tensors)
        loss = loss_of(logits_of(encoder.pooled(ids, lengths, shape, adapter), adapter), labels, num_labels)
        gradients = torch.autograd.grad(loss.sum(), list(tensors.values()))
        with torch.no_grad():
            norm = sum(gradient.flatten(1).square().sum(1) for gradient in gradients).sqrt()  # type: ignore[union-attr]
            cut = (1 / (norm + 1e-6)).clamp(max=1)
            now = step / rising if step < rising else (steps - step) / max(1, steps - rising)
            for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
                gradient = gradient * cut.view(-1, *[1] * (tensor.dim() - 1))
                first[name].lerp_(gradient, 0.1)
                second[name].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                size = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                tensor -= now * rate[name] * first[name] / (1 - 0.9 ** (step + 1)) / size
                if step >= first_averaged:
                    sums[name] += tensor / (steps - first_averaged)
            if step >= steps - 5:
                last.append(loss.detach())
    trained = tensors if first_averaged == steps else sums
    return {name: tensor.detach() for name, tensor in trained.items()}, torch.stack(last).mean(0)


def _widened(start: Tensors, most: int) -> Tensors:
    """The head with rows of zeros for the labels that other runs have and this one has not."""
    missing = most - len(start["head_bias"])
    return {
        "head_weight": F.pad(start["head_weight"], (0, 0, 0, missing)),
        "head_bias": F.pad(start["head_bias"], (0, missing)),
    }


@torch.no_grad()
def features(encoder: Encoder, shape: Shape, tensors: Tensors, rows: list[Rows], batch_size: int = 128) -> list[Tensor]:
    """What each run's head reads of each of its rows: [rows, d] fp32, a run each; the runs may have any number of rows."""
    device = encoder.weights["embeddings.word_embeddings.weight"].device
    table = _Table(rows, device)
    order = np.argsort(table.lengths, axis=1, kind="stable")
    on_device = torch.from_numpy(order).to(device)
    found = torch.empty(*order.shape, encoder.width, device=device)
    for start in range(0, order.shape[1], batch_size):
        chosen = on_device[:, start : start + batch_size]
        ids, lengths, _ = table.batch(order[:, start : start + batch_size], chosen)
        pooled = encoder.pooled(ids, lengths, shape, tensors)
        found.scatter_(1, chosen.unsqueeze(-1).expand(-1, -1, encoder.width), pooled)
    return [rows_found[: len(run)] for rows_found, run in zip(found, rows, strict=True)]


def settings(
    shape: Shape, rate: float, head_rate: float, *, down: float = 1.0, prompt: float = 1.0, others: float = 1.0,
    lora: float = 0.005,
) -> Rates:  # fmt: skip
    """A run's learning rate for every tensor: `rate` is a factor on EPT's defaults, and LoRA's rate itself.

    Args:
        down: a further factor on D's rates.
        prompt, others: further factors on the prompt's rate and on those of the paper's parts.
        lora: LoRA's rate beside EPT.
    """
    is_lora = shape.method == "LoRA"
    heads: Rates = {"head_weight": head_rate, "head_bias": head_rate}
    heads |= {f"lora_{x}.{target}": rate if is_lora else lora for x in "ab" for target in shape.targets}
    if is_lora:
        return heads
    kinds = ("up", "bias", "gain")
    deep: Rates = dict.fromkeys((f"{place}_{kind}" for place in ("token", "deep") for kind in kinds), 0.005 * rate)
    deep |= {"token_down": 0.005 * rate * down, "deep_down": 0.005 * rate * down, "prompt": 0.09 * rate * prompt}
    fast, slow = 0.018 * rate * others, 0.001 * rate * others
    of_paper: Rates = {"lowrank_b": fast, "space_up": fast, "lowrank_a": slow, "space_down": slow, "gate_weight": slow}
    return heads | deep | of_paper


def along_layers(rates: Rates, ratio: float, updates: int) -> Rates:
    """The same with the last update's rates `ratio` times those of the first, in equal steps of their logarithm.

    Their geometric mean stays. `updates` counts the one at the embeddings.
    """
    factors = [ratio ** (layer / (updates - 1) - 0.5) for layer in range(updates)]

    def at(name: str, rate: Any) -> float | list[float]:
        if name.startswith("token_"):
            return rate * factors[0]
        return [rate * factor for factor in factors[1:]] if name.startswith("deep_") else rate

    return {name: at(name, rate) for name, rate in rates.items()}
