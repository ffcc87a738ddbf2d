"""What inference needs of adapters: constants of one, or of several in one stack. A batch of any of them is one launch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import ept_kernels
from ept_kernels.availability import resolve

__all__ = ["Constants", "LayerUpdates"]


class LayerUpdates(NamedTuple):
    """The updates in the layers after the first: one entry a layer, in order (step 8 of docs/method.md).

    down, up: D_l/h_l and W_l·h_l, in the hidden states' own size, so that the kernel need not know h_l: [q, d_layer] each;
    with `adapter_index` [batch], the number of each row's adapter, [adapters, q, d_layer]; or a pair for each row
    [batch, q, d_layer].
    """

    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    activation: str
    impl: str
    adapter_index: Tensor | None = None

    def apply(self, number: int, hidden: Tensor) -> Tensor:
        """Hidden states [batch, columns, d_layer] at the input of the layer `number` after the first, updated.

        A batch of several adapters may come with each row several times in a row, as in a beam search.
        """
        if number >= len(self.down):
            return hidden
        down, up = self.down[number].to(hidden.device), self.up[number].to(hidden.device)
        settings: dict[str, Any] = dict(activation=self.activation, impl=self.impl)
        if down.dim() == 2:
            return ept_kernels.layer_update(hidden, down, up, **settings)
        index = None if self.adapter_index is None else self.adapter_index.to(hidden.device)
        rows = hidden.reshape(len(down if index is None else index), -1, hidden.shape[2])
        return ept_kernels.layer_update(rows, down, up, adapter_index=index, **settings).view(hidden.shape)


class Constants(NamedTuple):
    """Constants of adapters whose σ and implementation are the same; None for parts that all of them lack.

    prompt: P* [adapters, S, d] in the backbone's own size. Shorter prompts stand at one end of the S rows.
    prompt_lengths: [adapters] each adapter's rows; None: S.
    lowrank_a, lowrank_b: A [adapters, N, r], B [adapters, r, d] in units of `scale` and `embed_scale`; without B, A is the
        update itself [adapters, N, d] in the backbone's own size.
    token_down, token_up: D, W [adapters, q, d] in units of `embed_scale`.
    deep_down, deep_up: D_l/h_l, W_l·h_l [layers, adapters, q, d_layer]. Of a stack the last adapter is one of zeros.
    """

    prompt: Tensor
    prompt_lengths: Tensor | None
    lowrank_a: Tensor | None
    lowrank_b: Tensor | None
    token_down: Tensor | None
    token_up: Tensor | None
    deep_down: Tensor | None
    deep_up: Tensor | None
    scale: float
    embed_scale: float
    activation: str
    impl: str

    @classmethod
    def of_one(
        cls, prompt: Tensor, lowrank_a: Tensor | None, lowrank_b: Tensor | None, token_down: Tensor | None,
        token_up: Tensor | None, deep_down: Tensor | None, deep_up: Tensor | None, scale: float, embed_scale: float,
        activation: str, impl: str,
    ) -> "Constants":  # fmt: skip
        """The constants of one adapter, from tensors without the dimension of the adapters."""

        def of(tensor: Tensor | None, dim: int = 0) -> Tensor | None:
            return None if tensor is None else tensor.unsqueeze(dim)

        return cls(
            prompt.unsqueeze(0), None, of(lowrank_a), of(lowrank_b), of(token_down), of(token_up),
            of(deep_down, 1), of(deep_up, 1), scale, embed_scale, activation, impl,
        )  # fmt: skip

    def embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        embedding_weight: Tensor | None,
        inputs_embeds: Tensor | None,
        prompt_start: int | Tensor,
        index: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        text_positions: Tensor | None = None,
    ) -> Tensor:
        """The backbone's input [batch, S + L, d] from `input_ids` and E, or from `inputs_embeds` [batch, L, d].

        Args:
            prompt_start: the text column of the prompt, a number or [batch].
            index: [batch] the number of each row's adapter; None: all rows have the only one.
            prompt_lengths: [adapters] where shorter prompts stand at the beginning of the S rows.
            text_positions: [batch, L] in the mask's place.
        """
        if not self._has_text_update:
            text_positions = None
        source = embedding_weight if inputs_embeds is None else inputs_embeds
        settings: dict[str, Any] = dict(
            scale=self.scale, embed_scale=self.embed_scale, token_down=self.token_down, token_up=self.token_up,
            activation=self.activation, prompt_start=prompt_start, adapter_index=index, prompt_lengths=prompt_lengths,
            text_positions=text_positions, impl=self._impl(source, inputs_embeds is None),
        )  # fmt: skip
        tensors = (self.prompt, self.lowrank_a, self.lowrank_b, None, None, None)
        if inputs_embeds is not None:
            return ept_kernels.prompt_embed_inputs(inputs_embeds, attention_mask, *tensors, **settings)
        assert input_ids is not None and embedding_weight is not None
        return ept_kernels.prompt_embed(input_ids, attention_mask, embedding_weight, *tensors, **settings)

    def continue_text(
        self,
        input_ids: Tensor | None,
        embedding_weight: Tensor | None,
        inputs_embeds: Tensor | None,
        text_positions: Tensor | None,
        index: Tensor | None = None,
    ) -> Tensor:
        """[batch, n, d] embeddings of text that follows a cached prefix, updated for its positions [batch, n].

        -1 is padding. None is text without padding that starts at position 0.
        """
        return self.without_prompt().embed(
            input_ids, None, embedding_weight, inputs_embeds, 0, index, text_positions=text_positions
        )

    def without_prompt(self) -> "Constants":
        """The same with prompts of no rows."""
        return self._replace(prompt=self.prompt[:, :0])

    def runs_in_torch(self, embedding_weight: Tensor | None, inputs_embeds: Tensor | None) -> bool:
        """Whether `embed` of a text takes eager torch."""
        source = embedding_weight if inputs_embeds is None else inputs_embeds
        assert source is not None
        return resolve(self._impl(source, inputs_embeds is None), source.device) == "torch"

    @property
    def _has_text_update(self) -> bool:
        return self.lowrank_a is not None or self.token_down is not None

    @property
    def depends_on_positions(self) -> bool:
        """Whether a token's update depends on where it stands, and not only on what it is."""
        return self.lowrank_a is not None

    def _impl(self, source: Tensor | None, is_table: bool) -> str:
        """The implementation: the kernel for stacks has no gradient."""
        trained = [
            t for t in (self.prompt, self.lowrank_a, self.lowrank_b, self.token_down, self.token_up) if t is not None
        ]
        if source is not None and not is_table:
            trained.append(source)
        if torch.is_grad_enabled() and any(t.requires_grad for t in trained):
            return "torch" if self.impl in ("auto", "triton") else self.impl
        return self.impl

    def layer_updates(self, index: Tensor | None = None) -> LayerUpdates | None:
        """The updates in the layers for one pass; None where there are none. `index` as in `embed`.

        In torch each row gets its own D and W at once for all layers: afterwards a layer costs what it costs with one adapter.
        """
        down, up = self.deep_down, self.deep_up
        if down is None or up is None:
            return None
        if index is None:
            down, up = down[:, 0], up[:, 0]
        elif resolve(self.impl, down.device) != "triton":
            down, up, index = down[:, index], up[:, index], None
        return LayerUpdates(down.unbind(), up.unbind(), self.activation, self.impl, index)

    @classmethod
    def stacked(cls, parts: Sequence["Constants"], *, prompt_last: bool) -> "Constants":
        """One stack of several adapters' constants, in the backbone's own size.

        Smaller tensors are filled up with zeros, which change nothing. `prompt_last`: shorter prompts stand at the end.
        """
        first = parts[0]
        if any(part.lowrank_a is not None and part.lowrank_b is None for part in parts):
            parts = [part._with_table() for part in parts]
        parts = [part._in_own_size() for part in parts]
        side = "end" if prompt_last else "start"
        zeros = [part._replace(deep_down=_zeros(part.deep_down), deep_up=_zeros(part.deep_up)) for part in parts[:1]]
        prompt = _stack([part.prompt for part in parts], 0, side)
        assert prompt is not None
        return first._replace(
            prompt=prompt,
            prompt_lengths=torch.tensor([part.prompt.shape[1] for part in parts], device=first.prompt.device),
            lowrank_a=_stack([part.lowrank_a for part in parts], 0),
            lowrank_b=_stack([part.lowrank_b for part in parts], 0),
            token_down=_stack([part.token_down for part in parts], 0),
            token_up=_stack([part.token_up for part in parts], 0),
            deep_down=_stack([part.deep_down for part in (*parts, *zeros)], 1),
            deep_up=_stack([part.deep_up for part in (*parts, *zeros)], 1),
            scale=1.0,
            embed_scale=1.0,
        )

    def _with_table(self) -> "Constants":
        """The low-rank update as a table in the backbone's own size."""
        if self.lowrank_a is None or self.lowrank_b is None:
            return self
        return self._replace(
            lowrank_a=(self.lowrank_a * (self.scale * self.embed_scale)) @ self.lowrank_b, lowrank_b=None
        )

    def _in_own_size(self) -> "Constants":
        """The same with `scale` and `embed_scale` in the tensors."""
        a, down, up = self.lowrank_a, self.token_down, self.token_up
        if a is not None and self.lowrank_b is not None:
            a = a * (self.scale * self.embed_scale)
        if down is not None and up is not None:
            down, up = down / self.embed_scale, up * self.embed_scale
        return self._replace(lowrank_a=a, token_down=down, token_up=up, scale=1.0, embed_scale=1.0)


def _zeros(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


def _stack(tensors: Sequence[Tensor | None], dim: int, side: str = "start") -> Tensor | None:
    """The tensors joined in `dim`, in which each has one adapter; zeros for None, and where a tensor is smaller than another.

    `side`: where the rows of a smaller one stand. None where there is none at all.
    """
    present: list[Tensor] = [t for t in tensors if t is not None]
    if not present:
        return None
    sizes = [max(size) for size in zip(*(t.shape for t in present), strict=True)]
    sizes[dim] = 1
    dtype = present[0].dtype
    for each in present:
        dtype = torch.promote_types(dtype, each.dtype)
    filled: list[Tensor] = []
    for t in tensors:
        if t is None:
            filled.append(present[0].new_zeros(sizes, dtype=dtype))
            continue
        missing = [size - own for size, own in zip(sizes, t.shape, strict=True)]
        padding = [amount for each in reversed(missing) for amount in ((each, 0) if side == "end" else (0, each))]
        filled.append(F.pad(t.to(dtype), padding) if any(missing) else t.to(dtype))
    return torch.cat(filled, dim)
