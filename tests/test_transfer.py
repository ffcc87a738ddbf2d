"""Starting an adapter from trained ones: what is taken, in which units, by which weights, and what is refused."""

import dataclasses
import math

import pytest
import torch
import transformers as hf

from ept import EPTConfig, EPTLayer, EPTModel, get_ept_model
from ept.model.transfer import (
    Source,
    converted,
    leave_one_out_error,
    lined_up,
    start_from,
    targets_of,
    weighted_sum,
    weights_by_error,
)
from tiny_models import VOCAB, WIDTH, all_parts, backbone, ids, mean_pooling, shake

DEEP = dict(token_rank=3, deep_layers=1)


def trained(seed=0, config=None):
    """A model whose adapter started at a seed."""
    base = mean_pooling()
    torch.manual_seed(seed)
    return get_ept_model(base, config or EPTConfig.deep(**DEEP)).eval()


@torch.no_grad()
def shake_layer(layer, seed, std=0.02):
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def moved(seed, by):
    """An adapter of the start of `seed` with a large W, so that what the head reads is its own."""
    model = trained(seed)
    generator = torch.Generator().manual_seed(by)
    for parameter in (model.ept.token_up, model.ept.deep_up):
        parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    return model


def pair(model):
    return model.ept_config, model.adapter_tensors()


def fresh(adapters, config=None, **more):
    config = dataclasses.replace(config or EPTConfig.deep(**DEEP), init="adapters")
    return get_ept_model(mean_pooling(), config, init_adapters=adapters, **more).eval()


def layer_of(seed=0, config=None):
    """An adapter's layer at its start, without a backbone."""
    config = config or EPTConfig.deep(**DEEP)
    torch.manual_seed(seed)
    return EPTLayer(dataclasses.replace(config, embed_scale=config.embed_scale or 1.0), WIDTH)


def source_of(layer, name="adapter"):
    return Source(name, layer.config, dict(layer.state_dict()))


def rows(count=24, seed=3):
    labels = torch.arange(count) % 3
    text = ids(count, 6, seed)
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": labels}


def test_one_adapter_is_taken_as_it_is_from_its_directory_and_its_head_is_not(tmp_path):
    source = trained()
    shake(source, seed=5)
    source.base_model.classifier.weight.data.fill_(1.0)
    source.save_pretrained(tmp_path)
    model = fresh([tmp_path])
    for name, parameter in model.ept.named_parameters():
        assert torch.equal(parameter, source.ept.get_parameter(name))
    assert not torch.equal(model.base_model.classifier.weight, source.base_model.classifier.weight)
    assert model.started_from.weights == {str(tmp_path): 1.0} and model.started_from.errors is None
    model.save_pretrained(tmp_path / "own")
    again = EPTModel.from_pretrained(mean_pooling(), tmp_path / "own")
    assert torch.equal(again.ept.deep_up, source.ept.deep_up)


def test_given_weights_sum_adapters_of_one_start():
    sources = [layer_of(0), layer_of(0)]
    for seed, source in enumerate(sources):
        shake_layer(source, seed)
    layer = layer_of(9)
    start_from(layer, [source_of(source, str(n)) for n, source in enumerate(sources)], [0.25, 0.75], None)
    expected = weighted_sum([dict(source.named_parameters()) for source in sources], [0.25, 0.75])
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


def test_adapters_of_two_starts_are_not_summed():
    sources = [source_of(layer_of(0), "a"), source_of(layer_of(1), "b")]
    assert not lined_up([source.tensors for source in sources])
    with pytest.raises(ValueError, match="not trained from one start"):
        start_from(layer_of(), sources, [0.5, 0.5], None)
    layer = layer_of()
    assert start_from(layer, sources, [0, 1], None).weights == {"a": 0, "b": 1}
    assert torch.equal(layer.deep_down, sources[1].tensors["deep_down"])


def test_of_adapters_of_several_starts_the_best_is_taken_or_none():
    sources = [source_of(layer_of(1), "a"), source_of(layer_of(2), "b")]
    for errors, expected in [((0.9, 0.8, 0.7), {"a": 0, "b": 1}), ((0.7, 0.8, 0.9), {"fresh": 1})]:
        layer, read = layer_of(0), iter(errors)
        start = start_from(layer, sources, None, lambda read=read: next(read))
        assert start.weights == expected and list(start.errors.values()) == list(errors)
        assert torch.equal(layer.deep_down, layer_of(0 if "fresh" in expected else 2).deep_down)
    one = iter((0.5, 0.6))
    assert start_from(layer_of(0), sources[:1], None, lambda: next(one)).weights == {"fresh": 1.0}


def told_by_the_head(model, seed):
    """Rows whose labels an adapter's features tell and those of an untrained one do not."""
    given = rows(60, seed)
    read = []
    handle = model.base_model.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0][:, 0]))
    model(input_ids=given["input_ids"])
    handle.remove()
    features = read[0].detach()
    given["labels"] = (features > features.median()).long()
    return given


def test_rows_weight_adapters_of_one_start_by_what_the_head_would_miss():
    sources = [moved(0, by=5), moved(0, by=6)]
    given = told_by_the_head(sources[1], seed=4)
    adapters = [pair(source) for source in sources]
    assert lined_up([tensors for _, tensors in adapters])
    model = fresh(adapters, init_rows=given)
    start = model.started_from
    assert set(start.errors) == {"fresh", "adapter 0", "adapter 1"}
    assert start.errors["adapter 1"] < start.errors["adapter 0"]
    assert list(start.weights.values()) == weights_by_error([start.errors["adapter 0"], start.errors["adapter 1"]])
    expected = weighted_sum([dict(source.ept.named_parameters()) for source in sources], list(start.weights.values()))
    torch.testing.assert_close(model.ept.deep_up, expected["deep_up"])
    assert model.base_model.classifier(torch.zeros(1, WIDTH)).shape == (1, 3)  # hands on nothing any more


@pytest.mark.parametrize(
    "config", [all_parts(fusion=False, deep_layers=1), EPTConfig.deep(**DEEP)], ids=["all", "deep"]
)
def test_other_units_give_the_same_outputs(config):
    source = trained(0, dataclasses.replace(config, embed_scale=0.5))
    shake(source)
    source.ept.deep_scale.mul_(3)
    model = fresh([pair(source)], dataclasses.replace(config, embed_scale=0.2))
    model.base_model.load_state_dict(source.base_model.state_dict())
    text = ids(2, 7)
    torch.testing.assert_close(model(text).logits, source(text).logits, rtol=1e-4, atol=1e-5)


def test_what_is_alike_of_every_row_has_an_error_of_about_one_and_a_linear_rule_about_none():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(80, 5, generator=generator)
    rule = features @ torch.randn(5, 1, generator=generator) + 7
    noise = torch.randn(80, 1, generator=generator)
    errors = leave_one_out_error(features.expand(2, 80, 5), torch.stack([rule, noise]))
    assert errors[0] < 0.01 and 0.9 < errors[1] < 1.3


def test_the_leave_one_out_error_is_that_of_leaving_each_row_out():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=generator).double(), torch.randn(12, 1, generator=generator).double()
    centred = x - x.mean(0)
    size = (centred**2).sum(1).mean()
    errors = []
    for ridge in (0.01, 0.1, 1.0):
        missed = 0.0
        for row in range(12):
            rest = [i for i in range(12) if i != row]
            inputs, mean = centred[rest] - centred[rest].mean(0), y[rest].mean()
            weight = torch.linalg.solve(inputs.T @ inputs + ridge * size * torch.eye(4), inputs.T @ (y[rest] - mean))
            missed += (mean + (centred[row] - centred[rest].mean(0)) @ weight - y[row]).square().item()
        errors.append(missed / (y - y.mean()).square().sum().item())
    assert math.isclose(leave_one_out_error(x, y).item(), min(errors), rel_tol=1e-2)


def test_targets_are_columns_of_classes_or_the_values_themselves():
    assert targets_of(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert targets_of(torch.tensor([0.5, 1.5]), 1).tolist() == [[0.5], [1.5]]
    assert targets_of(torch.tensor([3, 4]), 1).tolist() == [[3], [4]]


@pytest.mark.parametrize(
    ("weights", "words"), [(None, "need init_rows"), ([1.0], "2 finite numbers"), ([1.0, math.nan], "2 finite numbers")]
)
def test_how_several_adapters_go_together_must_be_said(weights, words):
    with pytest.raises(ValueError, match=words):
        start_from(layer_of(), [source_of(layer_of(), "a"), source_of(layer_of(), "b")], weights, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(token_rank=4, deep_layers=1), r"token_down must be \(3, 32\) for this config, but it has \(4, 32\)"),
        (dict(DEEP, prompt_length=3), r"prompt must be \(2, 32\)"),
        (dict(DEEP, activation="relu"), "activation='relu'"),
        (dict(DEEP, deep_layers=0), "deep_down must be .* no such tensor"),
        (dict(DEEP, num_spaces=2), "gate_weight, space_down, space_up, which this config has not"),
    ],
)
def test_an_adapter_of_other_sizes_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        converted(source_of(layer_of(0, EPTConfig.deep(**settings))), layer_of())


def test_rows_that_tell_nothing_are_refused():
    features, labels = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="all labels are equal"):
        leave_one_out_error(features, targets_of(labels, 2))
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out_error(features[:1], targets_of(labels[:1], 2))


def test_other_units_beside_the_fusion_are_refused():
    source, layer = (layer_of(0, all_parts(embed_scale=scale)) for scale in (0.5, 0.2))
    with pytest.raises(ValueError, match="the fusion cannot be converted"):
        converted(source_of(source), layer)


def test_an_adapter_given_twice_is_refused():
    with pytest.raises(ValueError, match="given twice"):
        start_from(layer_of(), [source_of(layer_of())] * 2, [1, 0], None)


def test_arguments_that_do_not_go_together_are_refused():
    base, source, deep = mean_pooling(), source_of(layer_of()), EPTConfig.deep(**DEEP)
    adapters = [(source.config, source.tensors)]
    begin = dataclasses.replace(deep, init="adapters")
    for config, more, words in [
        (deep, dict(init_adapters=adapters), "go together"),
        (begin, dict(), "go together"),
        (deep, dict(init_rows=rows()), 'are for init="adapters"'),
        (begin, dict(init_adapters=adapters, init_rows=rows(), init_weights=[1]), "not both"),
        (begin, dict(init_adapters=adapters, init_rows={"input_ids": ids(4, 5)}), "need their labels"),
    ]:
        with pytest.raises(ValueError, match=words):
            get_ept_model(base, config, **more)
    with pytest.raises(ValueError, match="for get_ept_model"):
        get_ept_model(base, deep).add_adapter("other", begin)


def test_an_adapter_that_cannot_be_trained_on_or_of_another_backbone_is_refused(tmp_path):
    trained().fold().save_pretrained(tmp_path / "folded")
    with pytest.raises(ValueError, match="is folded"):
        fresh([tmp_path / "folded"])
    other = get_ept_model(mean_pooling("bert", seed=9), EPTConfig.deep(**DEEP))
    other.base_model.get_input_embeddings().weight.data[:] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="backbone"):
        fresh([tmp_path / "other"])


def test_rows_need_a_head():
    model = get_ept_model(backbone("llama", hf.AutoModelForCausalLM), EPTConfig.deep(**DEEP))
    text = ids(4, 5)
    config = EPTConfig.deep(init="adapters", **DEEP)
    more = dict(init_adapters=[pair(model)], init_rows={"input_ids": text, "labels": text})
    with pytest.raises(ValueError, match="has none: give init_weights"):
        get_ept_model(backbone("llama", hf.AutoModelForCausalLM), config, **more)
    del more["init_rows"]
    assert get_ept_model(backbone("llama", hf.AutoModelForCausalLM), config, **more).started_from


@pytest.mark.parametrize("name", ["roberta", "llama"])
def test_rows_are_judged_by_what_transformers_own_heads_read(name):
    def base():
        return backbone(name, hf.AutoModelForSequenceClassification, num_labels=3)

    source = get_ept_model(base(), EPTConfig.deep(**DEEP))
    config = EPTConfig.deep(init="adapters", **DEEP)
    model = get_ept_model(base(), config, init_adapters=[pair(source)], init_rows=rows())
    assert 0 < model.started_from.errors["fresh"] < 3
    assert model(**rows()).logits.shape == (24, 3) and VOCAB
