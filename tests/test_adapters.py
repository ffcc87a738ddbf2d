"""Several adapters in one model: rows of a mixed batch, heads, files, what trains."""

import copy

import pytest
import torch
import transformers as hf

from ept import EPTModel, get_ept_model
from tiny_models import all_parts, backbone, ids, mean_pooling, padded, shake, wrapped

SEQ = hf.AutoModelForSequenceClassification
CLOSE = dict(rtol=1e-4, atol=1e-5)  # as in test_model
# Other prompt lengths and other parts than all_parts' own.
OTHERS = {
    "short": all_parts(prompt_length=2, token_rank=0),
    "plain/prompt.1": all_parts(prompt_length=9, rank=0, num_spaces=0, token_rank=0),
    "same": all_parts(max_text_length=3, rank=1, fusion=False),
}


@torch.no_grad()
def randomise(model, name, seed):
    model.set_adapter(name)
    shake(model, seed=seed)
    for head in model.trained_heads():
        for p in head.parameters():
            p.normal_(generator=torch.Generator().manual_seed(seed))


def with_others(base, labels=()):
    """A model with the adapters "default" and OTHERS, all with weights of their own; "default" is active."""
    model = wrapped(base)
    for i, (name, config) in enumerate(OTHERS.items()):
        model.add_adapter(name, config, **({"num_labels": labels[i]} if labels else {}))
        randomise(model, name, seed=10 + i)
    randomise(model, "default", seed=9)
    return model


NAMES = ["same", "default", "short", "plain/prompt.1", "same", "short"]
ROWS = [ids(1, n, seed=n) for n in (9, 4, 1, 6, 7, 3)]


def alone(model, name, *args, **kwargs):
    model.set_adapter(name)
    with torch.no_grad():
        out = model(*args, **kwargs)
    model.set_adapter("default")
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "roberta", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_of_a_mixed_batch_is_that_row_with_its_adapter_alone(name, side):
    causal = name in ("llama", "gpt2", "gemma3", "bloom")
    model = with_others(backbone(name, hf.AutoModelForCausalLM if causal else hf.AutoModelForMaskedLM))
    batch, mask = padded(ROWS, side)
    with torch.no_grad():
        logits = model(batch, mask, adapter_ids=NAMES).logits
        equal = torch.cat([ROWS[0]] * 4)  # rows of one length need no mask
        without_mask = model(equal, adapter_ids=NAMES[:4]).logits
    for i, (row, adapter) in enumerate(zip(ROWS, NAMES, strict=True)):
        torch.testing.assert_close(logits[i][mask[i] == 1], alone(model, adapter, row).logits[0], **CLOSE)
        if i < 4:
            torch.testing.assert_close(without_mask[i], alone(model, adapter, ROWS[0]).logits[0], **CLOSE)


def test_labels_of_a_mixed_batch_line_up():
    model = with_others(backbone("llama", hf.AutoModelForCausalLM))
    batch, mask = padded(ROWS, "right")
    labels = batch.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(batch, mask, labels=labels, adapter_ids=NAMES)
        want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)


HEADS = {
    "bert": lambda: backbone("bert", SEQ, num_labels=3),
    "roberta": lambda: backbone("roberta", SEQ, num_labels=3),
    "distilbert": lambda: backbone("distilbert", SEQ, num_labels=3),
    "mean": lambda: mean_pooling(num_labels=3),
    "llama": lambda: backbone("llama", SEQ, num_labels=3, pad_token_id=0),
    "gpt2": lambda: backbone("gpt2", SEQ, num_labels=3),
}


@pytest.mark.parametrize("name", HEADS)
def test_rows_go_through_their_own_adapters_head_of_its_own_label_count(name):
    model = with_others(HEADS[name](), labels=[5, 1, 3])
    count = {"default": 3, "short": 5, "plain/prompt.1": 1, "same": 3}
    batch, mask = padded(ROWS, "left")
    with torch.no_grad():
        logits = model(batch, mask, adapter_ids=NAMES).logits
    assert logits.shape == (6, 5)
    for i, (row, adapter) in enumerate(zip(ROWS, NAMES, strict=True)):
        want = alone(model, adapter, row).logits[0]
        assert want.shape == (count[adapter],)
        torch.testing.assert_close(logits[i, : count[adapter]], want, **CLOSE)
        assert (logits[i, count[adapter] :] == -torch.inf).all()
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch, mask, adapter_ids=["short"] * 6).logits, alone(model, "short", batch, mask).logits
        )
    model.set_adapter("short")
    assert model(ROWS[0], labels=torch.tensor([4])).loss.isfinite() and model.config.num_labels == 5
    with pytest.raises(ValueError, match="active adapter's head"):
        model(batch, mask, labels=torch.zeros(6, dtype=torch.int64), adapter_ids=NAMES)


def test_an_adapter_with_scores_stands_beside_one_with_classes():
    model, x = wrapped(backbone("bert", SEQ, num_labels=3)), ids(4, 6)
    classes, scores = torch.tensor([0, 1, 2, 1]), torch.tensor([0.5, 1.5, 2.5, 0.0])
    model(x, labels=classes)  # transformers notes in the config what kind of labels it saw
    model.add_adapter("scores", all_parts(), num_labels=1)
    model.set_adapter("scores")
    out = model(x, labels=scores)
    torch.testing.assert_close(out.loss, torch.nn.functional.mse_loss(out.logits[:, 0], scores))
    model.set_adapter("default")
    out = model(x, labels=classes)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, classes))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mixed_batch_generates_what_each_row_generates_alone(name):
    model = with_others(backbone(name, hf.AutoModelForCausalLM))
    model.base_model.generation_config.eos_token_id = None
    batch, mask = padded(ROWS, "left")
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    got = model.generate(batch, mask, adapter_ids=NAMES, **settings)
    beams = model.generate(batch, mask, adapter_ids=NAMES, num_beams=3, **settings)
    for use in (dict(use_cache=False), dict(cache_implementation="static")):
        assert torch.equal(model.generate(batch, mask, adapter_ids=NAMES, **settings, **use), got)
    for i, (row, adapter) in enumerate(zip(ROWS, NAMES, strict=True)):
        model.set_adapter(adapter)
        assert torch.equal(got[i, 9:], model.generate(row, **settings)[0, row.shape[1] :])
        assert torch.equal(beams[i, 9:], model.generate(row, num_beams=3, **settings)[0, row.shape[1] :])


def test_a_mixed_batch_continues_its_cache():
    model = with_others(backbone("llama", hf.AutoModelForCausalLM))
    batch, mask = padded([ids(1, 12, seed=1), ids(1, 9, seed=2)], "left")
    names = ["short", "default"]
    with torch.no_grad():
        whole = model(batch, mask, adapter_ids=names).logits
        first = model(batch[:, :8], mask[:, :8], adapter_ids=names, use_cache=True)
        rest = model(batch[:, 8:], mask, past_key_values=first.past_key_values, adapter_ids=names).logits
    torch.testing.assert_close(rest, whole[:, 8:], **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_mixed_batch_of_an_encoder_decoder_generates_what_each_row_generates_alone(name):
    model = with_others(backbone(name, hf.AutoModelForSeq2SeqLM))
    pad = model.config.pad_token_id
    batch, mask = padded(ROWS, "right", pad=pad)
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    got = model.generate(batch, mask, adapter_ids=NAMES, **settings)
    labels = ids(6, 4, seed=3)
    with torch.no_grad():
        out = model(batch, mask, labels=labels, adapter_ids=NAMES)
        again = model(
            encoder_outputs=(out.encoder_last_hidden_state,), attention_mask=mask, labels=labels, adapter_ids=NAMES
        )
    torch.testing.assert_close(again.logits, out.logits)
    for i, (row, adapter) in enumerate(zip(ROWS, NAMES, strict=True)):
        torch.testing.assert_close(
            out.logits[i], alone(model, adapter, row, labels=labels[i : i + 1]).logits[0], **CLOSE
        )
        model.set_adapter(adapter)
        assert torch.equal(got[i], model.generate(row, **settings)[0])


def test_packed_rows_may_have_adapters_of_their_own():
    model = with_others(backbone("llama", hf.AutoModelForCausalLM))
    rows = [ids(1, 5, seed=1), ids(1, 4, seed=2)], [ids(1, 7, seed=3), ids(1, 2, seed=4)]
    batch = torch.cat([torch.cat(row, 1) for row in rows])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    with torch.no_grad():
        logits = model(batch, position_ids=positions, adapter_ids=["short", "default"]).logits
    for i, adapter in enumerate(["short", "default"]):
        want = torch.cat([alone(model, adapter, e).logits[0] for e in rows[i]])
        torch.testing.assert_close(logits[i], want, **CLOSE)


def test_the_active_adapter_alone_trains():
    model = with_others(backbone("bert", SEQ, num_labels=3), labels=[5, 1, 3])
    model.set_adapter("short")
    before = {name: copy.deepcopy(model.adapter_tensors(name)) for name in model.list_adapters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids(2, 6), labels=torch.tensor([4, 0])).loss.backward()
    optimizer.step()
    for name, tensors in before.items():
        same = all(torch.equal(t, model.adapter_tensors(name)[key]) for key, t in tensors.items())
        assert same == (name != "short"), name
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(model.trainable_parameters().values()) == trained


def test_what_was_frozen_stays_frozen_while_other_adapters_are_active():
    model = wrapped(backbone("bert", SEQ, num_labels=3))
    model.ept.prompt.requires_grad_(False)
    model.trained_heads()[0].requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.add_adapter("b", all_parts())
    model.set_adapter("b")
    assert all(p.requires_grad for module in (model.ept, *model.trained_heads()) for p in module.parameters())
    assert not any(p.requires_grad for p in model.inactive_adapters.parameters())
    model.set_adapter("default")
    inactive = {name for name, _ in model.named_parameters() if name.startswith("inactive_adapters.")}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen | inactive


def test_adapters_are_saved_and_loaded_by_name(tmp_path):
    model = with_others(backbone("bert", SEQ, num_labels=3), labels=[5, 1, 3])
    model.set_adapter("short")
    model.config.id2label = dict(enumerate("abcde"))
    model.set_adapter("default")
    for name in ("short", "plain/prompt.1"):
        model.save_pretrained(tmp_path / str(len(name)), adapter_name=name)
    model.save_pretrained(tmp_path / "active")
    fresh = EPTModel.from_pretrained(backbone("bert", SEQ, num_labels=3), tmp_path / "active", "first").eval()
    fresh.load_adapter(tmp_path / "5", "b")
    fresh.load_adapter(tmp_path / "14", "c")
    assert fresh.list_adapters() == ["first", "b", "c"] and fresh.active_adapter == "first"
    batch = ids(3, 6)
    with torch.no_grad():
        got = fresh(batch, adapter_ids=["first", "b", "c"]).logits
        assert torch.equal(got, model(batch, adapter_ids=["default", "short", "plain/prompt.1"]).logits)
    fresh.set_adapter("b")
    assert fresh.config.id2label == dict(enumerate("abcde")) and fresh.config.num_labels == 5
    EPTModel.from_pretrained(backbone("bert", SEQ, num_labels=5), tmp_path / "5")


@pytest.mark.parametrize("labels", [(), (5, 1, 3)])
def test_a_state_dict_is_loaded_by_the_adapters_names_whichever_is_active(labels):
    def make(active):
        model = with_others(backbone("bert", SEQ, num_labels=3) if labels else backbone("bert"), labels)
        model.set_adapter(active)
        return model

    model = make("plain/prompt.1")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}  # as a safetensors file gives it
    assert "inactive_adapters.adapter_short.layer.prompt" in state
    for active in ("plain/prompt.1", "default", "same"):
        other = make(active)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(state, strict=True)
        for name in model.list_adapters():
            for key, tensor in model.adapter_tensors(name).items():
                assert torch.equal(other.adapter_tensors(name)[key], tensor), (active, name, key)
    with pytest.raises(RuntimeError, match="adapter_short"):
        other.delete_adapter("short")
        other.load_state_dict(state)


def test_a_state_dict_that_numbers_the_adapters_loads_in_their_order():
    model = with_others(backbone("bert"))
    state, numbers = {}, {f"adapter_{name}".replace(".", "%2E"): str(i) for i, name in enumerate(OTHERS)}
    for key, tensor in model.state_dict().items():
        for name, number in numbers.items():
            key = key.replace(f"inactive_adapters.{name}.", f"inactive_adapters.{number}.")
        state[key] = tensor.clone()
    assert "inactive_adapters.1.layer.prompt" in state
    want = {name: copy.deepcopy(model.adapter_tensors(name)) for name in model.list_adapters()}
    for i, name in enumerate(model.list_adapters()):
        randomise(model, name, seed=30 + i)
    fresh = with_others(backbone("bert"))
    fresh.load_state_dict(state, strict=True)
    for name, tensors in want.items():
        assert all(torch.equal(fresh.adapter_tensors(name)[key], tensor) for key, tensor in tensors.items()), name


def test_adapters_are_removed_and_wrong_names_are_refused():
    model = with_others(backbone("bert"))
    model.delete_adapter("short")
    assert model.list_adapters() == ["default", "plain/prompt.1", "same"]
    for call, words in [
        (lambda: model.delete_adapter("default"), "is the active adapter"),
        (lambda: model.delete_adapter("short"), "no adapter 'short'"),
        (lambda: model.set_adapter("short"), "no adapter 'short'"),
        (lambda: model.add_adapter("same"), "already"),
        (lambda: model(ids(2, 3), adapter_ids=["same"]), "one adapter per row, 2 in all"),
        (lambda: model(ids(2, 3), adapter_ids="same"), "one adapter per row"),
        (lambda: model(ids(2, 3), adapter_ids=["same", "short"]), "no adapter 'short'"),
        (lambda: model.add_adapter("x", num_labels=3), "has no head"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="must be a string"):
        model.add_adapter("")


def test_folded_adapters_mix_with_others():
    model = with_others(backbone("llama", hf.AutoModelForCausalLM))
    batch, names = ids(3, 6), ["default", "short", "same"]
    with torch.no_grad():
        want = model(batch, adapter_ids=names).logits
        got = model.fold()(batch, adapter_ids=names).logits
    torch.testing.assert_close(got, want, **CLOSE)
    model.set_adapter("short")
    assert all(p.requires_grad for p in model.ept.parameters())


def test_a_copy_with_several_adapters_is_a_model_of_its_own():
    model = with_others(backbone("bert"))
    other = copy.deepcopy(model)
    randomise(other, "short", seed=77)
    batch = ids(1, 5)
    assert not torch.equal(alone(model, "short", batch).last_hidden_state, other(batch).last_hidden_state)


def test_the_first_adapters_name_is_the_users():
    assert get_ept_model(backbone("bert"), all_parts(), adapter_name="a.b").list_adapters() == ["a.b"]
