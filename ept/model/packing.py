"""Packed rows: several examples in one row, each with a prompt of its own.

The examples are taken apart into rows, laid out as a batch of such, and put together again. That an example then sees
itself alone is the backbone's work: by positions that restart, or by a block-diagonal mask. A probe of five tokens says
which of the two the backbone understands.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ept.backbone.embeddings import weight_of
from ept.backbone.probes import evaluating
from ept.backbone.traits import Traits
from ept.model.calls import bare
from ept.model.columns import taken
from ept.model.inputs import Inputs
from ept.model.layout import Embed, InputPlan, padded
from ept.model.routing import Routing

__all__ = ["Packing", "example_starts", "take_starts"]


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


def take_starts(inputs: Inputs, arguments: dict[str, Any]) -> Tensor | None:
    """`example_starts` of a call; takes the keywords of transformers' DataCollatorWithFlattening out of `arguments`."""
    edges = [arguments.pop(name, None) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    for name in ("max_length_q", "max_length_k"):
        arguments.pop(name, None)  # follows from the edges
    if edges[0] is not None and edges[1] is not None and not torch.equal(*edges):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: packed examples read themselves alone")
    lengths = edges[0] if edges[1] is None else edges[1]
    shape = inputs.text.shape[:2]
    starts = example_starts(inputs.position_ids, inputs.attention_mask, lengths, shape)
    # For state-space layers; the probe finds a backbone that needs it.
    numbers = arguments.pop("seq_idx", None)
    if starts is None and numbers is not None and (numbers != numbers[:, :1]).any():
        raise ValueError("seq_idx numbers several examples: give position_ids that restart with them")
    return starts


class _Examples(NamedTuple):
    """Where the text tokens of packed rows belong; each tensor [tokens], in the order of rows and columns.

    row, column: where a token stands. example: the number of its example. position: its place in that example.
    first: [examples] the number of each example's first token.
    """

    row: Tensor
    column: Tensor
    example: Tensor
    position: Tensor
    first: Tensor

    @classmethod
    def of(cls, starts: Tensor, attention_mask: Tensor | None) -> "_Examples":
        text = torch.ones_like(starts) if attention_mask is None else attention_mask != 0
        row, column = text.nonzero(as_tuple=True)
        first = starts[row, column].nonzero().flatten()
        example = starts[row, column].cumsum(0) - 1
        position = torch.arange(len(row), device=row.device) - first[example]
        return cls(row, column, example, position, first)

    def apart(self, tensor: Tensor) -> Tensor:
        """[batch, L, …] of the packed rows -> [examples, longest, …], padded on the right."""
        shape = (len(self.first), int(self.position.max()) + 1)
        padded = tensor.new_zeros(*shape, *tensor.shape[2:])
        return padded.index_put((self.example, self.position), tensor[self.row, self.column])


class Packing:
    """Lays out packed rows for one backbone; what the backbone understands is asked at the first such call."""

    def __init__(self, backbone: PreTrainedModel, traits: Traits):
        self.backbone, self.traits = backbone, traits
        self._way: str | None = None

    def plan(self, inputs: Inputs, routing: Routing, starts: Tensor, embed: Embed) -> InputPlan:
        """As `layout.padded`, for rows that hold several examples; `starts` [batch, L] is `example_starts`'."""
        way, batch = self.way(), len(starts)
        inputs = inputs.expanded()
        examples = _Examples.of(starts, inputs.attention_mask)
        row, first = examples.row, examples.first
        if inputs.position_ids is None:
            positions = torch.zeros_like(starts, dtype=torch.int64)
            positions = positions.index_put((row, examples.column), examples.position + self.traits.first_position)
            inputs = inputs.with_(position_ids=positions)
        text = torch.ones_like(starts) if inputs.attention_mask is None else inputs.attention_mask != 0
        alone = inputs.with_(attention_mask=text.long()).map(examples.apart)
        plan = padded(self.traits, alone, routing.of_rows(row[first]), embed)

        keep = plan.arguments["attention_mask"] != 0  # [examples, width]
        owner = row[first][keep.nonzero()[:, 0]]  # the packed row of every kept column
        sizes = torch.bincount(owner, minlength=batch)
        to = torch.arange(len(owner), device=owner.device) - (sizes.cumsum(0) - sizes)[owner]
        width = int(sizes.max())

        def together(tensor: Tensor, value: int = 0) -> Tensor:
            """[examples, width, …] -> the packed rows, padded on the right."""
            packed = tensor.new_full((batch, width, *tensor.shape[2:]), value)
            return packed.index_put((owner, to), tensor[keep])

        arguments = {
            name: together(tensor, -100 if name == "labels" else 0)
            for name, tensor in plan.arguments.items()
            if tensor is not None and name != "attention_mask"
        }
        numbers = torch.arange(1, len(first) + 1, device=row.device).unsqueeze(1).expand_as(keep)
        arguments |= self._apart_from_each_other(together(numbers), way, arguments["inputs_embeds"].dtype)
        place = torch.zeros_like(keep, dtype=torch.int64).masked_scatter(keep, to)
        in_example = taken(place, plan.indices())[examples.example, examples.position]
        columns = torch.zeros_like(starts, dtype=torch.int64).index_put((row, examples.column), in_example)
        return InputPlan(arguments, lambda: columns, starts.shape[1])

    @property
    def is_asked(self) -> bool:
        """Whether the next packed call would have to run the probe."""
        return self._way is None and not torch.compiler.is_compiling()

    def way(self) -> str:
        """ "positions" or "mask": how the backbone is told of packed examples; ValueError where it cannot be."""
        name = self.traits.name
        if self.traits.kind.encoder_decoder or self.traits.classifies_rows:
            raise ValueError(
                f"position_ids go backwards inside a row, but {name} gives one result per row: "
                "packed examples would share it; give one example per row"
            )
        if "position_ids" not in self.traits.accepts:
            raise ValueError(f"{name} takes no position_ids, by which packed examples are told apart: one per row")
        if self.traits.id_for_shape is not None:
            raise ValueError(
                f"{name} counts positions by columns, where examples are packed, too: give one example per row"
            )
        if self._way is None:
            self._way = self._probe()
        if not self._way:
            raise ValueError(
                f"{name} lets packed examples see each other, by positions and by a block-diagonal mask: give one example per row"
            )
        return self._way

    def _apart_from_each_other(self, numbers: Tensor, way: str, dtype: torch.dtype) -> dict[str, Any]:
        """What keeps examples from seeing each other; `numbers` [batch, width] says each column's example, 0 is padding."""
        causal = self.traits.kind.causal
        if way == "positions":
            # A cache would keep transformers from looking at the positions.
            arguments: dict[str, Any] = {"use_cache": False}
            if self._uses_flash_attention():
                if len(numbers) > 1:
                    raise ValueError("flash attention takes packed examples in a batch of one row only")
                sizes = torch.bincount(numbers[0])[1:]
                edges = F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
                arguments |= dict(cu_seq_lens_q=edges, cu_seq_lens_k=edges)
                arguments |= dict.fromkeys(("max_length_q", "max_length_k"), int(sizes.max()))
            return arguments
        seen = numbers.unsqueeze(1) == numbers.unsqueeze(2)
        if causal:
            seen = seen.tril()
        hidden = torch.finfo(dtype).min
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, hidden).unsqueeze(1)
        return {"attention_mask": mask} | ({"use_cache": False} if causal else {})

    def _uses_flash_attention(self) -> bool:
        return "flash" in (self.backbone.config._attn_implementation or "")

    @torch.no_grad()
    def _probe(self) -> str:
        """Runs three and two tokens in one row and apart: the first way in which they agree, "" if none does."""
        embedding = self.backbone.get_input_embeddings()
        weight = weight_of(embedding)
        windowed = getattr(self.backbone.config.get_text_config(), "sliding_window", None) is not None
        ways = ["positions"] if self.traits.kind.causal else []
        if not windowed and not self._uses_flash_attention():
            ways.append("mask")  # one mask for all layers has no window
        with bare(), evaluating(self.backbone):
            embeds = embedding(torch.arange(len(weight), device=weight.device)[-5:].unsqueeze(0))
            numbers = torch.tensor([[1, 1, 1, 2, 2]], device=embeds.device)
            positions = torch.tensor([[0, 1, 2, 0, 1]], device=embeds.device) + self.traits.first_position
            alone = torch.cat([self._run(embeds[:, :3]), self._run(embeds[:, 3:])], dim=1)
            for way in ways:
                arguments = self._apart_from_each_other(numbers, way, embeds.dtype)
                if _agree(alone, self._run(embeds, position_ids=positions, **arguments)):
                    return way
        return ""

    def _run(self, embeds: Tensor, **arguments: Any) -> Tensor:
        outputs = self.backbone(inputs_embeds=embeds, return_dict=True, **arguments)
        return outputs["logits" if "logits" in outputs else "last_hidden_state"]


def _agree(alone: Tensor, packed: Tensor) -> bool:
    """Whether two passes over the same tokens differ by rounding alone; to see another example costs more than that."""
    share = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(alone.float(), packed.float(), rtol=share, atol=share * alone.abs().max().item())
