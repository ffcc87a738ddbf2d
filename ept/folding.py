"""Folding: the trained tensors become the constants that inference needs, and `ept fold`.

P* and C = e·c·A·B do not depend on the batch (docs/method.md, Inference). A folded adapter holds them, and D and W of
the token-conditioned update, which can also become a new table of embeddings. It is for inference only.
"""

import copy
import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import ept_kernels
from ept_kernels import insert_prompt, text_positions

from .backbones import weight_of
from .config import EPTConfig
from .console import bad_input_is_one_line, say, without_load_reports
from .heads import MeanPoolingForSequenceClassification
from .layer import EPTLayer
from .saving import CONFIG_NAME, read_adapter, write_adapter

if TYPE_CHECKING:
    from .model import EPTModel

__all__ = ["FoldedLayer", "embedding_table", "fold_layer", "prompt_hash", "run"]

TABLE_NAME = "embedding_table.safetensors"


class FoldedLayer(nn.Module):
    """What inference needs of an EPTLayer, as buffers; it stands in an EPTModel where the EPTLayer stood.

    Buffers, None for parts that are off: `prompt` P* [s, d] and `text_update` C = e·c·A·B [N, d] in the backbone's own
    size, `token_down`, `token_up` [q, d] in units of e, `deep_down`, `deep_up` [layers, q, d] in the hidden states' own
    size. `sha256` is `prompt_hash` of P* and the deep updates as they were folded.

    Args:
        config: of the EPTLayer. embed_dim: d. prompt_start: text column of the prompt.
    """

    prompt: Tensor
    text_update: Tensor | None
    token_down: Tensor | None
    token_up: Tensor | None
    deep_down: Tensor | None
    deep_up: Tensor | None

    def __init__(self, config: EPTConfig, embed_dim: int, prompt_start: int = 0):
        super().__init__()
        self.embed_scale = config.known_embed_scale
        self.config, self.embed_dim, self.prompt_start = config, embed_dim, prompt_start
        has_update = config.has_lowrank and config.lowrank_update
        deep_shape = (config.known_deep_layers, config.token_rank, embed_dim) if config.known_deep_layers else None
        token_shape = (config.token_rank, embed_dim) if config.has_token_update else None
        shapes = {
            "prompt": (config.prompt_length, embed_dim),
            "text_update": (config.max_text_length, embed_dim) if has_update else None,
            "token_down": token_shape,
            "token_up": token_shape,
            "deep_down": deep_shape,
            "deep_up": deep_shape,
        }
        for name, shape in shapes.items():
            self.register_buffer(name, None if shape is None else torch.zeros(shape))
        self.sha256: str | None = None

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        embedding_weight: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The backbone's input [batch, s + L, d], as EPTLayer.forward."""
        if inputs_embeds is None:
            if input_ids is None or embedding_weight is None:
                raise ValueError("give input_ids with embedding_weight, or inputs_embeds")
            inputs_embeds = F.embedding(input_ids, embedding_weight)
        positions = None if attention_mask is None else text_positions(attention_mask)
        text = self.continue_text(inputs_embeds, positions)
        return insert_prompt(self.prompt.to(text.dtype), text, self.prompt_start)

    def continue_text(self, inputs_embeds: Tensor, text_positions: Tensor | None) -> Tensor:
        """[batch, n, d] embeddings of text with the updates for their positions [batch, n]; -1 is padding.

        None is text without padding from its first token on.
        """
        total = inputs_embeds.to(torch.promote_types(inputs_embeds.dtype, torch.float32))
        if self.token_down is not None:
            total = ept_kernels.text_update(
                total, text_positions, None, None, scale=0.0, embed_scale=self.embed_scale,
                token_down=self.token_down, token_up=self.token_up, activation=self.config.activation,
            )  # fmt: skip
        if self.text_update is not None:
            beyond, length = len(self.text_update), inputs_embeds.shape[1]
            if text_positions is None:
                total = total + F.pad(self.text_update[:length], (0, 0, 0, max(0, length - beyond)))
            else:  # one more row, of zeros, stands behind the last position and, as number -1, for padding
                rows = F.pad(self.text_update, (0, 0, 0, 1))
                total = total + rows[text_positions.clamp(-1, beyond)]
        return total.to(inputs_embeds.dtype)

    def deep_tensors(self, number: int) -> tuple[Tensor, Tensor]:
        """D and W, [q, d] each, of the layer `number` after the first, in its hidden states' own size."""
        assert self.deep_down is not None and self.deep_up is not None
        return self.deep_down[number], self.deep_up[number]

    def draw_deep_dropout(self) -> None:
        """Nothing is left out of a folded adapter."""

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """P* [s, d] and no gate weights [s, 0]: the gate is folded into P*."""
        return self.prompt, self.prompt.new_zeros(len(self.prompt), 0)

    def facts(self) -> dict[str, Any]:
        """What adapter_config.json says of a folded adapter."""
        return {"folded": True, "prompt_sha256": self.sha256}

    def extra_repr(self) -> str:
        return f"folded, prompt sha256 {self.sha256}"


@torch.no_grad()
def fold_layer(layer: EPTLayer | FoldedLayer) -> FoldedLayer:
    """The folded form of a layer; the layer itself stays as it is.

    P* and C are computed by the specification in float64 on the CPU and rounded once to fp32, so that the bits, and
    with them the hash, do not depend on the device, on the implementation or on the dtype of the backbone.
    """
    if isinstance(layer, FoldedLayer):
        return layer
    config, device = layer.config, layer.prompt.device
    exact = copy.deepcopy(layer).to("cpu", torch.float64)
    exact.config = EPTConfig.from_dict(config.to_dict() | {"impl": "reference"})
    folded = FoldedLayer(config, layer.embed_dim, layer.prompt_start)
    folded.prompt.copy_(exact.reconstruct()[0])
    deep: list[Tensor] = []
    if folded.deep_down is not None and folded.deep_up is not None:
        pairs = [exact.deep_tensors(number) for number in range(config.deep_layers)]
        deep = [folded.deep_down, folded.deep_up]
        for folded_deep, of_layers in zip(deep, zip(*pairs, strict=True), strict=True):
            folded_deep.copy_(torch.stack(of_layers))
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


@torch.no_grad()
def embedding_table(model: "EPTModel") -> Tensor:
    """The token-conditioned update as a new table of embeddings, E + e·σ(E/e·Dᵀ)·W [vocab, d] in E's dtype.

    A backbone that looks its input up in this table needs D and W no more. It is for the input alone: where the
    backbone's output layer shares the table (`tie_word_embeddings`), that must keep the old one.
    """
    layer, embedding = model.ept, model.base_model.get_input_embeddings()
    if layer.token_down is None:
        raise ValueError("this adapter has no token-conditioned update: the backbone's own embeddings are the table")
    rows = []
    weight = weight_of(embedding)
    for ids in torch.arange(len(weight), device=weight.device).split(8192):
        # Beyond the last position there is only the token-conditioned update.
        beyond = ids.new_full((1, len(ids)), layer.config.max_text_length)
        rows.append(layer.continue_text(embedding(ids).unsqueeze(0), beyond)[0])
    return torch.cat(rows)


# ---------------------------------------------------------------------- ept fold


@dataclass
class FoldArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": "Directory that ept train (or save_pretrained) wrote."})
    output_dir: str = field(metadata={"help": "Where the folded adapter goes."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model it was trained on, where it is not in its old place."}
    )
    format: str = field(
        default="auto",
        metadata={
            "help": "peft: a PEFT prompt-tuning adapter; ept: P*, C, D and W, which EPTModel.from_pretrained reads; "
            "auto: PEFT's where its results are the same.",
            "choices": ("auto", "peft", "ept"),
        },
    )
    embedding_table: bool = field(
        default=False,
        metadata={"help": f"Also write {TABLE_NAME}, with the token-conditioned update. Loads the model."},
    )


def run(argv: list[str]) -> None:
    """`ept fold`: an adapter as the constants that inference needs, in PEFT's form where that can hold them."""
    with bad_input_is_one_line("fold"):
        from .cli import RUN_NAME
        from .options import OptionParser
        from .peft_format import save_peft, why_not_peft

        description = "Folds an adapter into the constants that inference needs. Prints the folded prompt's SHA-256."
        (given,) = OptionParser("fold", description, FoldArguments).parse(argv)
        output = Path(given.output_dir)
        if output.is_file() or (output / CONFIG_NAME).exists():
            raise ValueError(f"--output_dir {output} is a file or holds another adapter: give a new directory")
        model, settings = _adapter_without_backbone(given.adapter, given.model_name_or_path, given.embedding_table)
        folded = fold_layer(model.ept)
        reason = why_not_peft(model)
        if given.format == "peft" or (given.format == "auto" and reason is None):
            save_peft(model, output)
            say(f"{output}: a PEFT prompt-tuning adapter")
        else:
            heads = {name: t for name, t in model.adapter_tensors().items() if name.startswith("head.")}
            write_adapter(output, settings | folded.facts(), folded.state_dict() | heads)
            record = Path(given.adapter) / RUN_NAME
            if record.is_file():  # eval and predict know from it the columns, the label words and pairs of texts
                shutil.copyfile(record, output / RUN_NAME)
            say(f"{output}: a folded EPT adapter" + (f" ({reason})" if given.format == "auto" else ""))
        if given.embedding_table:
            save_file({"weight": embedding_table(model).cpu().contiguous()}, output / TABLE_NAME)
            say(f"{output / TABLE_NAME}: the embeddings with the token-conditioned update")
        print(folded.sha256)


def _adapter_without_backbone(
    directory: str, name_or_path: str | None, with_weights: bool
) -> tuple["EPTModel", dict[str, Any]]:
    """The adapter on its backbone, whose weights are loaded only `with_weights`; and what its config says."""
    from .model import EPTModel, head_names

    settings = read_adapter(directory)[0]
    name_or_path = name_or_path or settings.get("base_model_name_or_path")
    if not name_or_path:
        raise ValueError(f"{directory} does not say what model it was trained on: give --model_name_or_path")
    kind = settings.get("base_model_class") or ""
    pooled = kind == MeanPoolingForSequenceClassification.__name__
    cls = transformers.AutoModel if pooled else getattr(transformers, kind, None)
    if cls is None:
        raise ValueError(f"{directory} adapts a {kind or 'model of no known kind'}, which transformers has not")
    labels = {} if settings.get("num_labels") is None else {"num_labels": settings["num_labels"]}
    base: Any
    if with_weights:
        with without_load_reports():
            base = cls.from_pretrained(name_or_path, **({} if pooled else labels))
    else:
        config = transformers.AutoConfig.from_pretrained(name_or_path, **labels)
        with torch.device("meta"):
            base = transformers.AutoModel.from_config(config) if pooled else cls(config)
        for name in head_names(base):
            base.get_submodule(name).to_empty(device="cpu")
    if pooled:
        base = MeanPoolingForSequenceClassification(base, settings["num_labels"], settings.get("problem_type"))
    return EPTModel.from_pretrained(base, directory).eval(), settings
