"""What the peers do with the embeddings, as work on the same batch. Prompt tuning and LoRA are PEFT's own code."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_kernels.prompt_embed import traffic

from .checked import CannotRun, Case, Inputs, Work
from .points import FLOOR, LORA_LAYERS, LORA_RANK
from .stems import text_inputs

__all__ = ["peer_work"]


def peer_work(name: str, x: traffic.Shapes, device: str) -> Work:
    """A peer's embedding step; of LoRA what it adds to its layers. `CannotRun` where PEFT is asked for and missing."""
    g = torch.Generator(device).manual_seed(0)
    if name.startswith("LoRA"):
        _ask_for_peft(name)
        return _lora(x, g, device)
    text = text_inputs(x, g, device)
    if name == "DePT":
        return _dept(text, x, g, device)
    if name == FLOOR:
        return Work(Case(text | dict(prompt=_weight(g, device, x.s, x.d)), _joined), _joined)
    _ask_for_peft(name)
    return _prompt_tuning(text, x, device)


def _ask_for_peft(name: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise CannotRun(f"{name} is PEFT's, which is not installed")


def _weight(g: torch.Generator, device: str, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=g, device=device) / shape[-1] ** 0.5).requires_grad_()


def _joined(i: Inputs) -> Tensor:
    """The text's embeddings behind a prompt."""
    embeds = F.embedding(i["input_ids"], i["embedding_weight"])
    return torch.cat([i["prompt"].to(embeds.dtype).expand(len(embeds), -1, -1), embeds], 1)


def _dept(text: Inputs, x: traffic.Shapes, g: torch.Generator, device: str) -> Work:
    scale = 8.0 / max(x.r, 1) ** 0.5
    sizes = dict(prompt=(x.s, x.d), lowrank_a=(x.n, x.r), lowrank_b=(x.r, x.d))
    inputs = text | {name: _weight(g, device, *shape) for name, shape in sizes.items()}

    def dept(i: Inputs) -> Tensor:
        embeds = F.embedding(i["input_ids"], i["embedding_weight"])
        embeds = embeds + (i["lowrank_a"] @ i["lowrank_b"] * scale).to(embeds.dtype)
        return torch.cat([i["prompt"].to(embeds.dtype).expand(len(embeds), -1, -1), embeds], 1)

    return Work(Case(inputs, dept), dept)


def _prompt_tuning(text: Inputs, x: traffic.Shapes, device: str) -> Work:
    from peft import PromptTuningConfig, TaskType
    from peft.tuners.prompt_tuning import PromptEmbedding

    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=x.s, token_dim=x.d, num_transformer_submodules=1
    )
    encoder = PromptEmbedding(config, None).to(device)
    rows = torch.arange(x.s, device=device)

    def prompt_tuning(i: Inputs) -> Tensor:  # PeftModel.get_prompt and forward, without the backbone
        embeds = F.embedding(i["input_ids"], i["embedding_weight"])
        prompts = encoder(rows.unsqueeze(0).expand(len(embeds), -1)).to(embeds.dtype)
        return torch.cat((prompts, embeds), dim=1)

    return Work(Case(text | dict(prompt=encoder.embedding.weight), _joined), prompt_tuning)


class _Ready(nn.Linear):
    """A linear layer whose result is its input, at no cost: what is timed behind LoRA is what LoRA adds."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _lora(x: traffic.Shapes, g: torch.Generator, device: str) -> Work:
    """The cost that PEFT's LoRA adds to twelve layers, one after another (query and value of a model of six)."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = nn.ModuleDict({f"layer{i}": _Ready(x.d, x.d, bias=False) for i in range(LORA_LAYERS)})
    config = LoraConfig(r=LORA_RANK, lora_alpha=8, target_modules=list(layers), lora_dropout=0.0)
    inject_adapter_in_model(config, layers)
    layers.to(device).requires_grad_(False)
    dtype = torch.bfloat16 if x.source_bytes == 2 else torch.float32
    inputs: Inputs = {"x": torch.randn(x.batch, x.length, x.d, generator=g, device=device).to(dtype).requires_grad_()}
    layer: Any  # as PEFT has changed it
    for name, layer in layers.items():
        for part in (layer.lora_A, layer.lora_B):
            part.default.weight.data = torch.randn(part.default.weight.shape, generator=g, device=device) / x.d**0.5
        inputs |= {f"{name} A": layer.lora_A.default.weight, f"{name} B": layer.lora_B.default.weight}
    for tensor in inputs.values():
        tensor.requires_grad_()

    def peft(i: Inputs) -> Tensor:
        out = i["x"]
        for layer in layers.values():
            out = layer(out)
        return out

    def formula(i: Inputs) -> Tensor:
        out = i["x"]
        for name in layers:
            a, b = i[f"{name} A"], i[f"{name} B"]
            out = out + ((out.to(a.dtype) @ a.T) @ b.T * (8 / LORA_RANK)).to(out.dtype)
        return out

    return Work(Case(inputs, formula), peft)
