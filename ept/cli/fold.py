"""`ept fold`: an adapter as the constants that inference needs."""

from dataclasses import dataclass, field

from safetensors.torch import save_file

from ept.cli.errors import bad_input_is_one_line
from ept.cli.options import ADAPTER_DIR_HELP, REVISION_HELP
from ept.cli.parser import OptionParser, option
from ept.cli.shared import new_adapter_dir
from ept.console import say
from ept.files.adapter_dir import write_adapter
from ept.files.hub import copy_beside
from ept.layer.folded import fold_layer
from ept.model.embedding_table import embedding_table
from ept.peft_format import save_peft, why_not_peft
from ept.pretrained import SavedAdapter
from ept.serving.served_dir import write_served

__all__ = ["TABLE_NAME", "FoldArguments", "run"]

TABLE_NAME = "embedding_table.safetensors"


@dataclass
class FoldArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": f"{ADAPTER_DIR_HELP}."})
    output_dir: str = field(metadata={"help": "Where the folded adapter goes."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model it was trained on, where it is not in its old place."}
    )
    revision: str | None = option(REVISION_HELP)
    format: str = field(
        default="auto",
        metadata={
            "help": "peft: a PEFT prompt-tuning adapter; ept: P*, C, D and W, which EPTModel.from_pretrained reads; "
            "vllm: what the plugin for vLLM serves; auto: PEFT's where its results are the same, else ept.",
            "choices": ("auto", "peft", "ept", "vllm"),
        },
    )
    embedding_table: bool = field(
        default=False,
        metadata={"help": f"Also write {TABLE_NAME}, with the token-conditioned update. Loads the model."},
    )


def run(argv: list[str]) -> None:
    """`ept fold`: an adapter as the constants that inference needs, in PEFT's form where that can hold them."""
    with bad_input_is_one_line("fold"):
        description = "Folds an adapter into the constants that inference needs. Prints the folded prompt's SHA-256."
        (options,) = OptionParser("fold", description, FoldArguments).parse(argv)
        output = new_adapter_dir(options.output_dir)
        saved_adapter = SavedAdapter.open(options.adapter, revision=options.revision)
        model = saved_adapter.load_to_fold(options.model_name_or_path, with_weights=options.embedding_table)
        folded = fold_layer(model.ept)
        digest = folded.sha256
        heads = {name: t for name, t in model.adapter_tensors().items() if name.startswith("head.")}
        reason = why_not_peft(model)
        if options.format == "peft" or (options.format == "auto" and reason is None):
            save_peft(model, output)
            say(f"{output}: a PEFT prompt-tuning adapter")
        elif options.format == "vllm":
            digest = write_served(output, folded, saved_adapter.settings, heads.get("head.score.weight")).sha256
            say(f"{output}: for vLLM, EPT_VLLM_ADAPTER={output}")
        else:
            write_adapter(output, saved_adapter.settings | folded.facts(), folded.state_dict() | heads)
            # From its record eval and predict know the columns, the label words and pairs of texts.
            copy_beside(saved_adapter.directory, output)
            say(f"{output}: a folded EPT adapter" + (f" ({reason})" if options.format == "auto" else ""))
        if options.embedding_table:
            save_file({"weight": embedding_table(model).cpu().contiguous()}, output / TABLE_NAME)
            say(f"{output / TABLE_NAME}: the embeddings with the token-conditioned update")
        print(digest)
