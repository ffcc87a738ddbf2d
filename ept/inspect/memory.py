"""`ept plan`: the memory that a training step takes, from the model's config alone.

Nothing is estimated by formula. The model is built without weights, and one forward and backward pass runs on fake
tensors (shapes and dtypes, no data), while a dispatch mode counts the storages that are alive. So what autograd keeps
for a frozen backbone, what attention keeps, and what activation checkpointing saves is right for any architecture.
"""

import copy
import dataclasses
import re
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from ept.backbone.traits import max_text_tokens
from ept.config import EPTConfig
from ept.model.model import EPTModel

__all__ = ["DTYPES", "GPUS", "StorageCounter", "gpu_memory", "plan_step"]

# How the frozen weights are kept: bits per weight of the linear layers, and the type of everything else. Of 4 bits
# bitsandbytes keeps one fp32 scale for 64 weights, of 8 bits one for each row.
DTYPES = {"float32": 32, "bfloat16": 16, "float16": 16, "8bit": 8, "4bit": 4}
BLOCK = 64

# Memory as the makers name it, in 10^9 bytes: what a driver shows is the same or a little more.
GPUS = {
    "t4": 16, "a10g": 24, "l4": 24, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "v100": 32, "a100-40": 40, "l40s": 48,
    "a100": 80, "h100": 80, "h200": 141, "mi300x": 192, "b200": 180,
}  # fmt: skip
# What a process takes beside its tensors, assumed and not measured: the driver's context and libraries' workspaces,
# and the share that an allocator cannot use.
CONTEXT, UNUSABLE = 10**9, 0.05
BYTES = ("weights", "adapter", "activations", "logits", "peak")


# ---------------------------------------------------------------------- counting


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages made while it is active, and their highest sum.

    Args:
        known: tensors whose storages are not counted (the weights).
        vocabulary: storages made for a tensor whose last dimension has this size are also counted as logits.

    Attributes: `live`, `peak` (bytes), `peak_logits` (the part of `peak` that is logits).

    A question about a fake tensor's values is answered with False or 0: no padding on the left, some on the right.
    """

    def __init__(self, known: Iterable[Tensor] = (), vocabulary: int | None = None):
        super().__init__()
        self.vocabulary = vocabulary
        self.live = self.peak = self.peak_logits = self._logits = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._sizes: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        size = storage.nbytes()
        logits = size if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary else 0
        self._sizes[key] = size, logits
        weakref.finalize(storage, self._forget, key).atexit = False
        self.live, self._logits = self.live + size, self._logits + logits
        if self.live > self.peak:
            self.peak, self.peak_logits = self.live, self._logits

    def _forget(self, key: int) -> None:
        size, logits = self._sizes.pop(key)
        self.live, self._logits = self.live - size, self._logits - logits


def plan_step(
    config: PreTrainedConfig,
    ept_config: EPTConfig,
    *,
    batch: int,
    length: int,
    target_length: int | None = None,
    task: str | None = None,
    dtype: str = "float32",
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Bytes of one training step of the model of `config` behind EPT; no weight is loaded or made.

    Args:
        config: the backbone's.
        batch, length: rows and padded columns of text on one device; `target_length` columns of an encoder-decoder's
            target (None: `length`).
        task: "text2text" (labels are tokens) or "classification"; None: text2text where the model writes text.
        dtype: of the frozen weights, one of `DTYPES`.
        checkpointing: whether each layer's activations are computed again in the backward pass.

    Returns:
        `weights` (frozen, and a head); `adapter` (what is trained, and Adam's two moments); `activations` and `logits`
        at the step's peak, gradients included; `peak`, their sum; `trained` (a number of parameters).

    Raises:
        ValueError: the model has no room for the length, or the task or the dtype does not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: one of {', '.join(DTYPES)}")
    if batch < 1 or length < 1 or (target_length is not None and target_length < 1):
        raise ValueError(f"batch {batch}, length {length} and target_length {target_length} must be at least 1")
    model = _without_weights(config, ept_config, task, dtype, checkpointing)
    room = max_text_tokens(model.base_model, ept_config.prompt_length)
    if room is not None and length > room:
        raise ValueError(
            f"length {length} does not fit: the model has positions for {room} tokens beside the prompt's "
            f"{ept_config.prompt_length}"
        )
    per_token = "ForSequenceClassification" not in type(model.base_model).__name__
    shape: tuple[int, ...] = (batch,)
    if per_token:
        shape = (batch, (target_length or length) if config.is_encoder_decoder else length)
    with FakeTensorMode():
        tensors = _make_fake(model)
        weights = sum(t.nbytes for t in tensors if not t.requires_grad)
        trained = [p for p in model.parameters() if p.requires_grad]
        text = config.get_text_config(decoder=True)
        with StorageCounter(tensors, text.vocab_size if per_token else None) as counter:
            ids, mask, labels = (torch.zeros(s, dtype=torch.int64) for s in ((batch, length), (batch, length), shape))
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        adapter = sum(3 * p.nbytes for p in trained)
    return {
        "weights": weights,
        "adapter": adapter,
        "activations": counter.peak - counter.peak_logits,
        "logits": counter.peak_logits,
        "peak": weights + adapter + counter.peak,
        "trained": sum(p.numel() for p in trained),
    }


def _without_weights(
    config: PreTrainedConfig, ept_config: EPTConfig, task: str | None, dtype: str, checkpointing: bool
) -> EPTModel:
    """The wrapped model on the meta device, in training mode."""
    writes = config.is_encoder_decoder or config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if task is None:
        task = "text2text" if config.is_encoder_decoder or (writes and not _is_encoder(config)) else "classification"
    if task == "text2text" and not writes:
        raise ValueError(f"a {config.model_type} writes no text: use the task classification")
    if task == "classification" and config.is_encoder_decoder:
        raise ValueError(f"a {config.model_type} is an encoder-decoder: use the task text2text")
    auto: Any = AutoModelForSequenceClassification
    if task == "text2text":
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    bits = DTYPES[dtype]
    stored = torch.bfloat16 if bits < 16 else getattr(torch, dtype)
    config = copy.deepcopy(config)
    config.use_cache = False  # as transformers' Trainer has it
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a pooled causal model asks for one
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    with torch.device("meta"):
        model = auto.from_config(config, dtype=stored)
        if bits < 16:
            _quantise(model, bits)
        ept_config = dataclasses.replace(ept_config, embed_scale=1.0, impl="torch")
        wrapped = EPTModel(model, ept_config)
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"{type(model).__name__} does not support activation checkpointing")
        wrapped.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return wrapped.train()


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model that can also be a decoder (BERT and its kin) is an encoder here."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def _make_fake(model: nn.Module) -> list[Tensor]:
    """Turns meta parameters and buffers into fake ones on the CPU, shared ones still shared; within a FakeTensorMode."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in holders:
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                held[name] = made[id(tensor)]
    return list(made.values())


# ---------------------------------------------------------------------- 8 and 4 bits


class _Dequantised(torch.autograd.Function):
    """x·Wᵀ with W made from its quantised form for the time of the product, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "_QuantisedLinear") -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return x @ x.new_empty(layer.out_features, layer.in_features).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(ctx.layer.out_features, ctx.layer.in_features), None


class _QuantisedLinear(nn.Module):
    """Stands for bitsandbytes' layer: as many bytes, the same memory while it runs; its values mean nothing."""

    def __init__(self, linear: nn.Linear | Conv1D, bits: int):
        super().__init__()
        shape = linear.weight.t().shape if isinstance(linear, Conv1D) else linear.weight.shape
        self.out_features, self.in_features = shape
        numel = linear.weight.numel()
        scales = -(-numel // BLOCK) if bits == 4 else self.out_features
        self.register_buffer("weight", torch.empty(-(-numel * bits // 8), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = _Dequantised.apply(x, self)
        return out if self.bias is None else out + self.bias


def _quantise(model: PreTrainedModel, bits: int) -> None:
    """Replaces the linear layers that transformers would: not the output embeddings, not a head, none kept in fp32."""
    kept = set(model._keep_in_fp32_modules or ())
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if (
                (type(child) is nn.Linear or type(child) is Conv1D)
                and child is not model.get_output_embeddings()
                and name not in kept
            ):
                setattr(parent, name, _QuantisedLinear(child, bits))


# ---------------------------------------------------------------------- the command


def gpu_memory(said: str) -> int:
    """Bytes of a GPU given by name ("h100") or by size ("24GB", "24GiB")."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib)", said.strip().lower())
    if size:
        return int(float(size[1]) * (10**9 if size[2] == "gb" else 2**30))
    if said.lower() not in GPUS:
        raise ValueError(f"--gpu {said} is unknown: give its memory (24GB), or one of {', '.join(GPUS)}")
    return GPUS[said.lower()] * 10**9
