"""The heads of a batch's adapters: each row gets its own head's result.

Where a head is made of linear maps and functions without parameters, as transformers' are, each linear map takes the rows of
all adapters in one product with weights gathered by row. A head of another make runs once for each adapter.
"""

import gc
import logging
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ept.model.calls import bare
from ept.model.routing import Member, Routing, SeveralAdapters
from ept.model.stacks import Stacks

__all__ = ["heads_by_row", "warn_of_shared_heads"]

logger = logging.getLogger("ept")

# A module's result for the rows' own adapters: from its first argument, the other ones, and those by keyword.
OwnResult = Callable[[Tensor, tuple, dict], Tensor]

_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def warn_of_shared_heads(owner: nn.Module, backbone: nn.Module) -> None:
    """Notes that a model with heads wraps a backbone, and warns where another one does: they share heads and labels."""
    before = _owners.get(backbone)
    if before is not None and before() is not None:
        gc.collect()  # a model that nobody uses any more may still be there
        if before() is not None:
            logger.warning(
                "another EPTModel wraps this %s, and both share its head and labels: what one trains or loads changes the "
                "other. Load the backbone again, or take add_adapter or load_adapter of that model",
                type(backbone).__name__,
            )
    _owners[backbone] = weakref.ref(owner)


def heads_by_row(
    active: Member, routing: Routing, members: Sequence[Member], stacks: Stacks
) -> dict[nn.Module, OwnResult]:
    """For each module in the active adapter's heads that takes part, what gives each row its own adapter's result."""
    several = routing if isinstance(routing, SeveralAdapters) else None
    if several is None:
        (member,) = routing.members
        return {head: _alone(own) for head, own in zip(active.heads, member.heads, strict=True)}
    results: dict[nn.Module, OwnResult] = {}
    for number, head in enumerate(active.heads):
        used = [member.heads[number] for member in routing.members]
        names, alike = stacks.remembered(f"{number}", [head, *(member.heads[number] for member in members)], _alike)
        if not all(any(each is other for other in alike) for each in used):
            results[head] = _apart(used, several)
            continue
        # A compiled graph has the heads in use alone; otherwise all share a stack, so that another batch needs no other.
        of_batch = torch.compiler.is_compiling()
        heads = used if of_batch else [member.heads[number] for member in members]
        for name in names:
            linears = [_linear(each, name) for each in used]
            stacked = [_linear(each, name) if any(each is other for other in alike) else None for each in heads]
            stack = stacks.of_linears(f"{number}.{name}", stacked, linears)
            index = several.owners if of_batch else several.numbers
            width = max(linear.out_features for linear in linears)
            results[head.get_submodule(name)] = _together(stack.apply, index, width)
    return results


def _together(apply: Callable[[Tensor, Tensor, int], Tensor], index: Tensor, width: int) -> OwnResult:
    return lambda features, others, kwargs: apply(features, index, width)


def _alone(head: nn.Module) -> OwnResult:
    """The result of one adapter's head for all rows."""

    def result(features: Tensor, others: tuple, kwargs: dict) -> Tensor:
        with bare():
            return head(features, *others, **kwargs)

    return result


def _apart(heads: list[nn.Module], routing: SeveralAdapters) -> OwnResult:
    """The results of heads that run one after the other."""

    def result(features: Tensor, others: tuple, kwargs: dict) -> Tensor:
        owners = routing.owners.repeat_interleave(len(features) // len(routing.owners))
        order = owners.argsort(stable=True)
        sizes = owners.bincount(minlength=len(heads)).tolist()
        rows = features.index_select(0, order).split(sizes)
        with bare():  # the active adapter's head may be among them
            parts = [own(part, *others, **kwargs) for own, part in zip(heads, rows, strict=True)]
        widest = max(part.shape[-1] for part in parts)
        parts = [F.pad(part, (0, widest - part.shape[-1]), value=-torch.inf) for part in parts]
        return torch.cat(parts).index_select(0, order.argsort())

    return result


def _linear(head: nn.Module, name: str) -> nn.Linear:
    linear = head.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _alike(heads: Sequence[nn.Module]) -> tuple[list[str], list[nn.Module]]:
    """The names of the linear maps in the first head, and the heads that are like it but for their numbers of labels.

    Alike means of one class, with every parameter in a linear map at the same place, which takes as many features, and, but for
    the last one, gives as many. Without such, both lists are empty.
    """
    shapes = _linear_shapes(heads[0])
    if shapes is None:
        return [], []
    *inner, last = shapes.items()
    alike = []
    for head in dict.fromkeys(heads):
        own = _linear_shapes(head)
        if type(head) is type(heads[0]) and own is not None and list(own) == list(shapes):
            *own_inner, own_last = own.items()
            if own_inner == inner and own_last[1][0] == last[1][0]:
                alike.append(head)
    return list(shapes), alike


def _linear_shapes(head: nn.Module) -> dict[str, tuple[int, int]] | None:
    """In- and outgoing features of a head's linear maps by name; None where it has other parameters."""
    shapes = {}
    for name, module in head.named_modules():
        if type(module) is nn.Linear:
            shapes[name] = (module.in_features, module.out_features)
        elif next(module.parameters(recurse=False), None) is not None:
            return None
    return shapes or None
