"""What EPT must know of a backbone: its kind, its head, its positions, and whether EPT can be right on it."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ept.backbone.embeddings import lacks_weights, weight_of
from ept.console import without_padding_warning

__all__ = [
    "beside_embeddings",
    "beside_text",
    "check_inputs_embeds",
    "evaluating",
    "id_for_shape",
    "keep_4_bits_differentiable",
    "refuse_unsupported",
    "sets_global_attention",
    "shifts_labels_of",
]


# Models that read the shape of input_ids also where embeddings are given.
SHAPE_FROM_IDS = ("layoutlmv3",)


def refuse_unsupported(model: Any) -> None:
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise TypeError(f"{name} already carries a PEFT adapter: merge or unload it first (model.unload())")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{name} is not a transformers PreTrainedModel: EPT needs its config and input embeddings")
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TypeError(f"{name} reads {model.main_input_name}, not input_ids: EPT needs a text model")
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not hasattr(embedding, "weight"):
        raise TypeError(f"{name} has no table of word embeddings: EPT needs a model that looks its tokens up in one")
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


def keep_4_bits_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights on a CPU for its inference kernel, which it does at the first pass
    without gradients: that kernel has no backward, and gradients through it come out as zero.

    Raises:
        ValueError: it has done so already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"bitsandbytes has packed the 4-bit weights of {name} for inference on a CPU, which has no gradient: "
                    "load the model again and wrap it before it runs"
                )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards each of its modules is in the mode that it was in.

    A short text makes a BigBird attend to everything from then on: its kind of attention comes back, too.
    """
    training = [module for module in model.modules() if module.training]
    switching: list[Any] = [module for module in model.modules() if hasattr(module, "set_attention_type")]
    kinds = [(module, module.attention_type) for module in switching]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module, kind in kinds:
            if module.attention_type != kind:
                module.set_attention_type(kind)
        for module in training:
            module.training = True


def beside_text(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a model's forward needs beside a text [1, L]: a mask, and where words stand on a page, which some ask for."""
    needed = {"attention_mask": torch.ones_like(ids)}
    if "bbox" in inspect.signature(model.forward).parameters:
        needed["bbox"] = torch.zeros(*ids.shape, 4, dtype=torch.int64, device=ids.device)
    if sets_global_attention(model):
        needed["global_attention_mask"] = (torch.arange(ids.shape[1], device=ids.device) == 0).long().expand_as(ids)
    if any(hasattr(module, "get_rope_index") for module in model.modules()):
        # Without them such a model counts by the images of an earlier call.
        needed["position_ids"] = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    return needed


def beside_embeddings(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a model's forward needs beside the embeddings of a text [1, L]."""
    number = id_for_shape(model)
    return beside_text(model, ids) | ({} if number is None else {"input_ids": torch.full_like(ids, number)})


def id_for_shape(model: Any) -> int | None:
    """The token by which a model is told the shape of a text beside its embeddings; None where they suffice.

    It is no padding, so that positions are counted as beside embeddings.
    """
    if model.config.model_type not in SHAPE_FROM_IDS:
        return None
    last = len(weight_of(model.get_input_embeddings())) - 1
    return last - int(last == model.config.pad_token_id)


def sets_global_attention(model: Any) -> bool:
    """Whether a model gives the first token global attention where no mask says otherwise, for which it needs input_ids."""
    takes_mask = "global_attention_mask" in inspect.signature(model.forward).parameters
    return takes_mask and "ForSequenceClassification" in type(model).__name__


def _in_full_precision(model: nn.Module) -> bool:
    """Whether all of a model's weights are fp32 or fp64, and none is quantised."""
    return all(parameter.dtype in (torch.float32, torch.float64) for parameter in model.parameters())


@torch.no_grad()
def shifts_labels_of(model: Any, *, default: bool) -> bool:
    """Whether a model's loss compares each column with the next one's label: what it does to a label at column 1 says so.

    Args:
        default: the answer where nothing can be computed, on the meta device.
    """
    parameters = inspect.signature(model.forward).parameters
    if "labels" not in parameters or "decoder_input_ids" in parameters or model.get_output_embeddings() is None:
        return False
    if lacks_weights(model):
        return default
    weight = weight_of(model.get_input_embeddings())
    ids = torch.arange(len(weight), device=weight.device)[-4:].unsqueeze(0)
    arguments = dict(input_ids=ids, return_dict=True) | beside_text(model, ids)
    try:
        with evaluating(model):
            scores = model(**arguments).logits[0].float().log_softmax(-1)
            label = (scores[0] - scores[1]).abs()[: len(weight)].argmax()  # which the two columns rate most differently
            labels = torch.full_like(ids, -100)
            labels[0, 1] = label
            loss = model(**arguments, labels=labels).loss.float()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return default  # what cannot run at all is refused by `check_inputs_embeds`
    by_column = (loss + scores[:2, label]).abs()
    return bool(by_column[0] < by_column[1])


@torch.no_grad()
def check_inputs_embeds(model: PreTrainedModel, kind: str) -> None:
    """Runs four tokens through the model by ids, by embeddings and beside padding: EPT is right only where all agree."""
    embedding, name = model.get_input_embeddings(), type(model).__name__
    if lacks_weights(model):
        return
    probed = model.get_encoder() if kind == "seq2seq" else model
    weight = weight_of(embedding)
    ids = torch.arange(len(weight), device=weight.device)[-4:].unsqueeze(0)
    try:
        with evaluating(model), without_padding_warning(model):
            embeds, others = embedding(ids), beside_text(probed, ids)
            by_ids = probed(input_ids=ids, **others, return_dict=True)
            by_embeds = probed(inputs_embeds=embeds, **beside_embeddings(probed, ids), return_dict=True)
            beside_padding = by_embeds
            if not kind.startswith("causal"):
                others = beside_embeddings(probed, torch.cat([ids, ids], 1))
                others["attention_mask"][:, ids.shape[1] :] = 0
                beside_padding = probed(inputs_embeds=torch.cat([embeds, embeds], 1), **others, return_dict=True)
            key = "logits" if "logits" in by_ids else "last_hidden_state"
            want, got, padded = (out[key].float() for out in (by_ids, by_embeds, beside_padding))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise TypeError(f"{name} cannot run on inputs_embeds, which EPT needs: {error}") from error
    # The passes do the same arithmetic; what differs is a factor or a term that one of them lacks.
    share = 3e-4 if _in_full_precision(model) else 1e-2
    close = functools.partial(torch.allclose, rtol=share, atol=share * want.abs().max().item(), equal_nan=True)
    if not close(want, got):
        raise TypeError(
            f"{name} gives other results for inputs_embeds than for input_ids "
            "(it needs the ids for more than the look-up): EPT would be wrong on it"
        )
    if not close(want, padded if want.dim() == 2 else padded[:, : want.shape[1]]):
        raise TypeError(
            f"{name} lets padding change the text's results (it ignores attention_mask): EPT cannot mend that"
        )
