"""EPTModel: a frozen transformers model with an EPT layer before it.

The wrapped model runs on `inputs_embeds`; nothing in it is replaced. What depends on where a row's padding stands is
made independent of it here: encoders get their rows right-padded, causal models get positions counted from the mask.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ept_kernels.reference import text_positions

from .config import EPTConfig
from .folding import FoldedLayer, fold_layer
from .heads import MeanPoolingForSequenceClassification
from .layer import EPTLayer
from .saving import backbone_fingerprint, check_fingerprint, check_weights, read_adapter, write_adapter
from .sharding import put, whole, whole_shape

__all__ = ["EPTModel", "get_ept_model", "head_names", "max_text_tokens"]

IGNORE_INDEX = -100  # what transformers' losses skip
RELATIVE_POSITIONS = ("bloom", "mpt", "falcon")  # causal models without position_ids to whom only distances matter


def get_ept_model(
    model: PreTrainedModel,
    config: EPTConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    token_counts: Tensor | None = None,
    soft_prompt: Tensor | None = None,
) -> "EPTModel":
    """Freezes a transformers model and puts a fresh EPT layer before it.

    Args:
        model: an encoder (with or without a head), an encoder-decoder, a causal LM, or a causal LM with a
            classification head. Its weights stay as they are and stop training, but for a classification head.
        config: the adapter's settings; None takes `EPTConfig()`.
        tokenizer: for init="text", and so that init="vocab" never draws special or unused tokens.
        token_counts: [vocab] how often each token occurs in your text; init="vocab" draws among the frequent ones.
        soft_prompt: Q [m, d], a trained soft prompt in the embeddings' own size, for init="decompose".

    Raises:
        ValueError, TypeError: the model or the settings cannot work together, with the reason.
    """
    config = EPTConfig() if config is None else config
    if not isinstance(config, EPTConfig):
        raise TypeError(f"config must be an EPTConfig, not {type(config).__name__}: EPTConfig.from_dict makes one")
    wrapped = EPTModel(model, config)
    _init_prompt(wrapped, tokenizer, token_counts, soft_prompt)
    return wrapped


class EPTModel(nn.Module):
    """A frozen transformers model behind an EPT layer; made by `get_ept_model` or `EPTModel.from_pretrained`.

    `forward` takes what the wrapped model's forward takes. Its outputs have the wrapped model's shapes: token-level
    `logits` and `last_hidden_state` [batch, L, …] come without the prompt's rows, in the caller's column order, and
    `labels` line up with them. `hidden_states`, `attentions`, `past_key_values` and `encoder_last_hidden_state` are
    the backbone's own and include the prompt's s rows. The loss is the wrapped model's, on these logits and labels: a
    causal LM's first column is predicted by nothing the caller sees and does not count, as in the wrapped model.

    In a causal model the prompt stands directly before a row's first text token, after any padding on the left, so that
    distances and attention windows are those of the row alone. What stands in padding columns of an output is undefined.

    Attributes: `base_model` (the wrapped model), `ept` (the EPTLayer), `ept_config`; `config` is the wrapped model's.
    """

    is_quantized = False  # transformers' Trainer refuses to train quantised weights: here they stay frozen

    def __init__(self, model: PreTrainedModel, config: EPTConfig):
        super().__init__()
        _refuse_unsupported(model)
        self.base_model = model
        self.config = model.config
        self._kind = _kind_of(model)
        parameters = inspect.signature(model.forward).parameters
        # Whether a head passes on what it takes as **kwargs is known of our own alone.
        inner = model.encoder if isinstance(model, MeanPoolingForSequenceClassification) else model
        taken = inspect.signature(inner.forward).parameters
        self._accepts = {name for name in ("position_ids", "token_type_ids") if name in taken}
        if getattr(model.config, "alibi", False):
            self._accepts.discard("position_ids")  # taken and ignored
        embedding = model.get_input_embeddings()
        _check_inputs_embeds(model, self._kind)
        if config.embed_scale is None:
            config = dataclasses.replace(config, embed_scale=_embedding_rms(embedding))
        prompt_start = config.prompt_start
        if prompt_start is None:
            prompt_start = int(self._kind == "encoder" and _reads_first_token(model))
        if self._kind.startswith("causal") and prompt_start != 0:
            raise ValueError(
                f"prompt_start={prompt_start}: a causal model's prompt stands before the text, where every token sees it; "
                "leave prompt_start at None"
            )
        self._max_length, self._first_position = _positions(model)
        if self._max_length is not None and config.prompt_length >= self._max_length:
            raise ValueError(
                f"prompt_length={config.prompt_length} leaves no room for text in the backbone's {self._max_length} positions"
            )
        self.ept_config = config
        weight = embedding.weight
        self.ept = EPTLayer(config, _embedding_width(embedding), prompt_start)
        if not weight.is_meta:
            self.ept.to(weight.device)
        model.requires_grad_(False)
        self.head_names = head_names(model)
        for head in self._heads():
            head.requires_grad_(True)
            if any(p.dtype in (torch.float16, torch.bfloat16) for p in head.parameters()):
                head.float()
                head.register_forward_pre_hook(_inputs_to_the_heads_dtype)
        # Whether the loss divides by the Trainer's num_items_in_batch: only the causal LM losses do.
        self._shifts_labels = self._kind == "causal" and model.get_output_embeddings() is not None
        self.accepts_loss_kwargs = self._shifts_labels and any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )
        self._adapter_enabled = True
        self.train(model.training)

    # ------------------------------------------------------------------ running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ):
        given = dict(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
            position_ids=position_ids, inputs_embeds=inputs_embeds, labels=labels, past_key_values=past_key_values,
            return_dict=return_dict,
        )  # fmt: skip
        if not self._adapter_enabled:
            return self.base_model(**{k: v for k, v in given.items() if v is not None}, **kwargs)
        self._check_inputs(input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels, kwargs)
        if self._kind == "seq2seq":
            prepared, order = self._prepare_encoder_of_seq2seq(input_ids, inputs_embeds, attention_mask, kwargs)
            prepared |= dict(labels=labels, past_key_values=past_key_values)
        elif past_key_values is not None and past_key_values.get_seq_length() > 0:
            prepared, order = self._continue(**given), None
            kwargs.pop("cache_position", None)
            outputs = self.base_model(**{k: v for k, v in prepared.items() if v is not None}, **kwargs)
            return outputs
        else:
            prepared, order = self._prepare(
                input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels
            )
            prepared["past_key_values"] = past_key_values
        kept = self._shift_logits_to_keep(kwargs)
        prepared = {k: v for k, v in prepared.items() if v is not None}
        outputs = self.base_model(**prepared, **kwargs, return_dict=True)
        if self._kind != "seq2seq":
            length = (inputs_embeds if input_ids is None else input_ids).shape[1]
            self._trim(outputs, order, length, kept)
        return outputs.to_tuple() if return_dict is False else outputs

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs):
        """The wrapped model's `generate`; the prompt's rows are not tokens: they do not count and are not returned.

        Takes `input_ids` (or `inputs` / `inputs_embeds`) and everything that `generate` of the wrapped model takes.
        """
        if not self._adapter_enabled:
            return self.base_model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        inputs_embeds = kwargs.pop("inputs_embeds", None)
        if input_ids is None and inputs_embeds is None:
            raise ValueError("generate needs input_ids or inputs_embeds")
        if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens") is not None:
            raise ValueError("assisted generation is not supported with EPT: leave out the assistant")
        if kwargs.get("past_key_values") is not None:
            raise ValueError("generate with a given past_key_values is not supported with EPT: pass the whole text")
        if kwargs.get("prefill_chunk_size") is not None:
            raise ValueError("prefill_chunk_size is not supported with EPT: leave it out")
        read_ids = input_ids if inputs_embeds is None else None
        self._check_inputs(read_ids, inputs_embeds, attention_mask, None, None, None, kwargs)
        if self._kind == "seq2seq":
            prepared, _ = self._prepare_encoder_of_seq2seq(read_ids, inputs_embeds, attention_mask, {})
            return self.base_model.generate(**{k: v for k, v in prepared.items() if v is not None}, **kwargs)
        if not self._shifts_labels or "past_key_values" not in inspect.signature(self.base_model.forward).parameters:
            raise TypeError(f"{type(self.base_model).__name__} does not generate text with a key-value cache")
        text = input_ids if inputs_embeds is None else inputs_embeds
        if attention_mask is None:
            attention_mask = self._mask_of(text, kwargs)
        if attention_mask.shape[1] == 0 or (attention_mask.diff(dim=1) < 0).any() or not attention_mask[:, -1].all():
            raise ValueError("text to go on with must end each row: pad on the left (tokenizer.padding_side = 'left')")
        leading = _leading_padding(attention_mask)
        embeds = self._place(self._embed(input_ids, inputs_embeds, attention_mask), leading)
        mask = self._place(self._insert(attention_mask, 1), leading)
        self._lengths_without_prompt(kwargs, text.shape[1])
        hook = functools.partial(self._update_decoding_step, leading=leading)
        handle = self.base_model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            ids = {} if input_ids is None else {"input_ids": input_ids}
            return self.base_model.generate(**ids, inputs_embeds=embeds, attention_mask=mask, **kwargs)
        finally:
            handle.remove()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the wrapped model runs without EPT (a trained head stays)."""
        before, self._adapter_enabled = self._adapter_enabled, False
        try:
            yield
        finally:
            self._adapter_enabled = before

    def train(self, mode: bool = True) -> "EPTModel":
        """Training mode; the frozen backbone's dropout stays off unless `backbone_dropout` is set."""
        super().train(mode)
        if mode and not self.ept_config.backbone_dropout:
            self.base_model.eval()
            for head in self._heads():
                head.train()
            for module in self.base_model.modules():
                # A layer checkpoints only while it is in training mode itself; its submodules stay in eval mode.
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **settings: Any
    ) -> None:
        """The wrapped model's; dropout that its layers apply themselves is set to zero with it if dropout is off."""
        if hasattr(self.base_model, "activation_checkpointing_enable"):
            self.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs, **settings)
        else:  # transformers before the name
            self.base_model.gradient_checkpointing_enable(activation_checkpointing_kwargs, **settings)
        # The prompt brings gradients into the first layer; the hook that would make frozen embeddings bring some
        # costs a gradient of all text, and hides the table from the fused path.
        self.base_model.disable_input_require_grads()
        if not self.ept_config.backbone_dropout:
            for module in self.base_model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    for name, value in vars(module).items():
                        if "drop" in name and isinstance(value, float):  # dropout, attention_dropout, layerdrop, …
                            setattr(module, name, 0.0)
        self.train(self.training)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **settings: Any) -> None:
        """transformers' older name for `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **settings)

    # ------------------------------------------------------------------ looking at it

    def trainable_parameters(self) -> dict[str, int]:
        """Trained parameters by part, the head last."""
        parts = self.ept_config.parameters_by_part(self.ept.embed_dim)
        head = sum(p.numel() for module in self._heads() for p in module.parameters())
        return parts | ({"head": head} if head else {})

    def print_trainable_parameters(self) -> None:
        """Prints the counts as PEFT does, and by part."""
        parts = self.trainable_parameters()
        trained, total = sum(parts.values()), sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")
        print("  " + ", ".join(f"{part}: {count:,}" for part, count in parts.items()))

    @torch.no_grad()
    def prompt_embeds(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """What the backbone (a T5's encoder) reads in place of the text: [batch, s + L, d] in the embeddings' dtype.

        For vLLM's `prompt_embeds` and for any other program that takes embeddings (docs/vllm.md). Rows of an encoder
        come padded on the right. A causal model's padding stays on its side, the prompt directly before the text.

        Args:
            input_ids: [batch, L], or `inputs_embeds` [batch, L, d] in their place.
            attention_mask: [batch, L], 1 on text; None where there is no padding.
        """
        self._check_inputs(input_ids, inputs_embeds, attention_mask, None, None, None, {})
        return self._prepare(input_ids, inputs_embeds, attention_mask, None, None, None)[0]["inputs_embeds"]

    def fold(self) -> "EPTModel":
        """Puts the constants P* and C in the EPT layer's place: from now on for inference only. Returns self."""
        self._put_folded(fold_layer(self.ept))
        return self

    @torch.no_grad()
    def gate_weights(self) -> Tensor:
        """The gate's weights [s, K]: one row per prompt row, each summing to 1. Empty where the spaces are off or folded."""
        return self.ept.reconstruct()[1]

    def plot_gates(self, path: str | os.PathLike | None = None, before: Tensor | None = None):
        """Heat map of `gate_weights()`, prompt rows × spaces, beside `before` [s, K] if given. Returns the figure."""
        from .plots import plot_gates

        return plot_gates(self.gate_weights(), before, path)

    # ------------------------------------------------------------------ files

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True) -> None:
        """Writes adapter_config.json and adapter_model.safetensors: the adapter and the head, never the backbone.

        Where the model is spread over processes, every one of them calls this, and one has `is_main_process`.
        Raises FloatingPointError, and writes nothing, if a tensor holds NaN or infinity.
        """
        tensors = self.adapter_tensors()
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} holds NaN or infinity: the training diverged, lower the learning rate"
                )
        settings = self.ept_config.to_dict() | {
            "method": "EPT",
            "base_model_name_or_path": getattr(self.config, "_name_or_path", "") or None,
            "base_model_class": type(self.base_model).__name__,
            "head": self.head_names,
            "num_labels": getattr(self.config, "num_labels", None) if self.head_names else None,
            "label_names": _label_names(self.config) if self.head_names else None,
            "problem_type": getattr(self.config, "problem_type", None) if self.head_names else None,
            "backbone": backbone_fingerprint(self.config, self.base_model.get_input_embeddings()),
        }
        if isinstance(self.ept, FoldedLayer):
            settings |= self.ept.facts()
        if is_main_process:
            write_adapter(save_directory, settings, tensors)

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, path: str | os.PathLike, *, ignore_backbone_mismatch: bool = False
    ) -> "EPTModel":
        """The adapter in the directory `path` on the backbone `model`; it can be used and (unless folded) trained on.

        Raises:
            FileNotFoundError, ValueError: the directory is incomplete or damaged, or belongs to another backbone
                (`ignore_backbone_mismatch=True` loads it all the same where the shapes fit).
        """
        settings, tensors = read_adapter(path)
        facts = {key: settings.pop(key, None) for key in _FACTS}
        config = EPTConfig.from_dict(settings)
        if not ignore_backbone_mismatch and facts["backbone"] is not None:
            check_fingerprint(facts["backbone"], backbone_fingerprint(model.config, model.get_input_embeddings()))
        wrapped = cls(model, config)
        if facts["folded"]:
            layer = FoldedLayer(wrapped.ept_config, wrapped.ept.embed_dim, wrapped.ept.prompt_start)
            layer.sha256 = facts["prompt_sha256"]
            wrapped._put_folded(layer.to(wrapped.ept.prompt.device))
        wrapped.load_adapter_tensors(tensors, source=str(path))
        check_weights(path)
        return wrapped

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What is saved: the EPT tensors by name, the head's under "head.". Whole, also where they are sharded."""
        return {name: whole(tensor).detach() for name, tensor in self._adapter_tensors().items()}

    @torch.no_grad()
    def load_adapter_tensors(self, tensors: dict[str, Tensor], source: str = "the given tensors") -> None:
        """Copies tensors into the layer and the head. ValueError if any is missing, extra or of another shape."""
        own = self._adapter_tensors()
        missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
        if missing or extra:
            said = [
                f"{word} {', '.join(names)}" for word, names in (("lacks", missing), ("has unknown", extra)) if names
            ]
            raise ValueError(f"{source} {' and '.join(said)}: it does not fit this config and this model's head")
        for name, tensor in own.items():
            if tensors[name].shape != whole_shape(tensor):
                raise ValueError(
                    f"{source}: {name} is {tuple(tensors[name].shape)}, but must be {tuple(whole_shape(tensor))} for this model"
                )
        for name, tensor in own.items():
            put(tensor, tensors[name])

    def __getattr__(self, name: str) -> Any:
        """What EPTModel does not have is asked of the wrapped model (device, dtype, generation_config, …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # ------------------------------------------------------------------ inside

    def _get_name(self) -> str:
        """The wrapped model's class: transformers' Trainer knows by it whether labels are shifted."""
        return type(self.base_model).__name__

    def _put_folded(self, layer: FoldedLayer) -> None:
        self.ept = layer
        self.requires_grad_(False)

    def _adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's parameters (of a folded one its buffers) as this process holds them."""
        tensors = self.ept.state_dict(keep_vars=True)
        for name, head in zip(self.head_names, self._heads(), strict=True):
            tensors |= {f"head.{name}.{key}": value for key, value in head.state_dict(keep_vars=True).items()}
        return tensors

    def _heads(self) -> list[nn.Module]:
        return [self.base_model.get_submodule(name) for name in self.head_names]

    def _check_inputs(
        self, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels, kwargs
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
                f"attention_mask must be [batch, length], 1 on text, not {shape}: "
                "the prompt's columns cannot be added to masks of other forms"
            )
        if kwargs.get("start_positions") is not None or kwargs.get("end_positions") is not None:
            raise ValueError("question answering is not supported: its positions would have to be moved")
        if position_ids is not None and "position_ids" not in self._accepts:
            raise ValueError(f"{name} takes no position_ids: leave them out")
        if token_type_ids is not None and "token_type_ids" not in self._accepts and token_type_ids.any():
            raise ValueError(f"{name} has no token types: leave token_type_ids out")
        if encoded:
            return
        batch, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]
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

    def _embed(self, input_ids, inputs_embeds, attention_mask) -> Tensor:
        """The backbone's input [batch, s + L, d]."""
        if inputs_embeds is not None:
            return self.ept(None, attention_mask, inputs_embeds=inputs_embeds)
        embedding = self.base_model.get_input_embeddings()
        if _is_plain(embedding):
            return self.ept(input_ids, attention_mask, embedding_weight=embedding.weight)
        return self.ept(None, attention_mask, inputs_embeds=embedding(input_ids))

    def _insert(self, columns: Tensor, value: int | Tensor) -> Tensor:
        """Columns [batch, L] with the prompt's s columns put in: one value, or [batch, s] values."""
        if not isinstance(value, Tensor):
            value = columns.new_full((len(columns), self.ept_config.prompt_length), value)
        start = self.ept.prompt_start
        return torch.cat([columns[:, :start], value, columns[:, start:]], dim=1)

    def _place(self, columns: Tensor, leading: Tensor) -> Tensor:
        """Columns [batch, s + L, …] with the prompt's moved behind a row's padding on the left, `leading` [batch] wide."""
        s, lead = self.ept_config.prompt_length, leading.unsqueeze(1)
        column = torch.arange(columns.shape[1], device=columns.device)
        source = torch.where(column < lead, column + s, torch.where(column < lead + s, column - lead, column))
        if columns.dim() == 3:
            source = source.unsqueeze(-1).expand(-1, -1, columns.shape[2])
        return columns.gather(1, source)

    def _prepare(
        self, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The wrapped model's arguments, and the order in which the columns were rearranged (None: as they were)."""
        self._refuse_packed(position_ids, attention_mask)
        token_labels = labels is not None and self._labels_are_per_token(labels)
        if attention_mask is None and self._kind == "causal-pooled" and input_ids is not None:
            attention_mask = self._mask_by_last_token(input_ids)
        order = None
        if attention_mask is not None and self._kind != "causal":
            # Encoders count positions by columns, so their text must start at the first; a pooled causal model reads
            # the last column, so its text must end there.
            text = attention_mask != 0
            order = torch.argsort(text if self._kind == "causal-pooled" else ~text, dim=1, stable=True)
            attention_mask = attention_mask.gather(1, order)
            input_ids, token_type_ids, position_ids = (
                None if t is None else t.expand(len(order), -1).gather(1, order)
                for t in (input_ids, token_type_ids, position_ids)
            )
            if inputs_embeds is not None:
                inputs_embeds = inputs_embeds.gather(1, order.unsqueeze(-1).expand(-1, -1, inputs_embeds.shape[2]))
            if token_labels:
                labels = labels.gather(1, order)
        length = (inputs_embeds if input_ids is None else input_ids).shape[1]
        self._check_length(length, attention_mask)
        prepared = {"inputs_embeds": self._embed(input_ids, inputs_embeds, attention_mask)}
        batch = len(prepared["inputs_embeds"])
        prepared["attention_mask"] = None if attention_mask is None else self._insert(attention_mask, 1)
        if token_type_ids is not None and "token_type_ids" in self._accepts:
            prepared["token_type_ids"] = self._insert(token_type_ids.expand(batch, -1), 0)
        if position_ids is not None:
            self._check_positions(position_ids)
            prepared["position_ids"] = self._insert_positions(position_ids.expand(batch, -1), attention_mask)
        if attention_mask is not None and self._kind.startswith("causal"):
            leading = _leading_padding(attention_mask)
            moved = bool(leading.any())  # asked once: it waits for the device
            if moved:
                prepared = {key: self._place(t, leading) for key, t in prepared.items()}
            if "position_ids" in self._accepts and position_ids is None:
                positions = text_positions(prepared["attention_mask"]).clamp(min=0)
                prepared["position_ids"] = positions + self._first_position
            elif position_ids is None and moved and self.config.model_type not in RELATIVE_POSITIONS:
                raise ValueError(
                    f"{type(self.base_model).__name__} takes no position_ids, so text after padding would get the wrong "
                    "positions: " + ("pad on the right" if self._kind == "causal" else "batch rows of one length")
                )
        if token_labels:
            # A column's label stands s columns on, where _trim finds its logits.
            if self._shifts_labels:
                labels = labels.clone()
                labels[:, :1] = IGNORE_INDEX  # the first token is predicted by the prompt, whose logits nobody sees
            labels = self._insert(labels, IGNORE_INDEX)
        prepared["labels"] = labels
        if isinstance(self.base_model, MeanPoolingForSequenceClassification):
            mask = attention_mask
            if mask is None:
                mask = torch.ones(batch, length, dtype=torch.int64, device=self.ept.prompt.device)
            prepared["pooling_mask"] = self._insert(mask, 0)
        return prepared, order

    def _prepare_encoder_of_seq2seq(self, input_ids, inputs_embeds, attention_mask, kwargs):
        if kwargs.get("encoder_outputs") is not None:
            mask = None
            if attention_mask is not None:
                mask = self._insert(attention_mask.sort(dim=1, descending=True, stable=True).values, 1)
            return {"attention_mask": mask}, None
        return self._prepare(input_ids, inputs_embeds, attention_mask, None, None, None)

    def _insert_positions(self, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Explicit positions with the prompt's put in: the prompt takes the positions where the text after it began."""
        s, start = self.ept_config.prompt_length, self.ept.prompt_start
        after = position_ids[:, start:]
        if attention_mask is not None:
            after = after.masked_fill(attention_mask[:, start:] == 0, torch.iinfo(position_ids.dtype).max)
        first = after.amin(dim=1, keepdim=True) if after.shape[1] else position_ids[:, -1:] + 1
        prompt = first + torch.arange(s, device=position_ids.device, dtype=position_ids.dtype)
        moved = torch.cat([position_ids[:, :start], position_ids[:, start:] + s], dim=1)
        if attention_mask is not None:
            moved = moved.where(attention_mask != 0, 0)
        return self._insert(moved, prompt)

    def _check_positions(self, position_ids: Tensor) -> None:
        limit = self._max_length
        if limit is None or position_ids.numel() == 0:
            return
        highest = int(position_ids.max()) + self.ept_config.prompt_length - self._first_position
        if highest >= limit:
            raise ValueError(
                f"position_ids with the prompt reach {highest}, but the backbone has positions 0 … {limit - 1}"
            )

    def _labels_are_per_token(self, labels: Tensor) -> bool:
        pooled = "SequenceClassification" in type(self.base_model).__name__
        return self._kind != "seq2seq" and not pooled and labels.dim() == 2

    def _refuse_packed(self, position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
        if position_ids is None or position_ids.shape[1] < 2:
            return
        backwards = position_ids[:, 1:] < position_ids[:, :-1]
        if attention_mask is not None:
            backwards = backwards & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
        if backwards.any():
            raise ValueError(
                "position_ids go backwards inside a row: packed sequences are not supported, "
                "each example would need its own prompt; give one example per row"
            )

    def _mask_by_last_token(self, input_ids: Tensor) -> Tensor | None:
        """Without a mask, transformers' pooled causal models find the last token by the padding's id; so here."""
        pad = self.config.get_text_config().pad_token_id
        if pad is None:
            return None
        return (input_ids != pad).flip(1).cumsum(1).flip(1) > 0

    def _check_length(self, length: int, attention_mask: Tensor | None) -> None:
        s, limit = self.ept_config.prompt_length, self._max_length
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

    def _continue(self, input_ids, attention_mask, inputs_embeds, past_key_values, position_ids, **given) -> dict:
        """Arguments for new tokens after a cached prefix that holds the prompt: the text's count p goes on."""
        if self._kind != "causal":
            raise ValueError("past_key_values is supported for causal language models only")
        s, cached = self.ept_config.prompt_length, past_key_values.get_seq_length()
        x = self.base_model.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        batch, new = x.shape[:2]
        text_length = cached - s + new
        if text_length < new:
            raise ValueError(
                f"the cache holds {cached} columns, fewer than the prompt's {s}: it was filled without EPT"
            )
        if attention_mask is None:
            attention_mask = torch.ones(batch, text_length, dtype=torch.int64, device=x.device)
        if attention_mask.shape[1] != text_length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but the cached and new text has {text_length}"
            )
        p = text_positions(attention_mask)[:, -new:]
        self._check_length(text_length, attention_mask)
        prepared = {k: v for k, v in given.items() if k not in ("token_type_ids", "labels")}
        prepared |= dict(
            inputs_embeds=self.ept.continue_text(x, p),
            attention_mask=self._place(self._insert(attention_mask, 1), _leading_padding(attention_mask)),
            past_key_values=past_key_values,
            labels=given["labels"],
        )
        if "position_ids" in self._accepts:
            positions = p + self._first_position if position_ids is None else position_ids
            prepared["position_ids"] = positions.clamp(min=0) + s
        return prepared

    def _update_decoding_step(
        self, module: nn.Module, args: tuple, kwargs: dict, leading: Tensor
    ) -> tuple[tuple, dict] | None:
        """A hook on the wrapped model while it generates: embeds new tokens with their update.

        `leading` [batch] is each row's padding before its text; beams and returned sequences repeat the rows.
        """
        input_ids, cache, s = kwargs.get("input_ids"), kwargs.get("past_key_values"), self.ept_config.prompt_length
        kwargs = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + self._first_position
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return args, kwargs
        kwargs["input_ids"] = None
        leading = leading.repeat_interleave(len(input_ids) // len(leading))
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        if cache is not None and cache.get_seq_length() > 0:
            embeddings = self.base_model.get_input_embeddings()(input_ids)
            p = cache.get_seq_length() - s - leading.unsqueeze(1) + column
            kwargs["inputs_embeds"] = self.ept.continue_text(embeddings, p)
        else:  # generation without a cache repeats the whole text
            text = (column >= leading.unsqueeze(1)).to(torch.int64)
            kwargs["inputs_embeds"] = self._place(self._embed(input_ids, None, text), leading)
            if kwargs.get("position_ids") is not None:
                positions = text_positions(self._place(self._insert(text, 1), leading)).clamp(min=0)
                kwargs["position_ids"] = positions + self._first_position
        return args, kwargs

    def _mask_of(self, text: Tensor, kwargs: dict) -> Tensor:
        """The mask that transformers' generate infers: padding by its id, unless that also ends texts."""
        config = kwargs.get("generation_config") or self.base_model.generation_config
        pad, end = (kwargs.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, (list, tuple)) else [end]
        if text.dim() == 3 or pad is None or pad in ends:
            return torch.ones(text.shape[:2], dtype=torch.int64, device=text.device)
        return (text != pad).to(torch.int64)

    def _lengths_without_prompt(self, kwargs: dict, length: int) -> None:
        """`max_length` and `min_length` count the text: as numbers of new tokens they are free of the prompt."""
        config = kwargs.get("generation_config") or self.base_model.generation_config
        for word in ("max", "min"):
            given = kwargs.pop(f"{word}_length", getattr(config, f"{word}_length", None))
            new = kwargs.get(f"{word}_new_tokens", getattr(config, f"{word}_new_tokens", None))
            if given and new is None:
                if word == "max" and given <= length:
                    raise ValueError(f"max_length={given} leaves nothing to generate after {length} tokens of text")
                kwargs[f"{word}_new_tokens"] = max(0, given - length)

    def _shift_logits_to_keep(self, kwargs: dict) -> int | Tensor | None:
        """`logits_to_keep` as the caller means it (columns of the text); a tensor of columns is moved by s."""
        kept = kwargs.get("logits_to_keep")
        if isinstance(kept, Tensor):
            kwargs["logits_to_keep"] = kept + self.ept_config.prompt_length
        return kept or None if not isinstance(kept, Tensor) else kept

    def _trim(self, outputs, order: Tensor | None, length: int, kept: int | Tensor | None) -> None:
        """Takes the prompt's rows out of token-level outputs and puts the columns back into the caller's order."""
        s, start = self.ept_config.prompt_length, self.ept.prompt_start
        inverse = None if order is None else torch.argsort(order, dim=1)
        for key in ("logits", "last_hidden_state"):
            value = outputs.get(key)
            if value is None or value.dim() != 3:
                continue
            if kept is not None and key == "logits":
                if not isinstance(kept, Tensor):
                    outputs[key] = value[:, -min(kept, length) :]
                continue
            text = torch.cat([value[:, :start], value[:, start + s :]], dim=1) if start else value[:, s:]
            if inverse is not None:
                text = text.gather(1, inverse.unsqueeze(-1).expand(-1, -1, text.shape[2]))
            outputs[key] = text


# Keys of adapter_config.json that are facts about the run, not settings of EPTConfig.
_FACTS = (
    "method", "base_model_name_or_path", "base_model_class", "head", "num_labels", "label_names", "problem_type", "backbone",
    "folded", "prompt_sha256",
)  # fmt: skip


def _refuse_unsupported(model: Any) -> None:
    name = type(model).__name__
    if isinstance(model, EPTModel):
        raise TypeError("the model is already an EPTModel: wrap its base_model, or train the adapter that it has")
    if hasattr(model, "peft_config"):
        raise TypeError(f"{name} already carries a PEFT adapter: merge or unload it first (model.unload())")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{name} is not a transformers PreTrainedModel: EPT needs its config and input embeddings")
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TypeError(f"{name} reads {model.main_input_name}, not input_ids: EPT needs a text model")
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise TypeError(f"{name}.forward takes no inputs_embeds: EPT cannot put a prompt before its text")
    if model.config.is_encoder_decoder and "ForSequenceClassification" in name:
        raise TypeError(
            f"{name} finds its sentence by input_ids' end tokens: use the encoder or the text-to-text model"
        )
    if any(
        kind in name
        for kind in ("ForMultipleChoice", "ForQuestionAnswering", "ForNextSentencePrediction", "DoubleHeads")
    ):
        raise TypeError(f"{name} is not supported: its inputs or labels are not one row of text with its label")
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise TypeError(f"{name} looks up embeddings for every layer by input_ids, which a soft prompt does not have")


def _kind_of(model: PreTrainedModel) -> str:
    """ "seq2seq", "causal", "causal-pooled" (a causal backbone whose head reads the last token) or "encoder"."""
    if model.config.is_encoder_decoder:
        return "seq2seq"
    model_type = model.config.model_type
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(model.config, "is_decoder", False)
    )
    if not causal:
        return "encoder"
    return "causal-pooled" if "ForSequenceClassification" in type(model).__name__ else "causal"


def _reads_first_token(model: PreTrainedModel) -> bool:
    """Whether an encoder's head or pooler reads the first token (all of transformers' do, but for the mean)."""
    if isinstance(model, MeanPoolingForSequenceClassification):
        return False
    return "ForSequenceClassification" in type(model).__name__ or getattr(model, "pooler", None) is not None


def _leading_padding(attention_mask: Tensor) -> Tensor:
    """[batch] columns before each row's first text token."""
    return ((attention_mask != 0).cumsum(1) == 0).sum(1)


def head_names(model: PreTrainedModel) -> list[str]:
    """Children beside the backbone that train: those of a classification model, none of a language model."""
    if model.base_model is model or model.get_output_embeddings() is not None:
        return []
    return [
        name for name, child in model.named_children()
        if child is not model.base_model and any(True for _ in child.parameters())
    ]  # fmt: skip


def max_text_tokens(model: PreTrainedModel, prompt_length: int) -> int | None:
    """The most text tokens that the backbone `model` has positions for beside the prompt; None: it sets no limit."""
    positions, _ = _positions(model)
    return None if positions is None else positions - prompt_length


def _positions(model: PreTrainedModel) -> tuple[int | None, int]:
    """How many columns the backbone has positions for (None: no limit), and the number of the first."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin start counting after the padding index.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first, first
    if model.config.is_encoder_decoder and not hasattr(model.config, "max_position_embeddings"):
        return None, 0
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return (limit if limit is not None and limit > 0 else None), 0


def _is_plain(embedding: nn.Module) -> bool:
    """Whether the module is a table look-up and nothing else, so that the fused path may read its weight."""
    hooked = embedding._forward_hooks or embedding._forward_pre_hooks
    floating = getattr(embedding, "weight", None) is not None and embedding.weight.is_floating_point()
    return type(embedding) is nn.Embedding and embedding.max_norm is None and not hooked and floating


def _embedding_width(embedding: nn.Module) -> int:
    return embedding.embedding_dim if hasattr(embedding, "embedding_dim") else embedding.weight.shape[1]


@torch.no_grad()
def _embedding_rms(embedding: nn.Module) -> float:
    """e: the root mean square of what the embedding module gives, over its whole vocabulary."""
    weight = embedding.weight
    if weight.is_meta:
        raise ValueError("the backbone is on the meta device: load its weights first, or give embed_scale")
    total, count = 0.0, 0
    for ids in torch.arange(len(weight), device=weight.device).split(8192):
        rows = embedding(ids).double()
        total, count = total + rows.square().sum().item(), count + rows.numel()
    if not total > 0:
        raise ValueError(
            "the backbone's word embeddings are all zero or NaN: load its weights first, or give embed_scale"
        )
    return (total / count) ** 0.5


@torch.no_grad()
def _check_inputs_embeds(model: PreTrainedModel, kind: str) -> None:
    """Runs four tokens through the model by ids, by embeddings and beside padding: EPT is right only where all agree."""
    embedding, name = model.get_input_embeddings(), type(model).__name__
    if any(p.is_meta for p in model.parameters()):
        return
    probed = model.get_encoder() if kind == "seq2seq" else model
    training = {module: module.training for module in model.modules()}
    ids = torch.arange(len(embedding.weight), device=embedding.weight.device)[-4:].unsqueeze(0)
    mask = torch.ones_like(ids)
    try:
        model.eval()
        embeds = embedding(ids)
        by_ids = probed(input_ids=ids, attention_mask=mask, return_dict=True)
        by_embeds = probed(inputs_embeds=embeds, attention_mask=mask, return_dict=True)
        beside_padding = by_embeds
        if not kind.startswith("causal"):
            beside_padding = probed(
                inputs_embeds=torch.cat([embeds, embeds], 1),
                attention_mask=torch.cat([mask, 0 * mask], 1),
                return_dict=True,
            )
        key = "logits" if "logits" in by_ids else "last_hidden_state"
        want, got, padded = (out[key].float() for out in (by_ids, by_embeds, beside_padding))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise TypeError(f"{name} cannot run on inputs_embeds, which EPT needs: {error}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
    # The passes do the same arithmetic; what differs is a factor or a term that one of them lacks.
    close = functools.partial(torch.allclose, rtol=1e-2, atol=1e-2 * want.abs().max().item(), equal_nan=True)
    if not close(want, got):
        raise TypeError(
            f"{name} gives other results for inputs_embeds than for input_ids "
            "(it needs the ids for more than the look-up): EPT would be wrong on it"
        )
    if not close(want, padded if want.dim() == 2 else padded[:, : want.shape[1]]):
        raise TypeError(
            f"{name} lets padding change the text's results (it ignores attention_mask): EPT cannot mend that"
        )


def _inputs_to_the_heads_dtype(module: nn.Module, args: tuple) -> tuple:
    """A hook on a trained head beside a half-precision backbone."""
    dtype = next(module.parameters()).dtype
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def _label_names(config: Any) -> list[str] | None:
    names = getattr(config, "id2label", None)
    return None if not names else [names[i] for i in sorted(names)]


FREQUENT = 5000  # tokens that init="vocab" draws from, as Lester et al. 2021 do


def _init_prompt(model: EPTModel, tokenizer, token_counts, soft_prompt) -> None:
    config, embedding = model.ept_config, model.base_model.get_input_embeddings()
    if (config.init == "decompose") != (soft_prompt is not None):
        raise ValueError('init="decompose" and soft_prompt go together: give both or neither')
    if config.init == "decompose":
        model.ept.init_decompose(soft_prompt)
    elif config.init == "text":
        if tokenizer is None:
            raise ValueError('init="text" needs the tokenizer: get_ept_model(model, config, tokenizer=tokenizer)')
        ids = tokenizer(config.init_text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if len(ids) == 0:
            raise ValueError(f"init_text={config.init_text!r} holds no token")
        model.ept.init_prompt(embedding(ids.to(embedding.weight.device)))
    elif config.init == "vocab":
        ids = _frequent_ids(embedding, tokenizer, token_counts)
        chosen = ids[torch.randperm(len(ids))[: config.prompt_length]]
        model.ept.init_prompt(embedding(chosen.to(embedding.weight.device)))


@torch.no_grad()
def _frequent_ids(embedding: nn.Module, tokenizer, token_counts: Tensor | None) -> Tensor:
    """Ids of frequent tokens: by counts if given, else the first of the vocabulary, which tokenizers sort so."""
    vocab = len(embedding.weight)
    allowed = torch.ones(vocab, dtype=torch.bool)
    # Tokens that were never trained keep a small norm; the padding's is often zero.
    norms = torch.cat(
        [embedding(ids).float().norm(dim=1) for ids in torch.arange(vocab).to(embedding.weight.device).split(8192)]
    )
    allowed &= (norms > 0.5 * norms.median()).cpu()
    if tokenizer is not None:
        special = [i for i in tokenizer.all_special_ids if i < vocab]
        allowed[special] = False
    if token_counts is not None:
        if token_counts.dim() != 1 or len(token_counts) > vocab:
            raise ValueError(
                f"token_counts must be [vocab] with at most {vocab} entries, not {tuple(token_counts.shape)}"
            )
        counts = torch.nn.functional.pad(token_counts.cpu().double(), (0, vocab - len(token_counts)))
        ids = torch.argsort(counts * allowed, descending=True, stable=True)
        return ids[: max(1, min(FREQUENT, int((counts * allowed > 0).sum())))]
    ids = allowed.nonzero().flatten()
    return ids[:FREQUENT] if len(ids) else torch.arange(vocab)
