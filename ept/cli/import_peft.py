"""`ept import`: a PEFT prompt-tuning adapter or a DePT checkpoint as an EPT adapter."""

from dataclasses import dataclass, field

from ept.cli.errors import bad_input_is_one_line
from ept.cli.options import REVISION_HELP
from ept.cli.parser import OptionParser, option
from ept.cli.shared import new_adapter_dir
from ept.files.hub import local_directory
from ept.peft_format import from_peft, named_as_head, read_peft
from ept.pretrained import load_peft_backbone

__all__ = ["ImportArguments", "run"]


@dataclass
class ImportArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": "A PEFT prompt-tuning adapter or DePT checkpoint: a directory or a hub id."})
    output_dir: str = field(metadata={"help": "Where the EPT adapter goes."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model it was trained on, where it is not where the adapter says."}
    )
    revision: str | None = option(REVISION_HELP)


def run(argv: list[str]) -> None:
    """`ept import`: a PEFT prompt-tuning adapter or a DePT checkpoint as an EPT adapter."""
    with bad_input_is_one_line("import"):
        description = "Reads a PEFT prompt-tuning adapter, or a checkpoint of DePT, and writes it as an EPT adapter."
        (options,) = OptionParser("import", description, ImportArguments).parse(argv)
        output = new_adapter_dir(options.output_dir)
        adapter = str(local_directory(options.adapter, revision=options.revision))
        settings, tensors = read_peft(adapter)
        backbone = load_peft_backbone(adapter, settings, named_as_head(tensors), options.model_name_or_path)
        model = from_peft(backbone, adapter)
        model.save_pretrained(output)
        print(f"{options.output_dir}: an EPT adapter on {model.config._name_or_path}")
        model.print_trainable_parameters()
