"""Launches that are worked out once for a shape, and repeated with other tensors.

Between two calls with equal shapes, strides, dtypes and settings a function that allocates and launches differs in
addresses alone. The first call runs it and records what it allocates and launches; the next ones allocate, fill in the
addresses and call the compiled kernels, without the function's arithmetic and without Triton's binder.

A function that is repeated allocates, takes counters once at most, and calls `launch`. Whatever else it did to a tensor
would be left out: a function that launches nothing is not repeated, and one that launches on a view raises RuntimeError.

Repeated on NVIDIA alone: on AMD what Triton compiles depends on the sizes of storages, too, and the interpreter compiles
nothing. Addresses that are no multiples of 16 go to Triton's binder, which compiles another kernel for them, and so do
all launches while a profiler has hooks in Triton.
"""

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .operators import Call
from .triton_launch import Recording, counters, device_of, interpreting, recorded

ALIGNMENT = 16  # bytes: what Triton's binder looks at
SCRATCH_ALIGNMENT = 256  # of the tensors that share one allocation, as far apart as allocators place them

Tensors = Sequence[Tensor | None]


def repeat(call: Call, key: Hashable, function: Callable[..., Any], tensors: Tensors) -> Any:
    """Returns `function(*tensors)`. `call` and `key` hold all that it depends on but for the addresses."""
    if interpreting():
        return function(*tensors)
    driver = triton.runtime.driver.active
    replay = call.replays.get((key, driver))
    if replay is not None:
        return replay(tensors) or function(*tensors)
    if driver.get_current_target().backend != "cuda" or any(t is not None and _misaligned(t) for t in tensors):
        return function(*tensors)
    # An object of its own for each argument tells them apart where one tensor is passed twice.
    inputs = [None if t is None else t.detach() for t in tensors]
    with recorded() as recording:
        results = function(*inputs)
    if recording.launches:
        call.replays[key, driver] = _Replay(inputs, results, recording)
    return results


def _misaligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT != 0


def _hooked() -> bool:
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


class _Replay:
    """The allocations and launches of one recording. Of its tensors only results without elements are kept."""

    def __init__(self, inputs: Tensors, results: Tensors, recording: Recording):
        self._device = next(t.device for t in results if t is not None)
        self._driver = triton.runtime.driver.active
        # How code that torch.compile generates allocates: half the time of torch.empty_strided.
        self._empty = getattr(torch._C._dynamo.guards, f"_empty_strided_{self._device.type}")
        self._results = [_specification(t) for t in results]
        self._counters = sum(buffer.numel() for buffer in recording.counters)
        named = [*inputs, *results]
        scratch, place = _places(named, recording)
        sizes = [-(-t.nbytes // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT for t in scratch]
        self._offsets, self._scratch = [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)
        # The values of a call: addresses of arguments, results, scratch and counters, then numbers and flags.
        first = len(named) + len(scratch) + 1
        self._numbers: list[Any] = []
        self._steps = []
        for compiled, programs, args in recording.launches:
            order = []
            for value in args:
                if id(value) not in place:  # a number, a flag, or scratch without elements
                    self._numbers.append(0 if isinstance(value, Tensor) else value)
                order.append(place.get(id(value), first + len(self._numbers) - 1))
            self._steps.append(
                (compiled.run, programs, compiled.function, compiled.packed_metadata, operator.itemgetter(*order))
            )

    def __call__(self, tensors: Tensors) -> Tensors | None:
        """The results; None where an address is not aligned as it was, or where a profiler watches."""
        if _hooked():
            return None
        device = self._device
        with device_of(device):
            results = tuple([self._empty(*spec) if type(spec) is tuple else spec for spec in self._results])
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            if functools.reduce(operator.or_, addresses) % ALIGNMENT:
                return None
            addresses += [0 if t is None else t.data_ptr() for t in results]
            start = 0
            if self._scratch:
                scratch = self._empty((self._scratch,), (1,), torch.uint8)
                start = scratch.data_ptr()
            addresses += [start + offset for offset in self._offsets]
            if not self._counters:
                self._launch((*addresses, 0, *self._numbers))
                return results
            counter = counters.buffer(self._counters, device)
            try:
                self._launch((*addresses, counter.data_ptr(), *self._numbers))
            except BaseException:
                counters.drop(counter)
                raise
        return results

    def _launch(self, values: tuple[Any, ...]) -> None:
        stream = self._driver.get_current_stream(self._driver.get_current_device())
        for run, programs, function, metadata, arguments in self._steps:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments(values))


def _specification(result: Tensor | None) -> Any:
    """Shape, strides and dtype of what each call allocates. A result without elements is the same in every call."""
    if result is None or result.numel() == 0:
        return result
    return tuple(result.shape), result.stride(), result.dtype


def _places(named: Tensors, recording: Recording) -> tuple[list[Tensor], dict[int, int]]:
    """Scratch: what launches take beside `named` and counters. Then the place of each of their arguments, by its id."""
    if len(recording.counters) > 1:
        raise RuntimeError("launches that are repeated take counters once")
    place = {id(t): i for i, t in enumerate(named) if t is not None}
    whole: dict[tuple[int, int], int] = {}  # the place of what spans these bytes; -1 for several
    for i, t in enumerate(named):
        if t is not None and t.numel():
            span = t.data_ptr(), t.nbytes
            whole[span] = -1 if span in whole else i
    of_counters = {id(t) for t in recording.counters}
    storages = {t.untyped_storage().data_ptr() for t in named if t is not None and t.numel()}
    scratch: list[Tensor] = []
    for _, _, args in recording.launches:
        for value in args:
            if not isinstance(value, Tensor) or id(value) in place or id(value) in of_counters or not value.numel():
                continue
            storage = value.untyped_storage()
            same = whole.get((value.data_ptr(), value.nbytes), -1)
            if same >= 0:
                place[id(value)] = same  # another view of an argument, such as its bytes
                continue
            if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:
                raise RuntimeError("launches that are repeated take whole tensors: pass no part of another one")
            place[id(value)] = len(named) + len(scratch)
            scratch.append(value)
    return scratch, place | {id(t): len(named) + len(scratch) for t in recording.counters}
