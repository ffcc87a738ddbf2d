"""One vLLM engine in a process of its own: `python engine_run.py JOB RESULTS` reads rounds of requests and writes what came.

A job is JSON: {"engine": arguments of vllm.LLM, "rounds": [[request, …], …]}, the requests of a round in one batch; a request
is {"ids": […], "adapter": [name, number, directory] or null, "sampling": {…}}. A round that is refused is its error's text.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"
}  # fmt: skip

from vllm import LLM, PoolingParams, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest


def top(entries: dict | None) -> dict[int, float] | None:
    """Logarithms of probabilities by token."""
    return None if entries is None else {token: entry.logprob for token, entry in entries.items()}


def run(llm: LLM, requests: list[dict]) -> list[dict]:
    """The outcome of each request of one batch."""
    adapters = [None if request["adapter"] is None else LoRARequest(*request["adapter"]) for request in requests]
    prompts = [{"prompt_token_ids": request["ids"]} for request in requests]
    if llm.llm_engine.vllm_config.lora_config is None:
        adapters = None
    if llm.llm_engine.model_config.runner_type == "pooling":
        params = [PoolingParams(task="classify", use_activation=False) for _ in requests]
        outputs = llm.encode(prompts, params, lora_request=adapters, pooling_task="classify", use_tqdm=False)
        return [{"scores": output.outputs.data.tolist()} for output in outputs]
    params = [
        SamplingParams(**{"temperature": 0, "ignore_eos": True, "detokenize": False} | request["sampling"])
        for request in requests
    ]
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "cached": output.num_cached_tokens,
            "logprobs": [top(entry) for entry in output.outputs[0].logprobs or []],
            "prompt_logprobs": [top(entry) for entry in output.prompt_logprobs or []],
        }
        for output in llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
    ]


def main(job: dict) -> dict:
    llm = LLM(skip_tokenizer_init=True, **job["engine"])
    results: list = []
    for requests in job["rounds"]:
        try:
            results.append(run(llm, requests))
        except VLLMValidationError as error:  # of this round alone: the engine goes on
            results.append(str(error))
    preemptions = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    return {"rounds": results, "preemptions": preemptions}


if __name__ == "__main__":
    outcome = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(outcome), encoding="utf-8")
