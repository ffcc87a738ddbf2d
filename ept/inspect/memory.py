"""The memory that a training step takes, from the model's config alone.

Nothing is estimated by formula. The model is built without weights, and one forward and backward pass runs on fake
tensors (shapes and dtypes, no data), while a dispatch mode counts the storages that are alive. So what autograd keeps
for a frozen backbone, what attention keeps, and what activation checkpointing saves is right for any architecture.
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from ept.backbone.loading import architecture_of, has_causal_form
from ept.backbone.traits import max_text_tokens
from ept.config import EPTConfig
from ept.inspect.quantised import quantise
from ept.inspect.storages import StorageCounter
from ept.model.model import EPTModel
from ept_kernels.availability import nothing_is_launched

__all__ = ["BYTES", "DTYPES", "GPUS", "UNUSABLE_BYTES", "UNUSABLE_SHARE", "gpu_memory", "largest_batch", "plan_step"]

# How the frozen weights are kept: bits per weight of the linear layers. Below 16 the rest is bfloat16.
DTYPES = {"float32": 32, "bfloat16": 16, "float16": 16, "8bit": 8, "4bit": 4}

# Memory as the makers name it, in 10^9 bytes: what a driver shows is the same or a little more.
GPUS = {
    "t4": 16, "a10g": 24, "l4": 24, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "v100": 32, "a100-40": 40, "l40s": 48,
    "a100": 80, "h100": 80, "h200": 141, "mi300x": 192, "b200": 180,
}  # fmt: skip
# What a process takes beside its tensors, assumed and not measured: the driver's context and libraries' workspaces,
# and the share that an allocator cannot use.
UNUSABLE_BYTES, UNUSABLE_SHARE = 10**9, 0.05
BYTES = ("weights", "adapter", "activations", "logits", "peak")


def gpu_memory(gpu: str) -> int:
    """Returns the bytes of a GPU given by name ("h100") or by size ("24GB", "24GiB")."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib)", gpu.strip().lower())
    if size:
        return int(float(size[1]) * (10**9 if size[2] == "gb" else 2**30))
    if gpu.lower() not in GPUS:
        raise ValueError(f"`gpu={gpu}` is unknown: give its memory (24GB), or one of {', '.join(GPUS)}")
    return GPUS[gpu.lower()] * 10**9


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
    kernels: bool = False,
) -> dict[str, Any]:
    """Predicts the bytes of one training step of the model of `config` behind EPT; no weight is loaded or made.

    Args:
        config: the backbone's.
        batch, length: rows and padded columns of text on one device; `target_length` columns of an encoder-decoder's
            target (None: `length`).
        task: "text2text" (labels are tokens) or "classification"; None: text2text where the model writes text.
        dtype: of the frozen weights, one of `DTYPES`.
        checkpointing: whether each layer's activations are computed again in the backward pass.
        kernels: whether EPT's own part runs as Triton kernels, as on a GPU, or in plain torch.

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
    ept_config = dataclasses.replace(ept_config, embed_scale=1.0, impl="triton" if kernels else "torch")
    model = _without_weights(config, ept_config, task, dtype, checkpointing)
    rows = model.ept_config.prompt_length
    room = max_text_tokens(model.base_model, rows)
    if room is not None and length > room:
        raise ValueError(
            f"length {length} does not fit: the model has positions for {room} tokens beside the prompt's {rows}"
        )
    if kernels:
        with nothing_is_launched(), _AttentionOfGPUs():
            return _run_on_fakes(model, batch, length, target_length or length)
    return _run_on_fakes(model, batch, length, target_length or length)


def largest_batch(peak: Callable[[int], int], room: float) -> int:
    """Returns rows at which `peak(rows)` bytes stay within `room`, the most by a line through two rows; 0 if one is too many.

    A peak is the largest of sums that each grow in proportion to the rows, so its chords lie above it: where the line
    was too flat, what a chord says fits.
    """
    one, two = peak(1), peak(2)
    if two > room:
        return int(one <= room)
    rows = 2 + int((room - two) / (two - one))
    at_rows = peak(rows)
    return rows if at_rows <= room else 2 + int((room - two) * (rows - 2) / (at_rows - two))


def _run_on_fakes(model: EPTModel, batch: int, length: int, target_length: int) -> dict[str, Any]:
    """Runs one step of a model on the meta device; returns what `plan_step` does."""
    config = model.base_model.config
    per_token = not model.traits.classifies_rows
    labels_shape: tuple[int, ...] = (batch,)
    if per_token:
        labels_shape = (batch, target_length if config.is_encoder_decoder else length)
    with FakeTensorMode():
        tensors = _make_fake(model)
        weights = sum(t.nbytes for t in tensors if not t.requires_grad)
        trained = [p for p in model.parameters() if p.requires_grad]
        vocabulary = config.get_text_config(decoder=True).vocab_size if per_token else None
        with _FakeStepCounter(vocabulary) as counter:
            ids, mask = (torch.zeros(batch, length, dtype=torch.int64) for _ in range(2))
            labels = torch.zeros(labels_shape, dtype=torch.int64)
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
    """Builds the wrapped model on the meta device, in training mode."""
    auto_class = _auto_class(config, task)
    bits = DTYPES[dtype]
    stored = torch.bfloat16 if bits < 16 else getattr(torch, dtype)
    config = copy.deepcopy(config)
    config.use_cache = False  # as transformers' Trainer has it
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a pooled causal model asks for one
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=stored)
        if bits < 16:
            quantise(model, bits)
        wrapped = EPTModel(model, ept_config)
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"{type(model).__name__} does not support activation checkpointing")
        wrapped.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return wrapped.train()


def _auto_class(config: PreTrainedConfig, task: str | None) -> Any:
    """Returns transformers' class that builds a model for a task; ValueError if the model does not do it."""
    if task is None:
        task = "classification" if architecture_of(config) == "encoder" else "text2text"
    if task == "classification":
        if config.is_encoder_decoder:
            raise ValueError(f"a {config.model_type} is an encoder-decoder: use the task text2text")
        return AutoModelForSequenceClassification
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if not has_causal_form(config):
        raise ValueError(f"a {config.model_type} writes no text: use the task classification")
    return AutoModelForCausalLM


class _AttentionOfGPUs(TorchFunctionMode):
    """Computes attention without a fused kernel where a GPU's refuse the mask, as a CPU's does not.

    The last dimension has to have stride 1 (`check_last_dim_stride_equals_1_dense` in torch's sdp_utils). That of T5's
    position bias has another one up to transformers 5.19.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is not None and mask.stride(-1) != 1:
                with sdpa_kernel(SDPBackend.MATH):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)


class _FakeStepCounter(StorageCounter):
    """Answers a question about a fake tensor's values with False or 0: no padding on the left, some on the right."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        return super().__torch_dispatch__(function, types, args, kwargs)


def _make_fake(model: nn.Module) -> list[Tensor]:
    """Turns meta parameters and buffers into fake ones on the CPU, shared ones still shared; within a FakeTensorMode."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        tensors_by_name: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tensors_by_name:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]
    return list(fakes.values())
