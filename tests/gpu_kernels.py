"""The kernels on the GPU of this machine: `make gpu`. Results go to bench/results/kernels/<device>.json.

0. layer_update, checked and timed (gpu_layer_update.py);
1. the matrix of the interpreter's tests in bf16, fp16 and fp32, the plain formula on the same GPU as the yardstick,
   on all cores, since compiling takes longest;
2. one launch against the same roles one after another, and two runs against each other: the same bits;
3. CUDA-graph capture and replay;
4. whole models behind EPT against the plain formula on the CPU: loss, gradients, greedy generation;
5. compute-sanitizer's race check on a few cases, where it is installed.

Times are `make bench-gpu`'s.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import gpu_layer_update
import torch
import transformers as hf
import triton
from kernel_cases import covering_cases, errors, kernel_case, run, source_dtype

from ept_kernels import prompt_embed
from tiny_models import all_parts, backbone, ids, padded, wrapped

ROOT = Path(__file__).parents[1]
CASES = 150
MOST_WORKERS = 16  # processes, each with a context of its own on the GPU
SANITIZED = 5
# On a GPU the plain formula's fp32 products are fp32's own, the kernels' three of TF32 each: up to 3.2 times its error was seen.
TIMES = 4.0
BENCH = dict(batch=32, length=256, s=60, n=256, r=30, k=4, h=8)


def on_gpu(case: dict) -> dict:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in case.items()}


def check_case(seed: int, axes: dict) -> dict:
    case = on_gpu(kernel_case(seed, **axes))
    try:
        return errors(case, run(case, "triton", source_dtype(case)), times=TIMES)
    except Exception as error:  # the other cases go on
        return dict(raised=f"{type(error).__name__}: {error}")


def check_matrix(number: int, workers: int) -> dict:
    cases = covering_cases(0, number)[:number]
    if workers == 1:  # under the sanitizer, which follows one process
        found = map(check_case, range(number), cases)
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(check_case, range(number), cases))
    wrong = {f"{seed} {axes}": faults for (seed, axes), faults in zip(enumerate(cases), found, strict=True) if faults}
    return dict(cases=number, wrong=wrong)


def bench_case(d: int, q: int) -> dict:
    case = kernel_case(
        0, shape="tiles", dtype=torch.float32, source_dtype=torch.bfloat16, parts="all" if q else "paper", mask="none",
        start="first", activation="silu", switch="on", inputs=False, e=1.0,
        sizes=BENCH | dict(d=d, q=max(q, 1)),
    )  # fmt: skip
    return on_gpu(case)


def same_bits() -> dict:
    case = bench_case(768, 24)
    first, again = (run(case, "triton", torch.bfloat16) for _ in range(2))
    os.environ["EPT_LAUNCH"] = "sequence"
    sequence = run(case, "triton", torch.bfloat16)
    del os.environ["EPT_LAUNCH"]
    return dict(
        two_runs=all(torch.equal(first[name], again[name]) for name in first),
        roles_in_sequence=all(torch.equal(first[name], sequence[name]) for name in first),
    )


def graph_replays() -> bool:
    case = bench_case(768, 0)
    want = prompt_embed(**case, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prompt_embed(**case, impl="triton")
    for _ in range(3):
        out.zero_()
        graph.replay()
    torch.cuda.synchronize()
    return torch.equal(out, want)


def models() -> dict:
    """How far a model's loss and trained gradients on the GPU are from those on the CPU, and whether it says the same."""
    far = {}
    for name, auto, side in (
        ("bert", hf.AutoModelForSequenceClassification, "right"),
        ("llama", hf.AutoModelForCausalLM, "left"),
        ("t5", hf.AutoModelForSeq2SeqLM, "right"),
    ):
        found, said = [], []
        for device, impl in (("cpu", "reference"), ("cuda", "triton")):
            model = wrapped(backbone(name, auto), all_parts(impl=impl, deep_layers=-1)).to(device)
            text, mask = (t.to(device) for t in padded([ids(1, 9), ids(1, 4, seed=1)], side))
            labels = torch.tensor([0, 1], device=device) if name == "bert" else text
            loss = model(input_ids=text, attention_mask=mask, labels=labels).loss
            loss.backward()
            grads = [p.grad.flatten() for p in model.ept.parameters()]
            found.append(torch.cat([loss.detach()[None], *grads]).double().cpu())
            if name != "bert":
                said.append(
                    model.generate(input_ids=text, attention_mask=mask, max_new_tokens=8, do_sample=False).cpu()
                )
        far[name] = dict(error=((found[1] - found[0]).norm() / found[0].norm()).item())
        if said:
            far[name]["same_tokens"] = torch.equal(*said)
    return far


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--matrix-only", action="store_true")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, MOST_WORKERS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make gpu: no GPU here")
    layer = {} if options.matrix_only else dict(layer_update=gpu_layer_update.check(workers=options.workers))
    result = layer | dict(
        device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        commit=subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip(),
        matrix=check_matrix(options.cases, options.workers),
    )  # fmt: skip
    if not options.matrix_only:
        result |= dict(same_bits=same_bits(), graph_replays=graph_replays(), models=models())
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer:
            command = [sanitizer, "--tool", "racecheck", "--error-exitcode", "1", sys.executable, __file__]
            done = subprocess.run(
                [*command, "--matrix-only", "--workers", "1", "--cases", str(SANITIZED)], capture_output=True, text=True
            )
            result["racecheck"] = dict(passed=done.returncode == 0, said=done.stdout[-500:])
        target = ROOT / "bench/results/kernels" / f"{result['device'].replace(' ', '_')}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    layer = result.get("layer_update", dict(wrong={}, matrix=dict(wrong={})))
    sys.exit(bool(result["matrix"]["wrong"] or layer["wrong"] or layer["matrix"]["wrong"]))


if __name__ == "__main__":
    main()
