"""Compile the project's own launches for a GPU that is not there, and read what the compiler made of them.

    with compiling_for("sm_90") as kernels:
        forward(...)                      # the launcher as it is, on CPU tensors; nothing runs
    resources(kernels[-1], "sm_90")       # registers, shared memory, spills, widths of loads and stores

Triton asks its driver which GPU it compiles for, and the driver launches. This one names the target, keeps what was
compiled and launches nothing.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Registers per scheduler's share of an SM (CU), threads that can be resident, shared memory: for the occupancy.
# CUDA programming guide, table of compute capabilities; AMD CDNA3 ISA, section 3.
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 4 * 64 * 512}
THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048, "gfx942": 2048}
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}


class _Utils:
    @staticmethod
    def get_device_properties(device):
        limit = SHARED[device.removeprefix("compiling-")]
        return {"max_shared_mem": limit, "warpSize": 32, "multiprocessor_count": 132, "max_num_regs": 65536}

    @staticmethod
    def load_binary(name, binary, shared, device):
        return None, None, 0, 0, 1024


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *args):
        pass


class CompilingDriver(DriverBase):
    launcher_cls, utils = _Launcher, _Utils()

    def __init__(self, name):
        self.name = name

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return TARGETS[self.name]

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return f"compiling-{self.name}"

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise NotImplementedError("nothing runs here")


@contextlib.contextmanager
def compiling_for(name: str):
    """Inside, launches compile for the target and do not run. Yields the list of compiled kernels."""
    config, kernels = triton.runtime.driver, []
    before = config._active
    compile_kernel = triton.runtime.jit.JITFunction.run

    def run(self, *args, **kwargs):
        kernel = compile_kernel(self, *args, **kwargs)
        kernels.append(kernel)
        return kernel

    config.set_active(CompilingDriver(name))
    triton.runtime.jit.JITFunction.run = run
    try:
        yield kernels
    finally:
        triton.runtime.jit.JITFunction.run = compile_kernel
        config._active = before


def resources(kernel, target: str) -> dict:
    """What the compiler reports: registers and shared memory of a program, spilled bytes, occupancy, access widths."""
    found = _amd(kernel) if target == "gfx942" else _nvidia(kernel)
    warps, lanes = kernel.metadata.num_warps, TARGETS[target].warp_size
    per_register = 8  # both allocate registers in eights
    taken = -(-found["registers"] // per_register) * per_register * warps * lanes
    by_shared = SHARED[target] // found["shared"] if found["shared"] else THREADS[target]
    found["programs_per_sm"] = min(REGISTERS[target] // taken, by_shared, THREADS[target] // (warps * lanes))
    return found


def _nvidia(kernel) -> dict:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    return dict(
        registers=number["REG"],
        shared=kernel.metadata.shared,
        spilled=number["STACK"] + number["LOCAL"],
        loads=_widths(re.findall(r"\bLDG\.E(\S*)", sass)),
        stores=_widths(re.findall(r"\bSTG\.E(\S*)", sass)),
        tensor_core=len(re.findall(r"\b(?:HMMA|DMMA|UTC\w*MMA|\w*GMMA)\b", sass)),
    )


def _widths(suffixes) -> dict:
    counts = {}
    for suffix in suffixes:
        bits = next((int(bits) for bits in re.findall(r"\b(128|64|U8|U16|S8|S16|8|16)\b", suffix) if bits.isdigit()), 0)
        small = re.search(r"\.[US](8|16)\b", suffix)
        bits = int(small.group(1)) if small else bits or 32
        counts[bits] = counts.get(bits, 0) + 1
    return dict(sorted(counts.items()))


def _amd(kernel) -> dict:
    asm = kernel.asm["amdgcn"]
    width = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}

    def count(kind):
        counts = {}
        for suffix in re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+)", asm):
            bits = width.get(suffix, 16 if "short" in suffix else 8)
            counts[bits] = counts.get(bits, 0) + 1
        return dict(sorted(counts.items()))

    number = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", asm)
    }
    return dict(
        registers=number["vgpr_count"],
        shared=kernel.metadata.shared,
        spilled=number["private_segment_fixed_size"] + number["vgpr_spill_count"],
        loads=count("load"),
        stores=count("store"),
        tensor_core=len(re.findall(r"\bv_mfma_", asm)),
    )
