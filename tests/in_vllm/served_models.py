"""Seeded models of the three architectures, adapters on them in both forms, and engines in processes of their own."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from ept import EPTConfig, EPTModel, get_ept_model
from ept.files.adapter_dir import read_adapter
from ept.layer.folded import fold_layer
from ept.serving.served_dir import write_served

VOCAB, MODEL_LENGTH, NEW_TOKENS = 512, 128, 16
# Large enough start values that greedy tokens differ from model to model; eos is none, so that lengths are the callers'.
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
    intermediate_size=256, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    pad_token_id=0, initializer_range=0.4,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_SIZES),
    "qwen3": lambda: hf.Qwen3Config(**_SIZES),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_SIZES | dict(initializer_range=0.2),
        sliding_window=16, layer_types=["sliding_attention"] * 3 + ["full_attention"],
    ),
}  # fmt: skip
# Adapters differ in prompt length, rank, depth and parts; "long" has more rows than a chunk of a prompt has tokens.
ADAPTERS: dict[str, dict[str, Any]] = {
    "default": dict(prompt_length=3, rank=0, num_spaces=0),
    "all": dict(
        prompt_length=5, rank=4, num_spaces=2, space_dim=2, max_text_length=20, lowrank_update=True, token_rank=2
    ),
    "shallow": dict(prompt_length=1, rank=0, deep_layers=2),
    "long": dict(prompt_length=40, rank=0, num_spaces=0, token_rank=3),
}


def backbone(kind: str, auto: Any = hf.AutoModelForCausalLM, **settings: Any) -> Any:
    """The seeded model of an architecture."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    for name, value in settings.items():
        setattr(config, name, value)
    return auto.from_config(config).eval()


def texts(*lengths: int, seed: int = 3) -> list[list[int]]:
    """Token ids of texts of these lengths; equal lengths have equal texts."""
    draw = [torch.Generator().manual_seed(seed * 1000 + length) for length in lengths]
    return [torch.randint(5, VOCAB, (length,), generator=g).tolist() for length, g in zip(lengths, draw, strict=True)]


@torch.no_grad()
def shaken(model: EPTModel, seed: int, std: float = 0.3) -> EPTModel:
    """The model with every tensor of its adapter away from its start value."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.ept.parameters():
        parameter += torch.randn(parameter.shape, generator=g) * std
    return model


def save(model: EPTModel, directory: Path) -> str:
    """The adapter in vLLM's form."""
    model.save_pretrained(directory / "trained")
    head = model.adapter_tensors().get("head.score.weight")
    write_served(directory / "served", fold_layer(model.ept), read_adapter(directory / "trained")[0], head)
    return str(directory / "served")


@dataclass
class Served:
    """A seeded backbone's directory, and adapters on it: as models, and as directories for vLLM."""

    kind: str
    directory: Path
    models: dict[str, EPTModel] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)

    @classmethod
    def make(cls, kind: str, directory: Path) -> "Served":
        served = cls(kind, directory)
        backbone(kind).save_pretrained(directory / "backbone")
        for seed, (name, settings) in enumerate(ADAPTERS.items(), start=1):
            model = shaken(get_ept_model(backbone(kind), EPTConfig(**settings)).eval(), seed)
            served.add(name, model)
        return served

    def add(self, name: str, model: EPTModel) -> None:
        self.models[name], self.adapters[name] = model, save(model, self.directory / name)

    def tokens(self, name: str | None, ids: list[int], new: int = NEW_TOKENS, **settings: Any) -> list[int]:
        """What EPTModel.generate writes behind a text, greedily; None: without an adapter."""
        model = self.models[name or next(iter(self.models))]
        inputs = torch.tensor([ids])
        with torch.no_grad():
            if name is None:
                with model.disable_adapter():
                    out = model.generate(inputs, do_sample=False, max_new_tokens=new, **settings)
            else:
                out = model.generate(inputs, do_sample=False, max_new_tokens=new, **settings)
        return out[0, len(ids) :].tolist()

    def request(self, name: str | None, ids: list[int], new: int = NEW_TOKENS, **sampling: Any) -> dict:
        """A request of `engine_run`."""
        numbered = list(self.adapters)
        adapter = None if name is None else [name, numbered.index(name) + 1, self.adapters[name]]
        return {"ids": ids, "adapter": adapter, "sampling": {"max_tokens": new} | sampling}

    def run(self, rounds: list[list[dict]], environment: dict[str, str], **engine: Any) -> dict:
        """What an engine on this backbone gives for rounds of requests."""
        return run_engine(self.directory, self.directory / "backbone", rounds, environment, **engine)


def run_engine(
    directory: Path, model: Path, rounds: list[list[dict]], environment: dict[str, str], **engine: Any
) -> dict:
    """What a new engine gives for rounds of requests; the environment chooses what the plugin serves.

    vLLM compiles a graph of the model, which torch runs as it is (VLLM_CPU_CI_ENV), unless `environment` says otherwise.
    """
    job, results = directory / "job.json", directory / "results.json"
    settings = dict(
        model=str(model), dtype="float32", max_model_len=MODEL_LENGTH, kv_cache_memory_bytes=2**27, block_size=32,
        max_num_batched_tokens=32, disable_log_stats=False, seed=0,
    )  # fmt: skip
    job.write_text(json.dumps({"engine": settings | engine, "rounds": rounds}), encoding="utf-8")
    results.unlink(missing_ok=True)
    plugin = {"EPT_VLLM_ADAPTER": "", "EPT_VLLM_SLOTS": ""}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("engine_run.py")), str(job), str(results)],
        env=os.environ | {"VLLM_CPU_CI_ENV": "1", "PYTHONPATH": ""} | plugin | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=900, cwd=directory,
    )  # fmt: skip
    if not results.is_file():
        raise RuntimeError(f"vLLM ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return json.loads(results.read_text(encoding="utf-8"))


@functools.cache
def slots(rows: int = 64, rank: int = 4) -> dict[str, str]:
    """The environment for adapters by request."""
    return {"EPT_VLLM_SLOTS": json.dumps({"rows": rows, "rank": rank})}
