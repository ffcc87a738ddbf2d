"""Small model directories with a tokenizer, and small labelled files, for the command line's tests."""

import csv
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from tiny_models import VOCAB, backbone

GOOD = ["great", "lovely", "superb", "funny", "moving"]
BAD = ["dull", "awful", "boring", "weak", "clumsy"]
FILLER = [
    "the",
    "film",
    "plot",
    "cast",
    "story",
    "ending",
    "music",
    "scene",
    "with",
    "a",
    "very",
    "and",
    "then",
    "quite",
    "somehow",
]
LABEL_WORDS = ["True", "False", "Answer:", *(f"{i / 5:.1f}" for i in range(26))]
WORDS = [*GOOD, *BAD, *FILLER, "positive", "negative", '"', "quoted", *LABEL_WORDS]


def tokenizer(kind: str = "bert") -> PreTrainedTokenizerFast:
    """One token a word; [CLS] and [SEP] around the text, or </s> after it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
    assert len(special) + len(WORDS) <= VOCAB
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "bert":
        form = dict(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1")
        named = dict(
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
        ids = [("[CLS]", 2), ("[SEP]", 3)]
    else:
        form, named, ids = dict(single="$A </s>", pair="$A </s> $B </s>"), dict(eos_token="</s>"), [("</s>", 4)]
    made.post_processor = processors.TemplateProcessing(**form, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", **named)


def save_model(directory: Path, name: str = "bert", auto=AutoModel, pooling: bool = False, **settings) -> str:
    """A tiny model and its tokenizer as a model directory; with `pooling`, one of sentence-transformers."""
    backbone(name, auto, **settings).save_pretrained(directory)
    tokenizer("bert" if name == "bert" else "t5").save_pretrained(directory)
    if pooling:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return str(directory)


def reviews(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) rows; the label is decided by one word of the text."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        words = draw.choices(FILLER, k=draw.randint(2, 8))
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if i % 2 else BAD))
        rows.append((" ".join(words), "positive" if i % 2 else "negative"))
    return rows


def write_csv(path: Path, rows, header=("sentence", "label")) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*([header] if header else []), *rows])
    return str(path)
