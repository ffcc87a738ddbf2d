"""EPTModel: a frozen transformers model behind an EPT layer.

The wrapped model runs on `inputs_embeds`; nothing in it is replaced. What depends on where a row's padding stands is
made independent of it: encoders get their rows right-padded, causal models get positions counted from the mask.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ept.backbone.heads import in_float32
from ept.backbone.layers import LayerSites, find_layers
from ept.backbone.probes import check_inputs_embeds, keep_4_bits_differentiable, refuse_unsupported
from ept.backbone.traits import traits_of
from ept.config import EPTConfig
from ept.files.adapter_dir import write_adapter
from ept.files.hub import upload
from ept.layer.base import AdapterLayer
from ept.layer.folded import fold_layer
from ept.model.adapters import Adapter, config_for, new_layer, tensors_of_adapter
from ept.model.backbone import Backbone
from ept.model.by_name import InactiveAdapters, load_by_name
from ept.model.calls import BARE, Call, Decoding, Disabled, entered
from ept.model.class_name import class_called, name_for
from ept.model.files import AdapterFiles, check_finite, copy_tensors, settings_of
from ept.model.generation import GenerationSettings, outside_the_call
from ept.model.heads import warn_of_shared_heads
from ept.model.hooks import hook_entries, hook_head, pass_embeddings_on
from ept.model.inputs import Inputs, check_inputs, take_per_token
from ept.model.labels import Labels
from ept.model.lock import calling, changing, lock_of
from ept.model.packing import Packing, take_starts
from ept.model.routing import Member, OneAdapter, Routing, route
from ept.model.signature import with_backbones_arguments
from ept.model.stacks import Stacks
from ept.model.start_values import init_prompt
from ept.model.switching import activate, check_new_name, fresh_adapter, loaded_adapter
from ept.model.tied import write_tied_once
from ept.model.training_mode import Walked, enable_checkpointing, freeze_dropout
from ept.model.transfer import Start
from ept.plots import plot_gates
from ept.sharding import whole

__all__ = ["EPTModel"]

# What runs the wrapped model by other ways than the forward that EPT stands before.
NOT_PASSED_ON = ("generate_batch", "continuous_batching_context_manager", "init_continuous_batching", "get_encoder")


class EPTModel(nn.Module):
    """A frozen transformers model with EPT adapters; made by `get_ept_model` or `EPTModel.from_pretrained`.

    `forward` takes, and names in its signature, what the wrapped model's forward takes. Its outputs have the wrapped
    model's shapes: token-level `logits` and `last_hidden_state` [batch, L, …] come without the prompt's rows, in the
    caller's column order, and `labels` line up with them. `hidden_states`, `attentions`, `past_key_values` and
    `encoder_last_hidden_state` are the backbone's own and include the prompt's s rows. The loss is the wrapped model's,
    on these logits and labels: a causal LM's first column is predicted by nothing the caller sees and does not count, as
    in the wrapped model.

    In a causal model the prompt stands directly before a row's first text token, after any padding on the left, so that
    distances and attention windows are those of the row alone. What stands in padding columns of an output is undefined.

    Rows with several examples are right where `position_ids` restart (or `cu_seq_lens_q` says so): each example has a
    prompt of its own. `adapter_ids` names an adapter per row, or gives its place in `list_adapters()` as integers [batch]; see
    docs/generation.md for both.

    Any number of threads may call one model at once, each with its own `adapter_ids` and `disable_adapter`. Adding,
    removing and switching adapters waits until no other thread is in a call; inside a call it raises RuntimeError.

    Its class is a subclass of EPTModel with the name of the wrapped model's, by which transformers' pipelines know what it
    does (`isinstance(model, EPTModel)` is true).

    Attributes: `base_model` (the wrapped model), `ept` (the active adapter's layer), `ept_config` (its settings);
    `active_adapter` (the name of the one that runs where no `adapter_ids` are given, trains, and is saved); `config` is
    the wrapped model's; `started_from` (what `init_adapters` of `get_ept_model` came to, or None).
    """

    is_quantized = False  # transformers' Trainer refuses to train quantised weights: here they stay frozen

    ept: AdapterLayer
    base_model: PreTrainedModel
    inactive_adapters: InactiveAdapters

    def __init__(self, model: PreTrainedModel, config: EPTConfig, adapter_name: str = "default"):
        super().__init__()
        if isinstance(model, EPTModel):
            raise TypeError("the model is already an EPTModel: wrap its base_model, or train the adapter that it has")
        refuse_unsupported(model)
        self.base_model, self.config = model, model.config
        self.started_from: Start | None = None
        self._disabled = Disabled()
        self._walked: Walked | None = None
        self._sites: LayerSites | None = None  # known once any adapter has updates in the layers
        self.adapter_names: list[str] = []
        check_new_name(self, adapter_name)
        self.adapter_names.append(adapter_name)
        self.active_adapter, self.inactive_adapters = adapter_name, InactiveAdapters()
        with changing(model, "wrapping a model"):
            keep_4_bits_differentiable(model)
            self.traits = traits_of(model)
            check_inputs_embeds(model, self.traits.kind.name)
            self._packing = Packing(model, self.traits)
            self._stacks = Stacks(prompt_last=self.traits.kind.causal)
            config = config_for(model, config)
            self.ept = new_layer(model, self.traits, config, self._sites_for(config))
            model.requires_grad_(False)
            if self.head_names:
                warn_of_shared_heads(self, model)
            for head in self.trained_heads():
                head.requires_grad_(True)
                in_float32(head)
                hook_head(head)
            hook_entries(model)
            if self.traits.generates:
                pass_embeddings_on(model)
        write_tied_once(self)
        load_by_name(self)
        self.__class__ = class_called(name_for(model), type(self))
        self.train(model.training)

    def __reduce__(self) -> tuple[Any, ...]:
        cls = type(self)  # cannot be imported; the class beneath it can
        return _blank, (cls.__name__, cls.__mro__[1]), self.__dict__

    # ------------------------------------------------------------------ running

    @with_backbones_arguments
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
        adapter_ids: list[str] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        others = take_per_token(kwargs)
        inputs = Inputs(input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, labels, others)
        if self._disabled.here():
            return self._bare_forward(inputs, past_key_values, return_dict, kwargs)
        check_inputs(self.traits, inputs, kwargs)
        starts = None if self.traits.kind.encoder_decoder else take_starts(inputs, kwargs)
        if starts is not None:
            self._learn_packing()
        with calling(self.base_model):
            routing = self._route(inputs, adapter_ids, kwargs)
            plan = self._backbone.lay_out(inputs, routing, starts, past_key_values, kwargs)
            with entered(self._call(routing)):
                outputs = self.base_model(**plan.given(), **kwargs, return_dict=True)
            outputs = plan.bring_back(outputs)
        return outputs.to_tuple() if return_dict is False else outputs

    @property
    def _backbone(self) -> Backbone:
        """The wrapped model as a call runs it; asked anew each time, since copies of a model have their own."""
        return Backbone(self.base_model, self.traits, self._packing, self._sites, self._stacks)

    def _call(self, routing: Routing, decoding: Decoding | None = None) -> Call:
        """What the hooks are to know of a call."""
        active = self._member(self.active_adapter)
        return self._backbone.call(routing, active, list(self._members().values()), decoding)

    def _bare_forward(self, inputs: Inputs, past_key_values: Any, return_dict: bool | None, kwargs: Any) -> Any:
        """The wrapped model's own forward."""
        others = {"past_key_values": past_key_values, "return_dict": return_dict}
        arguments = inputs.present() | {name: value for name, value in others.items() if value is not None}
        with calling(self.base_model), entered(BARE):
            return self.base_model(**arguments, **kwargs)

    def _learn_packing(self) -> None:
        """Asks before the first call with packed rows how the backbone is told of them.

        The probe runs the backbone in eval mode, so that it must be nobody else's turn.
        """
        if self._packing.is_asked and not lock_of(self.base_model).is_calling():
            with changing(self.base_model, "the first packed call"):
                self._packing.way()

    def _route(self, inputs: Inputs, adapter_ids: list[str] | Tensor | None, kwargs: dict[str, Any]) -> Routing:
        """The rows by adapter."""
        if adapter_ids is None:
            return OneAdapter(self._member(self.active_adapter))
        text = kwargs["encoder_outputs"][0] if kwargs.get("encoder_outputs") is not None else inputs.text
        routing = route(adapter_ids, len(text), self._members(), self._stacks, text.device)
        if inputs.labels is not None and self.head_names and any(layer is not self.ept for layer in routing.layers):
            raise ValueError("labels need the active adapter's head: set_adapter first, and leave adapter_ids out")
        return routing

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        adapter_ids: list[str] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The wrapped model's `generate`; the prompt's rows are not tokens: they do not count and are not returned.

        Args:
            input_ids: [batch, L] (also as `inputs`), or `inputs_embeds` [batch, L, d], which gives the same tokens and
                returns the new ones alone. Causal models want their padding on the left.
            attention_mask: [batch, L], 1 on text; None: transformers' rule, padding by its id.
            adapter_ids: each row's adapter by name, or [batch] integers, its place in `list_adapters()`; None: the active
                one for all.
            kwargs: everything that `generate` of the wrapped model takes. An encoder-decoder's `encoder_outputs`
                [batch, s + L, d], as a call of this model gives them, stand in place of the text. With `past_key_values`
                of an earlier turn the whole text goes in again, as in transformers; only what the cache lacks is computed.

        Raises:
            ValueError, TypeError: what cannot be right is refused with the reason.
        """
        backbone: Any = self.base_model  # its class has `generate`; PreTrainedModel alone has not
        with calling(self.base_model):
            if self._disabled.here():
                with entered(BARE):
                    return backbone.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
            embeds = kwargs.pop("inputs_embeds", None)
            encoded = self.traits.kind.encoder_decoder and kwargs.get("encoder_outputs") is not None
            if input_ids is None and embeds is None and not encoded:
                raise ValueError("generate needs input_ids or inputs_embeds")
            settings = GenerationSettings(backbone, self.traits, kwargs)
            settings.refuse_unsupported()
            types, others = kwargs.pop("token_type_ids", None), take_per_token(kwargs)
            ids = input_ids if embeds is None else None
            inputs = Inputs(ids, embeds, attention_mask, token_type_ids=types, others=others)
            check_inputs(self.traits, inputs, kwargs)
            routing = self._route(inputs, adapter_ids, kwargs if encoded else {})
            plan, decoding = self._backbone.start_of_text(inputs, routing, settings)
            if input_ids is not None and not self.traits.kind.encoder_decoder:
                plan = plan.with_arguments(input_ids=input_ids)  # returned with what is written
            with entered(self._call(routing, decoding)):
                return backbone.generate(**plan.given(), **outside_the_call(settings.arguments))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the calls of this thread run the wrapped model without EPT (a trained head stays)."""
        with self._disabled.entered():
            yield

    # ------------------------------------------------------------------ training

    def train(self, mode: bool = True) -> "EPTModel":
        """Training mode; the frozen backbone's dropout stays off unless `backbone_dropout` is set."""
        if mode:
            self._stacks.drop()
        if self._walked is not None and self._walked.is_as_left(self, mode):
            return self
        super().train(mode)
        if mode and not self.ept_config.backbone_dropout:
            freeze_dropout(self.base_model, self.trained_heads())
        self._walked = Walked(self, mode)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, without a walk through all modules where the parameters are those of the last `train`."""
        if set_to_none and self._walked is not None:
            if self._walked.clear_gradients():
                return
            self._walked = None  # the next `train` takes the walk again
        super().zero_grad(set_to_none)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **settings: Any
    ) -> None:
        """The wrapped model's; dropout that its layers apply themselves is set to zero with it if dropout is off."""
        keeps_dropout = self.ept_config.backbone_dropout
        enable_checkpointing(self.base_model, activation_checkpointing_kwargs, keeps_dropout=keeps_dropout, **settings)
        self._walked = None
        self.train(self.training)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **settings: Any) -> None:
        """transformers' older name for `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **settings)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Counts the parameters of the wrapped model and of all adapters, as transformers' models count theirs."""
        left_out = {id(self.base_model.get_input_embeddings().weight)} if exclude_embeddings else set()
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if id(p) not in left_out)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss divides by the Trainer's `num_items_in_batch`, which transformers asks."""
        return self.traits.takes_loss_kwargs

    # ------------------------------------------------------------------ several adapters

    @property
    def ept_config(self) -> EPTConfig:
        """The active adapter's settings."""
        return self.ept.config

    @property
    def head_names(self) -> list[str]:
        """The wrapped model's children that train, in order."""
        return list(self.traits.head_names)

    def list_adapters(self) -> list[str]:
        """The adapters' names in the order in which they came."""
        return list(self.adapter_names)

    def add_adapter(
        self,
        adapter_name: str,
        config: EPTConfig | None = None,
        *,
        num_labels: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        token_counts: Tensor | None = None,
        soft_prompt: Tensor | None = None,
    ) -> None:
        """Adds a fresh adapter beside the others; `set_adapter` makes it the active one.

        Args:
            adapter_name: any new name.
            num_labels: labels of its head, where the model has one; None: as many as the active adapter's.
            config, tokenizer, token_counts, soft_prompt: as in `get_ept_model`.
        """
        with changing(self.base_model, "adding an adapter"):
            check_new_name(self, adapter_name)
            config = config_for(self.base_model, EPTConfig() if config is None else config)
            if config.init == "adapters":
                raise ValueError('init="adapters" is for get_ept_model: wrap the base_model anew, or use load_adapter')
            layer = new_layer(self.base_model, self.traits, config, self._sites_for(config))
            adapter = fresh_adapter(self, adapter_name, layer, num_labels)
            embedding, placeholders = self.base_model.get_input_embeddings(), self.traits.placeholders
            init_prompt(embedding, layer, tokenizer, token_counts, soft_prompt, placeholders)
            self._put(adapter)

    def load_adapter(
        self,
        path: str | os.PathLike,
        adapter_name: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        ignore_backbone_mismatch: bool = False,
    ) -> None:
        """Adds a saved adapter beside the others; arguments and errors as in `EPTModel.from_pretrained`."""
        files = AdapterFiles.read(path, revision=revision, token=token, cache_dir=cache_dir)
        with changing(self.base_model, "loading an adapter"):
            if not ignore_backbone_mismatch:
                files.check_backbone(self.base_model, may_ignore=True)
            self._put(loaded_adapter(self, adapter_name, files, self._sites_for(files.config)))

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one; the one before keeps its tensors and stops training.

        What was frozen with `requires_grad_(False)` while its adapter was active stays frozen.
        """
        with changing(self.base_model, "switching adapters"):
            if adapter_name == self.active_adapter:
                return
            activate(self, self._inactive(adapter_name), Labels.of(self.config))
            self._walked = None
            self.train(self.training)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter that is not the active one."""
        with changing(self.base_model, "deleting an adapter"):
            if adapter_name == self.active_adapter:
                raise ValueError(f"{adapter_name!r} is the active adapter: make another one active first (set_adapter)")
            gone = self._inactive(adapter_name)
            self.inactive_adapters = InactiveAdapters(a for a in self.inactive_adapters if a is not gone)
            self.adapter_names.remove(adapter_name)
            self._stacks.drop()
            self._walked = None

    def fold(self) -> "EPTModel":
        """Puts the constants P* and C in the EPT layer's place: from now on for inference only. Returns self."""
        with changing(self.base_model, "folding"):
            self.ept = fold_layer(self.ept)
            self.requires_grad_(False)
            self._walked = None
        return self

    def _member(self, adapter_name: str) -> Member:
        """An adapter as a batch uses it."""
        if adapter_name == self.active_adapter:
            return Member(self.ept, self.trained_heads())
        adapter = self._inactive(adapter_name)
        return Member(adapter.layer, list(adapter.heads))

    def _members(self) -> dict[str, Member]:
        """All adapters by name, in the order of `list_adapters`."""
        adapters = (adapter for adapter in self.inactive_adapters if isinstance(adapter, Adapter))
        members = {adapter.name: Member(adapter.layer, list(adapter.heads)) for adapter in adapters}
        members[self.active_adapter] = Member(self.ept, self.trained_heads())
        return {name: members[name] for name in self.adapter_names}

    def _inactive(self, adapter_name: str) -> Adapter:
        for adapter in self.inactive_adapters:
            if isinstance(adapter, Adapter) and adapter.name == adapter_name:
                return adapter
        raise ValueError(f"there is no adapter {adapter_name!r}: there are {', '.join(map(repr, self.adapter_names))}")

    def trained_heads(self) -> list[nn.Module]:
        """The active adapter's heads, which stand in the wrapped model."""
        return [self.base_model.get_submodule(name) for name in self.head_names]

    def _put(self, adapter: Adapter) -> None:
        self.inactive_adapters.append(adapter.train(self.training))
        self.adapter_names.append(adapter.name)
        self._walked = None

    def _sites_for(self, config: EPTConfig) -> LayerSites | None:
        """Where the updates in the layers act, which then have their hooks; None where a config has no such updates."""
        if not config.has_deep_updates:
            return None
        if self._sites is None:
            self._sites = find_layers(self.base_model)
        self._backbone.hooked_layers()
        return self._sites

    # ------------------------------------------------------------------ looking at it

    @property
    def layer_rate(self) -> float:
        """The factor on the default learning rate of the active adapter's updates in the layers; 1 where it has none.

        It is below 1 in backbones whose tokens differ little beside the size of their hidden states (docs/method.md).
        """
        return self._sites.rate if self._sites is not None and self.ept_config.has_deep_updates else 1.0

    def trainable_parameters(self) -> dict[str, int]:
        """Trained parameters by part, the head last."""
        parts = self.ept.parameters_by_part()
        head = sum(p.numel() for module in self.trained_heads() for p in module.parameters())
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
        if self.ept_config.has_deep_updates:
            raise ValueError(
                "the adapter's deep updates act inside the backbone, where no input reaches: train one with deep_layers=0, "
                "EPTConfig.input_only(), to use its embeddings elsewhere"
            )
        inputs = Inputs(input_ids, inputs_embeds, attention_mask)
        with calling(self.base_model):
            check_inputs(self.traits, inputs, {})
            routing = OneAdapter(self._member(self.active_adapter))
            return self._backbone.lay_out_rows(inputs, routing).arguments["inputs_embeds"]

    @torch.no_grad()
    def gate_weights(self) -> Tensor:
        """The gate's weights [s, K]: one row per prompt row, each summing to 1. Empty where the spaces are off or folded."""
        return self.ept.reconstruct()[1]

    def plot_gates(self, path: str | os.PathLike | None = None, before: Tensor | None = None) -> Any:
        """Heat map of `gate_weights()`, prompt rows × spaces, beside `before` [s, K] if given. Returns the figure."""
        return plot_gates(self.gate_weights(), before, path)

    # ------------------------------------------------------------------ files

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, adapter_name: str | None = None
    ) -> None:
        """Writes adapter_config.json and adapter_model.safetensors: an adapter and its head, never the backbone.

        The active adapter, or the one named. Where the model is spread over processes, every one of them calls this,
        and one has `is_main_process`. Raises FloatingPointError, and writes nothing, if a tensor holds NaN or infinity.
        """
        with calling(self.base_model):
            adapter = None if adapter_name in (None, self.active_adapter) else self._inactive(adapter_name)
            layer, labels = (self.ept, Labels.of(self.config)) if adapter is None else (adapter.layer, adapter.labels)
            tensors = self.adapter_tensors(adapter_name)
            check_finite(tensors)
            settings = settings_of(self.base_model, self.traits, layer, labels)
        if is_main_process:
            write_adapter(save_directory, settings, tensors)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: list[str] | None = None,
        adapter_name: str | None = None,
    ) -> CommitInfo:
        """Writes what `save_pretrained` writes, and a model card, to the hub in one commit, which it returns.

        The active adapter, or the one named. One process calls it; of a model that is spread over several, the trainer's
        `push_to_hub` writes the adapter.

        Args:
            repo_id: "user/name"; the repository is made if there is none.
            commit_message, commit_description: of the commit.
            private: whether a repository that is made is private; None: as its owner has set it.
            token: None: HF_TOKEN or the one that `hf auth login` saved.
            revision: branch to commit to, made if there is none; None: the main branch.
            create_pr: opens a pull request in place of a commit to the branch.
            tags: further tags of the model card.

        Raises:
            OSError: the hub cannot be reached or refuses, in one sentence.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, adapter_name=adapter_name)
            return upload(
                directory,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        path: str | os.PathLike,
        adapter_name: str = "default",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        ignore_backbone_mismatch: bool = False,
    ) -> "EPTModel":
        """Puts a saved adapter on the backbone `model`; it can be used and (unless folded) trained on.

        `AutoEPTModel.from_pretrained` loads the backbone, too.

        Args:
            model: the backbone that it was trained on.
            path: a directory that `save_pretrained` wrote, or a hub id ("user/name"). A directory wins.
            adapter_name: what `add_adapter`'s others know it by.
            revision: branch, tag or commit of the hub's repository; None: its main branch.
            token: of the hub; None: HF_TOKEN or the one that `hf auth login` saved.
            cache_dir: where downloads are kept; None: the hub client's cache.
            ignore_backbone_mismatch: loads an adapter of another backbone all the same where the shapes fit.

        Raises:
            OSError: there is no such directory or repository, or the hub cannot be reached or refuses.
            ValueError: the adapter is damaged, or belongs to another backbone.
        """
        files = AdapterFiles.read(path, revision=revision, token=token, cache_dir=cache_dir)
        return cls.from_files(model, files, adapter_name, ignore_backbone_mismatch=ignore_backbone_mismatch)

    @classmethod
    def from_files(
        cls,
        model: PreTrainedModel,
        files: AdapterFiles,
        adapter_name: str = "default",
        *,
        ignore_backbone_mismatch: bool = False,
    ) -> "EPTModel":
        """Puts an adapter whose files have been read on the backbone `model`; ValueError as in `from_pretrained`."""
        if not ignore_backbone_mismatch:
            files.check_backbone(model, may_ignore=True)
        with changing(model, "loading an adapter"):
            wrapped = cls(model, files.config, adapter_name)
            if files.is_folded:
                wrapped.ept = files.new_layer(model, wrapped.traits, wrapped._sites_for(files.config))
                wrapped.requires_grad_(False)
                wrapped._walked = None
            files.copy_into(wrapped._adapter_tensors())
            if wrapped.head_names:
                files.labels_beside(Labels.of(wrapped.config)).put_on(model)
        return wrapped

    def adapter_tensors(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """What is saved: the EPT tensors by name, the head's under "head.". Whole, also where they are sharded."""
        with calling(self.base_model):
            return {name: whole(tensor).detach() for name, tensor in self._adapter_tensors(adapter_name).items()}

    def load_adapter_tensors(self, tensors: dict[str, Tensor], source: str = "the given tensors") -> None:
        """Copies tensors into the active adapter. ValueError if any is missing, extra or of another shape."""
        with changing(self.base_model, "loading tensors"):
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

    def _get_name(self) -> str:
        """The wrapped model's class: transformers' Trainer knows by it whether labels are shifted."""
        return type(self.base_model).__name__

    def _adapter_tensors(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """An adapter's parameters (of a folded one its buffers) as this process holds them."""
        if adapter_name is not None and adapter_name != self.active_adapter:
            return self._inactive(adapter_name).tensors(self.traits.head_names)
        return tensors_of_adapter(self.ept, dict(zip(self.head_names, self.trained_heads(), strict=True)))


def _blank(class_name: str, cls: type[EPTModel]) -> EPTModel:
    """An EPTModel without anything, as copies and pickles start."""
    named = class_called(class_name, cls)
    return named.__new__(named)
