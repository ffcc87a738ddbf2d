"""What the compiler makes of each kernel: the table kernel_resources.json, and what makes it worse.

python tests/kernel_resources.py           # compiles everything and writes the table (about 10 minutes on one core)
"""

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
HIGHER_IS_WORSE = ("registers", "shared", "spilled")


def keys():
    """One for each compilation: of the input stage, then of the layer's update."""
    for target, d, dtypes, q in itertools.product(TARGETS, WIDTHS, DTYPES, TOKEN_RANKS):
        yield f"{target} d={d} {dtypes} q={q}"
    for target, d, q in itertools.product(TARGETS, LAYER_WIDTHS, LAYER_RANKS):
        yield f"layer {target} d={d} bf16+fp32 q={q}"


def measure(key: str) -> dict[str, dict]:
    """Resources of the stem's kernels, by their names."""
    *stem, target, width, dtypes, rank = key.split()
    d, q = int(width.removeprefix("d=")), int(rank.removeprefix("q="))
    with compiling_for(target) as kernels:
        (_launch_layer if stem else _launch_input)(d, q, *DTYPES[dtypes])
    return {kernel.metadata.name: jsonable(resources(kernel, target)) for kernel in kernels}


def _launch_input(d: int, q: int, source_dtype: torch.dtype, dtype: torch.dtype) -> None:
    from ept_kernels.prompt_embed.arguments import Settings, Text, Weights
    from ept_kernels.prompt_embed.triton_op import prompt_embed

    s, n, r, k, h, batch, length = SIZES.values()

    def weight(*shape):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    ids, mask = torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.int64)
    tokens = (weight(q, d), weight(q, d)) if q else (None, None)
    out, _ = prompt_embed(
        Text(ids, torch.zeros(10, d, dtype=source_dtype), mask),
        Weights(weight(s, d), weight(n, r), weight(r, d), weight(k, h, d), weight(k, h, d), weight(k, d), *tokens),
        Settings(scale=1.0),
    )
    out.backward(torch.zeros_like(out))


def _launch_layer(d: int, q: int, hidden_dtype: torch.dtype, dtype: torch.dtype) -> None:
    from ept_kernels.layer_update.arguments import Settings, Update
    from ept_kernels.layer_update.triton_op import layer_update

    hidden = torch.zeros(2, 512, d, dtype=hidden_dtype, requires_grad=True)
    down, up = (torch.zeros(q, d, dtype=dtype, requires_grad=True) for _ in range(2))
    out = layer_update(Update(hidden, down, up), Settings(hidden_scale=2.0))
    out.backward(torch.zeros_like(out))


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
