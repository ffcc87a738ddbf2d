"""Whether the Triton kernels can run, and what impl="auto" therefore takes. Imports without Triton."""

import functools
import importlib.util
import logging

import torch

logger = logging.getLogger("ept_kernels")

OLDEST_TRITON = (3, 6)  # the oldest whose compiled kernels have passed; its interpreter fails, 3.7's does not
OLDEST_GPU = (8, 0)  # bfloat16 and acquire / release atomics in hardware

_said: set[tuple[str, str | None]] = set()


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
    from .triton_common import interpreting

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


@torch.compiler.assume_constant_result
def resolve(impl: str, device: torch.device) -> str:
    """ "triton" where it can run or an error that says why not; for "auto" what it takes, said once."""
    if impl == "triton":
        reason = _why_not_on_gpu(device) if device.type == "cuda" else why_no_triton(device)
        if reason is not None:
            raise RuntimeError(f'impl="triton" cannot run: {reason}. Use impl="torch"')
    if impl == "auto":
        reason = _why_not_on_gpu(device) if device.type == "cuda" else f"the tensors are on {device.type}, not on a GPU"
        impl = "triton" if reason is None else "torch"
        if (impl, reason) not in _said:
            _said.add((impl, reason))
            logger.info('impl="auto" takes impl="%s": %s', impl, reason or f"the tensors are on a GPU ({device})")
    return impl
