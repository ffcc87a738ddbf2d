"""Which rows of a batch belong to which adapter.

A batch of one adapter is the plain case (`OneAdapter`). `SeveralAdapters` gives each row the number of its adapter in a
stack of constants: the rows stay where they are, and every step is one for all of them.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ept.layer.base import AdapterLayer, PromptShape
from ept.layer.constants import Constants, LayerUpdates
from ept.model.columns import Places, source_columns
from ept.model.stacks import Stack, Stacks
from ept_kernels.common.checks import has_readable_values, value_range

__all__ = ["Member", "OneAdapter", "Routing", "SeveralAdapters", "TextSteps", "route"]


class Member(NamedTuple):
    """An adapter as a batch uses it: its layer, and its heads in the order of the backbone's."""

    layer: AdapterLayer
    heads: list[nn.Module]


class Routing(ABC):
    """The adapters of a batch and their rows.

    Attributes: `members`, the adapters in the order in which the batch names them first.
    """

    members: tuple[Member, ...]

    @abstractmethod
    def of_rows(self, rows: Tensor) -> "Routing":
        """The routing of a batch that is made of rows of this one, [n] row numbers, as each adapter's examples are."""

    @abstractmethod
    def for_rows(self, batch: int) -> "Routing":
        """The routing where every row comes `batch` / rows times in a row, as in a beam search."""

    @abstractmethod
    def embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        embedding_weight: Tensor | None,
        inputs_embeds: Tensor | None,
        places: Places,
    ) -> Tensor:
        """The backbone's input [batch, S + L, d] from `input_ids` and E, or from `inputs_embeds` [batch, L, d]."""

    @abstractmethod
    def steps(self) -> "TextSteps":
        """What embeds text that follows a cached prefix, for as many steps as a call has."""

    @abstractmethod
    def layer_updates(self) -> tuple[LayerUpdates, ...]:
        """The updates in the layers for one pass, one after the other."""

    @abstractmethod
    def places(self, *, prompt_last: bool) -> Places:
        """Where the prompts stand in rows whose text starts in their first column.

        `prompt_last`: whether a shorter prompt than the widest stands behind its row's filling, as a causal model's does.
        """

    @property
    def layers(self) -> list[AdapterLayer]:
        return [member.layer for member in self.members]

    @property
    def prompt_shapes(self) -> set[PromptShape]:
        return {layer.prompt_shape for layer in self.layers}

    @property
    def prompt_width(self) -> int:
        """Columns of the widest prompt."""
        return max(shape.length for shape in self.prompt_shapes)

    @property
    def impl(self) -> str:
        """The implementation of `ept_kernels` for what belongs to no adapter: the first one's."""
        return self.layers[0].config.impl


class TextSteps(NamedTuple):
    """Constants with each row's number in them, for text that follows a cached prefix.

    groups: constants, and [batch] each row's number in them, -1 in another group; None: all rows have the only one.
    """

    groups: tuple[tuple[Constants, Tensor | None], ...]

    @property
    def depends_on_positions(self) -> bool:
        """Whether any token's update depends on where it stands."""
        return any(constants.depends_on_positions for constants, _ in self.groups)

    def embed(
        self,
        input_ids: Tensor | None,
        embedding_weight: Tensor | None,
        inputs_embeds: Tensor | None,
        text_positions: Tensor | None,
    ) -> Tensor:
        """[batch, n, d] embeddings, updated for their positions [batch, n]; -1 is padding, None text without padding from 0.

        Rows may come several times in a row, as in a beam search.
        """
        return _of_groups(
            self.groups,
            lambda constants, index: _continued(
                constants, index, input_ids, embedding_weight, inputs_embeds, text_positions
            ),
        )


def _continued(
    constants: Constants,
    index: Tensor | None,
    ids: Tensor | None,
    table: Tensor | None,
    embeds: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    text = ids if embeds is None else embeds
    assert text is not None
    if index is None or len(index) == len(text):
        return constants.continue_text(ids, table, embeds, positions, index)
    # A row's copies follow each other: they are more tokens of one row.
    ids, embeds, positions = (
        None if t is None else t.reshape(len(index), -1, *t.shape[2:]) for t in (ids, embeds, positions)
    )
    out = constants.continue_text(ids, table, embeds, positions, index)
    return out.view(*text.shape[:2], out.shape[-1])


def _of_groups(
    groups: Sequence[tuple[Constants, Tensor | None]], make: Callable[[Constants, Tensor | None], Tensor]
) -> Tensor:
    """`make` of each group, [rows, …] each, with the rows that belong to it."""
    constants, index = groups[0]
    total = make(constants, index if index is None or len(groups) == 1 else index.clamp(min=0))
    for constants, index in groups[1:]:
        assert index is not None
        rows = make(constants, index.clamp(min=0))
        mine = (index >= 0).repeat_interleave(len(rows) // len(index))
        total = torch.where(mine.view(-1, *(1 for _ in rows.shape[1:])), rows, total)
    return total


class OneAdapter(Routing):
    """All rows belong to one adapter."""

    def __init__(self, member: Member):
        self.members = (member,)

    def of_rows(self, rows: Tensor) -> Routing:
        return self

    def for_rows(self, batch: int) -> Routing:
        return self

    def embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        embedding_weight: Tensor | None,
        inputs_embeds: Tensor | None,
        places: Places,
    ) -> Tensor:
        (layer,) = self.layers
        return layer(
            input_ids,
            attention_mask,
            embedding_weight=embedding_weight,
            inputs_embeds=inputs_embeds,
            prompt_start=places.start,
        )

    def steps(self) -> TextSteps:
        (layer,) = self.layers
        return TextSteps(((layer.constants(prompt=False), None),))

    def layer_updates(self) -> tuple[LayerUpdates, ...]:
        (layer,) = self.layers
        updates = layer.layer_updates()
        return () if updates is None else (updates,)

    def places(self, *, prompt_last: bool) -> Places:
        (shape,) = self.prompt_shapes
        return Places(shape.length, shape.start, None, prompt_last)


class SeveralAdapters(Routing):
    """Rows of several adapters.

    Args:
        members: the adapters.
        stacks: constants that hold them: one stack, or one for each σ and implementation.
        rows: [4 + stacks, batch] for each row: the number of its adapter among the members, the length and the start of its
            prompt, its number among all of the model's adapters, and in each stack, -1 where it is in another.
        starts: the column of all prompts where it is one, else None.
        sources: gives `source_columns` of all of the model's adapters for L text columns; None where all prompts of the
            batch are equally long.
    """

    def __init__(
        self,
        members: Sequence[Member],
        stacks: Sequence[Stack],
        rows: Tensor,
        starts: int | None,
        sources: Callable[[int], Tensor] | None,
    ):
        self.members, self.stacks, self.rows = tuple(members), tuple(stacks), rows
        self._starts, self._sources = starts, sources
        self._by_length: dict[int, Tensor] = {}  # what `sources` gave for these rows, so that a call asks once

    @property
    def owners(self) -> Tensor:
        """[batch] the number of each row's adapter among the members."""
        return self.rows[0]

    @property
    def numbers(self) -> Tensor:
        """[batch] the number of each row's adapter among all of the model's."""
        return self.rows[3]

    @property
    def _groups(self) -> tuple[tuple[Constants, Tensor], ...]:
        return tuple((stack.constants, index) for stack, index in zip(self.stacks, self.rows[4:], strict=True))

    def _with_rows(self, rows: Tensor) -> "SeveralAdapters":
        return SeveralAdapters(self.members, self.stacks, rows, self._starts, self._sources)

    def of_rows(self, rows: Tensor) -> Routing:
        return self._with_rows(self.rows.index_select(1, rows))

    def for_rows(self, batch: int) -> Routing:
        times = batch // self.rows.shape[1]
        return self if times == 1 else self._with_rows(self.rows.repeat_interleave(times, dim=1))

    def embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        embedding_weight: Tensor | None,
        inputs_embeds: Tensor | None,
        places: Places,
    ) -> Tensor:
        def of_group(constants: Constants, index: Tensor | None) -> Tensor:
            assert index is not None
            missing = constants.prompt.shape[1] - places.width
            if missing < 0:  # another group has longer prompts
                sides = (0, 0, -missing, 0) if places.prompt_last else (0, 0, 0, -missing)
                prompt = nn.functional.pad(constants.prompt, sides)
            else:
                prompt = constants.prompt[:, missing:] if places.prompt_last else constants.prompt[:, : places.width]
            text = (input_ids, attention_mask, embedding_weight, inputs_embeds)
            constants = constants._replace(prompt=prompt)
            if places.sources is None:
                return constants.embed(*text, places.start, index)
            if constants.runs_in_torch(embedding_weight, inputs_embeds):  # the mask's places serve
                updated = constants.without_prompt().embed(*text, 0, index)
                return places.insert(updated, prompt.index_select(0, index).to(updated.dtype))
            return constants.embed(*text, places.start, index, constants.prompt_lengths)

        return _of_groups(self._groups, of_group)

    def steps(self) -> TextSteps:
        return TextSteps(self._groups)

    def layer_updates(self) -> tuple[LayerUpdates, ...]:
        updates = (constants.layer_updates(index) for constants, index in self._groups)
        return tuple(each for each in updates if each is not None)

    def places(self, *, prompt_last: bool) -> Places:
        start = self.rows[2] if self._starts is None else self._starts
        if self._sources is None:
            return Places(self.prompt_width, start, None, prompt_last)
        sources = None if prompt_last else self._sources_of_rows
        return Places(self.prompt_width, start, self.rows[1], prompt_last, sources)

    def _sources_of_rows(self, length: int) -> Tensor:
        """[batch, S + length] `source_columns` of each row's prompt."""
        if torch.compiler.is_compiling():  # a graph holds no tensor of an earlier call
            return source_columns(self.prompt_width, self.rows[2], self.rows[1], length)
        if length not in self._by_length:
            assert self._sources is not None
            self._by_length[length] = self._sources(length).index_select(0, self.numbers)
        return self._by_length[length]


def route(
    adapter_ids: Sequence[str] | Tensor,
    batch: int,
    members_by_name: Mapping[str, Member],
    stacks: Stacks,
    device: torch.device,
) -> Routing:
    """The routing of a batch whose rows name their adapters.

    Args:
        adapter_ids: a name a row, or [batch] integers, the number of each row's adapter among all. A batch of numbers is
            laid out for all adapters: it is as wide as the longest prompt, and as the widest head.
        batch: rows of the batch.
        members_by_name: all of the model's adapters.
        stacks: what is kept of them.
        device: of the batch's tensors.

    Raises:
        ValueError: not one name or number a row, or an adapter that there is not.
        TypeError: a tensor of another dtype than an integer's.
    """
    if isinstance(adapter_ids, Tensor):
        _check_numbers(adapter_ids, batch, list(members_by_name))
        numbers = {name: number for number, name in enumerate(members_by_name)}
    else:
        _check_names(adapter_ids, batch, list(members_by_name))
        numbers = {name: number for number, name in enumerate(dict.fromkeys(adapter_ids))}
    members = [members_by_name[name] for name in numbers]
    if len(members) == 1:
        return OneAdapter(members[0])
    layers = [each.layer for each in members_by_name.values()]
    groups = stacks.of_layers(layers, [each.layer for each in members])
    shapes = [each.layer.prompt_shape for each in members]
    all_numbers = {name: number for number, name in enumerate(members_by_name)}
    of_member = [
        (number, *shape, all_numbers[name], *(group.numbers.get(each.layer, -1) for group in groups))
        for number, (name, each, shape) in enumerate(zip(numbers, members, shapes, strict=True))
    ]
    of_row = of_member if isinstance(adapter_ids, Tensor) else [of_member[numbers[name]] for name in adapter_ids]
    rows = torch.tensor([list(each) for each in zip(*of_row, strict=True)], device=device)  # one transfer for all
    if isinstance(adapter_ids, Tensor):
        rows = rows.index_select(1, adapter_ids.to(device))
    starts, widths = {shape.start for shape in shapes}, {shape.length for shape in shapes}
    sources = functools.partial(stacks.source_columns_of, layers, max(widths), device) if len(widths) > 1 else None
    return SeveralAdapters(members, groups, rows, starts.pop() if len(starts) == 1 else None, sources)


def _check_names(adapter_ids: Sequence[str], batch: int, names: list[str]) -> None:
    """ValueError where they are not one name of an adapter a row."""
    if isinstance(adapter_ids, str) or len(adapter_ids) != batch:
        raise ValueError(f"adapter_ids must name one adapter per row, {batch} in all, not {adapter_ids!r}")
    if not batch:
        raise ValueError("adapter_ids is empty: a batch needs at least one row")
    for name in adapter_ids:
        if name not in names:
            raise ValueError(f"there is no adapter {name!r}: there are {', '.join(map(repr, names))}")


def _check_numbers(adapter_ids: Tensor, batch: int, names: list[str]) -> None:
    """TypeError or ValueError where they are not one number of an adapter a row; values are read on the CPU alone."""
    if adapter_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"adapter_ids must hold integers, int64 or int32, or be names, not {adapter_ids.dtype}")
    if adapter_ids.shape != (batch,) or not batch:
        raise ValueError(f"adapter_ids must be [batch], one number per row of {batch}, not {tuple(adapter_ids.shape)}")
    if has_readable_values(adapter_ids):
        low, high = value_range(adapter_ids)
        if low < 0 or high >= len(names):
            raise ValueError(
                f"adapter_ids holds {adapter_ids.tolist()}, but adapters are 0 … {len(names) - 1}: "
                "their places in list_adapters()"
            )
