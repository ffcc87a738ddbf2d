"""From the caller's arguments to the wrapped model's: the prompt's columns go in here, and out of the outputs again.

The rows of a batch may belong to several adapters. Where their prompts have one shape, the rows of all are prepared
together but for the embeddings; otherwise each `Group` of rows is prepared as if it were alone, and then all are brought
to one width, so that the backbone runs once.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from ept_kernels import text_positions

from .backbones import is_plain, weight_of
from .folding import FoldedLayer
from .heads import MeanPoolingForSequenceClassification
from .layer import EPTLayer

__all__ = ["Group", "InputsMixin", "Prepared", "leading_padding"]

IGNORE_INDEX = -100  # what transformers' losses skip
RELATIVE_POSITIONS = ("bloom", "mpt", "falcon")  # causal models without position_ids to whom only distances matter


@dataclass
class Group:
    """The rows of a batch that belong to one adapter: its layer, its heads, and the rows' numbers (None: all rows).

    `order`, where it is known, has for every row of the batch its place among the rows of all groups, one after another.
    """

    layer: EPTLayer | FoldedLayer
    heads: list[nn.Module]
    rows: Tensor | None = None
    order: Tensor | None = None

    @overload
    def of(self, tensor: Tensor) -> Tensor: ...

    @overload
    def of(self, tensor: Tensor | None) -> Tensor | None: ...

    def of(self, tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or self.rows is None else tensor.index_select(0, self.rows)

    def repeated(self, times: int) -> "Group":
        """The group in a batch whose every row comes `times` times in a row, as in a beam search."""
        if self.rows is None or times == 1:
            return self
        rows = self.rows.unsqueeze(1) * times + torch.arange(times, device=self.rows.device)
        return dataclasses.replace(self, rows=rows.flatten(), order=None)


@dataclass
class Prepared:
    """The wrapped model's arguments, and where the caller's columns are in its outputs: a slice, or what says it."""

    arguments: dict[str, Any]
    where: slice | Callable[[], Tensor]

    @functools.cached_property
    def columns(self) -> slice | Tensor:
        """The columns of the outputs where the caller's are: a slice, or [batch, L]. Pooled outputs never ask."""
        return self.where if isinstance(self.where, slice) else self.where()

    @property
    def width(self) -> int:
        held = self.arguments.get("inputs_embeds")
        return (self.arguments["attention_mask"] if held is None else held).shape[1]


def text_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The text as it was given: ids [batch, L] or embeddings [batch, L, d]."""
    text = inputs_embeds if input_ids is None else input_ids
    if text is None:
        raise ValueError("pass either input_ids or inputs_embeds")
    return text


def leading_padding(attention_mask: Tensor) -> Tensor:
    """[batch] columns before each row's first text token."""
    return ((attention_mask != 0).cumsum(1) == 0).sum(1)


def in_row_order(parts: list[Tensor], groups: list[Group]) -> Tensor:
    """One tensor of all rows from each group's, in the batch's order."""
    if groups[0].rows is None:
        return parts[0]
    order = groups[0].order
    return torch.cat(parts).index_select(0, torch.argsort(all_rows(groups)) if order is None else order)


def by_group(tensor: Tensor, groups: list[Group]) -> list[Tensor]:
    """Each group's rows of a tensor [batch, …]."""
    if groups[0].rows is None:
        return [tensor]
    sizes = [len(group.rows) for group in groups if group.rows is not None]
    return list(tensor.index_select(0, all_rows(groups)).split(sizes))


def all_rows(groups: list[Group]) -> Tensor:
    return torch.cat([group.rows for group in groups if group.rows is not None])


def of_one_shape(groups: list[Group]) -> list[Group]:
    """The groups, or one of all rows where their prompts have one length and one place: it stands for every one of them
    in what asks for the prompt's shape alone."""
    shapes = {(group.layer.config.prompt_length, group.layer.prompt_start) for group in groups}
    return groups if len(shapes) > 1 else [dataclasses.replace(groups[0], rows=None, order=None)]


def prompt_width(groups: list[Group]) -> int:
    """The widest prompt among the groups: s, where there is one adapter."""
    return max(group.layer.config.prompt_length for group in groups)


def insert(layer: EPTLayer | FoldedLayer, columns: Tensor, value: int | Tensor) -> Tensor:
    """Columns [batch, L] with the prompt's s columns put in: one value, or [batch, s] values."""
    if not isinstance(value, Tensor):
        value = columns.new_full((len(columns), layer.config.prompt_length), value)
    start = layer.prompt_start
    return torch.cat([columns[:, :start], value, columns[:, start:]], dim=1)


def behind_padding(layer: EPTLayer | FoldedLayer, width: int, leading: Tensor) -> Tensor:
    """[batch, width = s + L] where to take columns from, so that the prompt's come to stand behind a row's padding on
    the left, `leading` [batch] wide."""
    s, lead = layer.config.prompt_length, leading.unsqueeze(1)
    column = torch.arange(width, device=leading.device)
    return torch.where(column < lead, column + s, torch.where(column < lead + s, column - lead, column))


def taken(tensor: Tensor, columns: Tensor) -> Tensor:
    """The columns [batch, m] of a tensor [batch, n, …]."""
    if tensor.dim() == 3:
        columns = columns.unsqueeze(-1).expand(-1, -1, tensor.shape[2])
    return tensor.gather(1, columns)


def widened(columns: Tensor, width: int, value: int, left: bool) -> Tensor:
    """Columns [batch, n, …] with columns of `value` added on one side up to `width`."""
    missing = width - columns.shape[1]
    sides = (missing, 0) if left else (0, missing)
    return F.pad(columns, (0, 0) * (columns.dim() - 2) + sides, value=value) if missing else columns


class InputsMixin(nn.Module):
    """What an EPTModel does to its inputs and outputs."""

    config: PretrainedConfig
    base_model: PreTrainedModel
    _kind: str
    _accepts: set[str]
    _max_length: int | None
    _first_position: int
    _shifts_labels: bool

    def _check_inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        name = type(self.base_model).__name__
        encoded = kwargs.get("encoder_outputs") is not None
        if (input_ids is None) == (inputs_embeds is None) and not encoded:
            raise ValueError("pass either input_ids or inputs_embeds")
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, length], not {tuple(input_ids.shape)}")
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(
                f"attention_mask must be [batch, length], 1 on text, not {shape}: a mask of another form does not say "
                "which columns each prompt belongs to; for several examples in a row give position_ids that restart"
            )
        if kwargs.get("start_positions") is not None or kwargs.get("end_positions") is not None:
            raise ValueError("question answering is not supported: its positions would have to be moved")
        if position_ids is not None and "position_ids" not in self._accepts:
            raise ValueError(f"{name} takes no position_ids: leave them out")
        if token_type_ids is not None and "token_type_ids" not in self._accepts and token_type_ids.any():
            raise ValueError(f"{name} has no token types: leave token_type_ids out")
        if encoded:
            return
        batch, length = text_of(input_ids, inputs_embeds).shape[:2]
        continued = self._kind == "causal" and attention_mask is not None and attention_mask.shape[1] > length
        given = {"attention_mask": None if continued else attention_mask, "token_type_ids": token_type_ids}
        given |= {"position_ids": position_ids}
        if labels is not None and self._labels_are_per_token(labels):
            given["labels"] = labels
        for what, tensor in given.items():
            if tensor is None:
                continue
            if tensor.is_floating_point():
                raise TypeError(f"{what} must hold integers, not {tensor.dtype}")
            rows = (batch, 1) if what in ("token_type_ids", "position_ids") else (batch,)
            if tensor.dim() != 2 or tensor.shape[0] not in rows or tensor.shape[1] != length:
                raise ValueError(
                    f"{what} is {tuple(tensor.shape)}, but the text is {(batch, length)}: give one entry per text token, "
                    "none for the prompt"
                )

    def _embed(
        self,
        layer: EPTLayer | FoldedLayer,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """The backbone's input [batch, s + L, d]."""
        if inputs_embeds is not None:
            return layer(None, attention_mask, inputs_embeds=inputs_embeds)
        embedding = self.base_model.get_input_embeddings()
        if is_plain(embedding):
            return layer(input_ids, attention_mask, embedding_weight=weight_of(embedding))
        return layer(None, attention_mask, inputs_embeds=embedding(input_ids))

    def _prepare_groups(
        self,
        groups: list[Group],
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
    ) -> Prepared:
        """The wrapped model's arguments for rows of several adapters (or of one)."""
        text = text_of(input_ids, inputs_embeds)
        batch, length = text.shape[:2]
        if attention_mask is None and self._kind == "causal-pooled" and input_ids is not None:
            attention_mask = self._mask_by_last_token(input_ids)
        if len(of_one_shape(groups)) == 1:
            return self._prepare(groups, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels)
        if attention_mask is None and len({group.layer.config.prompt_length for group in groups}) > 1:
            attention_mask = torch.ones(batch, length, dtype=torch.int64, device=text.device)
        token_type_ids, position_ids = (
            None if t is None else t.expand(batch, -1) for t in (token_type_ids, position_ids)
        )
        given = (input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels)
        parts = [self._prepare(of_one_shape([group]), *map(group.of, given)) for group in groups]
        return self._joined(parts, groups, length)

    def _joined(self, parts: list[Prepared], groups: list[Group], length: int) -> Prepared:
        """One batch from groups that were prepared apart, padded where the text need not be."""
        left = self._kind.startswith("causal")
        width = max(part.width for part in parts)
        if left and any(part.width < width for part in parts) and "position_ids" not in parts[0].arguments:
            self._refuse_moved_text()
        arguments = {}
        for key, first in parts[0].arguments.items():
            tensors = [part.arguments[key] for part in parts]
            if first is not None and first.shape[1:2] == (parts[0].width,):  # one entry per column
                value = IGNORE_INDEX if key == "labels" else 0
                tensors = [widened(t, width, value, left) for t in tensors]
            arguments[key] = None if first is None else in_row_order(tensors, groups)
        if self._kind == "causal":
            return Prepared(arguments, slice(width - length, None))

        def columns() -> Tensor:
            moved = [_as_indices(part, length) + (width - part.width if left else 0) for part in parts]
            return in_row_order(moved, groups)

        return Prepared(arguments, columns)

    def _prepare(
        self,
        groups: list[Group],
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
    ) -> Prepared:
        """The wrapped model's arguments for rows of adapters whose prompts have one shape, one example per row."""
        layer = groups[0].layer  # as good as any: asked for the shape alone
        token_labels = labels is not None and self._labels_are_per_token(labels)
        order = None
        if attention_mask is not None and self._kind != "causal":
            # Encoders count positions by columns, so their text must start at the first; a pooled causal model reads
            # the last column, so its text must end there.
            last = attention_mask != 0 if self._kind == "causal-pooled" else attention_mask == 0
            order = torch.argsort(last, dim=1, stable=True)
            attention_mask = attention_mask.gather(1, order)
            input_ids, token_type_ids, position_ids = (
                None if t is None else t.expand(len(order), -1).gather(1, order)
                for t in (input_ids, token_type_ids, position_ids)
            )
            if inputs_embeds is not None:
                inputs_embeds = taken(inputs_embeds, order)
            if labels is not None and token_labels:
                labels = labels.gather(1, order)
        length = text_of(input_ids, inputs_embeds).shape[1]
        self._check_length(layer, length, attention_mask)
        read = (input_ids, inputs_embeds, attention_mask)
        embeds = in_row_order([self._embed(group.layer, *map(group.of, read)) for group in groups], groups)
        prepared: dict[str, Any] = {"inputs_embeds": embeds}
        batch, device = len(embeds), embeds.device
        if position_ids is not None and attention_mask is None and self._kind.startswith("causal"):
            # Without a mask transformers takes a gap between positions for the start of another example.
            attention_mask = torch.ones(batch, length, dtype=torch.int64, device=device)
        prepared["attention_mask"] = None if attention_mask is None else insert(layer, attention_mask, 1)
        if token_type_ids is not None and "token_type_ids" in self._accepts:
            prepared["token_type_ids"] = insert(layer, token_type_ids.expand(batch, -1), 0)
        if position_ids is not None:
            self._check_positions(layer, position_ids)
            prepared["position_ids"] = _insert_positions(layer, position_ids.expand(batch, -1), attention_mask)
        if attention_mask is not None and self._kind.startswith("causal"):
            leading = leading_padding(attention_mask)
            moved = bool(leading.any())  # asked once: it waits for the device
            if moved:
                columns = behind_padding(layer, embeds.shape[1], leading)
                prepared = {key: taken(t, columns) for key, t in prepared.items()}
            if "position_ids" in self._accepts and position_ids is None:
                positions = text_positions(prepared["attention_mask"]).clamp(min=0)
                prepared["position_ids"] = positions + self._first_position
            elif position_ids is None and moved:
                self._refuse_moved_text()
        if labels is not None and token_labels:
            # A column's label stands s columns on, where _trim finds its logits.
            if self._shifts_labels:
                labels = labels.clone()
                labels[:, :1] = IGNORE_INDEX  # the first token is predicted by the prompt, whose logits nobody sees
            labels = insert(layer, labels, IGNORE_INDEX)
        prepared["labels"] = labels
        if isinstance(self.base_model, MeanPoolingForSequenceClassification):
            mask = attention_mask
            if mask is None:
                mask = torch.ones(batch, length, dtype=torch.int64, device=device)
            prepared["pooling_mask"] = insert(layer, mask, 0)
        if order is None and not layer.prompt_start:
            return Prepared(prepared, slice(layer.config.prompt_length, None))

        def where() -> Tensor:
            columns = torch.arange(length, device=device) if order is None else torch.argsort(order, dim=1)
            columns = columns + layer.config.prompt_length * (columns >= layer.prompt_start)
            return columns.expand(batch, -1)

        return Prepared(prepared, where)

    def _prepare_encoder_of_seq2seq(
        self,
        groups: list[Group],
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Prepared:
        if kwargs.get("encoder_outputs") is None:
            return self._prepare_groups(groups, input_ids, inputs_embeds, attention_mask, None, None, None)
        if attention_mask is None:
            if len({group.layer.config.prompt_length for group in groups}) > 1:
                raise ValueError("encoder_outputs of prompts of several lengths need the text's attention_mask")
            return Prepared({"attention_mask": None}, slice(None))
        groups = of_one_shape(groups)
        packed = attention_mask.sort(dim=1, descending=True, stable=True).values
        parts = [
            Prepared({"attention_mask": insert(group.layer, group.of(packed), 1)}, slice(0, None)) for group in groups
        ]
        return parts[0] if groups[0].rows is None else self._joined(parts, groups, attention_mask.shape[1])

    def _refuse_moved_text(self) -> None:
        """ValueError if text that starts after padding would get other positions than the row alone."""
        if self.config.model_type not in RELATIVE_POSITIONS:
            raise ValueError(
                f"{type(self.base_model).__name__} takes no position_ids, so text after padding would get the wrong "
                "positions: "
                + ("pad on the right" if self._kind == "causal" else "batch rows of one length")
                + ", with prompts of one length"
            )

    def _check_positions(self, layer: EPTLayer | FoldedLayer, position_ids: Tensor) -> None:
        limit = self._max_length
        if limit is None or position_ids.numel() == 0:
            return
        highest = int(position_ids.max()) + layer.config.prompt_length - self._first_position
        if highest >= limit:
            raise ValueError(
                f"position_ids with the prompt reach {highest}, but the backbone has positions 0 … {limit - 1}"
            )

    def _labels_are_per_token(self, labels: Tensor) -> bool:
        pooled = "SequenceClassification" in type(self.base_model).__name__
        return self._kind != "seq2seq" and not pooled and labels.dim() == 2

    def _mask_by_last_token(self, input_ids: Tensor) -> Tensor | None:
        """Without a mask, transformers' pooled causal models find the last token by the padding's id; so here."""
        pad = self.config.get_text_config().pad_token_id
        if pad is None:
            return None
        return (input_ids != pad).flip(1).cumsum(1).flip(1) > 0

    def _check_length(self, layer: EPTLayer | FoldedLayer, length: int, attention_mask: Tensor | None) -> None:
        s, limit = layer.config.prompt_length, self._max_length
        if limit is None or length + s <= limit:
            return
        longest = length
        if attention_mask is not None and self._kind == "causal":
            longest = int((attention_mask != 0).sum(1).max())  # padding takes no positions
        if longest + s > limit:
            raise ValueError(
                f"a row of {longest} tokens with {s} prompt rows exceeds the backbone's {limit} positions: "
                f"truncate the text to {limit - s} tokens (tokenizer(..., max_length={limit - s}, truncation=True))"
            )

    def _continue(
        self,
        groups: list[Group],
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: Any,
        position_ids: Tensor | None,
        labels: Tensor | None,
    ) -> dict[str, Any]:
        """Arguments for new tokens after a cached prefix that holds the prompt: the text's count p goes on."""
        if self._kind != "causal":
            raise ValueError("past_key_values is supported for causal language models only")
        width, cached = prompt_width(groups), int(past_key_values.get_seq_length())
        x = self.base_model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        batch, new = x.shape[:2]
        text_length = cached - width + new
        if text_length < new:
            raise ValueError(
                f"the cache holds {cached} columns, fewer than the prompt's {width}: it was filled without EPT"
            )
        if attention_mask is None:
            attention_mask = torch.ones(batch, text_length, dtype=torch.int64, device=x.device)
        if attention_mask.shape[1] != text_length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but the cached and new text has {text_length}"
            )
        p = text_positions(attention_mask)[:, -new:]
        shapes = of_one_shape(groups)
        for group in shapes:
            self._check_length(group.layer, text_length, group.of(attention_mask))
        prepared = dict(
            inputs_embeds=self._continue_text(groups, x, p),
            attention_mask=self._mask_with_prompt(groups, attention_mask),
            past_key_values=past_key_values,
            labels=labels,
        )
        if "position_ids" in self._accepts:
            if position_ids is None:
                position_ids = p + self._first_position
            s = [torch.full_like(group.of(p[:, :1]), group.layer.config.prompt_length) for group in shapes]
            prepared["position_ids"] = position_ids.clamp(min=0) + in_row_order(s, shapes)
        return prepared

    def _continue_text(self, groups: list[Group], x: Tensor, p: Tensor) -> Tensor:
        """[batch, n, d] embeddings of text after a cached prefix, each row with its adapter's update for p [batch, n]."""
        return in_row_order([group.layer.continue_text(group.of(x), group.of(p)) for group in groups], groups)

    def _mask_with_prompt(self, groups: list[Group], attention_mask: Tensor) -> Tensor:
        """[batch, prompt_width + L]: a causal model's mask with each row's prompt directly before its text."""
        width, leading = prompt_width(groups) + attention_mask.shape[1], leading_padding(attention_mask)
        groups, parts = of_one_shape(groups), []
        for group in groups:
            part = insert(group.layer, group.of(attention_mask), 1)
            part = taken(part, behind_padding(group.layer, part.shape[1], group.of(leading)))
            parts.append(widened(part, width, 0, left=True))
        return in_row_order(parts, groups)

    def _move_logits_to_keep(self, kwargs: dict, prepared: Prepared) -> int | Tensor | None:
        """Puts `logits_to_keep`, which counts the caller's columns, into the backbone's. Returns what was asked for."""
        kept = kwargs.get("logits_to_keep")
        if kept is None or (isinstance(kept, int) and kept == 0) or self._kind != "causal":
            return None
        columns = prepared.columns
        if isinstance(columns, slice):
            if isinstance(kept, Tensor):
                kwargs["logits_to_keep"] = kept + columns.start
            return kept
        if len(columns) > 1:
            raise ValueError("logits_to_keep beside packed examples needs a batch of one row: leave it out")
        kwargs["logits_to_keep"] = columns[0, kept] if isinstance(kept, Tensor) else columns[0, -kept:]
        return kwargs["logits_to_keep"]

    def _trim(self, outputs: Any, prepared: Prepared, length: int, kept: int | Tensor | None) -> None:
        """Brings token-level outputs into the caller's columns; the prompt's rows go."""
        for key in ("logits", "last_hidden_state"):
            value = outputs.get(key)
            if value is None or value.dim() != 3:
                continue
            if kept is not None and key == "logits":
                if not isinstance(kept, Tensor):
                    outputs[key] = value[:, -min(kept, length) :]
            elif isinstance(prepared.columns, slice):
                outputs[key] = value[:, prepared.columns]
            else:
                outputs[key] = taken(value, prepared.columns)


def _as_indices(part: Prepared, length: int) -> Tensor:
    """The part's columns as [batch, L]."""
    if isinstance(part.columns, Tensor):
        return part.columns
    held = next(t for t in part.arguments.values() if t is not None)
    return torch.arange(length, device=held.device).expand(len(held), -1) + part.columns.start


def _insert_positions(layer: EPTLayer | FoldedLayer, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Explicit positions with the prompt's put in: the prompt takes the positions where the text after it began."""
    s, start = layer.config.prompt_length, layer.prompt_start
    unset = torch.iinfo(position_ids.dtype).max
    after = position_ids[:, start:]
    if attention_mask is not None:
        after = after.masked_fill(attention_mask[:, start:] == 0, unset)
    first = torch.cat([after, after.new_full((len(after), 1), unset)], dim=1).amin(dim=1, keepdim=True)
    if start:  # a row may have no text after the prompt
        first = first.where(first != unset, position_ids[:, start - 1 : start] + 1)
    prompt = first + torch.arange(s, device=position_ids.device, dtype=position_ids.dtype)
    moved = torch.cat([position_ids[:, :start], position_ids[:, start:] + s], dim=1)
    if attention_mask is not None:
        moved = moved.where(attention_mask != 0, 0)
    return insert(layer, moved, prompt)
