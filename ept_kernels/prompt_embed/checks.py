"""What the arguments of the input stage must be; each message names the argument and the remedy."""

import torch
from torch import Tensor

from ..common.checks import (
    check_activation,
    check_all_or_none,
    check_same_device,
    check_scale,
    check_shape,
    check_trained,
    describe,
    has_readable_values,
    value_range,
)
from .arguments import Settings, Stack, Text, TextWeights, Weights


def check_ids(input_ids: Tensor, embedding_weight: Tensor) -> None:
    """Ids [batch, L] and E [vocab, d], but for the ids' values."""
    if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.dim() != 2:
        raise TypeError(f"input_ids must be a 2-d int64 or int32 tensor [batch, length], not {describe(input_ids)}")
    if embedding_weight.dim() != 2 or not embedding_weight.is_floating_point():
        raise TypeError(
            f"embedding_weight must be a 2-d floating-point tensor [vocab, d], not {describe(embedding_weight)}: "
            "pass quantised or computed embeddings to prompt_embed_inputs"
        )
    check_same_device("embedding_weight", embedding_weight, input_ids=input_ids)


def check_id_values(input_ids: Tensor, vocab: int) -> None:
    """The ids' values where reading them costs nothing."""
    if input_ids.numel() and has_readable_values(input_ids):
        low, high = value_range(input_ids)
        if low < 0 or high >= vocab:
            raise IndexError(
                f"input_ids holds {low if low < 0 else high}, but the vocabulary has ids 0 … {vocab - 1}: "
                "use the backbone's own tokenizer, or resize its embeddings"
            )


def check_prompt(weights: Weights, settings: Settings) -> None:
    """What P* is made of."""
    prompt, lowrank_a, lowrank_b, space_down, space_up, gate_weight, *_ = weights
    check_activation(settings.activation)
    check_scale("embed_scale", settings.embed_scale, "the RMS of the embeddings' entries")
    if prompt.dim() != 2 or len(prompt) == 0:
        raise ValueError(f"prompt must be [s, d] with s >= 1, not {tuple(prompt.shape)}")
    d = prompt.shape[1]
    check_all_or_none(lowrank_a=lowrank_a, lowrank_b=lowrank_b)
    check_all_or_none(space_down=space_down, space_up=space_up, gate_weight=gate_weight)
    if lowrank_a is not None and lowrank_b is not None:
        check_shape("lowrank_a", lowrank_a, ("N", "r"))
        check_shape("lowrank_b", lowrank_b, (lowrank_a.shape[1], d))
    if space_down is not None and space_up is not None and gate_weight is not None:
        check_shape("space_down", space_down, ("K", "h", d))
        check_shape("space_up", space_up, tuple(space_down.shape))
        check_shape("gate_weight", gate_weight, (len(space_down), d))
    check_trained(
        prompt.device, prompt=prompt, lowrank_a=lowrank_a, lowrank_b=lowrank_b,
        space_down=space_down, space_up=space_up, gate_weight=gate_weight,
    )  # fmt: skip


def check_text(text: Text, d: int, weights: TextWeights, activation: str) -> None:
    """The text's embeddings, or E, and what they meet."""
    if len(text.shape) != 3 or text.shape[2] != d:
        raise ValueError(
            f"the text's embeddings must be [batch, length, {d}] for a prompt of width {d}, "
            f"not {tuple(text.shape)}: the EPT tensors belong to another backbone"
        )
    lowrank_a, lowrank_b, token_down, token_up = weights
    check_activation(activation)
    check_all_or_none(lowrank_a=lowrank_a, lowrank_b=lowrank_b)
    check_all_or_none(token_down=token_down, token_up=token_up)
    if token_down is not None and token_up is not None:
        check_shape("token_down", token_down, ("q", d))
        check_shape("token_up", token_up, tuple(token_down.shape))
    check_trained(
        text.source.device, inputs_embeds=text.source, lowrank_a=lowrank_a, token_down=token_down, token_up=token_up
    )


def check_mask(text: Text) -> None:
    """The attention mask, which may be None."""
    mask = text.mask
    if mask is None:
        return
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"attention_mask must be bool or integer, nonzero on text, not {mask.dtype}: "
            "additive masks are not supported"
        )
    if mask.shape != text.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the text is "
            f"{tuple(text.shape[:2])}: pass one entry per text token, without columns for the prompt"
        )
    check_same_device("attention_mask", mask, inputs_embeds=text.source)


def check_start(prompt_start: int, text: Text) -> None:
    """The column at which the prompt stands, or each row's, but for their values."""
    if text.starts is not None:
        check_integers("prompt_start", text.starts, (text.shape[0],))
        check_same_device("prompt_start", text.starts, inputs_embeds=text.source)
    _check_column(prompt_start, text.shape[1])


def check_start_values(text: Text) -> None:
    """The values of the rows' columns where reading them costs nothing."""
    starts = text.starts
    if starts is not None and starts.numel() and has_readable_values(starts):
        for value in value_range(starts):
            _check_column(value, text.shape[1])


def _check_column(prompt_start: int, length: int) -> None:
    if not 0 <= prompt_start <= length:
        raise ValueError(f"prompt_start={prompt_start} is not a column of the text: it must be in 0 … {length}")


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """TypeError for another dtype than an integer's, ValueError for another shape."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, not {describe(tensor)}")
    check_shape(name, tensor, shape)


def check_no_stack(index: Tensor | None, lengths: Tensor | None, positions: Tensor | None) -> None:
    """ValueError for what belongs to a stack of adapters beside a prompt of two dimensions."""
    for name, value in (("adapter_index", index), ("prompt_lengths", lengths), ("text_positions", positions)):
        if value is not None:
            raise ValueError(f"{name} needs a stack of adapters: give a prompt [adapters, S, d] and the rest to match")


def check_stack(text: Text, stack: Stack, weights: Weights) -> None:
    """The constants of several adapters, and what the rows say of them."""
    if any(t is not None for t in (weights.space_down, weights.space_up, weights.gate_weight)):
        raise ValueError("a stack has no spaces: they are in P* already, leave them out")
    if len(stack.prompt) == 0:
        raise ValueError(f"prompt must be [adapters, S, d] with at least one adapter, not {tuple(stack.prompt.shape)}")
    adapters, _, d = stack.prompt.shape
    batch = text.shape[0]
    if len(text.shape) != 3 or text.shape[2] != d:
        raise ValueError(
            f"the text's embeddings must be [batch, length, {d}] for prompts of width {d}, not {tuple(text.shape)}: "
            "the stack belongs to another backbone"
        )
    check_all_or_none(token_down=stack.token_down, token_up=stack.token_up)
    if stack.lowrank_a is None and stack.lowrank_b is not None:
        raise ValueError(
            "lowrank_b given without lowrank_a: pass both, or the update itself, [adapters, N, d], as lowrank_a"
        )
    if stack.lowrank_a is not None:
        check_shape("lowrank_a", stack.lowrank_a, (adapters, "N", d if stack.lowrank_b is None else "r"))
        if stack.lowrank_b is not None:
            check_shape("lowrank_b", stack.lowrank_b, (adapters, stack.lowrank_a.shape[2], d))
    if stack.token_down is not None and stack.token_up is not None:
        check_shape("token_down", stack.token_down, (adapters, "q", d))
        check_shape("token_up", stack.token_up, tuple(stack.token_down.shape))
    check_trained(
        text.source.device, inputs_embeds=text.source, prompt=stack.prompt, lowrank_a=stack.lowrank_a,
        lowrank_b=stack.lowrank_b, token_down=stack.token_down, token_up=stack.token_up,
    )  # fmt: skip
    if stack.adapter_index is None and adapters > 1:
        raise ValueError(f"a stack of {adapters} adapters needs adapter_index: the number of each row's adapter")
    if stack.positions is not None and text.mask is not None:
        raise ValueError("text_positions and attention_mask both say where the text stands: give one of them")
    of_rows = (
        ("adapter_index", stack.adapter_index, (batch,)),
        ("prompt_lengths", stack.lengths, (adapters,)),
        ("text_positions", stack.positions, text.shape[:2]),
    )
    for name, tensor, shape in of_rows:
        if tensor is not None:
            check_integers(name, tensor, shape)
            check_same_device(name, tensor, inputs_embeds=text.source)


def check_stack_values(stack: Stack) -> None:
    """What the rows say of the adapters, where reading it costs nothing."""
    bounds = (
        ("adapter_index", stack.adapter_index, 0, len(stack.prompt) - 1),
        ("prompt_lengths", stack.lengths, 0, None),
        ("text_positions", stack.positions, -1, None),
    )
    for name, tensor, lowest, highest in bounds:
        if tensor is not None and tensor.numel() and has_readable_values(tensor):
            low, high = value_range(tensor)
            if low < lowest or (highest is not None and high > highest):
                raise IndexError(
                    f"{name} holds {low if low < lowest else high}, but must be in {lowest} … {highest}"
                    if highest is not None
                    else f"{name} holds {low}, but must be {lowest} or more"
                )


def check_positions(text_positions: Tensor | None, shape: tuple[int, ...]) -> None:
    """One position per token, or None."""
    if text_positions is not None and text_positions.shape != shape[:2]:
        raise ValueError(
            f"text_positions has shape {tuple(text_positions.shape)}, but must be one number per token: "
            f"{tuple(shape[:2])}"
        )
