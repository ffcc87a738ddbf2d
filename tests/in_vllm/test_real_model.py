"""SmolLM2-135M with its own weights: greedy tokens of adapters in vLLM are EPTModel.generate's."""

import importlib.util

import pytest
import transformers as hf

if any(importlib.util.find_spec(name) is None for name in ("vllm", "gguf")):
    pytest.skip("vLLM or what reads the model's file is not installed: make test-vllm", allow_module_level=True)

from bench.text.language_models import save_in_fp32
from ept import EPTConfig, get_ept_model
from in_vllm.served_models import NEW_TOKENS, Served, shaken, slots

TEXTS = ["The capital of France is", "def add(a, b):\n    return", "Hello!"]


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    served = Served("smollm2", tmp_path_factory.mktemp("smollm2"))
    save_in_fp32("smollm2", served.directory / "backbone")
    for seed, name in enumerate(("first", "second"), start=1):
        backbone = hf.AutoModelForCausalLM.from_pretrained(served.directory / "backbone").eval()
        served.add(name, shaken(get_ept_model(backbone, EPTConfig(prompt_length=seed + 1)).eval(), seed, std=0.03))
    return served


def test_tokens_of_real_text(served):
    tokenizer = hf.AutoTokenizer.from_pretrained(served.directory / "backbone")
    asked = [(name, tokenizer(text).input_ids) for text in TEXTS for name in ("first", "second", None)]
    engine = dict(enable_lora=True, max_loras=2, max_num_batched_tokens=64)
    outcome = served.run([[served.request(name, ids, NEW_TOKENS) for name, ids in asked]], slots(2 + 1), **engine)
    for (name, ids), got in zip(asked, outcome["rounds"][0], strict=True):
        assert got["tokens"] == served.tokens(name, ids, NEW_TOKENS, eos_token_id=None), (name, tokenizer.decode(ids))
    assert len({tuple(got["tokens"]) for got in outcome["rounds"][0]}) == len(asked)
