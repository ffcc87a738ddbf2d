"""The directory of an adapter as vLLM's plugin serves it: constants alone, laid out so that vLLM's LoRA requests carry it.

vLLM reads `adapter_config.json` and `adapter_model.safetensors` as those of a LoRA adapter. Its two matrices per module are
the constants here, for the module `model.layers.N.…` of the backbone:

| module | lora_A | lora_B |
|---|---|---|
| layers.0.ept_rows | [s + N, d]: P*, then C where the low-rank update is on | [1, s] zeros, whose width is s |
| layers.N.ept_update | [q, d]: D of the input (N = 0) or of layer N, in the hidden states' own size | [d, q]: W, transposed |
| score | the head of a classifier, `score.weight` [labels, d] | |

What vLLM does not read stands under "ept" in adapter_config.json. `peft_type` is left out, so that PEFT does not take the
directory for a LoRA adapter.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ept.files.adapter_dir import WEIGHTS_NAME, check_weights, read_json_config, write_adapter
from ept.layer.folded import FoldedLayer

__all__ = ["ARCHITECTURES", "ROWS", "UPDATE", "ServedAdapter", "module_name", "write_served"]

# transformers' class that an adapter is for -> the architecture of vLLM's that serves it.
ARCHITECTURES = {
    "LlamaForCausalLM": "LlamaForCausalLM",
    "Qwen3ForCausalLM": "Qwen3ForCausalLM",
    "Gemma3ForCausalLM": "Gemma3ForCausalLM",
    "LlamaForSequenceClassification": "LlamaForCausalLM",
    "Qwen3ForSequenceClassification": "Qwen3ForCausalLM",
    "Gemma3TextForSequenceClassification": "Gemma3ForCausalLM",
}
VERSION = 1
ROWS, UPDATE = "ept_rows", "ept_update"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class ServedAdapter:
    """What a directory says of its adapter.

    Attributes:
        base_class: transformers' class that it was trained on.
        sha256: of adapter_model.safetensors; different adapters have different ones.
        prompt_rows, text_rows: s, and N where the low-rank update is on, else 0.
        rank: q, 0 where there is no token-conditioned update.
        activation: σ.
        embed_dim: d.
        updated_layers: layers that have an update, the first's (the input's) among them.
        num_labels: rows of the head; None for a model that writes text.
        backbone: `backbone_fingerprint` of the model that it was trained on.
    """

    base_class: str
    sha256: str
    prompt_rows: int
    text_rows: int
    rank: int
    activation: str
    embed_dim: int
    updated_layers: tuple[int, ...]
    num_labels: int | None
    backbone: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows by position: s + N."""
        return self.prompt_rows + self.text_rows

    def check_model(self, name: str, architecture: str, *, classifies: bool, hidden_size: int, layers: int) -> None:
        """Raises ValueError if the adapter does not belong to a model of vLLM's.

        Args:
            name: of the adapter, for the message.
            architecture: the model's, as its config.json says it.
            classifies: whether the engine pools; otherwise it writes text.
            hidden_size, layers: of the model.
        """
        if (self.num_labels is not None) != classifies:
            kinds = {True: "a classifier (--runner pooling)", False: "a model that writes text"}
            raise ValueError(
                f"the adapter {name} is for {kinds[not classifies]}, and this engine is {kinds[classifies]}"
            )
        for what, expected, value in (
            ("the architecture", ARCHITECTURES.get(self.base_class), ARCHITECTURES.get(architecture)),
            ("hidden_size", self.embed_dim, hidden_size),
            ("num_hidden_layers", self.backbone.get("num_hidden_layers", layers), layers),
        ):
            if expected != value:
                raise ValueError(
                    f"the adapter {name} belongs to another backbone: {what} was {expected}, here it is {value}: serve "
                    "the model that it was trained on"
                )

    @classmethod
    def read(cls, directory: str | os.PathLike) -> "ServedAdapter":
        """Reads adapter_config.json and holds the weights against its hash.

        Raises:
            FileNotFoundError, ValueError: the directory is not of `ept fold --format vllm`, or is damaged.
        """
        settings = read_json_config(directory, wanted="a directory of ept fold --format vllm", remedy="fold again")
        facts = settings.get("ept") if isinstance(settings, dict) else None
        if not isinstance(facts, dict):
            raise ValueError(f"{directory} is not in the form that vLLM serves: ept fold --format vllm writes it")
        if facts.pop("version", None) != VERSION:
            raise ValueError(f"{directory} was written by another version of EPT: fold it again")
        check_weights(directory)
        facts["updated_layers"] = tuple(facts["updated_layers"])
        return cls(sha256=settings["weights_sha256"], **facts)

    def tensors(self, directory: str | os.PathLike) -> dict[str, Tensor]:
        """Reads the tensors by the names that vLLM gives their modules: "model.layers.3.ept_update.lora_A.weight"."""
        from safetensors.torch import load_file

        tensors = load_file(Path(directory) / WEIGHTS_NAME)
        return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def module_name(layer: int, module: str) -> str:
    """The name of one of the plugin's modules in vLLM's model."""
    return f"model.layers.{layer}.{module}"


def write_served(
    directory: str | os.PathLike, layer: FoldedLayer, settings: dict[str, Any], head: Tensor | None
) -> ServedAdapter:
    """Writes a folded adapter as vLLM's plugin serves it, and returns what the directory says of it.

    Args:
        directory: made if absent.
        layer: the folded adapter.
        settings: of the adapter_config.json that it was read from.
        head: [labels, d], the weight of a classifier's head; None for a model that writes text.

    Raises:
        ValueError: vLLM cannot serve the adapter; the message says why.
    """
    check_servable(settings, layer)
    tensors: dict[str, Tensor] = {}

    def put(number: int, module: str, a: Tensor, b: Tensor) -> None:
        name = PREFIX + module_name(number, module)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.float(), b.float()

    rows = layer.prompt if layer.text_update is None else torch.cat([layer.prompt, layer.text_update])
    put(0, ROWS, rows, rows.new_zeros(1, len(layer.prompt)))
    updates: dict[int, tuple[Tensor, Tensor]] = {}
    if layer.deep_down is not None and layer.deep_up is not None:
        updates |= enumerate(zip(layer.deep_down, layer.deep_up, strict=True), start=1)
    if layer.token_down is not None and layer.token_up is not None:
        size = layer.embed_scale  # e goes into the matrices, as h of the layers has: what is read has its own size
        updates[0] = (layer.token_down.double() / size, layer.token_up.double() * size)
    for number, (down, up) in sorted(updates.items()):
        put(number, UPDATE, down, up.T)
    if head is not None:
        tensors[f"{PREFIX}score.weight"] = head.float()
    facts = {
        "version": VERSION,
        "base_class": settings["base_model_class"],
        "prompt_rows": len(layer.prompt),
        "text_rows": len(rows) - len(layer.prompt),
        "rank": layer.config.token_rank if updates else 0,
        "activation": layer.config.activation,
        "embed_dim": layer.embed_dim,
        "updated_layers": sorted(updates),
        "num_labels": None if head is None else len(head),
        "backbone": settings.get("backbone") or {},
    }
    rank = max(1, facts["rank"])
    write_adapter(
        directory,
        {
            "r": rank,  # with lora_alpha the same, vLLM scales by 1
            "lora_alpha": rank,
            "target_modules": [ROWS, UPDATE],
            "modules_to_save": None if head is None else ["score"],
            "base_model_name_or_path": settings.get("base_model_name_or_path"),
            "ept": facts,
        },
        tensors,
    )
    return ServedAdapter.read(directory)


def check_servable(settings: dict[str, Any], layer: FoldedLayer) -> None:
    """Raises ValueError if vLLM's plugin has no model for an adapter's backbone."""
    base_class = settings.get("base_model_class")
    if base_class not in ARCHITECTURES:
        raise ValueError(
            f"the adapter is for {base_class}, and vLLM's plugin serves {', '.join(ARCHITECTURES)}: "
            "what acts on the input alone goes into vLLM as prompt_embeds (docs/vllm.md)"
        )
    if layer.layer_dim != layer.embed_dim:
        raise ValueError(
            f"the layers are {layer.layer_dim} wide and the embeddings {layer.embed_dim}: vLLM's plugin needs one width"
        )
