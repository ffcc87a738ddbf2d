"""README.md of an adapter on the hub: the metadata that the hub reads, and how the adapter is loaded."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

__all__ = ["CARD_NAME", "described_card", "is_public_name", "is_repo_name"]

CARD_NAME = "README.md"
TAGS = ("ept", "prompt-tuning")
# The end of a backbone's class -> the task by which the hub finds the adapter.
PIPELINE_TAGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}

USAGE = """
## How to use

```python
from ept import AutoEPTModel

model = AutoEPTModel.from_pretrained("{repo_id}"{name_or_path})
```

The model is called as the {model_class} that it adapts.
"""


def described_card(
    text: str | None, settings: dict[str, Any], repo_id: str, tags: list[str] | None = None
) -> ModelCard:
    """Returns a model card with an adapter's metadata; what the text says already stays.

    Args:
        text: the card so far; None begins a fresh one.
        settings: of the adapter's config.
        tags: beside those of every EPT adapter.
    """
    name, model_class = (
        settings.get("base_model_name_or_path"),
        settings.get("base_model_class") or "transformers model",
    )
    is_named = is_public_name(name)
    if text is None:
        text = f"---\n{{}}\n---\n\n# {repo_id.split('/')[-1]}\n\nAn adapter of Efficient Prompt Tuning (EPT, arXiv 2405.11464)"
        text += f" for {name}.\n" if is_named else ".\n"
    card = ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    card.data["library_name"] = "ept"
    if is_named:
        card.data["base_model"] = name
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS, *(tags or [])]))
    for ending, task in PIPELINE_TAGS.items():
        if model_class.endswith(ending) and not card.data.get("pipeline_tag"):
            card.data["pipeline_tag"] = task
    if "AutoEPTModel" not in card.text:
        name_or_path = "" if is_named else ', name_or_path="the base model"'
        usage = USAGE.format(repo_id=repo_id, model_class=model_class, name_or_path=name_or_path)
        card.text = card.text.rstrip("\n") + "\n" + usage
    return card


def is_public_name(name: str | None) -> bool:
    """Whether a backbone's name is one that the hub may know, and no directory of this machine."""
    if not name or Path(name).is_absolute() or Path(name).is_dir():
        return False
    return is_repo_name(name)


def is_repo_name(name: str) -> bool:
    """Whether a name has the form of a repository's on the hub, with a user or without."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
