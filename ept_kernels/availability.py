"""Whether the Triton kernels can run, and what impl="auto" therefore takes. Imports without Triton."""

import contextlib
import contextvars
import functools
import importlib.util
import logging
from collections.abc import Iterator

import torch

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")

logger = logging.getLogger("ept_kernels")

OLDEST_TRITON = (3, 6)  # the oldest whose compiled kernels have passed; its interpreter fails, 3.7's does not
OLDEST_GPU = (8, 0)  # bfloat16 and acquire / release atomics in hardware

_launches_nothing = contextvars.ContextVar("_launches_nothing", default=False)


@contextlib.contextmanager
def nothing_is_launched() -> Iterator[None]:
    """Inside, impl="triton" is taken on any device: for fake tensors, whose operators have shapes and launch nothing."""
    before = _launches_nothing.set(True)
    try:
        yield
    finally:
        _launches_nothing.reset(before)


_announced: set[tuple[str, str | None]] = set()


def why_no_triton(device: torch.device) -> str | None:
    """What keeps the Triton kernels from tensors on this device; None where they run.

    They run on NVIDIA and AMD GPUs, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1, set before the
    first import) or under a Triton driver whose device is the CPU (an emulator).
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_GPU:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return None
    from .common.triton_launch import interpreting

    if device.type == "cpu" and (interpreting() or _driver_of_cpu()):
        return None
    return f"the tensors are on {device.type}, not on a GPU"


_why_not_on_gpu = functools.cache(why_no_triton)  # what is known of a GPU stays true, and is asked in every call


def _driver_of_cpu() -> bool:
    import triton

    try:
        return triton.runtime.driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # Triton finds no driver
        return False


def resolve(impl: str, device: torch.device) -> str:
    """The implementation to use on a device: "auto" becomes "triton" where that can run and "torch" elsewhere.

    Raises:
        ValueError: the implementation is unknown.
        RuntimeError: "triton" was asked for and cannot run; the message says why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown: choose one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    return _resolved(impl, device)


@torch.compiler.assume_constant_result
def _resolved(impl: str, device: torch.device) -> str:
    if impl == "triton" and not _launches_nothing.get():
        reason = _why_not_on_gpu(device) if device.type == "cuda" else why_no_triton(device)
        if reason is not None:
            raise RuntimeError(f'impl="triton" cannot run: {reason}. Use impl="torch"')
    if impl == "auto":
        reason = _why_not_on_gpu(device) if device.type == "cuda" else f"the tensors are on {device.type}, not on a GPU"
        impl = "triton" if reason is None else "torch"
        if (impl, reason) not in _announced:
            _announced.add((impl, reason))
            logger.info('impl="auto" takes impl="%s": %s', impl, reason or f"the tensors are on a GPU ({device})")
    return impl
