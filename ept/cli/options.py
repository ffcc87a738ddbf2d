"""The options that several commands share, and the EPTConfig that the adapter's options say."""

import dataclasses
from dataclasses import dataclass, field, make_dataclass
from typing import Any, get_type_hints

from transformers import PreTrainedModel

from ept.backbone.loading import DTYPES
from ept.cli.parser import option
from ept.config import INITS, PRESETS, EPTConfig
from ept.model.adapters import config_for
from ept.model.files import AdapterFiles
from ept.model.fresh import config_for_budget
from ept.tasks.glue import BENCHMARK_TASKS
from ept.training.checkpoints import adapter_settings

__all__ = [
    "ADAPTER_DIR_HELP",
    "ADAPTER_HELP",
    "DATA_DIR_HELP",
    "REVISION_HELP",
    "TASK_HELP",
    "THRESHOLD_HELP",
    "AdapterArguments",
    "AdapterDirArguments",
    "ColumnArguments",
    "ept_config",
]

TASK_HELP = f"A task of GLUE or SuperGLUE in place of the files: {', '.join(BENCHMARK_TASKS)}."
DATA_DIR_HELP = "Where the task's published files are (tsv, jsonl or parquet); without it they come from the hub."

ADAPTER_DIR_HELP = "Directory that ept train (or save_pretrained) wrote, or a hub id (user/name)"
REVISION_HELP = "Branch, tag or commit of an adapter on the hub; by default its main branch."
THRESHOLD_HELP = "Probability above which a row has a label, where it may have several (multi_label); by default 0.5."


@dataclass
class ColumnArguments:
    _argument_group_name = "columns"

    text_column: str | None = option("Column with the text; found by itself where there is only one choice.")
    text_pair_column: str | None = option("Column with a second text, for tasks on pairs.")
    label_column: str | None = option(
        "Column with the label, or with the text to write (text2text); by default the one named label."
    )
    label_separator: str | None = option(
        "What stands between the labels of a row that may have several, such as ';' (--task multi_label)."
    )
    no_header: bool = option("The csv or tsv files have no header: columns are given by number, from 0.", False)
    max_seq_length: int | None = option("Cut texts to this many tokens; by default to what the model has room for.")
    max_target_length: int = option("Cut texts to write to this many tokens (text2text).", 128)


@dataclass
class AdapterDirArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": f"{ADAPTER_DIR_HELP}."})
    revision: str | None = option(REVISION_HELP)
    model_name_or_path: str | None = option("The model it was trained on, where it is not in its old place.")
    dtype: str = option("Type of the frozen weights; auto: as saved.", "auto", choices=DTYPES)


ADAPTER_HELP = {
    "prompt_length": "s, rows of the short prompt.",
    "max_text_length": "N, text positions that the low-rank update covers.",
    "rank": "r of the low-rank pair; 0 turns it off.",
    "num_spaces": "K, number of spaces; 0 turns them off.",
    "space_dim": "h, width of each space.",
    "token_rank": "q of the token-conditioned update; 0 turns it off.",
    "token_dropout": "Share of the token-conditioned update's hidden units that a training step leaves out.",
    "deep_layers": "Layers after the first whose input gets an update of rank q of its own; -1: all, 0: none; by default "
    "all, or none where the model's layers cannot have updates.",
    "alpha": "The low-rank pair is scaled by alpha / sqrt(rank).",
    "activation": "Of spaces and token-conditioned update: silu, relu, gelu or identity.",
    "lowrank_update": "Whether the low-rank pair updates the text.",
    "fusion": "Whether the prompt is fused with the low-rank pair.",
    "spaces": "Whether the prompt is projected into the spaces.",
    "token_update": "Whether the token-conditioned update is on.",
    "prompt_start": "Text column at which the prompt stands; by default 1 where the head reads the first token, else 0.",
    "embed_scale": "Unit of all that is trained; by default the RMS of the model's embeddings.",
    "init": f"Start of the prompt: {', '.join(INITS)}; decompose needs a soft prompt.",
    "init_text": "The words for init text.",
    "backbone_dropout": "Whether the frozen model's dropout stays on in training.",
    "impl": "Implementation of EPT's formulas: auto, torch, reference or triton.",
}


def _adapter_help(name: str) -> str:
    """Returns what a setting does, and its value in the presets."""
    values = {preset: getattr(make(), name) for preset, make in PRESETS.items()}
    if values["default"] is None:
        return ADAPTER_HELP[name]
    others = [f", {preset}: {value}" for preset, value in values.items() if value != values["default"]]
    return f"{ADAPTER_HELP[name]} (default: {values['default']}{''.join(others)})"


# None: not given, so that a preset or a budget decides.
AdapterArguments = make_dataclass(
    "AdapterArguments",
    [
        (
            "preset",
            str | None,
            option(
                "Sizes to start from: updates in every layer where the model can have them (default) or else refused "
                "(deep), the paper's parts, or what acts on the input alone, for PEFT and prompt_embeds (input); by default "
                "default.",
                choices=tuple(PRESETS),
            ),
        ),
        ("budget", int | None, option("Choose the sizes that fill this many trained parameters (without a head).")),
        ("soft_prompt", str | None, option(
            "Trained prompt for --init decompose: a PEFT prompt-tuning adapter (directory or hub id), or a safetensors file "
            "with one matrix."
        )),
        ("init_adapters", list[str] | None, option(
            "Trained adapters (directories or hub ids) of the same model to start from; their sizes are taken. Up to 200 "
            "training rows say how much each weighs; of several of different starts the best is taken. A task without a head, "
            "or with one for each word, takes one."
        )),
        *(
            (name, setting_type | None, option(_adapter_help(name)))
            for name, setting_type in get_type_hints(EPTConfig).items()
        ),
    ],
    namespace={"_argument_group_name": "adapter"},
)  # fmt: skip


def ept_config(adapter: Any, backbone: PreTrainedModel, checkpoint: str | None = None) -> EPTConfig:
    """Makes the config that AdapterArguments say, for a backbone.

    Without a preset or a budget, what is not given is as it was in the adapter of a checkpoint to go on from.
    """
    not_settings = ("preset", "budget", "soft_prompt", "init_adapters")
    settings = {k: v for k, v in vars(adapter).items() if v is not None and k not in not_settings}
    if adapter.init_adapters is not None:
        return _config_of_sources(adapter, settings, checkpoint)
    if settings.get("init") == "adapters":
        raise ValueError("--init adapters needs trained adapters: give --init_adapters DIR …")
    if (settings.get("init") == "decompose") != (adapter.soft_prompt is not None):
        raise ValueError("--init decompose and --soft_prompt go together: give both or neither")
    preset = adapter.preset or "default"
    if adapter.budget is not None:
        return config_for_budget(backbone, adapter.budget, preset=preset, **settings)
    if checkpoint is not None and adapter.preset is None:
        return EPTConfig(**adapter_settings(checkpoint) | settings)
    return config_for(backbone, PRESETS[preset](**settings))


def _config_of_sources(adapter: Any, settings: dict[str, Any], checkpoint: str | None) -> EPTConfig:
    """Makes the config of an adapter that starts from trained ones: the first one's, or a checkpoint's, with `settings` over
    it."""
    for name in ("preset", "budget", "soft_prompt"):
        if getattr(adapter, name) is not None:
            raise ValueError(f"--{name} and --init_adapters: the sizes and the start are the adapters': leave one out")
    if settings.get("init", "adapters") != "adapters":
        raise ValueError(f"--init {settings['init']} and --init_adapters: an adapter has one start: leave one out")
    source = AdapterFiles.read(adapter.init_adapters[0] if checkpoint is None else checkpoint).config
    return dataclasses.replace(source, **settings | {"init": "adapters", "init_text": None})
