"""Tokens per second of adapters in vLLM over the bare model's: `python -m bench.vllm_cost DIRECTORY`.

An optional measurement, in the environment of `make test-vllm`. SmolLM2-135M with seeded adapters of the default preset is
served by four engines, each in a process of its own, all open at once; they take turns, so that a busy machine slows all.
Each turn is one batch of requests, prompt and new tokens counted. The medians of the ratios of neighbouring turns are
printed as JSON. vLLM compiles no graph on a CPU where LoRA requests are on, so the mixed batch is held against both forms.
With VLLM_CPU_CI_ENV=1 vLLM traces the graph and runs it without a compiler, which starts faster.
"""

import json
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.text.real_text import save_smollm2
from ept import EPTConfig, get_ept_model
from ept.files.adapter_dir import read_adapter
from ept.layer.folded import fold_layer
from ept.machine import describe
from ept.serving.served_dir import write_served

ADAPTERS, REQUESTS, PROMPT, NEW_TOKENS, TURNS = 16, 16, 32, 16, 5
ENGINES: dict[str, dict[str, Any]] = {
    "bare": {},
    "one": {},
    "bare, no graph": {"enforce_eager": True},
    "16 mixed": {"enable_lora": True, "max_loras": ADAPTERS},
}
RATIOS = (("one", "bare"), ("16 mixed", "bare, no graph"), ("16 mixed", "bare"))


def prepare(directory: Path) -> None:
    """Writes the backbone and its adapters in vLLM's form."""
    save_smollm2(directory / "backbone")
    backbone: Any = transformers.AutoModelForCausalLM.from_pretrained(directory / "backbone")
    model = get_ept_model(backbone, EPTConfig())
    start = {name: parameter.detach().clone() for name, parameter in model.ept.named_parameters()}
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.ept.named_parameters():
                parameter.copy_(start[name] + 0.02 * torch.randn(parameter.shape))
        model.save_pretrained(directory / f"trained{number}")
        settings, _ = read_adapter(directory / f"trained{number}")
        write_served(directory / f"adapter{number}", fold_layer(model.ept), settings, None)


def serve(name: str, directory: Path, pipe: Connection) -> None:
    """An engine that runs the batch whenever it is told to, and answers with the seconds."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    if name == "one":
        os.environ["EPT_VLLM_ADAPTER"] = str(directory / "adapter0")
    elif name == "16 mixed":
        os.environ["EPT_VLLM_SLOTS"] = '{"rows": 2, "rank": 4}'
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(directory / "backbone"), skip_tokenizer_init=True, dtype="float32", max_model_len=256, block_size=32,
        kv_cache_memory_bytes=2**28, enable_prefix_caching=False, max_num_seqs=REQUESTS, **ENGINES[name],
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": torch.randint(5, 40000, (PROMPT,), generator=draw).tolist()} for _ in range(REQUESTS)
    ]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    requests = None
    if name == "16 mixed":
        requests = [LoRARequest(f"a{n}", n + 1, str(directory / f"adapter{n}")) for n in range(ADAPTERS)]
    pipe.send(0.0)
    while pipe.recv():
        start = time.perf_counter()
        llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        pipe.send(time.perf_counter() - start)


def main(directory: Path) -> None:
    import vllm

    if not (directory / f"adapter{ADAPTERS - 1}").is_dir():
        prepare(directory)
    spawned = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in ENGINES:
        ours, theirs = spawned.Pipe()
        process = spawned.Process(target=serve, args=(name, directory, theirs), daemon=True)
        process.start()
        processes.append(process)
        pipes[name] = ours
        ours.recv()
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    for turn in range(TURNS + 1):
        for name in list(ENGINES)[:: 1 if turn % 2 else -1]:
            pipes[name].send(True)
            taken = pipes[name].recv()
            if turn:  # the first warms up
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    tokens = REQUESTS * (PROMPT + NEW_TOKENS)
    record = {
        "measurement": "tokens per second over the bare model's, medians of pairs",
        "model": "SmolLM2-135M, fp32", "requests": REQUESTS, "prompt_tokens": PROMPT, "new_tokens": NEW_TOKENS,
        "turns": TURNS, "graph": "as traced" if os.environ.get("VLLM_CPU_CI_ENV") == "1" else "compiled",
        "tokens_per_second": {name: round(tokens / statistics.median(taken), 1) for name, taken in seconds.items()},
        "ratios": {
            f"{name} / {base}": [round(f(b / a for a, b in zip(seconds[name], seconds[base], strict=True)), 3)
                                 for f in (min, statistics.median, max)]
            for name, base in RATIOS
        },
    }  # fmt: skip
    print(json.dumps(record | describe() | {"vllm": vllm.__version__}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
