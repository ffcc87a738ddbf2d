"""EPTModel: a frozen transformers model with an EPT layer before it.

The wrapped model runs on `inputs_embeds`; nothing in it is replaced. What depends on where a row's padding stands is
made independent of it here: encoders get their rows right-padded, causal models get positions counted from the mask.
"""

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ept.backbone.fingerprint import backbone_fingerprint, check_fingerprint
from ept.backbone.heads import MeanPoolingForSequenceClassification, in_float32
from ept.backbone.probes import check_inputs_embeds, keep_4_bits_differentiable, refuse_unsupported
from ept.backbone.traits import head_names, kind_of, max_text_tokens, positions_of
from ept.config import EPTConfig
from ept.files.adapter_dir import check_weights, read_adapter, write_adapter
from ept.layer.folded import FoldedLayer, fold_layer
from ept.model.adapters import FACTS, AdaptersMixin, copy_tensors
from ept.model.generation import GenerationMixin
from ept.model.packing import PackingMixin
from ept.sharding import whole

__all__ = ["EPTModel", "head_names", "max_text_tokens"]

# What runs the wrapped model by other ways than the forward that EPT stands before.
NOT_PASSED_ON = ("generate_batch", "continuous_batching_context_manager", "init_continuous_batching", "push_to_hub")


class EPTModel(GenerationMixin, PackingMixin, AdaptersMixin, nn.Module):
    """A frozen transformers model behind an EPT layer; made by `get_ept_model` or `EPTModel.from_pretrained`.

    `forward` takes what the wrapped model's forward takes. Its outputs have the wrapped model's shapes: token-level
    `logits` and `last_hidden_state` [batch, L, …] come without the prompt's rows, in the caller's column order, and
    `labels` line up with them. `hidden_states`, `attentions`, `past_key_values` and `encoder_last_hidden_state` are
    the backbone's own and include the prompt's s rows. The loss is the wrapped model's, on these logits and labels: a
    causal LM's first column is predicted by nothing the caller sees and does not count, as in the wrapped model.

    In a causal model the prompt stands directly before a row's first text token, after any padding on the left, so that
    distances and attention windows are those of the row alone. What stands in padding columns of an output is undefined.

    Rows with several examples are right where `position_ids` restart (or `cu_seq_lens_q` says so): each example has a
    prompt of its own. `adapter_ids` names an adapter per row; see docs/generation.md for both.

    Attributes: `base_model` (the wrapped model), `ept` (the active adapter's EPTLayer), `ept_config` (its settings);
    `config` is the wrapped model's.
    """

    is_quantized = False  # transformers' Trainer refuses to train quantised weights: here they stay frozen

    def __init__(self, model: PreTrainedModel, config: EPTConfig, adapter_name: str = "default"):
        super().__init__()
        if isinstance(model, EPTModel):
            raise TypeError("the model is already an EPTModel: wrap its base_model, or train the adapter that it has")
        refuse_unsupported(model)
        self.base_model = model
        self.config = model.config
        self._kind = kind_of(model)
        parameters = inspect.signature(model.forward).parameters
        # Whether a head passes on what it takes as **kwargs is known of our own alone.
        inner = model.encoder if isinstance(model, MeanPoolingForSequenceClassification) else model
        taken = inspect.signature(inner.forward).parameters
        self._accepts = {name for name in ("position_ids", "token_type_ids") if name in taken}
        if getattr(model.config, "alibi", False):
            self._accepts.discard("position_ids")  # taken and ignored
        keep_4_bits_differentiable(model)
        check_inputs_embeds(model, self._kind)
        self._max_length, self._first_position = positions_of(model)
        self._adapter_names: list[str] = []
        self._check_new_name(adapter_name)
        self._adapter_names.append(adapter_name)
        self._active_adapter, self.inactive_adapters = adapter_name, nn.ModuleList()
        self.ept = self._new_layer(config)
        model.requires_grad_(False)
        self.head_names = head_names(model)
        for head in self._heads():
            head.requires_grad_(True)
            in_float32(head)
        # Whether the loss divides by the Trainer's num_items_in_batch: only the causal LM losses do.
        self._shifts_labels = self._kind == "causal" and model.get_output_embeddings() is not None
        self.accepts_loss_kwargs = self._shifts_labels and any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )
        self._adapter_enabled = True
        self.train(model.training)

    @property
    def ept_config(self) -> EPTConfig:
        """The active adapter's settings."""
        return self.ept.config

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
        adapter_ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        if not self._adapter_enabled:
            given = dict(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
                position_ids=position_ids, inputs_embeds=inputs_embeds, labels=labels, past_key_values=past_key_values,
                return_dict=return_dict,
            )  # fmt: skip
            with self._deep_updates_of([]):
                return self.base_model(**{k: v for k, v in given.items() if v is not None}, **kwargs)
        self._check_inputs(input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels, kwargs)
        if kwargs.get("encoder_outputs") is not None:
            text = kwargs["encoder_outputs"][0]
        else:
            text = inputs_embeds if input_ids is None else input_ids
        groups = self._groups(adapter_ids, len(text), text.device)
        if labels is not None and self.head_names and any(group.layer is not self.ept for group in groups):
            raise ValueError("labels need the active adapter's head: set_adapter first, and leave adapter_ids out")
        starts = (
            None if self._kind == "seq2seq" else self._starts_of(position_ids, attention_mask, text.shape[:2], kwargs)
        )
        continued = self._kind != "seq2seq" and past_key_values is not None and past_key_values.get_seq_length() > 0
        if starts is not None and (past_key_values is not None or kwargs.pop("use_cache", False)):
            raise ValueError("packed examples and a cache do not go together: leave past_key_values and use_cache out")
        if continued:
            arguments = self._continue(
                groups, input_ids, attention_mask, inputs_embeds, past_key_values, position_ids, labels
            )
            kwargs.pop("cache_position", None)
            arguments = {k: v for k, v in arguments.items() if v is not None}
            with self._deep_updates_of(groups):
                return self.base_model(
                    **arguments, **kwargs, **({} if return_dict is None else {"return_dict": return_dict})
                )
        rows = (input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels)
        if self._kind == "seq2seq":
            prepared = self._prepare_encoder_of_seq2seq(groups, input_ids, inputs_embeds, attention_mask, kwargs)
            prepared.arguments["labels"] = labels
        elif starts is not None:
            prepared = self._prepare_packed(groups, starts, *rows)
        else:
            prepared = self._prepare_groups(groups, *rows)
        kept = self._move_logits_to_keep(kwargs, prepared)
        arguments = {k: v for k, v in prepared.arguments.items() if v is not None}
        if past_key_values is not None:
            arguments["past_key_values"] = past_key_values
        with self._heads_of(groups), self._deep_updates_of(groups):
            outputs = self.base_model(**arguments, **kwargs, return_dict=True)
        if self._kind != "seq2seq":
            self._trim(outputs, prepared, text.shape[1], kept)
        return outputs.to_tuple() if return_dict is False else outputs

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

        Raises:
            ValueError: the adapter has deep updates, which no input can carry.
        """
        if self.ept_config.deep_layers:
            raise ValueError(
                "the adapter's deep updates act inside the backbone, where no input reaches: train one with deep_layers=0 "
                "to use its embeddings elsewhere"
            )
        self._check_inputs(input_ids, inputs_embeds, attention_mask, None, None, None, {})
        groups = self._groups(None, 0, self.ept.prompt.device)
        prepared = self._prepare_groups(groups, input_ids, inputs_embeds, attention_mask, None, None, None)
        return prepared.arguments["inputs_embeds"]

    def fold(self) -> "EPTModel":
        """Puts the constants P* and C in the EPT layer's place: from now on for inference only. Returns self."""
        self._put_folded(fold_layer(self.ept))
        return self

    @torch.no_grad()
    def gate_weights(self) -> Tensor:
        """The gate's weights [s, K]: one row per prompt row, each summing to 1. Empty where the spaces are off or folded."""
        return self.ept.reconstruct()[1]

    def plot_gates(self, path: str | os.PathLike | None = None, before: Tensor | None = None) -> Any:
        """Heat map of `gate_weights()`, prompt rows × spaces, beside `before` [s, K] if given. Returns the figure."""
        from ept.plots import plot_gates

        return plot_gates(self.gate_weights(), before, path)

    # ------------------------------------------------------------------ files

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, adapter_name: str | None = None
    ) -> None:
        """Writes adapter_config.json and adapter_model.safetensors: an adapter and its head, never the backbone.

        The active adapter, or the one named. Where the model is spread over processes, every one of them calls this,
        and one has `is_main_process`. Raises FloatingPointError, and writes nothing, if a tensor holds NaN or infinity.
        """
        layer, labels = self.ept, self._labels()
        if adapter_name is not None and adapter_name != self._active_adapter:
            adapter = self._inactive(adapter_name)
            layer, labels = adapter.layer, adapter.labels
        tensors = self.adapter_tensors(adapter_name)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} holds NaN or infinity: the training diverged, lower the learning rate"
                )
        names = labels["id2label"] if self.head_names else None
        settings = layer.config.to_dict() | {
            "method": "EPT",
            "base_model_name_or_path": getattr(self.config, "_name_or_path", "") or None,
            "base_model_class": type(self.base_model).__name__,
            "head": self.head_names,
            "num_labels": len(names) if names else None,
            "label_names": [names[i] for i in sorted(names)] if names else None,
            "problem_type": labels["problem_type"] if self.head_names else None,
            "backbone": backbone_fingerprint(self.config, self.base_model.get_input_embeddings()),
        }
        if isinstance(layer, FoldedLayer):
            settings |= layer.facts()
        if is_main_process:
            write_adapter(save_directory, settings, tensors)

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        path: str | os.PathLike,
        adapter_name: str = "default",
        *,
        ignore_backbone_mismatch: bool = False,
    ) -> "EPTModel":
        """The adapter in the directory `path` on the backbone `model`; it can be used and (unless folded) trained on.

        Raises:
            FileNotFoundError, ValueError: the directory is incomplete or damaged, or belongs to another backbone
                (`ignore_backbone_mismatch=True` loads it all the same where the shapes fit).
        """
        settings, tensors = read_adapter(path)
        facts = {key: settings.pop(key, None) for key in FACTS}
        config = EPTConfig.from_dict(settings)
        if not ignore_backbone_mismatch and facts["backbone"] is not None:
            check_fingerprint(facts["backbone"], backbone_fingerprint(model.config, model.get_input_embeddings()))
        wrapped = cls(model, config, adapter_name)
        if facts["folded"]:
            wrapped._put_folded(wrapped._folded_layer(wrapped.ept_config, facts["prompt_sha256"]))
        wrapped.load_adapter_tensors(tensors, source=str(path))
        check_weights(path)
        return wrapped

    def adapter_tensors(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """What is saved: the EPT tensors by name, the head's under "head.". Whole, also where they are sharded."""
        return {name: whole(tensor).detach() for name, tensor in self._adapter_tensors(adapter_name).items()}

    def load_adapter_tensors(self, tensors: dict[str, Tensor], source: str = "the given tensors") -> None:
        """Copies tensors into the active adapter. ValueError if any is missing, extra or of another shape."""
        copy_tensors(tensors, self._adapter_tensors(), source)

    def __getattr__(self, name: str) -> Any:
        """What EPTModel does not have is asked of the wrapped model (device, dtype, generation_config, …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            if name in NOT_PASSED_ON:
                raise AttributeError(
                    f"EPTModel has no {name}: the wrapped model's would leave the adapter out"
                ) from None
            return getattr(self.base_model, name)

    # ------------------------------------------------------------------ inside

    def _get_name(self) -> str:
        """The wrapped model's class: transformers' Trainer knows by it whether labels are shifted."""
        return type(self.base_model).__name__

    def _put_folded(self, layer: FoldedLayer) -> None:
        self.ept = layer
        self.requires_grad_(False)

    def _adapter_tensors(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """An adapter's parameters (of a folded one its buffers) as this process holds them."""
        if adapter_name is not None and adapter_name != self._active_adapter:
            return self._inactive(adapter_name).tensors(self.head_names)
        tensors = self.ept.state_dict(keep_vars=True)
        for name, head in zip(self.head_names, self._heads(), strict=True):
            tensors |= {f"head.{name}.{key}": value for key, value in head.state_dict(keep_vars=True).items()}
        return tensors
