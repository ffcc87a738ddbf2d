"""Folding: the trained tensors become the constants that inference needs.

P* and C = e·c·A·B do not depend on the batch (docs/method.md, Inference). A folded adapter holds them, and D and W of
the token-conditioned update, which can also become a new table of embeddings. It is for inference only.
"""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor

from ept.config import EPTConfig
from ept.layer.base import AdapterLayer
from ept.layer.constants import Constants, LayerUpdates
from ept.layer.layer import EPTLayer
from ept.parts import PARTS, folded_tensors_of

__all__ = ["FoldedLayer", "fold_layer", "prompt_hash"]


class FoldedLayer(AdapterLayer):
    """What inference needs of an EPTLayer, as buffers; it stands in an EPTModel where the EPTLayer stood.

    Buffers, None for parts that are off: `prompt` P* [s, d] and `text_update` C = e·c·A·B [N, d] in the backbone's own
    size, `token_down`, `token_up` [q, d] in units of e, `deep_down`, `deep_up` [layers, q, d_layer] in the hidden states'
    own size. `sha256` is `prompt_hash` of P* and the deep updates as they were folded.

    Args:
        config: of the EPTLayer. embed_dim: d. prompt_start: text column of the prompt. layer_dim: width of the layers.
    """

    prompt: Tensor
    text_update: Tensor | None
    token_down: Tensor | None
    token_up: Tensor | None
    deep_down: Tensor | None
    deep_up: Tensor | None
    trainable = False

    def __init__(self, config: EPTConfig, embed_dim: int, prompt_start: int = 0, layer_dim: int | None = None):
        super().__init__(config, embed_dim, prompt_start, layer_dim)
        for tensor in (tensor for part in PARTS for tensor in part.folded):
            self.register_buffer(tensor.name, None)
        for tensor in folded_tensors_of(config):
            self.register_buffer(tensor.name, torch.zeros(self._shape(tensor)))
        self.sha256: str | None = None

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        embedding_weight: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_start: int | Tensor | None = None,
    ) -> Tensor:
        if inputs_embeds is None:
            input_ids, embedding_weight = self._ids_and_table(input_ids, embedding_weight)
        start = self.prompt_start if prompt_start is None else prompt_start
        return self.constants().embed(input_ids, attention_mask, embedding_weight, inputs_embeds, start)

    def constants(self, *, prompt: bool = True) -> Constants:
        rows = self.prompt if prompt else self.prompt[:0]
        token_up = None if self.token_down is None else self.token_up
        return Constants.of_one(
            rows, self.text_update, None, self.token_down, token_up, self.deep_down, self.deep_up,
            1.0, self.embed_scale, self.config.activation, self.config.impl,
        )  # fmt: skip

    def layer_updates(self) -> LayerUpdates | None:
        return self.constants(prompt=False).layer_updates()

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """P* [s, d] and no gate weights [s, 0]: the gate is folded into P*."""
        return self.prompt, self.prompt.new_zeros(len(self.prompt), 0)

    def facts(self) -> dict[str, Any]:
        return {"folded": True, "prompt_sha256": self.sha256}

    def extra_repr(self) -> str:
        return f"folded, prompt sha256 {self.sha256}"


@torch.no_grad()
def fold_layer(layer: AdapterLayer) -> FoldedLayer:
    """The folded form of a layer; the layer itself stays as it is.

    P* and C are computed by the specification in float64 on the CPU and rounded once to fp32, so that the bits, and
    with them the hash, do not depend on the device, on the implementation or on the dtype of the backbone.
    """
    if isinstance(layer, FoldedLayer):
        return layer
    assert isinstance(layer, EPTLayer)
    config, device = layer.config, layer.prompt.device
    exact = copy.deepcopy(layer).to("cpu", torch.float64)
    exact.config = EPTConfig.from_dict(config.to_dict() | {"impl": "reference"})
    folded = FoldedLayer(config, layer.embed_dim, layer.prompt_start, layer.layer_dim)
    folded.prompt.copy_(exact.reconstruct()[0])
    deep: list[Tensor] = []
    if folded.deep_down is not None and folded.deep_up is not None:
        assert exact.deep_down is not None and exact.deep_up is not None and exact.deep_scale is not None
        scale = exact.deep_scale[:, None, None]
        folded.deep_down.copy_(exact.deep_down / scale)
        folded.deep_up.copy_(exact.deep_up * scale)
        deep = [folded.deep_down, folded.deep_up]
    folded.sha256 = prompt_hash(folded.prompt, *deep)
    if folded.text_update is not None and exact.lowrank_a is not None and exact.lowrank_b is not None:
        folded.text_update.copy_(layer.embed_scale * config.scale * exact.lowrank_a @ exact.lowrank_b)
    for mine, theirs in ((folded.token_down, layer.token_down), (folded.token_up, layer.token_up)):
        if mine is not None and theirs is not None:
            mine.copy_(theirs)
    return folded.to(device)


def prompt_hash(prompt: Tensor, *deep: Tensor) -> str:
    """SHA-256, in hex, of a prompt P* [s, d], its shape and its values as little-endian fp32, and then in the same way
    of D and W of the deep updates, [layers, q, d] each, if there are any. A key for prefix caches."""
    digest = hashlib.sha256()
    for tensor in (prompt, *deep):
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4")
        digest.update("x".join(map(str, values.shape)).encode() + b":" + values.tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------- ept fold
