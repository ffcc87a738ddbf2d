"""A classification or regression head on the mean of an encoder's text tokens.

Sentence encoders (MiniLM, MPNet, E5, …) are trained with mean pooling; the first-token head that
`AutoModelForSequenceClassification` puts on a BERT reads a token that they never trained.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["MeanPoolingForSequenceClassification", "in_float32"]


class MeanPoolingForSequenceClassification(PreTrainedModel):
    """A pretrained encoder with a linear head on the mean of its text tokens' last hidden states.

    Labels and loss are those of transformers' sequence classification: `config.problem_type`, or by `num_labels`
    and the labels' dtype (1 label: mean squared error; integer labels: cross entropy; float: one sigmoid each).
    """

    config_class = PretrainedConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    # The encoder has already chosen its attention; this class must not veto it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self, encoder: PreTrainedModel | PretrainedConfig, num_labels: int = 2, problem_type: str | None = None
    ):
        """A config in the encoder's place makes one with random weights, which `from_pretrained` fills."""
        whole: Any = encoder
        if isinstance(encoder, PretrainedConfig):
            num_labels, problem_type, whole = whole.num_labels, whole.problem_type, AutoModel.from_config(encoder)
        config: Any = whole.config  # whose problem_type is typed as the three words that its loss knows
        config.num_labels = num_labels
        config.problem_type = problem_type
        super().__init__(config)
        self.encoder: PreTrainedModel = whole
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)
        if whole.device.type != "meta":
            self.classifier.to(whole.device)
        if whole is not encoder:
            self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Loads what `save_pretrained` wrote, encoder and head; arguments as in transformers."""
        if kwargs.get("config") is None:
            of_hub = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
            given = {name: kwargs[name] for name in of_hub if name in kwargs}
            kwargs["config"] = AutoConfig.from_pretrained(pretrained_model_name_or_path, **given)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_encoder(
        cls, name_or_path: str, num_labels: int = 2, problem_type: str | None = None, **kwargs: Any
    ) -> "MeanPoolingForSequenceClassification":
        """Loads a pretrained encoder and puts a fresh head on it.

        Args:
            name_or_path: hub name or directory of the encoder.
            num_labels, problem_type: as in transformers' configs.
            kwargs: of `AutoModel.from_pretrained`.

        Raises:
            ValueError: the checkpoint lacks weights of the encoder, which would be random.
        """
        encoder, report = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
        missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
        if missing:
            raise ValueError(
                f"{name_or_path} lacks weights of a {type(encoder).__name__}, {missing[0]} among them: give an encoder; "
                "what save_pretrained of a MeanPoolingForSequenceClassification wrote is for its from_pretrained"
            )
        return cls(encoder, num_labels, problem_type)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """`pooling_mask` [batch, L] says which positions the mean covers; default: `attention_mask`."""
        outputs = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        mask = attention_mask if pooling_mask is None else pooling_mask
        if mask is None:
            mask = torch.ones(hidden.shape[:2], device=hidden.device)
        # Half-precision sums over many tokens lose bits; the head is fp32 anyway.
        weight = (mask != 0).to(torch.promote_types(hidden.dtype, torch.float32)).unsqueeze(-1)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits = self.classifier(pooled.to(next(self.classifier.parameters()).dtype))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output.to_tuple() if return_dict is False else output


def in_float32(head: nn.Module) -> None:
    """Makes a head that is trained beside a half-precision backbone float32, with inputs to match."""
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in head.parameters()):
        head.float()
        head.register_forward_pre_hook(_inputs_to_the_heads_dtype)


def _inputs_to_the_heads_dtype(module: nn.Module, args: tuple) -> tuple:
    dtype = next(module.parameters()).dtype
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
