"""The learning rates of EPT's parts: the arguments and the optimiser's groups."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ept.model.model import EPTModel
from ept.parts import PARTS

__all__ = [
    "DEEP_LEARNING_RATE",
    "DOWN_LEARNING_RATE",
    "HEAD_LEARNING_RATE",
    "LEARNING_RATE",
    "PROMPT_LEARNING_RATE",
    "EPTArguments",
    "EPTSeq2SeqTrainingArguments",
    "EPTTrainingArguments",
    "merged",
    "parameter_groups",
    "regrouped",
]

# In units of the embeddings' RMS (docs/method.md), found on MiniLM with the three tasks of `make compare`. The rate that
# moves all is that of the updates in the layers, which are the most of what the default trains.
LEARNING_RATE = 0.005
RATES = {"prompt": 0.09, "up": 0.018, "down": 0.001, "deep": 0.005, "head": 0.005}
PROMPT_LEARNING_RATE, DOWN_LEARNING_RATE = RATES["prompt"], RATES["down"]
DEEP_LEARNING_RATE, HEAD_LEARNING_RATE = RATES["deep"], RATES["head"]

# transformers rounds the share up to whole steps: a run of more than 20 steps has 20 to 40 lines, a shorter one all its steps.
LOGGED_SHARE = 1 / 40
EVAL_STEPS = 500  # transformers' default of both, which an evaluation keeps

# transformers' arguments that it would take and do nothing with, and why.
WITHOUT_EFFECT = {
    "neftune_noise_alpha": "its noise is added to what the embeddings return while they train, and here they are frozen",
    "use_liger_kernel": "transformers puts these kernels into a model of its own alone, and here that is wrapped",
    "sortish_sampler": "transformers reads it nowhere, and train_sampling_strategy has rows of similar length together",
}


def _own_rate(part: str, what: str, but: str = "") -> Any:
    """A part's own learning rate as a field of the arguments; `but` is an exception from its default, in words."""
    ratio = RATES[part] / LEARNING_RATE
    times = "learning_rate itself" if ratio == 1 else f"{ratio:g} times learning_rate"
    return field(default=None, metadata={"help": f"Rate of {what}; by default {times}{but}."})


@dataclass
class EPTArguments:
    """The learning rates of EPT's parts, mixed into transformers' arguments: in units of the embeddings' RMS, in the
    layers in units of the hidden states' size.

    `learning_rate` moves all parts: each one's rate is a fixed multiple of it unless it is given. That of the updates in the
    layers is multiplied by the model's `layer_rate`, too.

    Raises:
        ValueError: an argument of transformers' would have no effect, or there are no steps to train.
    """

    learning_rate: float = field(
        default=LEARNING_RATE,
        metadata={
            "help": "Moves every part's rate, each a fixed multiple of it unless it is given; of a head it is the rate itself, "
            "and of the updates in the layers, too, unless the backbone's tokens differ little."
        },
    )
    prompt_learning_rate: float | None = _own_rate("prompt", "the short prompt P")
    up_learning_rate: float | None = _own_rate(
        "up", "the tensors that start at zero, of the input's updates: B, V and W"
    )
    down_learning_rate: float | None = _own_rate("down", "the tensors that feed them: A, U, D and the gate G")
    deep_learning_rate: float | None = _own_rate(
        "deep",
        "D and W where every layer has its own (deep_layers), the first's among them",
        ", less where a backbone's tokens differ little",
    )
    head_learning_rate: float | None = _own_rate("head", "a task head")
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={
            "help": "Log tokens and tokens per second: of text (non_padding), with padding (all), or not (no).",
            "choices": ["non_padding", "all", "no"],
        },
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "The learning rates' schedule."})
    warmup_steps: float = field(default=0.06, metadata={"help": "Warm-up steps; below 1 it is a share of all steps."})
    logging_steps: float = field(
        default=LOGGED_SHARE,
        metadata={
            "help": "Steps between two lines of the log; below 1 a share of all steps. By default a run logs its loss 20 to "
            "40 times, and a short one every step."
        },
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the training rows: batches of similar length, or 'random', 'sequential', 'batch_rebalance'.",
            "choices": ["group_by_length", "random", "sequential", "batch_rebalance"],
        },
    )

    def __post_init__(self) -> None:
        args: Any = self
        for name, reason in WITHOUT_EFFECT.items():
            if getattr(args, name, None):
                raise ValueError(f"`{name}` would have no effect: {reason}; leave it out")
        if args.max_steps == 0:
            raise ValueError(
                "`max_steps=0` is no number of updates: transformers would make one; evaluate without training"
            )
        if args.eval_steps is None and self.logging_steps < 1:
            args.eval_steps = EVAL_STEPS  # transformers would evaluate as often as it logs
        args.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns without a GPU
        super().__post_init__()  # type: ignore[misc]  # of transformers' arguments, into which this is mixed

    def rates(self, layer_rate: float = 1.0) -> dict[str, float]:
        """Each part's peak learning rate by its name: "prompt", "up", "down", "deep" and "head".

        `layer_rate`: of the model that is trained; without it, as on a backbone where that is 1.
        """
        return _rates(self.learning_rate, {part: getattr(self, f"{part}_learning_rate") for part in RATES}, layer_rate)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Arguments that were pickled before `up_learning_rate` have its number in `learning_rate`.
        if "up_learning_rate" not in state:
            before = {f"{part}_learning_rate": rate for part, rate in RATES.items()}
            state = before | {"up_learning_rate": state["learning_rate"]} | state
        self.__dict__.update(state)


def _rates(learning_rate: float, given: dict[str, float | None], layer_rate: float) -> dict[str, float]:
    """Each part's rate: what is given for it, or its multiple of `learning_rate`, in the layers times `layer_rate`."""
    factor, rates = learning_rate / LEARNING_RATE, {}
    for part, default in (RATES | {"deep": RATES["deep"] * layer_rate}).items():
        own = given[part]
        rates[part] = default * factor if own is None else own
    return rates


@dataclass
class EPTTrainingArguments(EPTArguments, TrainingArguments):  # type: ignore[misc]  # its own str | bool is str here
    """transformers' TrainingArguments with EPT's learning rates and their defaults."""


@dataclass
class EPTSeq2SeqTrainingArguments(EPTArguments, Seq2SeqTrainingArguments):  # type: ignore[misc]  # as above
    """transformers' Seq2SeqTrainingArguments with EPT's learning rates and their defaults."""


# A checkpoint's training_args.bin is a pickle that names the classes' module: the public one, which stays.
EPTTrainingArguments.__module__ = EPTSeq2SeqTrainingArguments.__module__ = "ept.training"


def parameter_groups(
    model: EPTModel,
    *,
    learning_rate: float = LEARNING_RATE,
    prompt_learning_rate: float | None = None,
    up_learning_rate: float | None = None,
    down_learning_rate: float | None = None,
    deep_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The optimiser's groups, in this order: the prompt, what starts at zero, what feeds it, the updates where every
    layer has its own, and the head.

    The rates are those of `EPTArguments`. The prompt and biases have no weight decay. "parts" names a group's rate.

    Raises:
        ValueError: the adapter is folded.
    """
    if not model.ept.trainable:
        raise ValueError("the adapter is folded, for inference only: train the adapter that it was folded from")
    given = {
        "prompt": prompt_learning_rate, "up": up_learning_rate, "down": down_learning_rate, "deep": deep_learning_rate,
        "head": head_learning_rate,
    }  # fmt: skip
    rates = _rates(learning_rate, given, model.layer_rate)
    return [
        {"params": parameters, "lr": rates[name], "weight_decay": weight_decay if decays else 0.0, "parts": [name]}
        for name, decays, parameters in _groups(model)
    ]


def merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`parameter_groups` with neighbours of one rate and weight decay in one group: an optimiser's call takes each in turn.

    The parameters keep their order. "parts" names the rates that a group has.
    """
    result: list[dict[str, Any]] = []
    for group in groups:
        before = result[-1] if result else {}
        if all(before.get(name) == group[name] for name in ("lr", "weight_decay")):
            before["params"] = [*before["params"], *group["params"]]
            before["parts"] = list(dict.fromkeys([*before["parts"], *group["parts"]]))
        else:
            result.append(dict(group))
    return result


def regrouped(
    optimizer_state: dict[str, Any], schedule_state: dict[str, Any], groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the saved state of an optimiser and of its schedule for these groups of the same parameters.

    A checkpoint may have them in more groups, or in fewer. Each group takes the settings that its first parameter had.
    """
    saved = optimizer_state["param_groups"]
    group_of_parameter = [i for i, group in enumerate(saved) for _ in group["params"]]
    if len(group_of_parameter) != sum(len(group["params"]) for group in groups):
        return optimizer_state, schedule_state  # the optimiser's own message says what does not fit
    start, sources, param_groups = 0, [], []
    for group in groups:
        end = start + len(group["params"])
        sources.append(group_of_parameter[start])
        param_groups.append(saved[sources[-1]] | {"params": list(range(start, end)), "parts": group["parts"]})
        start = end
    by_group = {
        name: [value[i] for i in sources]
        for name, value in schedule_state.items()
        if isinstance(value, list) and len(value) == len(saved)
    }
    return optimizer_state | {"param_groups": param_groups}, schedule_state | by_group


def _groups(model: EPTModel) -> list[tuple[str, bool, list[nn.Parameter]]]:
    """The groups that hold anything: the name of their rate, whether their weights decay, and what they hold.

    Beside deep updates the first layer's token-conditioned update learns at their rate, as one of them.
    """
    by_name = dict(model.ept.named_parameters())
    by_rate: dict[str, list[nn.Parameter]] = {"prompt": [], "up": [], "down": [], "deep": []}
    for part in PARTS:
        for tensor in part.tensors:
            is_deep = part.name == "token" and model.ept_config.has_deep_updates
            if tensor.name in by_name:
                by_rate["deep" if is_deep else tensor.rate].append(by_name[tensor.name])
    head = [(name, p) for name, p in model.base_model.named_parameters() if p.requires_grad]
    groups = [(name, name != "prompt", parameters) for name, parameters in by_rate.items()]
    groups.append(("head", True, [p for name, p in head if not name.endswith("bias")]))
    groups.append(("head", False, [p for name, p in head if name.endswith("bias")]))
    return [group for group in groups if group[2]]
