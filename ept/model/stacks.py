"""The constants of a model's adapters in stacks, kept from call to call, so that a batch of any of them costs what one costs.

What is kept is made anew when a tensor that it was made of has changed. Torch counts changes in place; a new tensor is
another object. A change through `.data` is not counted: `EPTModel.train()`, which any training calls, drops everything.
"""

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ept.layer.base import AdapterLayer
from ept.layer.constants import Constants
from ept.model.columns import source_columns

__all__ = ["LinearStack", "Stack", "Stacks"]

Made = TypeVar("Made")
Stamp = dict[int, tuple[Tensor, float, int]]  # by the id of a tensor: itself, its version, its address


class Stack(NamedTuple):
    """Constants of several adapters, and the number of each layer in them."""

    constants: Constants
    numbers: dict[AdapterLayer, int]


class LinearStack(NamedTuple):
    """The weights and biases of linear heads, [heads, out, in + 1], for the widest of them; without a bias [heads, out, in].

    A head with fewer outputs has a bias of -inf for those that it lacks.
    """

    weight: Tensor
    features: int

    def apply(self, features: Tensor, index: Tensor, width: int) -> Tensor:
        """The first `width` outputs [rows, …, width] of each row's head for features [rows, …, in].

        `index` [batch] is the number of each row's head. Rows may come several times in a row.
        """
        own = self.weight[:, :width].index_select(0, index)
        rows = features.reshape(len(index), -1, self.features).to(own.dtype)  # a head may have been cast to another
        weight = own[..., : self.features].mT
        if own.shape[2] == self.features:
            out = torch.bmm(rows, weight)
        else:
            out = torch.baddbmm(own[:, None, :, self.features], rows, weight)
        return out.view(*features.shape[:-1], width)


class _Entry(NamedTuple):
    """What was made, of which tensors, and which objects it belongs to."""

    made: Any
    stamp: Stamp
    owners: tuple[Any, ...]


class Stacks:
    """Makes stacks and keeps them. Any thread may ask. Copies and pickles start empty.

    Args:
        prompt_last: whether shorter prompts stand at the end of a stack's rows, as a causal model wants it.
    """

    def __init__(self, prompt_last: bool):
        self.prompt_last = prompt_last
        self._lock = threading.RLock()
        self._of_layer: weakref.WeakKeyDictionary[AdapterLayer, _Entry] = weakref.WeakKeyDictionary()
        self._of_all: dict[Any, _Entry] = {}
        self._captured: list[_Entry] = []

    def __reduce__(self) -> tuple[type["Stacks"], tuple[bool]]:
        return Stacks, (self.prompt_last,)

    def drop(self) -> None:
        """Forgets everything."""
        if self._of_all or self._of_layer:
            with self._lock:
                self._of_layer.clear()
                self._of_all.clear()

    def of_layers(self, layers: Sequence[AdapterLayer], used: Sequence[AdapterLayer]) -> list[Stack]:
        """The stacks that hold the layers in use: one, or one for each σ and implementation.

        Args:
            layers: all of a model's. They share a stack, so that another choice of them needs no other.
            used: those of a batch.
        """
        if torch.compiler.is_compiling():  # the graph holds no tensor of an earlier call
            layers = used
        groups: dict[tuple[str, str], list[AdapterLayer]] = {}
        for layer in layers:
            groups.setdefault((layer.config.activation, layer.config.impl), []).append(layer)
        stacks = []
        for key in dict.fromkeys((layer.config.activation, layer.config.impl) for layer in used):
            group = tuple(groups[key])
            asked = [layer for layer in used if (layer.config.activation, layer.config.impl) == key]

            def make(group: tuple[AdapterLayer, ...] = group) -> Stack:
                parts = [self._constants(layer) for layer in group]
                constants = Constants.stacked(parts, prompt_last=self.prompt_last)
                return Stack(constants, {layer: number for number, layer in enumerate(group)})

            if any(map(_trains, asked)) or torch.compiler.is_compiling():
                stacks.append(make())
            else:
                tensors = _all_tensors(asked)
                everything = functools.partial(_all_tensors, group)
                stacks.append(self._kept(key, group, tensors, make, everything))
        return stacks

    def of_linears(self, place: str, heads: Sequence[nn.Linear | None], used: Sequence[nn.Linear]) -> LinearStack:
        """The stack of linear heads at one place of a model, zeros for None; `heads` and `used` as in `of_layers`."""
        trained = torch.is_grad_enabled() and any(t.requires_grad for head in used for t in _linear_tensors(head))
        if trained or torch.compiler.is_compiling():
            return _stack_linears(heads)
        tensors = [t for head in used for t in _linear_tensors(head)]
        everything = [t for head in heads for t in _linear_tensors(head)]
        return self._kept(place, tuple(heads), tensors, lambda: _stack_linears(heads), lambda: everything)

    def source_columns_of(
        self, layers: Sequence[AdapterLayer], width: int, device: torch.device, length: int
    ) -> Tensor:
        """[layers, width + length] `source_columns` of each layer's prompt, which has `width` rows at most."""
        size = max(64, 1 << (length - 1).bit_length())  # few sizes, so that few tables are kept
        owners = tuple(each for layer in layers for each in (layer.config, layer.prompt_start))

        def make() -> Tensor:
            starts, lengths = zip(*((layer.prompt_start, layer.prompt_shape.length) for layer in layers), strict=True)
            return source_columns(
                width, torch.tensor(starts, device=device), torch.tensor(lengths, device=device), size
            )

        return self._kept(("columns", width, size, device), owners, [], make, list)[:, : width + length]

    def remembered(self, place: str, heads: Sequence[nn.Module], make: Callable[[Sequence[nn.Module]], Made]) -> Made:
        """`make` of the heads at one place of a model, as long as they are the same modules."""
        if torch.compiler.is_compiling():
            return make(heads)
        return self._kept(place, tuple(heads), [], lambda: make(heads), list)

    def _constants(self, layer: AdapterLayer) -> Constants:
        if _trains(layer) or torch.compiler.is_compiling():
            return layer.constants()
        entry = self._of_layer.get(layer)
        tensors = _tensors(layer)
        if entry is None or entry.owners[0] is not layer.config or not _is_current(entry.stamp, tensors):
            entry = _Entry(_apart_from_autograd(layer.constants), _stamp_of(tensors), (layer.config,))
            if not _capturing(tensors):
                self._of_layer[layer] = entry
        return entry.made

    def _kept(
        self,
        key: Any,
        owners: tuple[Any, ...],
        asked: list[Tensor],
        make: Callable[[], Made],
        everything: Callable[[], list[Tensor]],
    ) -> Made:
        """What is kept under a key, or made anew where its owners are others or one of the tensors asked for has changed."""
        entry = self._of_all.get(key)
        if entry is not None:
            same = len(entry.owners) == len(owners) and all(map(operator.is_, entry.owners, owners))
            entry = entry if same and _is_current(entry.stamp, asked) else None
        if entry is None:
            with self._lock:
                tensors = everything()
                entry = _Entry(_apart_from_autograd(make), _stamp_of(tensors), owners)
                if not _capturing(asked):
                    self._of_all[key] = entry
        elif _capturing(asked) and not any(each is entry for each in self._captured):
            self._captured.append(entry)  # a graph that is replayed later reads this memory
        return entry.made


def _apart_from_autograd(make: Callable[[], Made]) -> Made:
    """What `make` returns, as ordinary tensors that any later call may use."""
    with torch.inference_mode(False), torch.no_grad():
        return make()


def _trains(layer: AdapterLayer) -> bool:
    """Whether a call's constants are its own: gradients go to them, or dropout is drawn."""
    if layer.training and layer.trainable and layer.config.token_dropout:
        return True
    return torch.is_grad_enabled() and any(p.requires_grad for p in layer._parameters.values() if p is not None)


def _all_tensors(layers: Sequence[AdapterLayer]) -> list[Tensor]:
    return [t for layer in layers for t in _tensors(layer)]


def _tensors(layer: AdapterLayer) -> list[Tensor]:
    held = (*layer._parameters.values(), *layer._buffers.values())
    return [t for t in held if t is not None]


def _linear_tensors(head: nn.Linear | None) -> list[Tensor]:
    if head is None:
        return []
    return [head.weight] if head.bias is None else [head.weight, head.bias]


def _stamp_of(tensors: Sequence[Tensor]) -> Stamp:
    return {id(t): (t, _version(t), t.data_ptr()) for t in tensors}


def _is_current(stamp: Stamp, tensors: Sequence[Tensor]) -> bool:
    """Whether none of the tensors, which are among those of the stamp, has changed."""
    for t in tensors:
        kept = stamp.get(id(t))
        if kept is None or kept[1] != _version(t) or kept[2] != t.data_ptr():
            return False
    return True


def _version(tensor: Tensor) -> float:
    """How often a tensor was changed in place; of one that does not count, a number that equals nothing."""
    return float("nan") if tensor.is_inference() else tensor._version


def _capturing(tensors: Sequence[Tensor]) -> bool:
    return any(t.is_cuda for t in tensors[:1]) and torch.cuda.is_current_stream_capturing()


def _stack_linears(heads: Sequence[nn.Linear | None]) -> LinearStack:
    present = [head for head in heads if head is not None]
    widest, like = max(head.out_features for head in present), present[0].weight
    has_bias = any(head.bias is not None or head.out_features < widest for head in present)
    stacked = []
    for head in heads:
        if head is None:
            stacked.append(like.new_zeros(widest, like.shape[1] + has_bias))
            continue
        weight = head.weight
        if has_bias:
            bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias
            weight = torch.cat([weight, bias.unsqueeze(1)], dim=1)
        missing = widest - len(weight)
        if missing:
            none = weight.new_zeros(missing, weight.shape[1])
            none[:, -1] = -torch.inf
            weight = torch.cat([weight, none])
        stacked.append(weight)
    return LinearStack(torch.stack(stacked), like.shape[1])
