"""`ept import`: a PEFT prompt-tuning adapter or a DePT checkpoint as an EPT adapter."""

from dataclasses import dataclass, field

from ept.cli.errors import bad_input_is_one_line
from ept.cli.parser import OptionParser
from ept.cli.shared import new_adapter_dir
from ept.peft_format import from_peft, named_as_head, read_peft
from ept.pretrained import load_peft_backbone

__all__ = ["ImportArguments", "run"]


@dataclass
class ImportArguments:
    _argument_group_name = "adapter"

    adapter: str = field(metadata={"help": "Directory of a PEFT prompt-tuning adapter or of a DePT checkpoint."})
    output_dir: str = field(metadata={"help": "Where the EPT adapter goes."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model it was trained on, where it is not where the adapter says."}
    )


def run(argv: list[str]) -> None:
    """`ept import`: a PEFT prompt-tuning adapter or a DePT checkpoint as an EPT adapter."""
    with bad_input_is_one_line("import"):
        description = "Reads a PEFT prompt-tuning adapter, or a checkpoint of DePT, and writes it as an EPT adapter."
        (options,) = OptionParser("import", description, ImportArguments).parse(argv)
        output = new_adapter_dir(options.output_dir)
        settings, tensors = read_peft(options.adapter)
        backbone = load_peft_backbone(options.adapter, settings, named_as_head(tensors), options.model_name_or_path)
        model = from_peft(backbone, options.adapter)
        model.save_pretrained(output)
        print(f"{options.output_dir}: an EPT adapter on {model.config._name_or_path}")
        model.print_trainable_parameters()
