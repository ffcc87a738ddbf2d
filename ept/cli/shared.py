"""What several commands do alike."""

from collections.abc import Callable
from typing import Any

import torch

from ept.files.run_record import RUN_NAME
from ept.model.model import EPTModel

__all__ = ["STEPS_NAME"]


def _label_names(model: EPTModel) -> list[str]:
    """The head's labels in the order of their numbers."""
    names: Any = model.config.id2label  # by number, though transformers' type has names for keys, too
    return [names[i] for i in sorted(names)]


def _check_prompt_start(model: EPTModel, data: Any, source: str) -> None:
    """ValueError if a text does not reach the column at which the prompt stands: it could be a batch by itself."""
    start = model.ept.prompt_start
    for row, ids in enumerate(data["input_ids"] if start else [], start=1):
        if len(ids) < start:
            raise ValueError(
                f"{source}, row {row}: {len(ids)} tokens are too few for a prompt that stands at column {start} "
                "(--prompt_start): lower it, or leave the row out"
            )


def _compute_metrics(problem: Any, split: Any, tokenizer: Any) -> Callable[[Any], dict[str, float]]:
    """What the trainer calls with the predictions of all of a split's rows, in their order."""

    def compute(evaluated: Any) -> dict[str, float]:
        predictions = evaluated.predictions
        if isinstance(predictions, tuple):
            predictions = predictions[0]
        if problem.kind == "text2text":
            if predictions.ndim == 3:  # --predict_with_generate false: logits of the given text
                predictions = predictions.argmax(-1)
            ids = torch.as_tensor(predictions)
            ids = ids.masked_fill(ids < 0, tokenizer.pad_token_id)
            predictions = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return problem.metrics(predictions, split)

    return compute


def _label_words(record: dict[str, Any], model: EPTModel) -> tuple[str, ...]:
    """The words that a causal model's adapter was trained to continue with."""
    words = record.get("label_words")
    if not (isinstance(words, list) and len(words) > 1 and all(isinstance(word, str) for word in words)):
        raise ValueError(
            f"{type(model.base_model).__name__} has no head, and {RUN_NAME} beside the adapter names no label words: "
            "load it with EPTModel.from_pretrained, or train it with ept train"
        )
    return tuple(words)


STEPS_NAME = "trainer_state.json"
