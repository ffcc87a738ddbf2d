"""What a live and a folded adapter have in common: the interface that a model calls."""

from abc import abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from ept.config import EPTConfig
from ept.layer.constants import Constants, LayerUpdates
from ept.parts import PartTensor

__all__ = ["AdapterLayer", "PromptShape"]


class PromptShape(NamedTuple):
    """How many rows a prompt has, and the text column at which it stands."""

    length: int
    start: int


class AdapterLayer(nn.Module):
    """An adapter's tensors and formulas, without a backbone: `EPTLayer` trains, `FoldedLayer` is for inference.

    Attributes: `config` (an EPTConfig), `embed_dim` (d), `layer_dim` (the width of the layers, d unless it is given),
    `prompt_start` (the text column of the prompt), `embed_scale` (e), `prompt` (a tensor [s, d]), `trainable`.
    """

    prompt: Tensor
    trainable: bool

    def __init__(self, config: EPTConfig, embed_dim: int, prompt_start: int, layer_dim: int | None):
        super().__init__()
        self.config, self.embed_dim, self.prompt_start = config, embed_dim, prompt_start
        self.layer_dim = embed_dim if layer_dim is None else layer_dim
        self.embed_scale = config.known_embed_scale

    @property
    def prompt_shape(self) -> PromptShape:
        return PromptShape(self.config.prompt_length, self.prompt_start)

    def parameters_by_part(self) -> dict[str, int]:
        """Trained parameters of each part that is on."""
        return self.config.parameters_by_part(self.embed_dim, self.layer_dim)

    def _shape(self, tensor: PartTensor) -> tuple[int, ...]:
        """The shape of one of the parts' tensors here."""
        return tensor.shape(self.config, tensor.width(self.embed_dim, self.layer_dim))

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        embedding_weight: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_start: int | Tensor | None = None,
    ) -> Tensor:
        """The backbone's input [batch, s + L, d] from `input_ids` and E, or from `inputs_embeds` [batch, L, d].

        `prompt_start` is the text column of the prompt, a number or [batch]; None: the layer's own.
        """

    @abstractmethod
    def constants(self, *, prompt: bool = True) -> Constants:
        """What inference needs of the adapter; without `prompt` P* has no rows. In training mode its dropout is drawn."""

    def continue_text(self, inputs_embeds: Tensor, text_positions: Tensor | None) -> Tensor:
        """[batch, n, d] embeddings of text that follows a cached prefix, updated for their positions [batch, n].

        -1 is padding. None is text without padding that starts at position 0.
        """
        return self.constants(prompt=False).continue_text(None, None, inputs_embeds, text_positions)

    @abstractmethod
    def layer_updates(self) -> LayerUpdates | None:
        """The updates in the layers for one pass; None where there are none. In training mode their dropout is drawn."""

    @abstractmethod
    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """P* [s, d] in the backbone's own size, and the gate's weights [s, K]."""

    def facts(self) -> dict[str, Any]:
        """What adapter_config.json says beside the settings."""
        return {}

    def _ids_and_table(self, input_ids: Tensor | None, embedding_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both, which belong together; ValueError where one is missing."""
        if input_ids is None or embedding_weight is None:
            raise ValueError("give input_ids with embedding_weight, or inputs_embeds")
        return input_ids, embedding_weight
