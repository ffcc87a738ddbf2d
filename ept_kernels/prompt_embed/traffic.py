"""Bytes, launches and flops of the kernels, predicted from the shapes. Plain arithmetic: needs neither torch nor a GPU.

`memory` counts what has to cross the memory bus once: inputs that are read, results, and what one launch leaves for
the next. What a program reads again (a slice of B by every text tile, the rows of E by a token-conditioned update of many
ranks) comes from the caches and is not in it. tests/interpreted_kernels.py holds the large terms against a count of real
loads and stores.
"""

import dataclasses

from ..common.traffic import PEAK_BANDWIDTH, Traffic, seconds

__all__ = ["PEAK_BANDWIDTH", "Shapes", "Traffic", "backward", "by_row", "forward", "kept_by_torch", "seconds"]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Symbols of docs/method.md; bytes per number of E (and X), of the trained tensors and of the compute type."""

    batch: int
    length: int
    d: int
    s: int
    n: int = 0
    r: int = 0
    k: int = 0
    h: int = 0
    q: int = 0
    masked: bool = True
    source_bytes: int = 2
    weight_bytes: int = 4
    compute_bytes: int = 4

    @property
    def weights(self) -> int:
        """Trained numbers."""
        s, d, n, r, k, h, q = self.s, self.d, self.n, self.r, self.k, self.h, self.q
        return s * d + n * r + r * d + 2 * k * h * d + k * d + 2 * q * d

    @property
    def kept(self) -> int:
        """Numbers that the forward keeps for the backward: down, mix, softmax, and x/e·Dᵀ of every token."""
        prompt = self.s * (2 * self.r + 2 * self.k * self.h + self.k + (2 if self.r else 0))
        return prompt + self.batch * self.length * self.q

    @property
    def slots(self) -> int:
        """Bytes of the slots and the lengths; without A·B flags alone."""
        return 4 * (self.batch * self.length + (self.batch if self.r else 0)) if self.masked else 0


def forward(x: Shapes, id_bytes: int = 8, mask_bytes: int = 8) -> Traffic:
    """One launch. The text's minimum is the rows of E and X: 2·batch·L·d numbers."""
    tokens = x.batch * x.length
    memory = {
        "rows of E": tokens * x.d * x.source_bytes,
        "X": tokens * x.d * x.source_bytes,
        "P* in every row": x.batch * x.s * x.d * x.source_bytes,
        "ids and mask": tokens * (id_bytes + (mask_bytes if x.masked else 0)),
        "slots": x.slots * (2 if x.r else 1),  # written, and read by the text where they order it
        "weights": x.weights * x.weight_bytes,
        "kept": x.kept * x.compute_bytes,
    }
    rank = x.r + x.k * x.h
    flops = 2 * x.d * (x.s * (2 * rank + x.k) + min(x.n, x.length) * x.r) + 4 * x.s * x.n * x.r + 4 * tokens * x.d * x.q
    return Traffic(1, memory, flops)


def backward(x: Shapes, id_bytes: int = 8) -> Traffic:
    """Two launches. dX is read once, with the token-conditioned update once by each of them."""
    tokens, covered = x.batch * x.length, min(x.n, x.length) if x.r else 0
    reads = tokens if x.q else x.batch * covered
    memory = {
        "dX": (x.batch * x.s + reads * (2 if x.q else 1)) * x.d * x.source_bytes,
        "rows of E": (tokens * x.d * x.source_bytes + tokens * id_bytes) if x.q else 0,
        "dC": 0 if x.q else 2 * covered * x.d * x.compute_bytes,  # written, and read by the second launch
        "Y": 2 * x.s * x.d * x.compute_bytes,
        "g": 2 * tokens * x.q * x.compute_bytes,
        "slots": x.slots * (2 if x.q else 1),
        "weights": 2 * x.weights * x.weight_bytes,  # read, and their gradients written
        "kept": x.kept * x.compute_bytes,
    }
    rank = x.r + x.k * x.h
    flops = (
        2 * x.d * (x.s * (4 * rank + 3 * x.k + x.r) + 2 * covered * x.r) + 16 * x.s * x.n * x.r + 6 * tokens * x.d * x.q
    )
    return Traffic(2, memory, flops)


def kept_by_torch(x: Shapes, fusion: bool = True, lowrank_update: bool = True) -> dict[str, int]:
    """Bytes that impl="torch" keeps from forward to backward, beside trained tensors and E. It computes in fp32."""
    tokens, covered = x.batch * x.length, min(x.n, x.length)
    kept = {}
    if x.k:
        kept["spaces"] = 4 * (x.s * x.k + 3 * x.s * x.k * x.h)  # gate; before and after σ, and weighted
    if x.r and fusion:  # the scores and what they come from in float64
        exact = x.d * x.r + x.s * x.d + x.n * x.r + x.s * x.r + x.s * x.n
        kept["fusion"] = 8 * exact + 4 * (x.s * x.n + x.s * x.r)
    if x.q:  # the gathered rows, before and after σ, the mask, W in the embeddings' size
        kept["token-conditioned update"] = 4 * (tokens * x.d + 2 * tokens * x.q + x.q * x.d) + tokens * x.masked
    if x.r and lowrank_update:  # the rows of A that the text reaches, one of zeros behind them, and where they go
        kept["low-rank update"] = 4 * (covered + x.masked) * x.r + 8 * tokens * x.masked
    return kept


def by_row(x: Shapes, adapters: int, table: bool = False, id_bytes: int = 8, mask_bytes: int = 8) -> Traffic:
    """One launch with the constants of several adapters: r counts in A and B, or with `table` in e·c·A·B of N rows."""
    tokens = x.batch * x.length
    lowrank = (x.n * x.d if table else x.n * x.r + x.r * x.d) if x.r else 0
    memory = {
        "rows of E": tokens * x.d * x.source_bytes,
        "X": tokens * x.d * x.source_bytes,
        "P* in every row": x.batch * x.s * x.d * x.source_bytes,
        "ids and mask": tokens * (id_bytes + (mask_bytes if x.masked else 0)),
        "constants": adapters * (x.s * x.d + lowrank + 2 * x.q * x.d) * x.weight_bytes,
    }
    flops = 2 * tokens * x.d * (x.r if x.r and not table else 0) + 4 * tokens * x.d * x.q
    return Traffic(1, memory, flops)
