"""The public functions: check the arguments, choose an implementation, fix the dtype of computation and result.

Shapes and symbols as in docs/method.md. All of them take every trained tensor in units of `embed_scale`.
"""

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, torch_impl
from .availability import resolve

__all__ = ["ACTIVATIONS", "IMPLEMENTATIONS", "prompt_embed", "prompt_embed_inputs", "reconstruct_prompt", "text_update"]

ACTIVATIONS = tuple(reference.ACTIVATIONS)
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


def prompt_embed(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    embedding_weight: Tensor,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    *,
    scale: float,
    embed_scale: float = 1.0,
    token_down: Tensor | None = None,
    token_up: Tensor | None = None,
    activation: str = "silu",
    prompt_start: int = 0,
    lowrank_update: bool = True,
    fusion: bool = True,
    impl: str = "auto",
) -> Tensor:
    """The backbone's input: the reconstructed prompt P* joined with the updated embeddings of the text.

        X[b, j] = E[id] + e·c·A[p]·B + e·σ(E[id]/e·Dᵀ)·W        p = text tokens before j in row b
        P*      = e·(P + softmax(P·Cᵀ/√d)·C + Σ_k w[:, k]·σ(P·U_kᵀ)·V_k),  w = softmax(P·Gᵀ),  C = c·A·B

    Parts that are switched off are passed as None: `lowrank_a` with `lowrank_b` (update and fusion), the three space
    tensors together, `token_down` with `token_up`.

    Args:
        input_ids: [batch, L] int64 or int32. L may be 0.
        attention_mask: [batch, L] bool or integer, nonzero on text; None where there is no padding. Padding may stand
            anywhere in a row; it gets its embedding and no update.
        embedding_weight: E [vocab, d], a constant here: it receives no gradient. Its dtype is the result's.
        prompt: P [s, d].
        lowrank_a, lowrank_b: A [N, r], B [r, d].
        space_down, space_up, gate_weight: U [K, h, d], V [K, h, d], G [K, d].
        scale: c. embed_scale: e.
        token_down, token_up: D [q, d], W [q, d].
        activation: σ, one of "silu", "relu", "gelu", "identity".
        prompt_start: the text column, 0 … L, at which P* stands.
        lowrank_update, fusion: False leaves the text update or the fusion out while A and B serve the other.
        impl: "reference" (the specification), "torch", "triton", or "auto" (Triton where it can run, else torch).

    Returns:
        [batch, s + L, d] in E's dtype. Trained tensors may have another dtype than E (fp32 beside a bf16 backbone);
        "torch" and "triton" compute half-precision inputs in fp32 and round once; autocast does not reach inside.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or value; the message names it.
        IndexError: an id lies outside the vocabulary (checked on CPU, where it costs nothing).
    """
    _check_embedding(input_ids, embedding_weight)
    impl = _resolve(impl, prompt)
    table = embedding_weight.detach() if embedding_weight.requires_grad else embedding_weight
    if impl == "triton":
        return _launch(
            input_ids, table, attention_mask, prompt, lowrank_a, lowrank_b, space_down, space_up,
            gate_weight, scale, embed_scale, token_down, token_up, activation, prompt_start, lowrank_update, fusion,
        )  # fmt: skip
    return _join(
        F.embedding(input_ids, table), attention_mask, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight,
        scale, embed_scale, token_down, token_up, activation, prompt_start, lowrank_update, fusion, impl,
    )  # fmt: skip


def prompt_embed_inputs(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    *,
    scale: float,
    embed_scale: float = 1.0,
    token_down: Tensor | None = None,
    token_up: Tensor | None = None,
    activation: str = "silu",
    prompt_start: int = 0,
    lowrank_update: bool = True,
    fusion: bool = True,
    impl: str = "auto",
) -> Tensor:
    """`prompt_embed` for embeddings that come from elsewhere (scaled, quantised, computed): [batch, L, d].

    The result has the dtype of `inputs_embeds`, which also receives a gradient when it asks for one.
    Everything else is as in `prompt_embed`.
    """
    impl = _resolve(impl, prompt)
    if impl == "triton":
        return _launch(
            None, inputs_embeds, attention_mask, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight,
            scale, embed_scale, token_down, token_up, activation, prompt_start, lowrank_update, fusion,
        )  # fmt: skip
    return _join(
        inputs_embeds, attention_mask, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight,
        scale, embed_scale, token_down, token_up, activation, prompt_start, lowrank_update, fusion, impl,
    )  # fmt: skip


def reconstruct_prompt(
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    *,
    scale: float,
    embed_scale: float = 1.0,
    activation: str = "silu",
    fusion: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """P* [s, d] and the gate's weights [s, K], both in the prompt's dtype. Arguments as in `prompt_embed`."""
    _check_prompt(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, activation, embed_scale)
    impl = _resolve(impl, prompt)
    if impl == "triton":
        from . import triton_op

        out, gate = triton_op.prompt_embed(
            None, prompt.new_empty(1, 0, prompt.shape[1]), None,
            prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, None, None,
            scale=scale, embed_scale=embed_scale, activation=activation, prompt_start=0,
            lowrank_update=False, fusion=fusion,
        )  # fmt: skip
        return out[0], gate
    functions = _functions(impl)
    dtype = _compute_dtype(functions, prompt, lowrank_a, space_down)
    with torch.autocast(prompt.device.type, enabled=False):
        prompt_star, gate = functions.reconstruct_prompt(
            *_cast(dtype, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight),
            scale=scale, embed_scale=embed_scale, activation=activation, fusion=fusion,
        )  # fmt: skip
    return prompt_star.to(prompt.dtype), gate.to(prompt.dtype)


def text_update(
    inputs_embeds: Tensor,
    text_positions: Tensor | None,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    *,
    scale: float,
    embed_scale: float = 1.0,
    token_down: Tensor | None = None,
    token_up: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """The text's embeddings [batch, L, d] with both updates and without a prompt: what a decoding step needs.

    `text_positions` [batch, L] int64 says p for each token, -1 on padding: the tokens of a cached prefix count. None is
    text without padding that starts at 0.
    Computed in torch; returns [batch, L, d] in the dtype of `inputs_embeds`.
    """
    shape = inputs_embeds.shape
    _check_text(shape, inputs_embeds, shape[-1], lowrank_a, lowrank_b, token_down, token_up, activation)
    if text_positions is not None and text_positions.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"text_positions has shape {tuple(text_positions.shape)}, but must be one number per token: "
            f"{tuple(inputs_embeds.shape[:2])}"
        )
    dtype = _compute_dtype(torch_impl, inputs_embeds, lowrank_a, token_down)
    a, b, down, up = _cast(dtype, lowrank_a, lowrank_b, token_down, token_up)
    with torch.autocast(inputs_embeds.device.type, enabled=False):
        x = torch_impl.text_update(
            inputs_embeds.to(dtype), text_positions, a, b,
            scale=scale, embed_scale=embed_scale, token_down=down, token_up=up, activation=activation,
        )  # fmt: skip
    return x.to(inputs_embeds.dtype)


def _launch(
    input_ids: Tensor | None,
    source: Tensor,
    attention_mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    scale: float,
    embed_scale: float,
    token_down: Tensor | None,
    token_up: Tensor | None,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
) -> Tensor:
    """_join by the kernels: `source` is E with ids, or the text's embeddings without."""
    from . import triton_op

    _check_prompt(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, activation, embed_scale)
    shape = source.shape if input_ids is None else (*input_ids.shape, source.shape[1])
    _check_text(shape, source, prompt.shape[1], lowrank_a, lowrank_b, token_down, token_up, activation)
    _check_mask(attention_mask, shape, source)
    _check_start(prompt_start, shape[1])
    lowrank_update = lowrank_update and lowrank_a is not None
    out, _ = triton_op.prompt_embed(
        input_ids, source, attention_mask if lowrank_update or token_down is not None else None,
        prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up,
        scale=scale, embed_scale=embed_scale, activation=activation, prompt_start=prompt_start,
        lowrank_update=lowrank_update, fusion=fusion and lowrank_a is not None,
    )  # fmt: skip
    return out


def _join(
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    scale: float,
    embed_scale: float,
    token_down: Tensor | None,
    token_up: Tensor | None,
    activation: str,
    prompt_start: int,
    lowrank_update: bool,
    fusion: bool,
    impl: str,
) -> Tensor:
    _check_prompt(prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, activation, embed_scale)
    shape = inputs_embeds.shape
    _check_text(shape, inputs_embeds, prompt.shape[1], lowrank_a, lowrank_b, token_down, token_up, activation)
    _check_mask(attention_mask, shape, inputs_embeds)
    length = shape[1]
    _check_start(prompt_start, length)
    functions = _functions(impl)
    dtype = _compute_dtype(functions, inputs_embeds, prompt, lowrank_a, space_down, token_down)
    with torch.autocast(inputs_embeds.device.type, enabled=False):
        x, p, a, b, u, v, g, down, up = _cast(
            dtype, inputs_embeds, prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, token_down, token_up
        )
        prompt_star, _ = functions.reconstruct_prompt(
            p, a, b, u, v, g, scale=scale, embed_scale=embed_scale, activation=activation, fusion=fusion
        )
        if not lowrank_update:
            a = b = None
        if a is None and down is None:
            positions = None  # nothing asks for them
        elif attention_mask is not None:
            positions = reference.text_positions(attention_mask)
        elif functions is reference:
            positions = torch.arange(length, device=inputs_embeds.device).expand(len(inputs_embeds), -1)
        else:
            positions = None
        if a is not None and functions is torch_impl:
            a = a[:length]  # no position lies beyond the text
        x = functions.text_update(
            x, positions, a, b,
            scale=scale, embed_scale=embed_scale, token_down=down, token_up=up, activation=activation,
        )  # fmt: skip
        return functions.insert_prompt(prompt_star.to(inputs_embeds.dtype), x.to(inputs_embeds.dtype), prompt_start)


def _resolve(impl: str, prompt: Tensor) -> str:
    """The implementation to use; "auto" says once what it took and why."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown: choose one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    return resolve(impl, prompt.device)


def _functions(impl: str) -> ModuleType:
    return reference if impl == "reference" else torch_impl


def _compute_dtype(functions: ModuleType, *tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among the tensors; at least fp32 in the implementations that are not the specification."""
    present = [t.dtype for t in tensors if t is not None]
    dtype = present[0]
    for other in present[1:]:
        dtype = dtype if other == dtype else torch.promote_types(dtype, other)
    return dtype if functions is reference else torch.promote_types(dtype, torch.float32)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in tensors]


def _check_embedding(input_ids: Tensor, embedding_weight: Tensor) -> None:
    if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.dim() != 2:
        raise TypeError(f"input_ids must be a 2-d int64 or int32 tensor [batch, length], not {_describe(input_ids)}")
    if embedding_weight.dim() != 2 or not embedding_weight.is_floating_point():
        raise TypeError(
            f"embedding_weight must be a 2-d floating-point tensor [vocab, d], not {_describe(embedding_weight)}: "
            "pass quantised or computed embeddings to prompt_embed_inputs"
        )
    _same_device("embedding_weight", embedding_weight, input_ids=input_ids)
    readable = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and input_ids.numel() and not _is_traced(input_ids):
        low, high, vocab = input_ids.min().item(), input_ids.max().item(), len(embedding_weight)
        if low < 0 or high >= vocab:
            raise IndexError(
                f"input_ids holds {low if low < 0 else high}, but the vocabulary has ids 0 … {vocab - 1}: "
                "use the backbone's own tokenizer, or resize its embeddings"
            )


def _is_traced(tensor: Tensor) -> bool:
    """Whether the tensor has no readable values (fake tensors, torch.func transforms)."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _check_prompt(
    prompt: Tensor,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    space_down: Tensor | None,
    space_up: Tensor | None,
    gate_weight: Tensor | None,
    activation: str,
    embed_scale: float,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: choose one of {', '.join(map(repr, ACTIVATIONS))}")
    if not 0 < embed_scale < math.inf:
        raise ValueError(
            f"embed_scale={embed_scale} must be positive and finite: it is the RMS of the embeddings' entries"
        )
    if prompt.dim() != 2 or len(prompt) == 0:
        raise ValueError(f"prompt must be [s, d] with s >= 1, not {tuple(prompt.shape)}")
    d = prompt.shape[1]
    _all_or_none(lowrank_a=lowrank_a, lowrank_b=lowrank_b)
    _all_or_none(space_down=space_down, space_up=space_up, gate_weight=gate_weight)
    if lowrank_a is not None and lowrank_b is not None:
        _check_shape("lowrank_a", lowrank_a, ("N", "r"))
        _check_shape("lowrank_b", lowrank_b, (lowrank_a.shape[1], d))
    if space_down is not None and space_up is not None and gate_weight is not None:
        _check_shape("space_down", space_down, ("K", "h", d))
        _check_shape("space_up", space_up, tuple(space_down.shape))
        _check_shape("gate_weight", gate_weight, (len(space_down), d))
    named = dict(
        prompt=prompt, lowrank_a=lowrank_a, lowrank_b=lowrank_b,
        space_down=space_down, space_up=space_up, gate_weight=gate_weight,
    )  # fmt: skip
    _check_trained(prompt.device, named)


def _check_text(
    shape: tuple[int, ...],
    source: Tensor,
    d: int,
    lowrank_a: Tensor | None,
    lowrank_b: Tensor | None,
    token_down: Tensor | None,
    token_up: Tensor | None,
    activation: str,
) -> None:
    """`shape` is that of the text's embeddings, `source` what they come from: themselves, or E."""
    if len(shape) != 3 or shape[2] != d:
        raise ValueError(
            f"the text's embeddings must be [batch, length, {d}] for a prompt of width {d}, "
            f"not {tuple(shape)}: the EPT tensors belong to another backbone"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: choose one of {', '.join(map(repr, ACTIVATIONS))}")
    _all_or_none(lowrank_a=lowrank_a, lowrank_b=lowrank_b)
    _all_or_none(token_down=token_down, token_up=token_up)
    if token_down is not None and token_up is not None:
        _check_shape("token_down", token_down, ("q", d))
        _check_shape("token_up", token_up, tuple(token_down.shape))
    named = dict(inputs_embeds=source, lowrank_a=lowrank_a, token_down=token_down, token_up=token_up)
    _check_trained(source.device, named)


def _check_mask(attention_mask: Tensor | None, shape: tuple[int, ...], source: Tensor) -> None:
    if attention_mask is None:
        return
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool or integer, nonzero on text, not {attention_mask.dtype}: "
            "additive masks are not supported"
        )
    if attention_mask.shape != shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the text is "
            f"{tuple(shape[:2])}: pass one entry per text token, without columns for the prompt"
        )
    _same_device("attention_mask", attention_mask, inputs_embeds=source)


def _check_start(prompt_start: int, length: int) -> None:
    if not 0 <= prompt_start <= length:
        raise ValueError(f"prompt_start={prompt_start} is not a column of the text: it must be in 0 … {length}")


def _check_shape(name: str, tensor: Tensor, shape: tuple) -> None:
    """Letters stand for any positive size."""
    if tensor.shape == shape:
        return
    fits = tensor.dim() == len(shape) and all(
        n >= 1 if isinstance(want, str) else n == want for n, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], not {tuple(tensor.shape)}")


def _check_trained(device: torch.device, named: dict[str, Tensor | None]) -> None:
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, not {_describe(tensor)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the rest on {device}: move them to one device")


def _same_device(name: str, tensor: Tensor, **others: Tensor) -> None:
    for other, value in others.items():
        if value.device != tensor.device:
            raise ValueError(f"{name} is on {tensor.device}, but {other} on {value.device}: move them to one device")


def _all_or_none(**tensors: Tensor | None) -> None:
    missing = [name for name, t in tensors.items() if t is None]
    if missing and len(missing) < len(tensors):
        given = [name for name in tensors if name not in missing]
        raise ValueError(f"{', '.join(given)} given without {', '.join(missing)}: pass all of them, or None for all")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
