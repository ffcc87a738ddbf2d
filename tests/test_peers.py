"""The methods beside EPT: each trains what it says, within its budget, on every kind of backbone that has it."""

import pytest
import torch
import transformers as hf

from ept import MeanPoolingForSequenceClassification
from ept.compare.fit import fit
from ept.compare.methods import ABLATIONS, METHODS, TRAIN_THE_BACKBONE, adapt
from ept.tasks.predicting import logits_predictor, predict
from tiny_models import WIDTH, backbone, ids
from tiny_text import tokenizer

BUDGET, POSITIONS = 100 * WIDTH, 256


def made(kind: str):
    if kind == "encoder":
        return MeanPoolingForSequenceClassification(backbone("bert", max_position_embeddings=POSITIONS), 2)
    name, auto = {"t5": ("t5", hf.AutoModelForSeq2SeqLM), "llama": ("llama", hf.AutoModelForCausalLM)}[kind]
    return backbone(name, auto, max_position_embeddings=POSITIONS)


def adapted(method: str, kind: str, budget: int = BUDGET):
    torch.manual_seed(0)
    return adapt(method, made(kind), budget=budget, rate=1.0, tokenizer=tokenizer())


def without_head(model) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad and ".classifier." not in f".{n}"}


@pytest.mark.parametrize("kind", ["encoder", "t5", "llama"])
@pytest.mark.parametrize("method", ["EPT", "EPT paper", "EPT deep", "DePT", "prompt tuning 100", "LoRA", *ABLATIONS])
def test_methods_with_a_size_fill_the_same_budget(method, kind):
    model, groups = adapted(method, kind)
    trained = sum(p.numel() for p in without_head(model).values())
    assert 0.8 * BUDGET < trained <= BUDGET
    in_groups = sum(p.numel() for group in groups for p in group["params"])
    assert in_groups == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_bitfit_trains_biases_full_everything_and_head_only_the_head():
    assert all(name.endswith("bias") for name in without_head(adapted("BitFit", "encoder")[0]))
    assert all(p.requires_grad for p in adapted("full", "t5")[0].parameters())
    assert not without_head(adapted("head only", "encoder")[0])


@pytest.mark.parametrize("auto", [hf.AutoModelForSequenceClassification, None])
@pytest.mark.parametrize("method", METHODS)
def test_beside_half_precision_what_is_trained_is_float32(method, auto):
    base = made("encoder") if auto is None else backbone("bert", auto, max_position_embeddings=POSITIONS)
    base = base.to(torch.bfloat16)
    if method in TRAIN_THE_BACKBONE:
        with pytest.raises(ValueError, match="load them in float32"):
            adapt(method, base, budget=BUDGET, rate=1.0)
        return
    model, groups = adapt(method, base, budget=BUDGET, rate=1.0, tokenizer=tokenizer())
    assert {p.dtype for group in groups for p in group["params"]} == {torch.float32}
    loss = model(
        input_ids=ids(2, 6), attention_mask=torch.ones(2, 6, dtype=torch.int64), labels=torch.tensor([0, 1])
    ).loss
    loss.backward()
    assert all(p.grad is not None for group in groups for p in group["params"])


def test_lora_on_all_linear_layers_is_on_those_of_every_layer_and_not_on_the_head():
    few = {name.split(".layer.")[1][0] for name in without_head(adapted("LoRA all", "encoder", budget=500)[0])}
    assert few == {"1"}  # of a budget that holds no rank of all, the last
    names = {name.split(".lora_")[0] for name in without_head(adapted("LoRA all", "encoder")[0])}
    assert {name.split(".layer.")[1] for name in names} == {
        f"{layer}.{part}" for layer in range(2) for part in (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "intermediate.dense", "output.dense",
        )
    }  # fmt: skip


@pytest.mark.parametrize("method, kind, missing", [
    ("BitFit", "t5", "has no biases"), ("head only", "llama", "has no classification head"),
    ("LoRA all", "encoder", "no LoRA of rank 1"),
    ("LoRA", "encoder", "no LoRA of rank 1"), ("LoRa", "encoder", "choose one of head only, EPT"),
])  # fmt: skip
def test_a_method_that_the_backbone_or_the_budget_does_not_hold_is_refused(method, kind, missing):
    with pytest.raises(ValueError, match=missing):
        adapted(method, kind, budget=10)


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_what_is_trained_and_nothing_else_and_has_no_dropout(method):
    model, groups = adapted(method, "encoder")
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * 6, "labels": i % 2} for i, row in enumerate(ids(8, 6))]
    batch = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    if method.startswith("prompt tuning"):
        prefix = torch.zeros(2, int(method.split()[-1]), dtype=torch.int64)
        batch["pooling_mask"] = torch.cat([prefix, batch["attention_mask"]], dim=1)
    model.train()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trace = fit(model, groups, rows, tokenizer(), steps=2, batch_size=4)
    assert len(trace.losses) == 2
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed and changed <= trained
    assert predict(logits_predictor(model, tokenizer()), rows, batch_size=64).shape == (8, 2)
