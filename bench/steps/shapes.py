"""The shapes that whole steps are measured on: a frozen backbone and the batch that it gets.

MiniLM has its real weights on a CPU. Everything else has seeded random weights, which take the same time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.initialization import no_init_weights

from ept import MeanPoolingForSequenceClassification

from ..text.real_text import minilm

__all__ = ["GPU_SHAPES", "SHAPES", "SMALL_SHAPES", "Shape", "backbone", "batch_of"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A backbone, the batch that it gets, and what is measured on it.

    Attributes:
        targets: the projections that LoRA adapts.
        task: PEFT's name for what the model does: "SEQ_CLS", "SEQ_2_SEQ_LM" or "CAUSAL_LM".
        config: makes the backbone's config; None for the real MiniLM.
        dtype: of the frozen weights.
        paper: whether the paper's preset and inference are measured, too.
        vocabulary: the ids are below this.
    """

    name: str
    batch: int
    length: int
    rounds: int
    targets: tuple[str, str]
    task: str
    config: Callable[[], PreTrainedConfig] | None = None
    dtype: torch.dtype = torch.float32
    paper: bool = False
    vocabulary: int = 20_000

    @property
    def weights(self) -> str:
        return "real" if self.config is None else "seeded"

    @property
    def identity(self) -> dict[str, Any]:
        """The columns of a result table that say what was measured."""
        return {
            "shape": self.name, "weights": self.weights, "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch, "length": self.length,
        }  # fmt: skip


def _bert(d: int, layers: int, heads: int, d_ff: int, vocabulary: int) -> Callable[[], PreTrainedConfig]:
    return lambda: BertConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=d_ff,
    )


def _t5(d: int, layers: int, heads: int, d_ff: int, vocabulary: int = 32128) -> Callable[[], PreTrainedConfig]:
    start: dict[str, Any] = {"decoder_start_token_id": 0}  # taken without being named
    return lambda: T5Config(
        vocab_size=vocabulary, d_model=d, num_layers=layers, num_heads=heads, d_ff=d_ff, dropout_rate=0.0, **start
    )


def _llama(
    d: int, layers: int, heads: int, kv_heads: int, d_ff: int, vocabulary: int = 32000
) -> Callable[[], PreTrainedConfig]:
    """Without an end-of-text token, so that decoding never stops early."""
    return lambda: LlamaConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=d_ff, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=layers, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


# On a CPU, where TinyLlama has 4 of its 22 layers.
SHAPES = (
    Shape("MiniLM", 32, 64, 10, ("query", "value"), "SEQ_CLS", paper=True),
    Shape("T5-small", 16, 128, 7, ("q", "v"), "SEQ_2_SEQ_LM", _t5(512, 6, 8, 2048), paper=True),
    Shape("T5-base", 2, 64, 5, ("q", "v"), "SEQ_2_SEQ_LM", _t5(768, 12, 12, 3072)),
    Shape("T5-large", 1, 64, 3, ("q", "v"), "SEQ_2_SEQ_LM", _t5(1024, 24, 16, 4096), torch.bfloat16),
    Shape("TinyLlama-1.1B", 1, 64, 5, ("q_proj", "v_proj"), "CAUSAL_LM", _llama(2048, 4, 32, 4, 5632), torch.bfloat16),
)
# On a GPU, at sizes that people train with. All weights are seeded, so that nothing has to be installed or downloaded.
GPU_SHAPES = (
    Shape("MiniLM", 32, 64, 20, ("query", "value"), "SEQ_CLS", _bert(384, 6, 12, 1536, 30522)),
    Shape("T5-base", 16, 256, 12, ("q", "v"), "SEQ_2_SEQ_LM", _t5(768, 12, 12, 3072), torch.bfloat16),
    Shape("Llama-1.1B", 8, 1024, 8, ("q_proj", "v_proj"), "CAUSAL_LM", _llama(2048, 22, 32, 4, 5632), torch.bfloat16),
)
SMALL_SHAPES = (
    Shape("tiny BERT", 2, 6, 3, ("query", "value"), "SEQ_CLS", _bert(32, 2, 4, 64, 300), vocabulary=300),
    Shape("tiny T5", 2, 6, 3, ("q", "v"), "SEQ_2_SEQ_LM", _t5(32, 2, 4, 64, 300), torch.bfloat16, vocabulary=300),
    Shape(
        "tiny Llama", 2, 6, 3, ("q_proj", "v_proj"), "CAUSAL_LM", _llama(32, 2, 4, 2, 64, 300), torch.bfloat16,
        vocabulary=300,
    ),
)  # fmt: skip


def backbone(shape: Shape, device: str) -> PreTrainedModel:
    """The frozen model of a shape, in evaluation mode: dropout is off for every method."""
    kind = "single_label_classification"
    if shape.config is None:
        return MeanPoolingForSequenceClassification.from_encoder(str(minilm()), 2, kind).eval().to(device)
    config = shape.config()
    model: PreTrainedModel
    with no_init_weights():
        if shape.task == "SEQ_CLS":
            encoder = AutoModel.from_config(config, dtype=shape.dtype)
            model = MeanPoolingForSequenceClassification(encoder, 2, kind)
        else:
            auto = AutoModelForCausalLM if shape.task == "CAUSAL_LM" else AutoModelForSeq2SeqLM
            model = auto.from_config(config, dtype=shape.dtype)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]  # its decorator hides what it takes
    _fill(model, device)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _fill(model: nn.Module, device: str) -> None:
    """Seeded weights of standard deviation 0.02, one block of them over and over: drawing a billion takes minutes."""
    block = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).to(device)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        for part in parameter.view(-1).split(len(block)):
            part.copy_(block[: len(part)])


def batch_of(shape: Shape, device: str) -> dict[str, Tensor]:
    """Seeded ids without padding, and labels of the shape's task."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary // 10, shape.vocabulary, (shape.batch, shape.length), generator=g)
    if shape.task == "SEQ_CLS":
        labels = torch.arange(shape.batch) % 2
    elif shape.task == "CAUSAL_LM":
        labels = ids
    else:
        labels = torch.randint(5, shape.vocabulary, (shape.batch, 4), generator=g)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
