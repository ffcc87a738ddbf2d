"""Wrote everything else in this directory, once, with the code of commit 1d9f1c5 (torch 2.13.0, transformers 5.23.0, CPU):

    git worktree add before 1d9f1c5 && cd before
    OMP_NUM_THREADS=1 PYTHONPATH=.:tests python …/tests/written_before/make.py DIRECTORY

`tests/test_written_before.py` holds today's code against it. Do not run it again with later code: what it would write then
is no longer what users have on their disks. All paths in the files are relative to DIRECTORY.
"""

import contextlib
import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import transformers as hf

import tiny_models
import tiny_text
from ept import EPTConfig, EPTModel, get_ept_model
from ept.cli import main as ept
from ept.training import EPTTrainingArguments

SIZES = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2)
NAMES = {0: "bad", 1: "mixed", 2: "good"}
PRESETS = {
    "default": EPTConfig(prompt_length=3, token_rank=4),
    "paper": EPTConfig.paper(prompt_length=4, rank=3, max_text_length=16),
    "deep": EPTConfig.deep(token_rank=2),
}
TRAIN = [
    "train", "--model_name_or_path", "backbones/bert", "--train_file", "data/train.csv",
    "--validation_file", "data/validation.csv", "--test_file", "data/test.csv", "--output_dir", "run", "--max_steps", "48",
    "--per_device_train_batch_size", "16", "--save_steps", "24", "--eval_steps", "24", "--logging_steps", "4",
    "--learning_rate", "0.3", "--down_learning_rate", "0.2", "--head_learning_rate", "0.1",
    "--prompt_length", "3", "--token_rank", "6", "--disable_tqdm", "true", "--use_cpu", "--report_to", "none",
]  # fmt: skip
SWEEP = [
    "sweep", "--model_name_or_path", "backbones/bert", "--tasks", "data", "--results", "sweep.jsonl", "--methods", "EPT",
    "head only", "--learning_rates", "0.3", "10", "--seeds", "0", "--max_steps", "40", "--batch_size", "8",
    "--max_seq_length", "16",
]  # fmt: skip


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    os.chdir(directory)
    backbones()
    rows = {"train": 64, "validation": 24, "test": 24}
    Path("data").mkdir()
    for split, n in rows.items():
        tiny_text.write_csv(Path("data", f"{split}.csv"), tiny_text.reviews(n, seed=n + len(split)))
    expected = classifiers() | {"t5": text_to_text(), "llama": causal()} | command_line()
    expected = {"commands": {"train": TRAIN, "sweep": SWEEP}} | expected
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def backbones() -> None:
    tiny_text.save_model(Path("backbones/bert"), "bert", hf.AutoModel, pooling=True, **SIZES)
    # With larger weights than T5's own start values, so that its answers depend on what it reads.
    t5 = dict(d_model=16, d_ff=16, num_heads=2, eos_token_id=4, initializer_factor=4.0)
    tiny_models.backbone("t5", hf.AutoModelForSeq2SeqLM, **t5).save_pretrained("backbones/t5")
    llama = SIZES | dict(head_dim=8)
    tiny_models.backbone("llama", hf.AutoModelForCausalLM, **llama).save_pretrained("backbones/llama")


def shaken(model: EPTModel, seed: int) -> EPTModel:
    """The model with every trained tensor away from its start value, in eval mode."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 9, 6 and 3 tokens, padded on the right."""
    rows = [tiny_models.ids(1, n, seed=n) for n in (9, 6, 3)]
    ids, mask = tiny_models.padded(rows, "right")
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def classifiers() -> dict:
    """adapters/{default,paper,deep} on a BERT with a head for three named labels, and adapters/folded from "paper"."""
    given, logits, hashes = batch(), {}, {}
    for seed, (name, config) in enumerate(PRESETS.items()):
        torch.manual_seed(seed)
        base = hf.AutoModelForSequenceClassification.from_pretrained("backbones/bert", num_labels=3, id2label=NAMES)
        model = shaken(get_ept_model(base, config), seed)
        model.save_pretrained(f"adapters/{name}")
        logits[name] = model(**given).logits.tolist()
        hashes[name] = printed("fold", "--adapter", f"adapters/{name}", "--output_dir", f"folded/{name}")
    shutil.move("folded/paper", "adapters/folded")
    shutil.rmtree("folded")
    given = {name: tensor.tolist() for name, tensor in given.items()}
    return {"bert": {"batch": given, "label_names": list(NAMES.values()), "logits": logits, "folded_sha256": hashes}}


@torch.no_grad()
def text_to_text() -> dict:
    base = hf.AutoModelForSeq2SeqLM.from_pretrained("backbones/t5")
    model = shaken(get_ept_model(base, EPTConfig(prompt_length=3, token_rank=4)), 7)
    model.save_pretrained("adapters/t5")
    labels = tiny_models.ids(3, 4, seed=4)
    given = batch()
    return {
        "batch": {name: tensor.tolist() for name, tensor in given.items()},
        "labels": labels.tolist(),
        "loss": model(**given, labels=labels).loss.item(),
        "generated": generated(model, given),
        "folded_sha256": printed_and_removed("t5"),
    }


@torch.no_grad()
def causal() -> dict:
    base = hf.AutoModelForCausalLM.from_pretrained("backbones/llama")
    model = shaken(get_ept_model(base, EPTConfig.deep(token_rank=2)), 8)
    model.save_pretrained("adapters/llama")
    rows = [tiny_models.ids(1, n, seed=n) for n in (9, 6, 3)]
    ids, mask = tiny_models.padded(rows, "left")
    given = {"input_ids": ids, "attention_mask": mask}
    labels = ids.masked_fill(mask == 0, -100)
    return {
        "batch": {name: tensor.tolist() for name, tensor in given.items()},
        "labels": labels.tolist(),
        "loss": model(**given, labels=labels).loss.item(),
        "generated": generated(model, given),
        "folded_sha256": printed_and_removed("llama"),
    }


def generated(model: EPTModel, given: dict[str, torch.Tensor]) -> list[list[int]]:
    """Greedy tokens, whose choice another rounding does not change."""
    out = model.generate(
        **given, max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_scores=True
    )
    best = torch.stack(out.scores).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-3
    assert len(set(out.sequences[:, -8:].flatten().tolist())) > 3
    return out.sequences.tolist()


def command_line() -> dict:
    """run/ with checkpoint-24 of 48 steps, what eval says of it, and a sweep of four runs."""
    printed(*TRAIN)
    shutil.rmtree("run/checkpoint-48")
    for config in Path("run").rglob("adapter_config.json"):  # the model's directory stands in it in full
        config.write_text(config.read_text().replace(f"{Path.cwd()}/", ""))
    predicted = [line.split("\t") for line in lines("predict", "--adapter", "run", "--input_file", texts())]
    assert all(float(probability) > 0.501 for _, probability in predicted)
    evaluated = json.loads(printed("eval", "--adapter", "run", "--test_file", "data/test.csv"))
    sha256 = printed("fold", "--adapter", "run", "--output_dir", "run-folded")
    shutil.rmtree("run-folded")
    os.remove("texts.txt")
    torch.save(EPTTrainingArguments("from-python", max_steps=3, report_to="none", use_cpu=True), "training_args.bin")
    printed(*SWEEP)
    table = [line for line in lines("report", "--results", "sweep.jsonl") if line.startswith("|")]
    return {
        "run": {"eval": evaluated, "labels": [label for label, _ in predicted], "folded_sha256": sha256},
        "report": table,
    }


def texts() -> str:
    """A file with the texts of the test rows, one a line."""
    with open("data/test.csv", newline="") as file:
        Path("texts.txt").write_text("".join(f"{row['sentence']}\n" for row in csv.DictReader(file)))
    return "texts.txt"


def lines(*argv: str) -> list[str]:
    """What a command writes to standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert ept([*argv]) == 0
    return out.getvalue().splitlines()


def printed(*argv: str) -> str:
    """The last line that a command writes to standard output; empty without one."""
    return (lines(*argv) or [""])[-1]


def printed_and_removed(name: str) -> str:
    """The SHA-256 that `ept fold` prints for adapters/`name`."""
    sha256 = printed("fold", "--adapter", f"adapters/{name}", "--output_dir", "folded")
    shutil.rmtree("folded")
    return sha256


if __name__ == "__main__":
    main()
