"""vLLM's models with an adapter's rows and updates in their layers: a class for each architecture that the plugin serves."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from ept.backbone.fingerprint import backbone_fingerprint, check_fingerprint
from ept.serving.checks import check_adapter, check_engine
from ept.serving.layers import Rows, Update, before_first_layer, before_layer
from ept.serving.served_dir import ROWS, UPDATE, module_name
from ept.serving.settings import OneAdapter, Slots, served

__all__ = ["EPTGemma3ForCausalLM", "EPTLlamaForCausalLM", "EPTQwen3ForCausalLM"]


class _WithAdapters(nn.Module):
    """Puts the plugin's modules into the decoder layers of a model of vLLM's, before its weights are loaded."""

    model: Any
    score: Any
    one: OneAdapter | None
    head: Tensor | None

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        what = served()
        check_engine(vllm_config, what)
        width = vllm_config.model_config.get_hidden_size()
        layers: list[nn.Module] = list(self.model.layers)
        if isinstance(what, OneAdapter):
            check_adapter(what.adapter, what.directory, vllm_config.model_config)
            self._install_one(what, layers, width)
        else:
            self._install_slots(what, vllm_config.lora_config, layers, width)
        # vLLM keeps compiled graphs by its settings, and adapters of other shapes need others.
        vllm_config.additional_config["ept"] = str(what.shapes)

    def _install_one(self, one: OneAdapter, layers: list[nn.Module], width: int) -> None:
        self.one, adapter = one, one.adapter
        tensors = adapter.tensors(one.directory)
        self.head = tensors.get("score.weight")
        layers[0].add_module(ROWS, Rows(1, adapter.rows, width, by_token=False))
        for number in adapter.updated_layers:
            layers[number].add_module(UPDATE, Update(1, adapter.rank, width, adapter.activation, by_token=False))
        for number, layer in enumerate(layers):
            for name, module in layer.named_children():
                if isinstance(module, (Rows, Update)):
                    stem = module_name(number, name)
                    module.set_lora(0, tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"])
        _hook(layers)

    def _install_slots(self, slots: Slots, lora_config: Any, layers: list[nn.Module], width: int) -> None:
        self.one, self.head = None, None
        # vLLM's own layers stay as they are, and A and B keep their dtype.
        lora_config.target_modules = [ROWS, UPDATE]
        lora_config.lora_dtype = torch.float32
        layers[0].add_module(ROWS, Rows(lora_config.max_loras, slots.rows, width, by_token=True))
        for layer in layers:
            layer.add_module(UPDATE, Update(lora_config.max_loras, slots.rank, width, "silu", by_token=True))
        _hook(layers)

    def load_weights(self, weights: Any) -> set[str]:
        """Loads the backbone's weights, then the adapter's head, where one adapter with a head serves all requests."""
        loaded = set(super().load_weights(weights))  # type: ignore[misc]
        if self.one is not None:
            self._check_embeddings(self.one)
        if self.head is None:
            return loaded
        score = self.score.weight
        if score.shape != self.head.shape:
            raise ValueError(
                f"the adapter's head has {len(self.head)} labels and the model {len(score)}: start vLLM with "
                f"--hf-overrides '{{\"num_labels\": {len(self.head)}}}'"
            )
        with torch.no_grad():
            score.copy_(self.head)
        return loaded | {"score.weight"}

    def _check_embeddings(self, one: OneAdapter) -> None:
        """Raises ValueError if the model's word embeddings are not those that the adapter was trained on."""
        table, trained_on = self.model.embed_tokens, one.adapter.backbone
        own: Any = SimpleNamespace(weight=table.weight[: table.org_vocab_size])  # without vLLM's padding
        facts = backbone_fingerprint(self.config, own)
        try:
            check_fingerprint(
                trained_on, trained_on | {key: facts[key] for key in facts if key.startswith("embedding_")}
            )
        except ValueError as error:
            raise ValueError(
                f"{one.directory} belongs to another backbone: the word embeddings differ: serve the model that it was "
                "trained on"
            ) from error


def _hook(layers: list[nn.Module]) -> None:
    layers[0].register_forward_pre_hook(before_first_layer)
    for layer in layers[1:]:
        if hasattr(layer, UPDATE):
            layer.register_forward_pre_hook(before_layer)


class EPTLlamaForCausalLM(_WithAdapters, LlamaForCausalLM):
    """Llama and what shares its architecture."""


class EPTQwen3ForCausalLM(_WithAdapters, Qwen3ForCausalLM):
    """Qwen 3."""


class EPTGemma3ForCausalLM(_WithAdapters, Gemma3ForCausalLM):
    """Gemma 3, the models of text alone."""
