"""bench.accuracy.many: runs that train side by side are the package's and PEFT's, each as if it were alone."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from bench.accuracy.arms import TASKS
from bench.accuracy.many import Encoder, Rows, Shape, features, fresh, fresh_head, logits_of, loss_of, settings, train
from bench.accuracy.study import decode_predictions
from bench.accuracy.transfer import Bundle, Job, Study, mean_product
from ept import EPTConfig, get_ept_model
from ept.backbone.layers import find_layers
from tiny_models import POSITIONS, VOCAB, WIDTH, mean_pooling

SIZES = {"train": 50, "dev": 8, "test": 9}
SHAPES = {"EPT": Shape("EPT", 3), "LoRA": Shape("LoRA", 2)}
LINEARS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


def encoder_of(model, embed_scale=1.0):
    deep_scale = tuple(find_layers(model.encoder).sizes.tolist())
    return Encoder(dict(model.encoder.state_dict()), 4, embed_scale, deep_scale)


def rows_of(count, seed, num_labels=3):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, VOCAB, rng.integers(3, 12)) for _ in range(count)]
    labels = rng.random(count) if num_labels == 1 else rng.integers(num_labels, size=count)
    return Rows(ids, labels, num_labels)


def start_of(shape, encoder, seed, num_labels=3):
    """Away from zero, so that every tensor has an effect."""
    start = fresh(shape, encoder, seed, np.arange(5, VOCAB)) | fresh_head(num_labels, WIDTH, seed)
    generator = torch.Generator().manual_seed(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in start.items()}


def peers_tensors(shape, model):
    """The package's or PEFT's parameters under the names used here, of LoRA a list of the layers' own."""
    named = dict(model.named_parameters())
    if shape.method == "EPT":
        return {name: [model.ept.get_parameter(name)] for name in named_sizes(shape, model.base_model)}
    found = {}
    for target in shape.targets:
        path = f"attention.self.{target}" if target in ("query", "key", "value") else target
        for x in "AB":
            stem = f"base_model.model.encoder.encoder.layer.{{}}.{path}.lora_{x}.default.weight"
            found[f"lora_{x.lower()}.{target}"] = [named[stem.format(layer)] for layer in range(2)]
    return found


def named_sizes(shape, base):
    return shape.sizes(encoder_of(base))


@pytest.mark.parametrize("name", ["EPT", "LoRA", "LoRA, all layers"])
def test_logits_and_gradients_are_those_of_the_package_and_of_peft(name):
    base = mean_pooling(num_labels=3)
    encoder = encoder_of(base, embed_scale=0.5)
    shape, rows = SHAPES.get(name, Shape("LoRA", 1, LINEARS)), rows_of(6, 1)
    start = start_of(shape, encoder, 7)
    if name == "EPT":
        model = get_ept_model(base, EPTConfig.deep(token_rank=3, embed_scale=0.5))
        head = base.classifier
    else:
        config = LoraConfig(
            task_type="SEQ_CLS", r=shape.rank, lora_alpha=2 * shape.rank, target_modules=list(shape.targets)
        )
        model = get_peft_model(base, config)
        head = model.base_model.model.classifier.modules_to_save["default"]
    theirs = peers_tensors(shape, model)
    with torch.no_grad():
        for key, parameters in theirs.items():
            for parameter, value in zip(parameters, [start[key]] if name == "EPT" else start[key], strict=True):
                parameter.copy_(value)
        head.weight.copy_(start["head_weight"])
        head.bias.copy_(start["head_bias"])
    lengths = torch.tensor([len(row) for row in rows.ids])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, values in zip(ids, rows.ids, strict=True):
        row[: len(values)] = torch.from_numpy(values)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    output = model.eval()(input_ids=ids, attention_mask=mask, labels=torch.from_numpy(rows.labels))
    output.loss.backward()

    tensors = {key: value.unsqueeze(0).requires_grad_() for key, value in start.items()}
    logits = logits_of(encoder.pooled(ids.unsqueeze(0), lengths.unsqueeze(0), shape, tensors), tensors)
    labels = torch.from_numpy(rows.labels).float().unsqueeze(0)
    loss = loss_of(logits, labels, torch.tensor([3]))
    loss.sum().backward()
    torch.testing.assert_close(logits[0], output.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss[0], output.loss, rtol=1e-5, atol=1e-6)
    for key, parameters in theirs.items():
        expected = torch.stack([parameter.grad for parameter in parameters])
        own = tensors[key].grad if name == "EPT" else tensors[key].grad[0]
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-6)


def test_a_regressions_loss_is_the_squared_error_of_its_one_score():
    logits = torch.tensor([[[1.0, 9.0], [2.0, 9.0]], [[0.0, 0.0], [0.0, 0.0]]])
    loss = loss_of(logits, torch.tensor([[0.0, 4.0], [1.0, 0.0]]), torch.tensor([1, 2]))
    torch.testing.assert_close(loss, torch.tensor([2.5, np.log(2)]), check_dtype=False)


def test_a_run_among_others_ends_as_it_does_alone():
    encoder, shape = encoder_of(mean_pooling()), SHAPES["EPT"]
    runs = [(rows_of(40, 1), 0, 1.0), (rows_of(50, 2, num_labels=1), 1, 0.5)]
    starts = [start_of(shape, encoder, seed, rows.num_labels) for rows, seed, _ in runs]
    rates = [settings(shape, rate, 0.005) for _, _, rate in runs]

    def trained(chosen):
        return train(
            encoder, shape, [starts[i] for i in chosen], [runs[i][0] for i in chosen], [rates[i] for i in chosen],
            [runs[i][1] for i in chosen], steps=4, batch_size=8,
        )  # fmt: skip

    together, losses = trained([0, 1])
    for number in (0, 1):
        alone, loss = trained([number])
        torch.testing.assert_close(losses[number], loss[0], rtol=1e-4, atol=1e-6)
        for name, tensor in alone.items():
            kept = together[name][number][: tensor.shape[1]] if name.startswith("head") else together[name][number]
            torch.testing.assert_close(kept, tensor[0], rtol=1e-3, atol=1e-5)


def test_features_are_in_the_rows_own_order():
    encoder, shape = encoder_of(mean_pooling()), SHAPES["EPT"]
    rows = [rows_of(9, 1), rows_of(5, 2)]
    starts = [start_of(shape, encoder, seed) for seed in (0, 1)]
    tensors = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    found = features(encoder, shape, tensors, rows, batch_size=4)
    assert [len(x) for x in found] == [9, 5]
    for run in (0, 1):
        own = {name: tensor[run : run + 1] for name, tensor in tensors.items()}
        for number, ids in enumerate(rows[run].ids):
            alone = encoder.pooled(torch.from_numpy(ids)[None, None], torch.tensor([[len(ids)]]), shape, own)
            torch.testing.assert_close(found[run][number], alone[0, 0], rtol=1e-4, atol=1e-5)


def test_an_untrained_layer_leaves_the_encoder_as_it_is():
    model = mean_pooling()
    encoder = encoder_of(model)
    ids = torch.arange(5, 15)[None, None]
    start = {name: value.unsqueeze(0) for name, value in fresh(SHAPES["LoRA"], encoder, 0, np.arange(5, 20)).items()}
    pooled = encoder.pooled(ids, torch.tensor([[10]]), SHAPES["LoRA"], start)
    expected = model.encoder(input_ids=ids[0]).last_hidden_state.mean(1)
    torch.testing.assert_close(pooled[0], expected, rtol=1e-4, atol=1e-5)
    assert POSITIONS > 10


def test_the_mean_of_products_of_one_source_is_its_product():
    start = start_of(SHAPES["LoRA"], encoder_of(mean_pooling()), 3)
    again = mean_product([{name: value for name, value in start.items() if name.startswith("lora")}] * 2)
    for target in ("query", "value"):
        expected = start[f"lora_b.{target}"] @ start[f"lora_a.{target}"]
        torch.testing.assert_close(again[f"lora_b.{target}"] @ again[f"lora_a.{target}"], expected)


def test_a_study_leaves_a_line_for_every_run_and_its_sources_never_see_a_judged_row(tmp_path):
    labels = dict(zip(TASKS, (2, 1, 1, 5, 2), strict=True))
    parts = {
        task: {part: rows_of(size, seed, labels[task]) for seed, (part, size) in enumerate(SIZES.items())}
        for task in TASKS
    }
    kept = {task: np.arange(40) for task in TASKS}
    study = Study(
        Bundle(encoder_of(mean_pooling()), parts, kept, np.arange(5, VOCAB)), tmp_path / "lines", np.inf, steps=2
    )
    drawn = study.bundle.drawn_for_source("movies", seed=0)
    assert {row.tobytes() for row in drawn.ids} == {parts["movies"]["train"].ids[i].tobytes() for i in range(40)}
    study.train_sources((0,), ["EPT"])
    ways = ("scratch", "blend", "pick", "gate")
    jobs = [Job("EPT", "news", 40, 0, way, 1.0, "test") for way in ways] + [
        Job("EPT", "movies", 40, 0, "blend", 1.0, "dev", far=True)
    ]
    study.run("final", jobs)
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert sorted(line["way"] for line in lines) == sorted([*ways, "blend"])
    by_task = {line["task"]: line for line in lines if line["way"] == "blend"}
    assert set(by_task["movies"]["errors"]) == {"tweets", "news", "authors", "mean", "fresh"}
    assert len(decode_predictions(by_task["news"]["predictions"])) == SIZES["test"]
