"""bench.accuracy.many: runs that train side by side are the package's and PEFT's, each as if it were alone."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from bench.accuracy import forms, forms_table
from bench.accuracy.arms import TASKS
from bench.accuracy.bootstrap import Bootstrap
from bench.accuracy.many import (
    Encoder,
    Rows,
    Shape,
    along_layers,
    features,
    fresh,
    fresh_head,
    logits_of,
    loss_of,
    settings,
    train,
)
from bench.accuracy.study import decode_predictions
from bench.accuracy.transfer import Bundle, Job, Study, mean_product, score
from bench.text.real_text import Task
from ept import EPTConfig, get_ept_model
from ept.backbone.layers import find_layers
from tiny_models import POSITIONS, VOCAB, WIDTH, mean_pooling

SIZES = {"train": 50, "dev": 8, "test": 9}
SHAPES = {"EPT": Shape("EPT", 3), "LoRA": Shape("LoRA", 2)}
# Shape and the package's config of the same parts.
PARTS = {
    "EPT": (SHAPES["EPT"], EPTConfig.deep(token_rank=3, embed_scale=0.5)),
    "EPT, identity": (
        Shape("EPT", 3, activation="identity"), EPTConfig.deep(token_rank=3, embed_scale=0.5, activation="identity"),
    ),
    "EPT paper": (
        Shape("EPT", 0, prompt_length=3, lowrank=2, positions=8, spaces=(2, 2)),
        EPTConfig.paper(prompt_length=3, rank=2, max_text_length=8, num_spaces=2, embed_scale=0.5),
    ),
    "EPT, all parts": (
        Shape("EPT", 3, prompt_length=3, lowrank=2, positions=8, spaces=(2, 2)),
        EPTConfig.deep(
            prompt_length=3, token_rank=3, rank=2, max_text_length=8, num_spaces=2, space_dim=2, embed_scale=0.5
        ),
    ),
}  # fmt: skip
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


@pytest.mark.parametrize("name", [*PARTS, "LoRA", "LoRA, all layers"])
def test_logits_and_gradients_are_those_of_the_package_and_of_peft(name):
    base = mean_pooling(num_labels=3)
    encoder = encoder_of(base, embed_scale=0.5)
    is_ept = name in PARTS
    shape = PARTS[name][0] if is_ept else SHAPES.get(name, Shape("LoRA", 1, LINEARS))
    rows, start = rows_of(6, 1), start_of(shape, encoder, 7)
    if is_ept:
        model = get_ept_model(base, PARTS[name][1])
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
            for parameter, value in zip(parameters, [start[key]] if is_ept else start[key], strict=True):
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
        own = tensors[key].grad if is_ept else tensors[key].grad[0]
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


@pytest.mark.parametrize("form", [
    {"after_last": True}, {"affine": True}, {"sharing": 2}, {"lora_rank": 1}, {"attention_only": True},
    {"after_last": True, "affine": True, "sharing": 2},
])  # fmt: skip
def test_a_form_that_the_package_has_not_starts_as_the_prompt_alone_and_every_tensor_of_it_learns(form):
    encoder, rows = encoder_of(mean_pooling()), [rows_of(16, 1)]
    shape, plain = Shape("EPT", 2, **form), Shape("EPT", 0)
    start = fresh(shape, encoder, 0, np.arange(5, VOCAB)) | fresh_head(3, WIDTH, 0)
    tensors = {name: value.unsqueeze(0) for name, value in start.items()}
    found, expected = (features(encoder, one, tensors, rows)[0] for one in (shape, plain))
    torch.testing.assert_close(found, expected)
    trained, _ = train(encoder, shape, [start], rows, [settings(shape, 1.0, 0.005)], [0], steps=3, batch_size=8)
    assert all(not torch.equal(trained[name][0], value) for name, value in start.items())


def test_averaged_tensors_are_the_mean_of_the_last_steps():
    encoder, shape, rows = encoder_of(mean_pooling()), SHAPES["EPT"], rows_of(16, 1)
    start = start_of(shape, encoder, 0)
    arguments = ([start], [rows], [settings(shape, 1.0, 0.005)], [0])
    last, _ = train(encoder, shape, *arguments, steps=4, batch_size=8)
    same, _ = train(encoder, shape, *arguments, steps=4, batch_size=8, averaged=0.25)  # the last step's own
    mean, _ = train(encoder, shape, *arguments, steps=4, batch_size=8, averaged=1.0)
    torch.testing.assert_close(same["deep_up"], last["deep_up"])
    gaps = [(each["deep_up"][0] - start["deep_up"]).norm() for each in (mean, last)]
    assert 0 < gaps[0] < gaps[1]


def test_rates_along_the_layers_keep_their_mean_and_reach_every_update():
    encoder, shape, rows = encoder_of(mean_pooling()), SHAPES["EPT"], rows_of(8, 1)
    start = start_of(shape, encoder, 0)
    rates = settings(shape, 1.0, 0.005)
    along = along_layers(rates, 4.0, encoder.layers)
    of_up = [along["token_up"], *along["deep_up"]]
    assert len(of_up) == encoder.layers and of_up[-1] / of_up[0] == pytest.approx(4)
    assert np.prod(of_up) == pytest.approx(rates["token_up"] ** len(of_up))
    assert along["prompt"] == rates["prompt"] and along["head_bias"] == rates["head_bias"]
    # One step at the whole rate behind one at none, on the same rows: AdamW moves every number by the rate itself.
    trained, _ = train(encoder, shape, [start], [rows], [along], [0], steps=2, batch_size=8, warmup=0.0)
    moved = (trained["deep_up"][0] - start["deep_up"]).abs().amax(dim=(1, 2))
    torch.testing.assert_close(moved, torch.tensor(along["deep_up"]), rtol=1e-3, atol=0)


def test_the_rates_rise_over_the_warm_up():
    encoder, shape, rows = encoder_of(mean_pooling()), SHAPES["EPT"], rows_of(16, 1)
    start = start_of(shape, encoder, 0)
    moved = []
    for warmup in (0.25, 1.0):
        trained, _ = train(
            encoder, shape, [start], [rows], [settings(shape, 1.0, 0.005)], [0], steps=4, batch_size=8, warmup=warmup
        )
        moved.append((trained["prompt"][0] - start["prompt"]).norm())
    assert 0 < moved[1] < moved[0]


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


def test_a_question_searches_every_forms_rates_then_runs_its_seeds_and_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "SEARCH_SEEDS", (5,))
    for module in (forms, forms_table):
        monkeypatch.setattr(module, "FINAL_SEEDS", (0, 1))
    parts = {
        task: {part: rows_of(size, seed, 2) for seed, (part, size) in enumerate(SIZES.items())}
        for task in ("sst2", "cola")
    }
    bundle = Bundle(encoder_of(mean_pooling()), parts, {}, np.arange(5, VOCAB), {"cola": "matthews"})
    tried = tuple({"prompt": prompt} for prompt in (1.0, 4.0))
    question = forms.Question(
        {"EPT": forms.Form(Shape("EPT", 2), tried, averaged=0.5), "LoRA": forms.Form(Shape("LoRA", 1))},
        ("sst2", "cola"), (40,), 2, 4,
    )  # fmt: skip

    def lines():
        runner = forms.Runner(question, bundle, tmp_path / "lines", np.inf, 3, None)
        forms.answer(runner, question.forms)
        return (tmp_path / "lines").read_text().splitlines()

    first = lines()
    assert len(first) == (2 + 3) * 2 + 2 * 2 * 2 and lines() == first
    records = [json.loads(line) for line in first]
    final = [record for record in records if record["part"] == "test"]
    assert all(len({tuple(map(tuple, r["rates"])) for r in final if r["form"] == form}) == 1 for form in question.forms)
    tasks = {
        task: Task(task, "single_label_classification", ["a", "b"], {}, {"test": part.labels.tolist()}, metric)
        for task, metric in (("sst2", "accuracy"), ("cola", "matthews"))
        for part in [parts[task]["test"]]
    }
    table = forms_table.table(final, list(question.forms), Bootstrap(tasks, 50))
    assert table[0].startswith("| 40 rows |") and table[2].startswith("| EPT |") and table[2].endswith("| – | – | – |")
    assert table[3].startswith("| LoRA |") and table[3].endswith("| 4 |") and len(table) == 4


def test_matthews_correlation_is_that_of_scikit_learn():
    from sklearn.metrics import matthews_corrcoef

    rows, logits = rows_of(30, 4, 2), np.random.default_rng(0).random((30, 2))
    assert score(logits, rows, "matthews") == pytest.approx(matthews_corrcoef(rows.labels, logits.argmax(1)))
