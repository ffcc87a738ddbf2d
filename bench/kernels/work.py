"""What runs at a point of the microbenchmarks."""

from .checked import CannotRun, Work
from .peers import peer_work
from .points import PEERS, Point
from .stems import compiled, stem_case, stem_function

__all__ = ["work"]


def work(point: Point, device: str) -> Work:
    """The work of a point. `CannotRun` where its implementation lacks something; the message says what."""
    if point.impl in PEERS:
        return peer_work(point.impl, point.sizes, device)
    if point.impl == "compile":
        function, calls = compiled(point.stem, device)
        return Work(stem_case(point.stem, point.sizes, device, point.adapters), function, calls)
    function = stem_function(point.stem, point.impl)
    if point.impl == "triton":
        _probe(point, device)
    return Work(stem_case(point.stem, point.sizes, device, point.adapters), function)


def _probe(point: Point, device: str) -> None:
    """`CannotRun` if the stem has no kernel for this device."""
    inputs = stem_case(point.stem, point.sizes, device, point.adapters).inputs
    try:
        stem_function(point.stem, "triton")(inputs)
    except RuntimeError as reason:
        if not str(reason).startswith('impl="triton" cannot run'):
            raise
        raise CannotRun(str(reason)) from reason
