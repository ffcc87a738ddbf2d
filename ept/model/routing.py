"""Which rows of a batch belong to which adapter.

A batch of one adapter is the plain case (`OneAdapter`): its rows stay where they are. `SeveralAdapters` sorts the rows by
adapter, so that each adapter's stand together, and brings results back into the batch's order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ept.layer.base import AdapterLayer, PromptShape

__all__ = ["Member", "OneAdapter", "Routing", "SeveralAdapters", "route"]


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
    def split(self, tensor: Tensor) -> list[Tensor]:
        """Each adapter's rows of a tensor [batch, …]."""

    @abstractmethod
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor of all rows, in the batch's order, from each adapter's."""

    @abstractmethod
    def of_rows(self, rows: Tensor) -> "Routing":
        """The routing of a batch that is made of rows of this one, [n] row numbers, as each adapter's examples are."""

    @abstractmethod
    def for_rows(self, batch: int) -> "Routing":
        """The routing where every row comes `batch` / rows times in a row, as in a beam search."""

    @property
    def layers(self) -> list[AdapterLayer]:
        return [member.layer for member in self.members]

    @property
    def prompt_shapes(self) -> set[PromptShape]:
        return {layer.prompt_shape for layer in self.layers}

    @property
    def shared_shape(self) -> PromptShape | None:
        """The shape that all prompts have; None where they differ."""
        first, *others = self.prompt_shapes
        return None if others else first

    @property
    def prompt_width(self) -> int:
        """Columns of the widest prompt."""
        return max(shape.length for shape in self.prompt_shapes)

    def by_shape_parts(self, tensor: Tensor) -> list[tuple[Tensor, PromptShape]]:
        """Each adapter's rows and its prompt's shape; all rows at once where all prompts have one shape."""
        shape = self.shared_shape
        if shape is not None:
            return [(tensor, shape)]
        return [(rows, layer.prompt_shape) for rows, layer in zip(self.split(tensor), self.layers, strict=True)]

    def by_shape(self, tensor: Tensor, make: Callable[[Tensor, PromptShape], Tensor]) -> Tensor:
        """`make` of each of `by_shape_parts`, as one tensor in the batch's order."""
        parts = [make(rows, shape) for rows, shape in self.by_shape_parts(tensor)]
        return parts[0] if len(parts) == 1 else self.join(parts)


class OneAdapter(Routing):
    """All rows belong to one adapter."""

    def __init__(self, member: Member):
        self.members = (member,)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def of_rows(self, rows: Tensor) -> Routing:
        return self

    def for_rows(self, batch: int) -> Routing:
        return self


class SeveralAdapters(Routing):
    """Rows of several adapters.

    Args:
        members: the adapters.
        owners: [batch] the number of each row's adapter.
        sizes: how many rows each adapter has; none is 0.
        order: [batch] the rows sorted by adapter, stable.
        place: [batch] where each row stands in that order.
    """

    def __init__(self, members: Sequence[Member], owners: Tensor, sizes: list[int], order: Tensor, place: Tensor):
        self.members, self._owners, self._sizes, self._order, self._place = tuple(members), owners, sizes, order, place

    @classmethod
    def by_owner(cls, members: Sequence[Member], owners: Tensor) -> Routing:
        """The routing of rows whose adapters' numbers are `owners` [batch]; members without rows are left out."""
        counts = torch.bincount(owners, minlength=len(members)).tolist()
        present = [number for number, count in enumerate(counts) if count]
        if len(present) == 1:
            return OneAdapter(members[present[0]])
        if len(present) < len(members):
            renumbered = owners.new_zeros(len(members))
            renumbered[present] = torch.arange(len(present), device=owners.device)
            owners = renumbered[owners]
        order = torch.argsort(owners, stable=True)
        sizes = [counts[number] for number in present]
        return cls([members[number] for number in present], owners, sizes, order, torch.argsort(order))

    def split(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.index_select(0, self._order).split(self._sizes))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts)).index_select(0, self._place)

    def of_rows(self, rows: Tensor) -> Routing:
        return SeveralAdapters.by_owner(self.members, self._owners[rows])

    def for_rows(self, batch: int) -> Routing:
        times = batch // len(self._owners)
        if times == 1:
            return self

        def repeated(rows: Tensor) -> Tensor:
            return (rows.unsqueeze(1) * times + torch.arange(times, device=rows.device)).flatten()

        return SeveralAdapters(
            self.members, self._owners.repeat_interleave(times), [size * times for size in self._sizes],
            repeated(self._order), repeated(self._place),
        )  # fmt: skip


def route(adapter_ids: Sequence[str], batch: int, member: Callable[[str], Member], device: torch.device) -> Routing:
    """The routing of a batch whose rows name their adapters.

    Args:
        adapter_ids: a name a row.
        batch: rows of the batch.
        member: gives an adapter by its name; ValueError where there is none.
        device: of the batch's tensors.

    Raises:
        ValueError: not one name a row, or no such adapter.
    """
    if isinstance(adapter_ids, str) or len(adapter_ids) != batch:
        raise ValueError(f"adapter_ids must name one adapter per row, {batch} in all, not {adapter_ids!r}")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(adapter_ids))}
    members = [member(name) for name in numbers]
    if not members:
        raise ValueError("adapter_ids is empty: a batch needs at least one row")
    if len(members) == 1:
        return OneAdapter(members[0])
    owners = [numbers[name] for name in adapter_ids]
    order = sorted(range(batch), key=owners.__getitem__)
    place = sorted(range(batch), key=order.__getitem__)
    table = torch.tensor([owners, order, place], device=device)  # one transfer for all
    sizes = [owners.count(number) for number in range(len(members))]
    return SeveralAdapters(members, table[0], sizes, table[1], table[2])
