"""`ept fold`: an adapter as the constants that inference needs."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file

from ept.backbone.heads import MeanPoolingForSequenceClassification
from ept.console import bad_input_is_one_line, say, without_load_reports
from ept.files.adapter_dir import CONFIG_NAME, read_adapter, write_adapter
from ept.layer.folded import fold_layer
from ept.model.embedding_table import embedding_table

if TYPE_CHECKING:
    from ept.model.model import EPTModel

__all__ = ["TABLE_NAME", "FoldArguments", "run"]

TABLE_NAME = "embedding_table.safetensors"


@dataclass
class FoldArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": "Directory that ept train (or save_pretrained) wrote."})
    output_dir: str = field(metadata={"help": "Where the folded adapter goes."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model it was trained on, where it is not in its old place."}
    )
    format: str = field(
        default="auto",
        metadata={
            "help": "peft: a PEFT prompt-tuning adapter; ept: P*, C, D and W, which EPTModel.from_pretrained reads; "
            "auto: PEFT's where its results are the same.",
            "choices": ("auto", "peft", "ept"),
        },
    )
    embedding_table: bool = field(
        default=False,
        metadata={"help": f"Also write {TABLE_NAME}, with the token-conditioned update. Loads the model."},
    )


def run(argv: list[str]) -> None:
    """`ept fold`: an adapter as the constants that inference needs, in PEFT's form where that can hold them."""
    with bad_input_is_one_line("fold"):
        from ept.cli.options import OptionParser
        from ept.files.run_record import RUN_NAME
        from ept.peft_format import save_peft, why_not_peft

        description = "Folds an adapter into the constants that inference needs. Prints the folded prompt's SHA-256."
        (given,) = OptionParser("fold", description, FoldArguments).parse(argv)
        output = Path(given.output_dir)
        if output.is_file() or (output / CONFIG_NAME).exists():
            raise ValueError(f"--output_dir {output} is a file or holds another adapter: give a new directory")
        model, settings = _adapter_without_backbone(given.adapter, given.model_name_or_path, given.embedding_table)
        folded = fold_layer(model.ept)
        reason = why_not_peft(model)
        if given.format == "peft" or (given.format == "auto" and reason is None):
            save_peft(model, output)
            say(f"{output}: a PEFT prompt-tuning adapter")
        else:
            heads = {name: t for name, t in model.adapter_tensors().items() if name.startswith("head.")}
            write_adapter(output, settings | folded.facts(), folded.state_dict() | heads)
            record = Path(given.adapter) / RUN_NAME
            if record.is_file():  # eval and predict know from it the columns, the label words and pairs of texts
                shutil.copyfile(record, output / RUN_NAME)
            say(f"{output}: a folded EPT adapter" + (f" ({reason})" if given.format == "auto" else ""))
        if given.embedding_table:
            save_file({"weight": embedding_table(model).cpu().contiguous()}, output / TABLE_NAME)
            say(f"{output / TABLE_NAME}: the embeddings with the token-conditioned update")
        print(folded.sha256)


def _adapter_without_backbone(
    directory: str, name_or_path: str | None, with_weights: bool
) -> tuple["EPTModel", dict[str, Any]]:
    """The adapter on its backbone, whose weights are loaded only `with_weights`; and what its config says."""
    from ept.backbone.traits import head_names
    from ept.model.model import EPTModel

    settings = read_adapter(directory)[0]
    name_or_path = name_or_path or settings.get("base_model_name_or_path")
    if not name_or_path:
        raise ValueError(f"{directory} does not say what model it was trained on: give --model_name_or_path")
    kind = settings.get("base_model_class") or ""
    pooled = kind == MeanPoolingForSequenceClassification.__name__
    cls = transformers.AutoModel if pooled else getattr(transformers, kind, None)
    if cls is None:
        raise ValueError(f"{directory} adapts a {kind or 'model of no known kind'}, which transformers has not")
    labels = {} if settings.get("num_labels") is None else {"num_labels": settings["num_labels"]}
    base: Any
    if with_weights:
        with without_load_reports():
            base = cls.from_pretrained(name_or_path, **({} if pooled else labels))
    else:
        config = transformers.AutoConfig.from_pretrained(name_or_path, **labels)
        with torch.device("meta"):
            base = transformers.AutoModel.from_config(config) if pooled else cls(config)
        for name in head_names(base):
            base.get_submodule(name).to_empty(device="cpu")
    if pooled:
        base = MeanPoolingForSequenceClassification(base, settings["num_labels"], settings.get("problem_type"))
    return EPTModel.from_pretrained(base, directory).eval(), settings
