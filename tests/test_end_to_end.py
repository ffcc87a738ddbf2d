"""The end-to-end benchmarks: equal budgets, shared frozen weights, memory that is counted rightly."""

import dataclasses

import pytest
import torch
from peft import get_peft_model

from bench.steps import inference, memory, methods, shapes, training
from bench.steps.methods import lora_config
from bench.steps.shapes import SMALL_SHAPES
from ept import EPTConfig
from tiny_models import all_parts, backbone, ids, wrapped

TINY = {
    "seq2seq": dataclasses.replace(SMALL_SHAPES[1], dtype=torch.float32, paper=True),
    "causal": SMALL_SHAPES[2],
}


@pytest.mark.parametrize("kind", TINY)
def test_every_method_is_timed_beside_its_floor_at_no_more_than_the_budget(kind):
    shape = TINY[kind]
    *_, (rows, ratios) = training.training(shape, "cpu", rounds=3)
    by_method = {row["method"]: row for row in rows}
    assert {"floor", "EPT", "prompt tuning 100", "DePT", "LoRA"} <= by_method.keys()
    trained = {name: row["trained_parameters"] for name, row in by_method.items() if "trained_parameters" in row}
    assert all(0.75 * 3200 <= count <= 3200 for count in trained.values()), trained
    assert all(row["peak_bytes"] > 0 and row["low"] <= row["median"] <= row["high"] for row in rows)
    assert by_method["EPT"]["own_bytes_predicted"] == by_method["EPT"]["own_bytes_measured"]
    pairs = {(row["method"], row["over"]): row for row in ratios}
    assert pairs["EPT", "floor"]["goal"] == 1.02 and pairs["DePT", "prompt tuning 100"]["goal"] == ""
    assert pairs["EPT", "floor"]["met"] == (pairs["EPT", "floor"]["median"] <= 1.02)


def test_inference_compares_the_same_number_of_columns(monkeypatch):
    seen = {}

    def steps(given, rounds, description, clock):
        for name, step in given.items():
            step()
            seen[name] = 1
        return {name: [1.0, 1.0, 1.0] for name in given}

    lengths = []
    monkeypatch.setattr(inference, "interleaved", steps)
    make = inference.backbone

    def watched(shape, device):
        model = make(shape, device)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(
                (kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]).shape[1]
            ),
            with_kwargs=True,
        )
        return model

    monkeypatch.setattr(inference, "backbone", watched)
    (row,) = inference.inference(TINY["causal"], "cpu", 3)
    assert lengths[-2:] == [10, 10] and (row["method"], row["goal"]) == ("EPT folded", 1.01)


def test_methods_share_the_frozen_weights_and_no_head():
    base = shapes.backbone(TINY["seq2seq"], "cpu")
    models = [methods.build(name, TINY["seq2seq"], base)[0] for name in ("EPT", "LoRA", "prompt tuning 100")]
    tables = [model.get_input_embeddings().weight for model in (models[0].base_model, *models[1:])]
    assert all(table.data_ptr() == base.get_input_embeddings().weight.data_ptr() for table in tables)
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("budget", [100, 128, 300, 520, 1000])
def test_lora_comes_as_near_to_the_budget_as_it_can(budget):
    model = backbone("bert")  # two layers, query and value: 64 parameters for each rank of a projection
    adapted = get_peft_model(model, lora_config(model, ("query", "value"), budget, "FEATURE_EXTRACTION"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == budget // 64 * 64


def test_lora_is_refused_where_the_budget_holds_nothing():
    with pytest.raises(ValueError, match="does not hold LoRA of rank 1"):
        lora_config(backbone("bert"), ("query", "value"), 63, "FEATURE_EXTRACTION")


CONFIGS = {
    "input": EPTConfig.input_only(token_rank=6),
    "paper": EPTConfig.paper(rank=3, max_text_length=16),
    "all": all_parts(),
    "dropout": all_parts(token_dropout=0.5),
    "short N": all_parts(max_text_length=4),
    "no fusion": all_parts(fusion=False),
    "no update": all_parts(lowrank_update=False),
    "prompt alone": EPTConfig(prompt_length=4, num_spaces=0, token_rank=0),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_layers_own_bytes_are_those_predicted(name, masked):
    config = dataclasses.replace(CONFIGS[name], impl="torch")
    model = wrapped(backbone("bert"), config).train()
    text, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.int64) if masked else None
    weight = model.base_model.get_input_embeddings().weight
    measured = memory.own_bytes(model.ept, lambda: model.ept(text, mask, embedding_weight=weight), [weight])
    assert measured == memory.predicted_own_bytes(config, 32, 3, 9, masked, "torch")
    if config.has_token_update:  # torch keeps the gathered rows, the kernels gather again
        assert memory.predicted_own_bytes(config, 32, 3, 9, masked, "triton") < measured


def test_the_peak_counts_what_is_alive_at_one_time():
    x = torch.ones(1000, requires_grad=True)

    def step():
        y = x * 2  # 4,000 bytes, kept by nobody after the next line
        y = y.exp()  # 4,000 more, kept for the backward
        y.sum().backward()  # a scalar, its gradient (4 bytes each, one expanded without memory) and one of 4,000 bytes
        x.grad = None

    step()
    assert 8000 <= memory.peak_bytes(step) <= 16100
    assert memory.peak_bytes(step) == memory.peak_bytes(step)
    big = torch.ones(10_000)
    assert memory.peak_bytes(lambda: big.view(100, 100).t()) == 0  # views allocate nothing
    assert memory.peak_bytes(lambda: big.add_(1)) == 0
    assert memory.peak_bytes(lambda: [big + 1 for _ in range(3)]) == 120_000


def test_dropout_is_off_for_every_method_and_for_the_floor():
    base = backbone("bert").requires_grad_(False)  # its config asks for dropout
    shape = dataclasses.replace(TINY["causal"], targets=("query", "value"), task="FEATURE_EXTRACTION")
    for name in ("EPT", "LoRA"):
        model, _ = methods.build(name, shape, base)
        model.train()
        dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
        assert dropouts and not any(module.training for module in dropouts)
    assert not any(module.training for module in base.modules())


def test_a_mixed_batch_is_timed_beside_the_same_batch_of_one_adapter():
    (row,) = inference.mixed(TINY["causal"], "cpu", 3, counts=(2,))
    assert (row["method"], row["over"]) == ("mixed batch of 2 adapters", "batch of one adapter") and row["median"] > 0
