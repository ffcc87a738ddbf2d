"""Packed rows: several examples in one row, each with a prompt of its own.

The examples are taken apart into rows, prepared as a batch of such, and put together again. That an example then
sees itself alone is the backbone's work: by positions that restart, or by a block-diagonal mask; a probe of five tokens
says which of the two the backbone understands.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ept.backbone.embeddings import weight_of
from ept.backbone.probes import evaluating
from ept.model.inputs import Group, InputsMixin, Prepared

__all__ = ["PackingMixin", "example_starts"]


def example_starts(
    position_ids: Tensor | None, attention_mask: Tensor | None, lengths: Tensor | None, shape: torch.Size
) -> Tensor | None:
    """[batch, L] bool: the text tokens that start an example; None where no row holds more than one.

    Args:
        position_ids: [batch, L] or [1, L]; an example starts where they do not rise.
        attention_mask: [batch, L], 1 on text; padding belongs to no example.
        lengths: [n + 1] where each example starts, and the end (`cu_seq_lens_q`), for one row. It goes before positions.
        shape: (batch, L).
    """
    if lengths is not None:
        if shape[0] != 1 or attention_mask is not None:
            raise ValueError(
                "cu_seq_lens_q describes one row without padding: give a batch of one and no attention_mask"
            )
        edges = lengths.long()
        if lengths.dim() != 1 or len(edges) < 2 or edges[0] != 0 or edges[-1] != shape[1] or (edges.diff() <= 0).any():
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the row's {shape[1]} columns, not {lengths.tolist()}")
        starts = torch.zeros(shape, dtype=torch.bool, device=lengths.device)
        starts[0, edges[:-1]] = True
        return starts
    if position_ids is None or shape[1] < 2:
        return None
    position_ids = position_ids.expand(shape)
    column = torch.arange(shape[1], device=position_ids.device).expand(shape)
    text = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    # The last text column before each, -1 where there is none.
    before = F.pad(column.where(text, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    restarts = text & (before >= 0) & (position_ids <= position_ids.gather(1, before.clamp(min=0)))
    if not restarts.any():
        return None
    return restarts | (text & (before < 0))


class PackingMixin(InputsMixin):
    """What an EPTModel does with packed rows."""

    _packs_by: str | None = None

    def _starts_of(
        self, position_ids: Tensor | None, attention_mask: Tensor | None, shape: torch.Size, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """`example_starts` of a call; takes the keywords of transformers' DataCollatorWithFlattening out of `kwargs`."""
        given = [kwargs.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
        for name in ("max_length_q", "max_length_k"):
            kwargs.pop(name, None)  # follows from the lengths
        if given[0] is not None and given[1] is not None and not torch.equal(*given):
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: packed examples read themselves alone")
        starts = example_starts(position_ids, attention_mask, given[0] if given[1] is None else given[1], shape)
        # For state-space layers; the probe finds a backbone that needs it.
        numbers = kwargs.pop("seq_idx", None)
        if starts is None and numbers is not None and (numbers != numbers[:, :1]).any():
            raise ValueError("seq_idx numbers several examples: give position_ids that restart with them")
        return starts

    def _prepare_packed(
        self,
        groups: list[Group],
        starts: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
    ) -> Prepared:
        """As `_prepare_groups`, for rows that hold several examples; `starts` [batch, L] is `example_starts`'."""
        way = self._way_of_packing()
        batch = len(starts)
        text = torch.ones_like(starts) if attention_mask is None else attention_mask != 0
        row, column = text.nonzero(as_tuple=True)  # of every text token, in order
        first = starts[row, column].nonzero().flatten()  # of every example, the number of its first token
        example = starts[row, column].cumsum(0) - 1
        p = torch.arange(len(row), device=row.device) - first[example]
        shape = (len(first), int(p.max()) + 1)

        def apart(tensor: Tensor | None) -> Tensor | None:
            """[batch, L, …] of the packed rows -> [examples, longest, …]."""
            if tensor is None:
                return None
            tensor = tensor.expand(batch, *tensor.shape[1:])
            return tensor.new_zeros(*shape, *tensor.shape[2:]).index_put((example, p), tensor[row, column])

        if position_ids is None:
            position_ids = torch.zeros_like(starts, dtype=torch.int64).index_put(
                (row, column), p + self._first_position
            )
        owners = [
            group if group.rows is None
            else dataclasses.replace(group, rows=torch.isin(row[first], group.rows).nonzero().flatten(), order=None)
            for group in groups
        ]  # fmt: skip
        given = (input_ids, inputs_embeds, text.long(), token_type_ids, position_ids, labels)
        examples = self._prepare_groups([g for g in owners if g.rows is None or len(g.rows)], *map(apart, given))

        keep = examples.arguments["attention_mask"] != 0  # [examples, width]
        owner = row[first][keep.nonzero()[:, 0]]  # the packed row of every kept column
        sizes = torch.bincount(owner, minlength=batch)
        to = torch.arange(len(owner), device=owner.device) - (sizes.cumsum(0) - sizes)[owner]
        width = int(sizes.max())

        def together(tensor: Tensor, value: int = 0) -> Tensor:
            """[examples, width, …] -> the packed rows, padded on the right."""
            packed = tensor.new_full((batch, width, *tensor.shape[2:]), value)
            return packed.index_put((owner, to), tensor[keep])

        arguments = {
            key: together(tensor, -100 if key == "labels" else 0)
            for key, tensor in examples.arguments.items()
            if tensor is not None and key != "attention_mask"
        }
        numbers = torch.arange(1, len(first) + 1, device=row.device).unsqueeze(1).expand_as(keep)
        arguments |= self._apart_from_each_other(together(numbers), way, arguments["inputs_embeds"].dtype)
        place = torch.zeros_like(keep, dtype=torch.int64).masked_scatter(keep, to)
        columns = examples.columns
        if isinstance(columns, slice):
            columns = torch.arange(shape[1], device=row.device).expand(shape) + columns.start
        in_example = place.gather(1, columns)[example, p]
        columns = torch.zeros_like(starts, dtype=torch.int64).index_put((row, column), in_example)
        return Prepared(arguments, lambda: columns)

    def _apart_from_each_other(self, numbers: Tensor, way: str, dtype: torch.dtype) -> dict[str, Any]:
        """What keeps examples from seeing each other; `numbers` [batch, width] says each column's example, 0 is padding."""
        if way == "positions":
            # A cache would keep transformers from looking at the positions.
            apart: dict[str, Any] = {"use_cache": False}
            if "flash" in (self.config._attn_implementation or ""):
                if len(numbers) > 1:
                    raise ValueError("flash attention takes packed examples in a batch of one row only")
                sizes = torch.bincount(numbers[0])[1:]
                edges = F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
                apart |= dict(cu_seq_lens_q=edges, cu_seq_lens_k=edges)
                apart |= dict.fromkeys(("max_length_q", "max_length_k"), int(sizes.max()))
            return apart
        seen = numbers.unsqueeze(1) == numbers.unsqueeze(2)
        if self._kind == "causal":
            seen = seen.tril()
        hidden = torch.finfo(dtype).min
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, hidden).unsqueeze(1)
        return {"attention_mask": mask} | ({"use_cache": False} if self._kind == "causal" else {})

    def _way_of_packing(self) -> str:
        """ "positions" or "mask": how this backbone can be told of packed examples; ValueError where it cannot."""
        name = type(self.base_model).__name__
        if self._kind in ("seq2seq", "causal-pooled") or "SequenceClassification" in name:
            raise ValueError(
                f"position_ids go backwards inside a row, but {name} gives one result per row: "
                "packed examples would share it; give one example per row"
            )
        if "position_ids" not in self._accepts:
            raise ValueError(f"{name} takes no position_ids, by which packed examples are told apart: one per row")
        if self._packs_by is None:
            self._packs_by = self._probe_packing()
        if not self._packs_by:
            raise ValueError(
                f"{name} lets packed examples see each other, by positions and by a block-diagonal mask: give one example per row"
            )
        return self._packs_by

    @torch.no_grad()
    def _probe_packing(self) -> str:
        """Runs three and two tokens in one row and apart: the first way in which they agree, "" if none does."""
        model, embedding = self.base_model, self.base_model.get_input_embeddings()
        weight = weight_of(embedding)
        with evaluating(model):
            embeds = embedding(torch.arange(len(weight), device=weight.device)[-5:].unsqueeze(0))
        numbers = torch.tensor([[1, 1, 1, 2, 2]], device=embeds.device)
        positions = torch.tensor([[0, 1, 2, 0, 1]], device=embeds.device) + self._first_position
        config = self.config.get_text_config()
        windowed = getattr(config, "sliding_window", None) is not None
        ways = ["positions"] if self._kind == "causal" else []
        if not windowed and "flash" not in (self.config._attn_implementation or ""):
            ways.append("mask")  # one mask for all layers has no window
        with evaluating(model):
            alone = torch.cat([self._probed(embeds[:, :3]), self._probed(embeds[:, 3:])], dim=1)
            for way in ways:
                apart = self._apart_from_each_other(numbers, way, embeds.dtype)
                if _agree(alone, self._probed(embeds, position_ids=positions, **apart)):
                    return way
        return ""

    def _probed(self, embeds: Tensor, **arguments: Any) -> Tensor:
        outputs = self.base_model(inputs_embeds=embeds, return_dict=True, **arguments)
        return outputs["logits" if "logits" in outputs else "last_hidden_state"]


def _agree(alone: Tensor, packed: Tensor) -> bool:
    """Whether two passes over the same tokens differ by rounding alone; to see another example costs more than that."""
    share = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(alone.float(), packed.float(), rtol=share, atol=share * alone.abs().max().item())
