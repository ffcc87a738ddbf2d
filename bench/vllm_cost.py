"""What adapters cost in vLLM: tokens per second with them over those without. `python -m bench.vllm_cost DIRECTORY`.

An optional measurement, in the environment of `make test-vllm`. SmolLM2-135M with seeded adapters of the default preset is
served by one engine at a time, eagerly. In the same engine the plugin's hooks are taken out and put back, and the two take
turns, so that a busy machine slows both alike. Each turn is one batch of requests, prompt and new tokens counted. The ratios of
neighbouring turns are printed as JSON: least, median, greatest.
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

from bench.text.language_models import save_in_fp32
from ept import EPTConfig, get_ept_model
from ept.files.adapter_dir import read_adapter
from ept.layer.folded import fold_layer
from ept.machine import describe
from ept.serving.served_dir import write_served

ADAPTERS, REQUESTS, PROMPT, NEW_TOKENS, TURNS = 16, 16, 32, 16, 5
ENGINES: dict[str, dict[str, Any]] = {
    "one": {"enforce_eager": True},
    "16 mixed": {
        "enable_lora": True,
        "max_loras": ADAPTERS,
    },  # vLLM compiles no graph on a CPU where LoRA requests are on
}


def prepare(directory: Path) -> None:
    """Writes the backbone and its adapters in vLLM's form."""
    save_in_fp32("smollm2", directory / "backbone")
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


def measure(name: str, directory: Path, pipe: Connection) -> None:
    """Sends the seconds of each pair of turns in a new engine: without the plugin's hooks, and with them."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    if name == "one":
        os.environ["EPT_VLLM_ADAPTER"] = str(directory / "adapter0")
    else:
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
    if name != "one":
        requests = [LoRARequest(f"a{n}", n + 1, str(directory / f"adapter{n}")) for n in range(ADAPTERS)]
    layers = llm.apply_model(lambda model: list(model.model.layers))[0]
    hooks = [dict(layer._forward_pre_hooks) for layer in layers]

    def seconds(with_hooks: bool) -> float:
        for layer, hook in zip(layers, hooks, strict=True):
            layer._forward_pre_hooks.clear()
            layer._forward_pre_hooks.update(hook if with_hooks else {})
        start = time.perf_counter()
        llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        return time.perf_counter() - start

    pairs = []
    for turn in range(TURNS + 1):
        order = (False, True) if turn % 2 else (True, False)
        pairs.append({with_hooks: seconds(with_hooks) for with_hooks in order})
    pipe.send([(pair[False], pair[True]) for pair in pairs[1:]])  # the first warms up


def main(directory: Path) -> None:
    import vllm

    if not (directory / f"adapter{ADAPTERS - 1}").is_dir():
        prepare(directory)
    spawned = multiprocessing.get_context("spawn")
    for name in ENGINES:
        ours, theirs = spawned.Pipe()
        process = spawned.Process(target=measure, args=(name, directory, theirs))
        process.start()
        pairs = ours.recv()
        process.join()
        tokens = REQUESTS * (PROMPT + NEW_TOKENS)
        ratios = sorted(without / with_hooks for without, with_hooks in pairs)
        record = {
            "measurement": "tokens per second with adapters over without, in one engine", "adapters": name,
            "model": "SmolLM2-135M, fp32, eager", "requests": REQUESTS, "prompt_tokens": PROMPT,
            "new_tokens": NEW_TOKENS, "pairs": TURNS,
            "tokens_per_second_without": round(tokens / statistics.median(without for without, _ in pairs), 1),
            "ratio": [round(value, 3) for value in (ratios[0], statistics.median(ratios), ratios[-1])],
        }  # fmt: skip
        print(json.dumps(record | describe() | {"vllm": vllm.__version__}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
