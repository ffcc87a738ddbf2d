"""What the compiler makes of each kernel: the table kernel_resources.json, and what makes it worse.

python tests/kernel_resources.py           # compiles everything and writes the table (about 10 minutes on one core)
"""

import functools
import itertools
import json
import sys
from pathlib import Path

import torch
from kernel_compiler import TARGETS, compiling_for, resources

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".json")
WIDTHS = (768, 1024, 2048, 4096)
# dtype of E or of the hidden states, dtype of the trained tensors
DTYPES = {"bf16+fp32": (torch.bfloat16, torch.float32), "fp32": (torch.float32,) * 2}
TOKEN_RANKS = (0, 24)
SIZES = dict(s=60, n=256, r=30, k=4, h=8, batch=2, length=64)  # kernels depend on r, k, h and d only, not on the rest
LAYER_WIDTHS = (384, 768, 1024, 2048, 4096, 8192)
LAYER_RANKS = (1, 4, 8, 16, 64)
DEFAULT_WIDTHS, DEFAULT_RANK = (768, 4096), 4  # of the default preset
STACK_WIDTHS = (384, 768, 4096)
STACK_RANKS = (0, 4, 24)
HIGHER_IS_WORSE = ("registers", "shared", "spilled")


def keys():
    """One for each compilation: of the input stage, with all parts and with the default preset's, of the layer's update, of
    stacks of adapters, of padded columns."""
    for target, d, dtypes, q in itertools.product(TARGETS, WIDTHS, DTYPES, TOKEN_RANKS):
        yield f"{target} d={d} {dtypes} q={q}"
    for target, d in itertools.product(TARGETS, DEFAULT_WIDTHS):
        yield f"default {target} d={d} bf16+fp32 q={DEFAULT_RANK}"
    for target, d, q in itertools.product(TARGETS, LAYER_WIDTHS, LAYER_RANKS):
        yield f"layer {target} d={d} bf16+fp32 q={q}"
    for target, d, q, lowrank in itertools.product(TARGETS, STACK_WIDTHS, STACK_RANKS, ("factors", "table")):
        yield f"{lowrank} {target} d={d} bf16+fp32 q={q}"
    for target in TARGETS:
        yield f"columns {target} d=0 bf16+fp32 q=0"


def measure(key: str) -> dict[str, dict]:
    """Resources of the stem's kernels, by their names."""
    *stem, target, width, dtypes, rank = key.split()
    d, q = int(width.removeprefix("d=")), int(rank.removeprefix("q="))
    with compiling_for(target) as kernels:
        LAUNCHES[stem[0] if stem else "input"](d, q, *DTYPES[dtypes])
    return {kernel.metadata.name: jsonable(resources(kernel, target)) for kernel in kernels}


def _launch_input(d: int, q: int, source_dtype: torch.dtype, dtype: torch.dtype) -> None:
    from ept_kernels.prompt_embed.arguments import Settings, Text, Weights
    from ept_kernels.prompt_embed.triton_op import prompt_embed

    s, n, r, k, h, batch, length = SIZES.values()

    def weight(*shape):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    ids, mask = torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.int64)
    tokens = (weight(q, d), weight(q, d)) if q else (None, None)
    out = prompt_embed(
        Text(ids, torch.zeros(10, d, dtype=source_dtype), mask),
        Weights(weight(s, d), weight(n, r), weight(r, d), weight(k, h, d), weight(k, h, d), weight(k, d), *tokens),
        Settings(scale=1.0),
    )
    out.backward(torch.zeros_like(out))


def _launch_default(d: int, q: int, source_dtype: torch.dtype, dtype: torch.dtype) -> None:
    from ept_kernels import prompt_embed

    ids, mask = torch.zeros(2, 64, dtype=torch.int64), torch.ones(2, 64, dtype=torch.int64)
    prompt, down, up = (torch.zeros(rows, d, dtype=dtype, requires_grad=True) for rows in (2, q, q))
    table, others = torch.zeros(10, d, dtype=source_dtype), [None] * 5
    out = prompt_embed(ids, mask, table, prompt, *others, scale=1.0, token_down=down, token_up=up, impl="triton")
    out.backward(torch.zeros_like(out))


def _launch_layer(d: int, q: int, hidden_dtype: torch.dtype, dtype: torch.dtype) -> None:
    from ept_kernels.layer_update.arguments import Settings, Update
    from ept_kernels.layer_update.triton_op import layer_update

    hidden = torch.zeros(2, 512, d, dtype=hidden_dtype, requires_grad=True)
    down, up = (torch.zeros(q, d, dtype=dtype, requires_grad=True) for _ in range(2))
    out = layer_update(Update(hidden, down, up), Settings(hidden_scale=2.0))
    out.backward(torch.zeros_like(out))


def _launch_stack(lowrank: str, d: int, q: int, source_dtype: torch.dtype, dtype: torch.dtype) -> None:
    from ept_kernels import prompt_embed

    adapters, (s, n, r, _, _, batch, length) = 3, SIZES.values()

    def constant(*shape):
        return torch.zeros(adapters, *shape, dtype=dtype)

    ids, mask = torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.int64)
    a, b = (constant(n, r), constant(r, d)) if lowrank == "factors" else (constant(n, d), None)
    prompt_embed(
        ids, mask, torch.zeros(10, d, dtype=source_dtype), constant(s, d), a, b, None, None, None, scale=1.0,
        token_down=constant(q, d) if q else None, token_up=constant(q, d) if q else None,
        adapter_index=torch.zeros(batch, dtype=torch.int64), prompt_start=torch.zeros(batch, dtype=torch.int32), impl="triton",
    )  # fmt: skip


def _launch_columns(d: int, q: int, source_dtype: torch.dtype, dtype: torch.dtype) -> None:
    from ept_kernels import prompt_columns

    mask = torch.ones(2, 64, dtype=torch.int64)
    prompt_columns(mask, 8, labels=mask, prompt_lengths=torch.ones(2, dtype=torch.int64), impl="triton")


LAUNCHES = {
    "input": _launch_input, "default": _launch_default, "layer": _launch_layer, "columns": _launch_columns,
    "factors": functools.partial(_launch_stack, "factors"), "table": functools.partial(_launch_stack, "table"),
}  # fmt: skip


def jsonable(row: dict) -> dict:
    return {name: {str(k): v for k, v in x.items()} if isinstance(x, dict) else x for name, x in row.items()}


def worse(now: dict, before: dict) -> list[str]:
    """In words: what got worse from one row of the table to another."""
    found = [f"{name} {before[name]} → {now[name]}" for name in HIGHER_IS_WORSE if now[name] > before[name]]
    if now["programs_per_sm"] < before["programs_per_sm"]:
        found.append(f"programs per SM {before['programs_per_sm']} → {now['programs_per_sm']}")
    for kind in ("loads", "stores"):
        if now[kind].get("128", 0) < before[kind].get("128", 0):
            found.append(f"128-bit {kind} {before[kind].get('128', 0)} → {now[kind].get('128', 0)}")
    if now["tensor_core"] == 0 < before["tensor_core"]:
        found.append("no tensor-core instructions any more")
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""  # the beginning of the keys to measure anew
    table = json.loads(TABLE.read_text(encoding="utf-8")) if wanted else {}
    for key in keys():
        if not key.startswith(wanted):
            continue
        table[key] = measure(key)
        print(key, {name: [row[x] for x in HIGHER_IS_WORSE] for name, row in table[key].items()}, flush=True)
    rows = (f" {json.dumps(key)}: {{\n" + ",\n".join(f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in row.items()) + "}"
            for key, row in table.items())  # fmt: skip
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
