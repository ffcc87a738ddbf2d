"""The arguments of the input stage, by what they are. Symbols and shapes as in docs/method.md."""

from typing import NamedTuple

from torch import Tensor


class Text(NamedTuple):
    """The text: E [vocab, d] with ids [batch, L], or inputs_embeds [batch, L, d] as `source` without ids.

    `starts` [batch] is the column of each row's prompt, where they differ.
    """

    ids: Tensor | None
    source: Tensor
    mask: Tensor | None
    starts: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[batch, L, d] of the text's embeddings."""
        return self.source.shape if self.ids is None else (*self.ids.shape, self.source.shape[-1])


class TextWeights(NamedTuple):
    """The trained tensors that the text's embeddings meet: A, B, D and W; None for a part that is off."""

    lowrank_a: Tensor | None = None
    lowrank_b: Tensor | None = None
    token_down: Tensor | None = None
    token_up: Tensor | None = None


class Weights(NamedTuple):
    """The trained tensors: P, A, B, U, V, G, D and W; None for a part that is off."""

    prompt: Tensor
    lowrank_a: Tensor | None = None
    lowrank_b: Tensor | None = None
    space_down: Tensor | None = None
    space_up: Tensor | None = None
    gate_weight: Tensor | None = None
    token_down: Tensor | None = None
    token_up: Tensor | None = None

    def of_text(self, lowrank_update: bool) -> TextWeights:
        """Those that the text's embeddings meet; without A and B where they serve the fusion alone."""
        a, b = (self.lowrank_a, self.lowrank_b) if lowrank_update else (None, None)
        return TextWeights(a, b, self.token_down, self.token_up)

    def contiguous(self) -> "Weights":
        """The same tensors in row-major memory; copies only those that are not."""
        others = (None if weight is None else weight.contiguous() for weight in self[1:])
        return Weights(self.prompt.contiguous(), *others)

    @property
    def rank(self) -> int:
        """r: the rank of the low-rank pair."""
        return 0 if self.lowrank_b is None else self.lowrank_b.shape[0]

    @property
    def positions(self) -> int:
        """N: the text positions that the low-rank pair covers."""
        return 0 if self.lowrank_a is None else self.lowrank_a.shape[0]

    @property
    def spaces(self) -> tuple[int, int]:
        """K and h: how many spaces, and the width of each."""
        return (0, 0) if self.space_down is None else (self.space_down.shape[0], self.space_down.shape[1])

    @property
    def token_rank(self) -> int:
        """q: the rank of the token-conditioned update."""
        return 0 if self.token_down is None else self.token_down.shape[0]


class Stack(NamedTuple):
    """The constants of several adapters for inference: P* [adapters, S, d], A [adapters, N, r] with B [adapters, r, d],
    D and W [adapters, q, d]; None for a part that is off.

    A without B is the update e·c·A·B itself, [adapters, N, d]. `adapter_index` [batch] names each row's adapter; None: all
    rows have the only one. `lengths` [adapters] says how many rows of P* an adapter has; None: S. `positions` [batch, L] is p
    of each token, in the mask's place.
    """

    prompt: Tensor
    lowrank_a: Tensor | None = None
    lowrank_b: Tensor | None = None
    token_down: Tensor | None = None
    token_up: Tensor | None = None
    adapter_index: Tensor | None = None
    lengths: Tensor | None = None
    positions: Tensor | None = None

    @property
    def kind(self) -> str:
        """What the low-rank update is made of: "none", "factors" A and B, or a "table" e·c·A·B."""
        if self.lowrank_a is None:
            return "none"
        return "table" if self.lowrank_b is None else "factors"

    @property
    def token_rank(self) -> int:
        """q: the rank of the token-conditioned update."""
        return 0 if self.token_down is None else self.token_down.shape[1]

    def of(self, adapter: int) -> TextWeights:
        """What the text of one adapter's rows meets, but for a table."""
        a, b, down, up = (None if t is None else t[adapter] for t in self[1:5])
        return TextWeights(None if b is None else a, b, down, up)


class Settings(NamedTuple):
    """c, e, σ, the column of the prompt, and which of its two uses the low-rank pair has."""

    scale: float
    embed_scale: float = 1.0
    activation: str = "silu"
    prompt_start: int = 0
    lowrank_update: bool = True
    fusion: bool = True
