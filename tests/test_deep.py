"""Deep updates: a token-conditioned update of its own at the input of every layer after the first."""

import copy
import dataclasses
import json
import threading

import accelerate
import pytest
import torch
import transformers as hf

from bench.kernels.kernel_traffic import OperationCounter
from ept import EPTConfig, EPTModel, get_ept_model
from ept.backbone.layers import find_layers, layers_of, why_no_updates
from ept.layer.layer import EPTLayer
from ept.model.fresh import config_for_budget
from ept.model.inputs import Inputs
from ept.model.routing import Member, OneAdapter
from ept.training.rates import parameter_groups
from tiny_models import all_parts, backbone, ids, mean_pooling, padded, shake, wrapped

DEEP = dict(deep_layers=-1)


def causal(name="llama", **settings):
    layers = {} if name in ("qwen2", "gemma3") else {"num_hidden_layers": 4}  # those name the kind of each layer
    return wrapped(backbone(name, hf.AutoModelForCausalLM, **layers), all_parts(**DEEP | settings))


def first_token():
    return wrapped(backbone("bert", hf.AutoModelForSequenceClassification, num_hidden_layers=4), all_parts(**DEEP))


def by_hand(model, input_ids, dropout=None):
    """One row without padding: the backbone's output where each layer after the first updates what it reads."""
    routing = OneAdapter(Member(model.ept, []))
    embeds = model._backbone.embed(Inputs(input_ids=input_ids), routing, routing.places(prompt_last=True))
    reader = model.base_model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    handles = []
    for i, layer in enumerate(layers_of(model.base_model)[1:]):

        def add(module, args, kwargs, i=i):
            e, down, up = model.ept.deep_scale[i], model.ept.deep_down[i], model.ept.deep_up[i]
            up = up if dropout is None else up * dropout[i]
            return (args[0] + e * torch.nn.functional.silu(args[0] / e @ down.T) @ up, *args[1:]), kwargs

        handles.append(layer.register_forward_pre_hook(add, with_kwargs=True))
    out = reader(inputs_embeds=embeds)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma3", "bloom"])
def test_every_layer_after_the_first_updates_what_it_reads(name):
    model, text = causal(name), ids(1, 7)
    want = by_hand(model, text).logits[:, 5:]
    torch.testing.assert_close(model(input_ids=text).logits, want, rtol=1e-4, atol=1e-5)
    model.ept.deep_up.data.zero_()
    assert (model(input_ids=text).logits - want).abs().max() > 1e-4


def test_an_encoder_has_them():
    model, text = first_token(), ids(1, 7)
    assert model.ept.prompt_start == 1 and model.ept_config.deep_layers == 3
    torch.testing.assert_close(model(input_ids=text).logits, by_hand(model, text).logits)


@pytest.mark.parametrize(("activation", "part"), [("silu", -(32**-0.5)), ("identity", 0.0)])
def test_a_token_many_times_larger_fills_no_hidden_unit_at_the_start(activation, part):
    base = backbone("gpt2", hf.AutoModelForCausalLM, num_hidden_layers=4, bos_token_id=6)
    config, small = EPTConfig(activation=activation), find_layers(base)
    plain = get_ept_model(copy.deepcopy(base), seeded(config)).ept.deep_down
    assert not small.outliers.any()
    base.transformer.wte.weight.data[6] *= 300  # as where a text begins: the residual stream keeps it
    outliers = find_layers(base).outliers
    torch.testing.assert_close(outliers.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(find_layers(base).sizes, small.sizes, rtol=0.3, atol=0)

    down = get_ept_model(base, seeded(config)).ept.deep_down
    states = base(input_ids=torch.tensor([[6, 3, 9]]), output_hidden_states=True).hidden_states
    for site in range(3):
        assert states[site + 1][0, 0] @ outliers[site] > 0.99 * states[site + 1][0, 0].norm()
        torch.testing.assert_close(down[site] @ outliers[site], torch.full((4,), part), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            down[site], plain[site] + torch.outer(part - plain[site] @ outliers[site], outliers[site])
        )
    base.config.bos_token_id = None  # nothing says how a text begins
    assert not find_layers(base).outliers.any()


def seeded(config: EPTConfig) -> EPTConfig:
    """The config; whatever is drawn next is drawn from one seed."""
    torch.manual_seed(3)
    return config


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_has_them_in_its_encoder(name):
    model, text = wrapped(backbone(name, hf.AutoModelForSeq2SeqLM), all_parts(**DEEP)), ids(2, 7)
    out = model(input_ids=text, decoder_input_ids=ids(2, 3))
    torch.testing.assert_close(out.encoder_last_hidden_state[:1], by_hand(model, text[:1]).last_hidden_state)
    generated = model.generate(text, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    for row in range(2):
        alone = model.generate(text[row : row + 1], max_new_tokens=4, num_beams=2, num_return_sequences=2)
        assert torch.equal(generated[2 * row : 2 * row + 2, : alone.shape[1]], alone)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [causal, first_token, lambda: wrapped(mean_pooling(), all_parts(**DEEP))])
def test_a_rows_result_does_not_depend_on_its_padding(make, side):
    model, rows = make(), [ids(1, n, seed=n) for n in (4, 9, 6)]
    text, mask = padded(rows, side)
    got = model(input_ids=text, attention_mask=mask).logits
    for i, row in enumerate(rows):
        mine = got[i][mask[i] != 0] if got.dim() == 3 else got[i]
        torch.testing.assert_close(mine, model(input_ids=row).logits[0], rtol=1e-4, atol=1e-5)


def test_cached_generation_goes_on_as_a_pass_over_the_whole_text_does():
    model = causal()
    text, mask = padded([ids(1, n, seed=n) for n in (4, 9, 6)], "left")
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    cached = model.generate(text, mask, **settings)
    assert torch.equal(cached, model.generate(text, mask, use_cache=False, **settings))
    longer = torch.cat([mask, torch.ones(3, 6, dtype=torch.int64)], 1)
    logits = model(input_ids=cached, attention_mask=longer).logits
    assert torch.equal(logits[:, 8:-1].argmax(-1), cached[:, 9:])
    beams = model.generate(text, mask, num_beams=3, num_return_sequences=2, **settings)
    alone = model.generate(ids(1, 9, seed=9), num_beams=3, num_return_sequences=2, **settings)
    assert torch.equal(beams[2:4], alone)


def test_a_second_turn_on_a_cache_is_that_of_a_fresh_one():
    model, text = causal(), ids(1, 8)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    first = model.generate(text[:, :5], **settings)
    whole = torch.cat([first.sequences, text[:, 5:]], 1)
    assert torch.equal(
        model.generate(whole, past_key_values=first.past_key_values, **settings).sequences,
        model.generate(whole, **settings).sequences,
    )


def test_a_pass_by_hand_over_a_cache_has_them():
    model, text = causal(), ids(2, 9)
    cache = hf.DynamicCache(config=model.config)
    start = model(input_ids=text[:, :6], past_key_values=cache).logits
    rest = model(input_ids=text[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([start, rest], 1), model(input_ids=text).logits, rtol=1e-4, atol=1e-5)


def test_packed_examples_are_updated_each_as_it_is_alone():
    model, rows = causal(), [ids(1, n, seed=n) for n in (4, 6, 3)]
    text = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)
    want = torch.cat([model(input_ids=row).logits for row in rows], 1)
    got = model(input_ids=text, position_ids=positions).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_rows_of_several_adapters_get_their_own():
    model = causal()
    model.add_adapter("flat", all_parts(prompt_length=3))
    model.add_adapter("shallow", all_parts(prompt_length=4, deep_layers=1))
    for adapter in model.inactive_adapters:
        shake(type("Holder", (), {"ept": adapter.layer}), seed=len(adapter.name))
    text, mask = padded([ids(1, n, seed=n) for n in (4, 9, 6, 5)], "left")
    names = ["shallow", "default", "flat", "default"]
    logits = model(input_ids=text, attention_mask=mask, adapter_ids=names).logits
    written = model.generate(text, mask, adapter_ids=names, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = text[row : row + 1, mask[row] != 0]
        torch.testing.assert_close(logits[row][mask[row] != 0], model(input_ids=alone).logits[0], rtol=1e-4, atol=1e-5)
        own = model.generate(alone, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(written[row, -3:], own[0, -3:])


# transformers 5.19 checkpoints a layer with its hooks: the second layer's backward finds D/h and W·h of all layers freed.
with_hooks = pytest.mark.skipif(
    not hasattr(hf.PreTrainedModel, "activation_checkpointing_enable"),
    reason="this transformers checkpoints a layer's hooks, too: use_reentrant=True ends in torch's error",
)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=with_hooks)])
def test_checkpointed_layers_give_the_same_gradients_and_keep_no_steps_of_the_update(reentrant):
    text, model = ids(3, 7), causal().train()
    model(input_ids=text, labels=text).loss.backward()
    want = {name: p.grad.clone() for name, p in model.ept.named_parameters()}
    assert want["deep_down"].abs().amin(dim=2).min() > 0 and want["deep_up"].abs().amin(dim=2).min() > 0  # all layers'
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(input_ids=text, labels=text)
    assert (3, 12, 6) not in kept  # the hidden units of 3 rows of 5 + 7 columns
    first, second = (model(input_ids=t, labels=t).loss for t in (text, text.flip(0)))
    second.backward()  # another pass has run since the first: each keeps its own rows
    first.backward()
    for name, p in model.ept.named_parameters():
        torch.testing.assert_close(p.grad, 2 * want[name], rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_a_compiled_backbone_updates_each_batch():
    model = wrapped(backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=3), all_parts(**DEEP))
    rows = [ids(1, n, seed=n) for n in (4, 9, 6)]
    batches = [padded(rows, "left"), padded(rows[::-1], "left"), padded(rows, "right")]
    want = [model(input_ids=text, attention_mask=mask).logits for text, mask in batches]
    model.base_model.compile(backend="aot_eager")
    with model.disable_adapter():
        model(input_ids=batches[0][0], attention_mask=batches[0][1])
    for (text, mask), logits in zip(batches, want, strict=True):
        got = model(input_ids=text, attention_mask=mask).logits
        torch.testing.assert_close(got[mask != 0], logits[mask != 0], rtol=1e-4, atol=1e-5)


def test_they_start_at_zero_in_units_of_the_hidden_states():
    base = backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4)
    flat = get_ept_model(copy.deepcopy(base), all_parts()).eval()
    deep = get_ept_model(base, all_parts(**DEEP)).eval()
    flat.load_adapter_tensors({name: deep.adapter_tensors()[name] for name in flat.adapter_tensors()})
    assert torch.equal(deep(input_ids=ids(2, 7)).logits, flat(input_ids=ids(2, 7)).logits)
    assert deep.ept.deep_up.shape == deep.ept.deep_down.shape == (3, 6, 32) and not deep.ept.deep_up.any()
    assert abs(deep.ept.deep_down.std() * 32**0.5 - 1) < 0.1
    out = base(input_ids=torch.arange(0, 120, 3).unsqueeze(0), output_hidden_states=True)
    sizes = torch.stack([hidden.square().mean(-1).sqrt().median() for hidden in out.hidden_states[1:-1]])
    torch.testing.assert_close(deep.ept.deep_scale, sizes, rtol=0.3, atol=0)  # other tokens


def test_they_count_and_train_at_a_rate_of_their_own():
    model = causal(deep_layers=2)
    assert model.trainable_parameters()["deep"] == 2 * 2 * 6 * 32 == model.ept.deep_up.numel() * 2
    assert sum(model.trainable_parameters().values()) == model.ept_config.num_parameters(32)
    (group,) = (group for group in parameter_groups(model, deep_learning_rate=0.25) if group["lr"] == 0.25)
    updates = [getattr(model.ept, name) for name in ("token_down", "token_up", "deep_down", "deep_up")]
    assert {id(p) for p in group["params"]} == set(map(id, updates))


def test_a_training_pass_leaves_units_out_for_the_whole_batch(monkeypatch):
    model, text = causal(token_dropout=0.5), ids(2, 7)
    size = model.ept.deep_scale[:, None, None]
    assert torch.equal(torch.stack(model.ept.layer_updates().up), model.ept.deep_up * size)
    model.train()
    model.ept.token_up.data.zero_()  # whose dropout is drawn apart
    updates = model.ept.layer_updates()
    dropout = (torch.stack(updates.up) / (model.ept.deep_up * size)).mean(-1, keepdim=True).round(decimals=4)
    assert dropout.shape == (3, 6, 1) and set(dropout.unique().tolist()) == {0.0, 2.0}
    monkeypatch.setattr(model.ept, "layer_updates", lambda: updates)
    got = model(input_ids=text).logits
    for row in range(2):
        want = by_hand(model, text[row : row + 1], dropout).logits[:, 5:]
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["default", "deep", "input"])
@pytest.mark.parametrize("given", [{}, {"prompt_length": 3}, {"num_spaces": 0}])
def test_a_budget_counts_them(preset, given):
    for budget in (7_000, 38_400, 76_800):
        config = EPTConfig.for_budget(budget, 384, preset=preset, deep_layers=5, **given)
        assert 0 <= budget - config.num_parameters(384) < 6 * 2 * 384  # not a rank of all six layers more
    assert EPTConfig.for_budget(4_992, 384, preset="deep", deep_layers=5).num_parameters(384) == 4_992  # s = 1, q = 1
    assert EPTConfig.for_budget(57_600, 576, preset="deep", deep_layers=29).prompt_length == 2  # the rest is not spent
    with pytest.raises(ValueError, match="raise the budget"):
        EPTConfig.for_budget(4_991, 384, preset="deep", deep_layers=5)
    for left_open, other in (("deep", -1), ("default", None)):
        with pytest.raises(ValueError, match=f"deep_layers={other} is known once a model is wrapped.*input_only"):
            EPTConfig.for_budget(38_400, 384, preset=left_open)


def test_a_models_budget_is_filled_by_the_default_preset():
    model = backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4)
    config = config_for_budget(model, 64 + 8 * 32 * 2)  # the prompt, and two hidden units in each of four layers
    assert config == EPTConfig(token_rank=2, deep_layers=3)
    assert sum(get_ept_model(model, config).trainable_parameters().values()) == 64 + 8 * 32 * 2
    assert config_for_budget(model, 2_000, preset="paper", max_text_length=16).rank > 0
    with pytest.raises(ValueError, match="preset='large' is unknown: choose one of 'default'"):
        config_for_budget(model, 2_000, preset="large")


def test_the_preset_has_them_in_all_layers():
    model = get_ept_model(backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4), EPTConfig.deep())
    assert model.ept_config.deep_layers == 3
    assert model.trainable_parameters() == {"prompt": 2 * 32, "token": 8 * 32, "deep": 24 * 32}


def test_the_default_has_them_in_all_layers_and_is_saved_with_their_number(tmp_path):
    model = get_ept_model(backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4))
    assert model.ept_config == dataclasses.replace(EPTConfig.deep(deep_layers=3), embed_scale=model.ept.embed_scale)
    model.add_adapter("second")
    assert model._inactive("second").layer.config == model.ept_config
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["deep_layers"] == 3
    again = EPTModel.from_pretrained(backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4), tmp_path)
    assert again.ept_config == model.ept_config


def test_without_layers_the_default_falls_back_to_the_input_and_says_so_once(caplog):
    def one_layer():
        return backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=1)

    def settings_of(config):
        return dataclasses.replace(get_ept_model(one_layer(), config).ept_config, embed_scale=None)

    assert settings_of(None) == EPTConfig.input_only()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "no layers after the first" in record.getMessage()
    assert "EPTConfig.input_only()" in record.getMessage()
    changed = dict(prompt_length=7, num_spaces=2, token_dropout=0.1)
    assert settings_of(EPTConfig(**changed)) == EPTConfig.input_only(**changed)
    caplog.clear()
    config = config_for_budget(one_layer(), 2_000, prompt_length=3)
    assert config == EPTConfig.for_budget(2_000, 32, preset="input", prompt_length=3) and len(caplog.records) == 1
    with pytest.raises(ValueError, match=r"no layers after the first.*input_only"):
        get_ept_model(one_layer(), EPTConfig.deep())
    with pytest.raises(ValueError, match=r"no layers after the first.*input_only"):
        config_for_budget(one_layer(), 2_000, preset="deep")


@pytest.mark.parametrize("off", [dict(token_rank=0), dict(token_update=False)])
def test_without_a_token_conditioned_update_the_default_leaves_the_layers_alone(off, caplog):
    model = get_ept_model(backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4), EPTConfig(**off))
    assert model.ept_config.deep_layers == 0 and model.trainable_parameters() == {"prompt": 2 * 32}
    assert EPTConfig(**off).num_parameters(32) == 2 * 32 and not caplog.records
    config = config_for_budget(model.base_model, 320, preset="default", num_spaces=2, space_dim=1, **off)
    assert config.deep_layers == 0 and config.prompt_length == 4


def test_a_count_that_only_a_backbone_can_say_is_refused():
    assert EPTConfig(deep_layers=5).num_parameters(384) == (2 + 8 * 6) * 384
    for config in (EPTConfig(), EPTConfig.deep()):
        with pytest.raises(ValueError, match=r"known once a model is wrapped.*input_only"):
            config.num_parameters(384)
        with pytest.raises(ValueError, match="known once a model is wrapped"):
            EPTLayer(dataclasses.replace(config, embed_scale=1.0), 384)


@pytest.mark.parametrize("fold", [False, True])
def test_a_saved_adapter_gives_the_same_bits(tmp_path, fold):
    model, text = causal(), ids(2, 7)
    want = model(input_ids=text).logits
    if fold:
        model = model.fold()
        torch.testing.assert_close(model(input_ids=text).logits, want, rtol=1e-4, atol=1e-5)
        want = model(input_ids=text).logits
    model.save_pretrained(tmp_path)
    again = EPTModel.from_pretrained(backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4), tmp_path).eval()
    assert torch.equal(again(input_ids=text).logits, want)
    if fold:
        other = causal()
        other.ept.deep_up.data += 1
        assert torch.equal(other.fold().ept.prompt, again.ept.prompt) and other.ept.sha256 != again.ept.sha256


def test_without_the_adapter_and_after_an_error_the_backbone_is_as_it_was():
    model, text = causal(), ids(2, 7)
    base = backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4)
    with pytest.raises(ValueError):
        model(input_ids=text, labels=text[:, :3])
    layers_of(model.base_model)[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=text)
    layers_of(model.base_model)[2]._forward_pre_hooks.popitem()
    assert torch.equal(model.base_model(input_ids=text).logits, base(input_ids=text).logits)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=text).logits, base(input_ids=text).logits)


def test_calls_from_several_threads_add_their_own():
    model, texts = causal(), [ids(2, 7), ids(3, 9, seed=1)]
    want = [model(input_ids=text).logits for text in texts]
    wrong = []

    def run(text, logits):
        wrong.extend(not torch.equal(model(input_ids=text).logits, logits) for _ in range(50))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(texts, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 100 and not any(wrong)


@pytest.mark.parametrize("inner", ["default", "flat", None])
def test_a_call_within_a_generation_is_as_it_is_alone(inner):
    model, text = causal(), ids(1, 6)
    model.add_adapter("flat", all_parts(prompt_length=3))
    others = [ids(1, n, seed=n) for n in (3, 6, 11)]

    def run(other):
        if inner is None:
            with model.disable_adapter():
                return model(input_ids=other).logits
        return model(input_ids=other, adapter_ids=[inner]).logits

    want, got = [run(other) for other in others], []
    settings = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    alone = model.generate(text, **settings)

    class Within(hf.LogitsProcessor):
        def __call__(self, input_ids, scores):
            got.extend(run(other) for other in others)
            model.generate(others[2], **settings)
            return scores

    assert torch.equal(model.generate(text, logits_processor=[Within()], **settings), alone)
    assert len(got) == 9 and all(torch.equal(a, b) for a, b in zip(got, want * 3, strict=True))


def test_layers_behind_a_checkpoint_wrapper_give_the_same_gradients():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    text, model = ids(3, 7), causal().train()
    model(input_ids=text, labels=text).loss.backward()
    want = {name: p.grad.clone() for name, p in model.ept.named_parameters()}
    model.zero_grad()
    kind = type(layers_of(model.base_model)[0])
    apply_activation_checkpointing(model.base_model, check_fn=lambda module: isinstance(module, kind))
    first, second = (model(input_ids=t, labels=t).loss for t in (text, text.flip(0)))
    second.backward()
    first.backward()
    for name, p in model.ept.named_parameters():
        torch.testing.assert_close(p.grad, 2 * want[name], rtol=1e-3, atol=1e-6)


def test_a_classifier_without_a_padding_token_and_an_offloaded_backbone_are_measured(tmp_path):
    auto = hf.AutoModelForSequenceClassification
    want = causal().ept.deep_scale
    base = backbone("llama", auto, num_hidden_layers=4, pad_token_id=None)
    assert (wrapped(base, all_parts(**DEEP)).ept.deep_scale < 0.1).all()  # not the ones of what is not measured
    base = accelerate.dispatch_model(
        backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=4),
        {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "cpu", "model.layers.2": "disk", "model.layers.3": "disk"},
        main_device="cpu", offload_dir=str(tmp_path), force_hooks=True,
    )  # fmt: skip
    torch.testing.assert_close(get_ept_model(base, all_parts(**DEEP)).ept.deep_scale, want)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: wrapped(backbone("electra", num_hidden_layers=1), all_parts(**DEEP)),
            "Electra.*no layers after the first.*=0",
        ),
        (
            lambda: wrapped(backbone("llama", hf.AutoModelForCausalLM), all_parts(deep_layers=2)),
            "has 1 layers after the first",
        ),
        (lambda: EPTConfig(deep_layers=-2), "deep_layers=-2"),
        (lambda: EPTConfig(deep_layers=1.5), "whole number"),
        (lambda: EPTConfig.paper(deep_layers=-1), "token_rank >= 1"),
        (lambda: EPTConfig(token_update=False, deep_layers=2), "token_rank >= 1"),
        (lambda: causal().prompt_embeds(ids(1, 4)), r"deep_layers=0, EPTConfig.input_only\(\)"),
    ],
)
def test_what_cannot_be_right_is_refused(make, said):
    with pytest.raises((ValueError, TypeError), match=said):
        make()


def albert(**settings):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=120,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
    )
    return hf.AlbertForSequenceClassification(hf.AlbertConfig(**sizes | settings)).eval()


def rembert():
    torch.manual_seed(0)
    return hf.RemBertModel(hf.RemBertConfig(
        vocab_size=120, hidden_size=32, input_embedding_size=16, output_embedding_size=24, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
    )).eval()  # fmt: skip


def xlm():
    torch.manual_seed(0)
    config = hf.XLMConfig(vocab_size=120, emb_dim=32, n_layers=3, n_heads=4, max_position_embeddings=64, pad_index=0)
    return hf.XLMModel(config).eval()


def xlnet(auto=hf.XLNetModel):
    torch.manual_seed(0)
    config = hf.XLNetConfig(vocab_size=120, d_model=32, n_layer=3, n_head=4, d_inner=64, pad_token_id=0)
    return auto(config).eval()


OTHER_HOUSES = {  # the backbone, what each site reads, and the width there
    "ELECTRA, narrow embeddings": (lambda: backbone("electra", num_hidden_layers=3), 2, 32),
    "RemBERT, narrow embeddings": (rembert, 2, 32),
    "OPT-350m, narrow embeddings": (lambda: backbone("opt", num_hidden_layers=3), 2, 32),
    "ALBERT, shared weights": (albert, 3, 32),
    "ALBERT, two groups of two": (lambda: albert(num_hidden_groups=2, inner_group_num=2), 3, 32),
    "XLM, parts side by side": (xlm, 2, 32),
    "XLNet, columns first": (xlnet, 2, 32),
    "T5's encoder alone": (lambda: backbone("t5", hf.AutoModelForSeq2SeqLM, num_layers=3).get_encoder(), 2, 32),
}  # fmt: skip


@torch.no_grad()
def with_updates_by_hand(model, text, sequence, at):
    """The first output for one row, where the calls of modules after the first have updates: `sequence` is their order."""
    flat, calls = copy.deepcopy(model), []
    flat.ept.deep_up.zero_()

    def updated(hidden):
        site = len(calls) - (2 if at == "input" else 1)
        if not 0 <= site < len(model.ept.deep_up):
            return hidden
        h, down, up = (getattr(model.ept, name)[site] for name in ("deep_scale", "deep_down", "deep_up"))
        return hidden + h * torch.nn.functional.silu(hidden / h @ down.T) @ up

    def before(module, args):
        calls.append(module)
        return (updated(args[0]), *args[1:])

    def after(module, args, output):
        calls.append(module)
        return updated(output)

    modules = sequence(flat.base_model)
    for module in dict.fromkeys(modules):
        if at == "input":
            module.register_forward_pre_hook(before)
        else:
            module.register_forward_hook(after)
    result = next(iter(flat(input_ids=text).values()))
    assert calls == modules
    return result


SEQUENCES = {  # the modules that are called in one pass, one after the other
    "ALBERT, shared weights": lambda base: [base.albert.encoder.albert_layer_groups[0]] * 4,
    "ALBERT, two groups of two": lambda base: [base.albert.encoder.albert_layer_groups[i] for i in (0, 0, 1, 1)],
    "XLM, parts side by side": lambda base: list(base.layer_norm2),
}


@pytest.mark.parametrize("house", OTHER_HOUSES)
def test_layers_of_any_width_and_order_have_an_update_for_each_call(house):
    make, sites, width = OTHER_HOUSES[house]
    model, text = wrapped(make(), all_parts(**DEEP)), ids(1, 7)
    assert model.ept.deep_up.shape == (sites, 6, width) and model.ept_config.deep_layers == sites
    assert model.trainable_parameters()["deep"] == 2 * sites * 6 * width
    assert sum(model.trainable_parameters().values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    sequence = SEQUENCES.get(house, lambda base: layers_of(base))
    want = with_updates_by_hand(model, text, sequence, "output" if "XLM" in house else "input")
    with torch.no_grad():
        got = next(iter(model(input_ids=text).values()))
        model.ept.deep_up.zero_()
        without = next(iter(model(input_ids=text).values()))
    torch.testing.assert_close(
        got, want[:, want.shape[1] - got.shape[1] :] if got.dim() == 3 else want, rtol=1e-4, atol=1e-5
    )
    assert (got - without).abs().max() > 1e-4


@pytest.mark.parametrize("house", OTHER_HOUSES)
def test_layers_of_any_width_and_order_do_not_depend_on_padding_or_company(house, tmp_path):
    make = OTHER_HOUSES[house][0]
    model = wrapped(make(), all_parts(**DEEP))
    model.add_adapter("b", all_parts(prompt_length=3, deep_layers=1))
    shake(type("Holder", (), {"ept": model.inactive_adapters[0].layer}), seed=7)
    rows, names = [ids(1, n, seed=n) for n in (4, 9)], ["b", "default"]
    with torch.no_grad():
        alone = [
            next(iter(model(input_ids=row, adapter_ids=[name]).values()))[0]
            for row, name in zip(rows, names, strict=True)
        ]
        for side in ("left", "right"):
            text, mask = padded(rows, side)
            got = next(iter(model(input_ids=text, attention_mask=mask, adapter_ids=names).values()))
            for i, want in enumerate(alone):
                mine = got[i][mask[i] != 0] if got.dim() == 3 else got[i]
                torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
        want = next(iter(model(input_ids=rows[1]).values()))
        model.save_pretrained(tmp_path)
        again = EPTModel.from_pretrained(make(), tmp_path).eval()
        assert torch.equal(next(iter(again(input_ids=rows[1]).values())), want)
        folded = next(iter(again.fold()(input_ids=rows[1]).values()))
        torch.testing.assert_close(folded, want, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_again_has_the_update_of_that_call_in_the_backward_pass_too():
    model, text = wrapped(albert(), all_parts(**DEEP)).train(), ids(3, 7)
    labels = torch.tensor([0, 1, 0])
    model(input_ids=text, labels=labels).loss.backward()
    assert model.ept.deep_up.grad.abs().amin(dim=2).min() > 0  # each call's own
    step, epsilon = torch.zeros_like(model.ept.deep_up), 1e-2
    step[1, 2] = model.ept.deep_up.grad[1, 2] / model.ept.deep_up.grad[1, 2].norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            model.ept.deep_up += sign * epsilon * step
            losses.append(model(input_ids=text, labels=labels).loss.double())
            model.ept.deep_up -= sign * epsilon * step
    slope = (losses[0] - losses[1]) / (2 * epsilon)
    torch.testing.assert_close(slope, model.ept.deep_up.grad[1, 2].norm().double(), rtol=0.05, atol=1e-6)


def test_a_budget_counts_the_width_of_the_layers():
    from ept.model.fresh import config_for_budget

    base = backbone("electra", num_hidden_layers=4)
    config = config_for_budget(base, 2_000, preset="deep")
    model = get_ept_model(base, config)
    assert config.deep_layers == 3 and config.token_rank == (2_000 - 2 * 16) // (2 * 16 + 3 * 2 * 32)
    assert sum(model.trainable_parameters().values()) == config.num_parameters(16, 32) <= 2_000


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: backbone("bert", num_hidden_layers=1), "no layers after the first"),
        (lambda: hf.SqueezeBertModel(hf.SqueezeBertConfig(
            vocab_size=120, embedding_size=32, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        )).eval(), "not called as modules"),
    ],
)  # fmt: skip
def test_why_a_backbone_cannot_have_them_is_said(make, said):
    base = make()
    assert said in why_no_updates(base) and why_no_updates(backbone("bert")) is None
    with pytest.raises(ValueError, match=f"{said}.*set deep_layers=0"):
        get_ept_model(base, EPTConfig.deep())
    get_ept_model(base, all_parts())


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_all_layers_take_three_operations_each_forward_and_six_backward_in_plain_torch(hidden_dtype):
    """Beside casts: 3n + 2 and 6n + 4 for n layers, since D/h and W·h are made once for all of them."""
    n = 4
    config = EPTConfig.deep(deep_layers=n, token_dropout=0.0, impl="torch", embed_scale=1.0)
    layer = EPTLayer(config, 32)
    layer.deep_scale.fill_(3.0)
    hidden = torch.randn(2, 5, 32).to(hidden_dtype).requires_grad_()
    with OperationCounter() as forward:
        updates, states = layer.layer_updates(), hidden
        for number in range(n):
            states = updates.apply(number, states)
    gradient = torch.ones_like(states)
    with OperationCounter() as backward:
        torch.autograd.grad(states, [hidden, layer.deep_down, layer.deep_up], gradient)
    counts = [counter.operations.total() - counter.operations["_to_copy"] for counter in (forward, backward)]
    assert counts[0] <= 3 * n + 2 and counts[1] <= 6 * n + 4, (forward.operations, backward.operations)
