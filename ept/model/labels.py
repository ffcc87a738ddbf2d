"""What a backbone says of its head's labels: their names and numbers, and the problem that they are of."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["Labels"]


@dataclass
class Labels:
    """What a backbone's config says of its head's labels."""

    id2label: dict[int, str]
    label2id: dict[str, int]
    problem_type: str | None

    @classmethod
    def of(cls, config: Any) -> "Labels":
        """The labels that a config says."""
        values: Any = {field.name: copy.copy(getattr(config, field.name, None)) for field in dataclasses.fields(cls)}
        return cls(**values)

    @classmethod
    def numbered(cls, count: int, problem_type: str | None, names: list[str] | None = None) -> "Labels":
        """`count` labels with their names, or numbers in place of names."""
        id2label = dict(enumerate(names or [f"LABEL_{i}" for i in range(count)]))
        return cls(id2label, {name: i for i, name in id2label.items()}, problem_type)

    def with_count(self, count: int) -> "Labels":
        """As many numbered labels as asked for."""
        # Scores beside classes, or the other way round: transformers tells from the first labels it sees.
        return Labels.numbered(count, self.problem_type if count == len(self.id2label) else None)

    @property
    def names(self) -> list[str]:
        """The labels' names in the order of their numbers."""
        return [self.id2label[number] for number in sorted(self.id2label)]

    def put_on(self, model: Any) -> None:
        """Writes them into a model's config."""
        for field in dataclasses.fields(self):
            setattr(model.config, field.name, copy.copy(getattr(self, field.name)))
        if hasattr(model, "num_labels"):
            model.num_labels = model.config.num_labels
