"""EPTModel on every kind of transformers model: padding, labels, positions, files, refusals."""

import copy
import dataclasses
import inspect
import json
import pickle
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ept import EPTConfig, EPTModel, get_ept_model
from tiny_models import (
    CAUSAL,
    ENCODERS,
    POSITIONS,
    VOCAB,
    WIDTH,
    all_parts,
    backbone,
    ids,
    mean_pooling,
    padded,
    shake,
    wrapped,
)

SEQ = hf.AutoModelForSequenceClassification
# Rounding of fp32 through two small layers; a wrong position or a seen pad moves the logits by 1e-2 and more.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def classifiers():
    for name in ENCODERS:
        yield f"{name} first token", lambda name=name: backbone(name, SEQ, num_labels=3)
    yield "bert mean", mean_pooling
    for name in (*CAUSAL, "bloom", "mpt"):
        yield f"{name} last token", lambda name=name: backbone(name, SEQ, num_labels=3, pad_token_id=0)


CLASSIFIERS = dict(classifiers())


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classified_row_gives_the_same_logits_however_it_is_padded(kind, side):
    model = wrapped(CLASSIFIERS[kind]())
    rows = [ids(1, 11, seed=1), ids(1, 4, seed=2), ids(1, 1, seed=3)]
    batch, mask = padded(rows, side)
    with torch.no_grad():
        logits = model(batch, mask).logits
        for row, got in zip(rows, logits, strict=True):
            torch.testing.assert_close(got, model(row).logits[0], **CLOSE)
            torch.testing.assert_close(got, model(row, torch.ones_like(row)).logits[0], **CLOSE)


@pytest.mark.parametrize("name", [*ENCODERS, *CAUSAL])
@pytest.mark.parametrize("side", ["left", "right"])
def test_last_hidden_states_come_in_the_callers_columns_however_rows_are_padded(name, side):
    model = wrapped(backbone(name))
    rows = [ids(1, 11, seed=1), ids(1, 4, seed=2)]
    batch, mask = padded(rows, side)
    with torch.no_grad():
        hidden = model(batch, mask).last_hidden_state
        assert hidden.shape[:2] == batch.shape
        for i, row in enumerate(rows):
            torch.testing.assert_close(hidden[i][mask[i] == 1], model(row).last_hidden_state[0], **CLOSE)


@pytest.mark.parametrize("name", [*CAUSAL, "bloom", "mpt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_logits_line_up_and_the_loss_is_the_hand_computed_one(name, side):
    model = wrapped(backbone(name, hf.AutoModelForCausalLM))
    rows = [ids(1, 11, seed=1), ids(1, 4, seed=2)]
    batch, mask = padded(rows, side)
    labels = batch.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(batch, mask, labels=labels)
        assert out.logits.shape == (2, 11, VOCAB)
        for i, row in enumerate(rows):
            torch.testing.assert_close(out.logits[i][mask[i] == 1], model(row).logits[0], **CLOSE)
    by_hand = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
    assert torch.equal(labels, batch.masked_fill(mask == 0, -100))


def test_outputs_of_the_bare_encoder_are_not_taken_for_those_of_the_adapter():
    model, text, written = wrapped(backbone("t5", hf.AutoModelForSeq2SeqLM)), ids(2, 7), ids(2, 3)
    mask = torch.ones_like(text)
    with pytest.raises(AttributeError, match="get_encoder"):
        model.get_encoder()
    bare = model.base_model.get_encoder()(input_ids=text, attention_mask=mask)
    for call in (
        lambda: model(encoder_outputs=bare, attention_mask=mask, decoder_input_ids=written),
        lambda: model.generate(encoder_outputs=bare, attention_mask=mask, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="encoder_outputs have 7 columns, where a call of this model gives 12"):
            call()


@pytest.mark.parametrize("auto", [hf.AutoModel, hf.AutoModelForSeq2SeqLM])
def test_a_decoder_without_input_is_told_what_it_needs(auto):
    with pytest.raises(ValueError, match="needs decoder_input_ids, decoder_inputs_embeds or labels"):
        wrapped(backbone("bart", auto))(input_ids=ids(2, 7))


def test_parameters_are_counted_with_the_adapters():
    model = wrapped(backbone("llama", hf.AutoModelForCausalLM))
    assert model.num_parameters(only_trainable=True) == sum(model.trainable_parameters().values())
    all_of_them = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == all_of_them
    assert model.num_parameters(exclude_embeddings=True) == all_of_them - VOCAB * WIDTH


def test_a_second_model_around_a_backbone_with_a_head_is_warned_of(caplog):
    base = backbone("bert", SEQ)
    first = wrapped(base)
    assert not caplog.records
    second = wrapped(base)
    assert "both share its head and labels" in caplog.text
    caplog.clear()
    del first, second
    wrapped(base)
    wrapped(backbone("llama", hf.AutoModelForCausalLM))
    assert not caplog.records


def test_a_big_bird_keeps_its_attention():
    config = hf.BigBirdConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=512, block_size=4, num_random_blocks=1, attention_type="block_sparse", initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    base = hf.BigBirdForSequenceClassification(config).eval()
    with torch.no_grad():
        before = base(input_ids=ids(1, 160)).logits
        model = get_ept_model(base, EPTConfig()).eval()
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids(1, 160)).logits, before)
    assert not any(module.training for module in base.modules())


@pytest.mark.parametrize("keep", [1, 3, 11])
def test_logits_to_keep_counts_columns_of_the_text(keep):
    model = wrapped(backbone("llama", hf.AutoModelForCausalLM))
    with torch.no_grad():
        whole = model(ids(2, 11)).logits
        torch.testing.assert_close(model(ids(2, 11), logits_to_keep=keep).logits, whole[:, -keep:])
        for columns in ([0, 4], [-1], [3, -2], [True] * 3 + [False] * 8):
            columns = torch.tensor(columns)
            torch.testing.assert_close(model(ids(2, 11), logits_to_keep=columns).logits, whole[:, columns])


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_decoder_gives_the_same_loss_and_logits_however_its_text_is_padded(name, side):
    model = wrapped(backbone(name, hf.AutoModelForSeq2SeqLM))
    rows, labels = [ids(1, 11, seed=1), ids(1, 4, seed=2)], ids(2, 6, seed=3)
    batch, mask = padded(rows, side, pad=model.config.pad_token_id)
    with torch.no_grad():
        out = model(batch, mask, labels=labels)
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
        for i, row in enumerate(rows):
            torch.testing.assert_close(out.logits[i], model(row, labels=labels[i : i + 1]).logits[0], **CLOSE)
        again = model(encoder_outputs=(out.encoder_last_hidden_state,), attention_mask=mask, labels=labels)
        torch.testing.assert_close(again.logits, out.logits)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_token_labels_line_up_with_token_logits(name):
    for auto in (hf.AutoModelForTokenClassification, hf.AutoModelForMaskedLM):
        model = wrapped(backbone(name, auto, num_labels=4))
        batch, mask = padded([ids(1, 9, seed=1), ids(1, 5, seed=2)], "left")
        labels = torch.where(mask == 1, torch.randint(4, batch.shape), -100)
        out = model(batch, mask, labels=labels)
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


def test_classification_and_regression_losses_are_the_hand_computed_ones():
    batch, mask = padded([ids(1, 9, seed=1), ids(1, 5, seed=2)], "right")
    for make in (lambda n: backbone("bert", SEQ, num_labels=n), lambda n: mean_pooling(num_labels=n)):
        out = (model := wrapped(make(3)))(batch, mask, labels=torch.tensor([2, 0]))
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, torch.tensor([2, 0])))
        assert model.config.num_labels == 3
        out = wrapped(make(1))(batch, mask, labels=torch.tensor([0.5, -1.0]))
        torch.testing.assert_close(out.loss, F.mse_loss(out.logits[:, 0], torch.tensor([0.5, -1.0])))


def test_as_many_labels_as_columns_are_not_mistaken_for_token_labels():
    model = wrapped(backbone("bert", SEQ, num_labels=9))
    assert model(ids(2, 4)).logits.shape == (2, 9)  # 4 columns and 5 prompt rows
    out = model(ids(2, 9), labels=torch.rand(2, 9))
    assert out.logits.shape == (2, 9) and out.loss.isfinite()


def test_the_mean_covers_the_text_alone():
    base = mean_pooling()
    model = wrapped(base)
    row = ids(1, 6)
    with torch.no_grad():
        out = model(row, output_hidden_states=True)
        text = out.hidden_states[-1][:, 5:].mean(1)
        torch.testing.assert_close(out.logits, base.classifier(text))
        padded_row, mask = padded([row, ids(1, 9)], "right")
        torch.testing.assert_close(base(padded_row, mask).logits[:1], base(row).logits, **CLOSE)


def test_an_encoder_with_a_first_token_head_keeps_its_first_token_first():
    assert wrapped(backbone("bert", SEQ)).ept.prompt_start == 1
    assert wrapped(mean_pooling()).ept.prompt_start == 0
    assert wrapped(backbone("llama", SEQ, pad_token_id=0)).ept.prompt_start == 0
    assert wrapped(backbone("bert", SEQ), all_parts(prompt_start=0)).ept.prompt_start == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_explicit_positions_are_honoured(name):
    model = wrapped(backbone(name))
    row = ids(1, 6)
    with torch.no_grad():
        plain = model(row).last_hidden_state
        torch.testing.assert_close(model(row, position_ids=torch.arange(6)[None]).last_hidden_state, plain)
        other = model(row, position_ids=torch.tensor([[0, 1, 2, 10, 11, 12]])).last_hidden_state
        assert (other - plain).abs().max() > 1e-3
        batch, mask = padded([row, ids(1, 9)], "left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        torch.testing.assert_close(
            model(batch, mask, position_ids=positions).last_hidden_state[0, 3:], plain[0], **CLOSE
        )


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_batch_without_rows_is_refused(name):
    auto = {"bert": hf.AutoModel, "llama": hf.AutoModelForCausalLM, "t5": hf.AutoModelForSeq2SeqLM}[name]
    model = wrapped(backbone(name, auto))
    for given in ({"input_ids": ids(0, 5)}, {"inputs_embeds": torch.zeros(0, 5, WIDTH)}):
        with pytest.raises(ValueError, match="the batch has no rows"):
            model(**given)
    if name != "bert":
        with pytest.raises(ValueError, match="the batch has no rows"):
            model.generate(ids(0, 5))


def test_positions_that_cannot_be_honoured_are_refused():
    with pytest.raises(ValueError, match="takes no position_ids"):
        wrapped(backbone("t5", hf.AutoModelForSeq2SeqLM))(
            ids(1, 6), position_ids=torch.arange(6)[None], labels=ids(1, 2)
        )
    batch, mask = padded([ids(1, 6), ids(1, 3)], "left")
    with pytest.raises(ValueError, match="pad on the right"):
        without = wrapped(backbone("gpt2", hf.AutoModelForCausalLM))
        accepts = without.traits.accepts - {"position_ids"}  # as a model with learned positions that takes none
        without.traits = dataclasses.replace(without.traits, accepts=accepts)
        without(batch, mask)
    with pytest.raises(ValueError, match="positions 0 … 63"):
        wrapped(backbone("gpt2"))(ids(1, 3), position_ids=torch.tensor([[0, 1, 60]]))


_WINDOWED = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=64, max_position_embeddings=POSITIONS, sliding_window=8, pad_token_id=0,
)  # fmt: skip
WINDOWED = {
    "mistral": lambda: hf.MistralConfig(**_WINDOWED),
    "gemma3": lambda: hf.Gemma3TextConfig(**_WINDOWED),
}


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_push_the_prompt_out_of_an_attention_window(name, side):
    rows = [ids(1, 20, seed=1), ids(1, 4, seed=2), ids(1, 1, seed=3)]
    batch, mask = padded(rows, side)
    for auto in (hf.AutoModelForCausalLM, SEQ):
        torch.manual_seed(0)
        model = wrapped(auto.from_config(WINDOWED[name]()).eval())
        with torch.no_grad():
            together = model(batch, mask).logits
            for i, row in enumerate(rows):
                want, got = model(row).logits[0], together[i]
                torch.testing.assert_close(got if auto is SEQ else got[mask[i] == 1], want, **CLOSE)


def test_a_causal_token_classifier_keeps_the_label_of_its_first_token():
    model = wrapped(backbone("llama", hf.AutoModelForTokenClassification, num_labels=4))
    row, labels = ids(2, 6), torch.randint(4, (2, 6), generator=torch.Generator().manual_seed(0))
    out = model(row, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bert", dict(attention_mask=torch.ones(2, 4, dtype=torch.int64)), "attention_mask is"),
        ("bert", dict(attention_mask=torch.ones(1, 6, dtype=torch.int64)), "attention_mask is"),
        ("llama", dict(attention_mask=torch.ones(2, 4, dtype=torch.int64)), "attention_mask is"),
        ("bert", dict(token_type_ids=torch.zeros(2, 5, dtype=torch.int64)), "token_type_ids is"),
        ("bert", dict(position_ids=torch.zeros(2, 5, dtype=torch.int64)), "position_ids is"),
        ("bert", dict(position_ids=torch.zeros(2, 6)), "position_ids must hold integers"),
        ("bert", dict(labels=torch.zeros(2, 7, dtype=torch.int64)), "labels is"),
    ],
)
def test_inputs_of_another_length_are_refused_instead_of_cut(name, changes, words):
    auto = hf.AutoModelForTokenClassification if "labels" in changes else hf.AutoModel
    with pytest.raises((ValueError, TypeError), match=words):
        wrapped(backbone(name, auto))(ids(2, 6), **changes)


def test_without_a_mask_a_pooled_causal_model_finds_the_last_token_by_the_paddings_id():
    model = wrapped(backbone("gpt2", SEQ, num_labels=3))
    batch, mask = padded([ids(1, 9, seed=1), ids(1, 4, seed=2)], "right")
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits, model(batch, mask).logits, **CLOSE)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 6, 6), {"full_attention": None}, torch.ones(6)])
def test_masks_of_other_forms_are_refused(mask):
    with pytest.raises(ValueError, match="attention_mask must be"):
        wrapped(backbone("llama"))(ids(1, 6), mask)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_text_longer_than_the_positions_left_is_refused_before_the_backbone_fails(name):
    model = wrapped(backbone(name))
    room = POSITIONS - 5 - (2 if name == "roberta" else 0)
    model(ids(1, room))
    with pytest.raises(ValueError, match=f"truncate the text to {room} tokens"):
        model(ids(1, room + 1))


def test_inputs_embeds_equal_input_ids():
    model = wrapped(backbone("gemma"))
    row = ids(2, 6)
    embeds = model.get_input_embeddings()(row)
    torch.testing.assert_close(model(inputs_embeds=embeds).last_hidden_state, model(row).last_hidden_state)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(row, inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["gemma", "gemma3", "bart"])
def test_scaled_embeddings_are_measured_and_used_as_the_backbone_sees_them(name):
    auto = hf.AutoModelForSeq2SeqLM if name == "bart" else hf.AutoModelForCausalLM
    model = wrapped(backbone(name, auto))
    embedding = model.get_input_embeddings()
    seen = embedding(torch.arange(VOCAB))
    assert model.ept_config.embed_scale == pytest.approx(seen.square().mean().sqrt().item(), rel=1e-5)
    if type(embedding) is not torch.nn.Embedding:  # older transformers scale Gemma's in the model itself
        assert model.ept_config.embed_scale > 3 * embedding.weight.square().mean().sqrt()


def test_a_resized_vocabulary_is_used_at_once():
    base = backbone("llama", hf.AutoModelForCausalLM)
    model = wrapped(base)
    base.resize_token_embeddings(VOCAB + 8)
    assert model(torch.tensor([[VOCAB + 7]])).logits.shape[-1] == VOCAB + 8


def test_the_backbone_is_frozen_and_comes_through_training_bit_identical():
    for make in (mean_pooling, lambda: backbone("bert", SEQ), lambda: backbone("llama", hf.AutoModelForCausalLM)):
        base = make()
        before = {n: p.clone() for n, p in base.named_parameters()}
        model = get_ept_model(base, all_parts())
        head = {f"{h}.{n}" for h in model.head_names for n, _ in base.get_submodule(h).named_parameters()}
        assert {n for n, p in base.named_parameters() if p.requires_grad} == head
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train()
        row = ids(2, 6)
        labels = row if model.traits.kind.name == "causal" else torch.tensor([0, 1])
        for _ in range(2):
            model(row, labels=labels).loss.backward()
            optimizer.step()
        for name, p in base.named_parameters():
            assert torch.equal(p, before[name]) != (name in head), name


def test_the_frozen_backbones_dropout_is_off_unless_asked_for():
    base = backbone("bert", SEQ, hidden_dropout_prob=0.5)
    model = get_ept_model(base, all_parts()).train()
    model.base_model.dropout.p = 0.0  # the head's own dropout is not the backbone's
    assert torch.equal(model(ids(2, 6)).logits, model(ids(2, 6)).logits)
    on = get_ept_model(backbone("bert", SEQ, hidden_dropout_prob=0.5), all_parts(backbone_dropout=True)).train()
    assert not torch.equal(on(ids(2, 6)).logits, on(ids(2, 6)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_tensors_are_fp32_over_a_half_precision_backbone(dtype):
    for base in (mean_pooling().to(dtype), backbone("bert", SEQ).to(dtype), backbone("roberta", SEQ).to(dtype)):
        model = wrapped(base)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        out = model(*padded([ids(1, 6), ids(1, 3)], "left"), labels=torch.tensor([0, 1]))
        assert out.logits.dtype == torch.float32
        out.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_deep_copy_is_a_model_of_its_own():
    model = wrapped(backbone("bert"))
    other = copy.deepcopy(model)
    shake(other)
    assert not torch.equal(other(ids(1, 4)).last_hidden_state, model(ids(1, 4)).last_hidden_state)


def test_a_model_made_by_another_models_class_is_of_that_class_and_is_pickled():
    model = wrapped(backbone("bert"))
    other = type(model)(backbone("bert"), all_parts())
    assert type(other) is type(model)
    assert type(pickle.loads(pickle.dumps(other))) is type(model)


def test_disable_adapter_is_the_wrapped_model():
    base = backbone("llama", hf.AutoModelForCausalLM)
    row = ids(1, 6)
    want = base(row).logits
    model = wrapped(base)
    with model.disable_adapter():
        assert torch.equal(model(row).logits, want)
    assert not torch.equal(model(row).logits, want)


def test_print_trainable_parameters_counts_what_trains(capsys):
    model = wrapped(mean_pooling())
    model.print_trainable_parameters()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {trained:,} ||" in capsys.readouterr().out
    assert sum(model.trainable_parameters().values()) == trained


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_models_that_take_no_positions_generate_the_teacher_forced_argmax_too(name):
    model = wrapped(backbone(name, hf.AutoModelForCausalLM), all_parts(max_text_length=9))
    model.base_model.generation_config.eos_token_id = None
    row, other = ids(1, 6, seed=1), ids(1, 3, seed=2)
    want = model.generate(row, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(want).logits.argmax(-1)[:, 5:-1], want[:, 6:])
    assert torch.equal(model.generate(row, max_new_tokens=8, do_sample=False, use_cache=False), want)
    batch, mask = padded([other, row], "left")
    assert torch.equal(model.generate(batch, mask, max_new_tokens=8, do_sample=False)[1], want[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation_is_the_teacher_forced_argmax_with_and_without_cache(name):
    model = wrapped(backbone(name, hf.AutoModelForCausalLM), all_parts(max_text_length=9))
    model.base_model.generation_config.eos_token_id = None
    row, other = ids(1, 6, seed=1), ids(1, 3, seed=2)
    settings = dict(max_new_tokens=8, do_sample=False)
    want = model.generate(row, **settings)
    with torch.no_grad():
        assert torch.equal(model(want).logits.argmax(-1)[:, 5:-1], want[:, 6:])
    for extra in (
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(attention_mask=torch.ones_like(row)),
    ):
        assert torch.equal(model.generate(row, **settings, **extra), want)
    batch, mask = padded([other, row], "left")
    together = model.generate(batch, mask, **settings)
    assert torch.equal(together[1], want[0])
    assert torch.equal(together[0, 6:], model.generate(other, **settings)[0, 3:])
    assert model.generate(row, max_length=10, do_sample=False).shape == (1, 10)
    assert model.generate(row, num_beams=3, **settings).shape == (1, 14)
    batch, mask = padded([other, row], "right")
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(batch, mask, **settings)


def test_a_cache_filled_by_forward_continues_the_text():
    model = wrapped(backbone("llama", hf.AutoModelForCausalLM), all_parts(max_text_length=9))
    batch, mask = padded([ids(1, 12, seed=1), ids(1, 7, seed=2)], "left")
    with torch.no_grad():
        whole = model(batch, mask).logits
        first = model(batch[:, :8], mask[:, :8], use_cache=True)
        rest = model(batch[:, 8:], mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 8:], **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_generates_the_same_for_a_row_alone_and_padded(name):
    model = wrapped(backbone(name, hf.AutoModelForSeq2SeqLM))
    rows = [ids(1, 9, seed=1), ids(1, 4, seed=2)]
    batch, mask = padded(rows, "left", pad=model.config.pad_token_id)
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    together = model.generate(batch, mask, **settings)
    for i, row in enumerate(rows):
        assert torch.equal(together[i], model.generate(row, **settings)[0])


# ---------------------------------------------------------------- other houses


def t5_encoder():
    return backbone("t5", hf.AutoModelForSeq2SeqLM).get_encoder()


def bart_encoder():
    return backbone("bart").get_encoder()


def xlnet(auto):
    torch.manual_seed(0)
    config = hf.XLNetConfig(
        vocab_size=VOCAB, d_model=WIDTH, n_layer=2, n_head=4, d_inner=64, pad_token_id=0, num_labels=3
    )
    return auto.from_config(config).eval()


OTHER_HOUSES = {
    "T5's encoder alone": t5_encoder,
    "T5EncoderModel": lambda: hf.T5EncoderModel(backbone("t5").config).eval(),
    "BART's encoder alone": bart_encoder,
    "XLNet": lambda: xlnet(hf.AutoModel),
    "XLNet that classifies": lambda: xlnet(SEQ),
    "CodeGen, without a padding id in its config": lambda: hf.CodeGenForCausalLM(
        hf.CodeGenConfig(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=POSITIONS, rotary_dim=4)
    ).eval(),
}


@pytest.mark.parametrize("house", OTHER_HOUSES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_gives_the_same_results_in_every_house_however_it_is_padded(house, side):
    model = wrapped(OTHER_HOUSES[house]())
    rows = [ids(1, 11, seed=1), ids(1, 4, seed=2), ids(1, 1, seed=3)]
    batch, mask = padded(rows, side)
    with torch.no_grad():
        got = next(iter(model(batch, mask).values()))
        assert got.shape[0] == 3 and (got.dim() == 2 or got.shape[1] == 11)  # without the prompt's columns
        for i, row in enumerate(rows):
            want = next(iter(model(row).values()))[0]
            torch.testing.assert_close(got[i] if got.dim() == 2 else got[i][mask[i] == 1], want, **CLOSE)


def test_an_encoder_alone_gives_what_it_gives_in_its_encoder_decoder():
    whole = wrapped(backbone("t5", hf.AutoModelForSeq2SeqLM))
    alone = get_ept_model(t5_encoder(), all_parts()).eval()
    alone.load_adapter_tensors(whole.adapter_tensors())
    with torch.no_grad():
        want = whole(ids(2, 6), decoder_input_ids=ids(2, 3)).encoder_last_hidden_state
        assert torch.equal(alone(ids(2, 6)).last_hidden_state, want[:, 5:])


LOSSES = {  # whether the wrapped model's own loss compares a column with the next one's label
    "llama": (lambda: backbone("llama", hf.AutoModelForCausalLM), True),
    "a BERT that writes": (lambda: backbone("bert", hf.AutoModelForCausalLM, is_decoder=True), True),
    "a BERT that sees both sides": (lambda: hf.BertLMHeadModel(backbone("bert").config).eval(), True),
    "BERT's masked words": (lambda: backbone("bert", hf.AutoModelForMaskedLM), False),
    "BART's decoder": (lambda: backbone("bart", hf.AutoModelForCausalLM), False),
    "XLNet": (lambda: xlnet(hf.AutoModelForCausalLM), False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_counts_the_labels_that_the_wrapped_models_counts(name):
    make, shifts = LOSSES[name]
    base, row = make(), ids(2, 6)
    by_hand = {
        True: lambda out: F.cross_entropy(out.logits[:, :-1].flatten(0, 1), row[:, 1:].flatten()),
        False: lambda out: F.cross_entropy(out.logits.flatten(0, 1), row.flatten()),
    }[shifts]
    with torch.no_grad():
        for model in (base, wrapped(base)):
            out = model(input_ids=row, labels=row)
            torch.testing.assert_close(out.loss, by_hand(out))


# ---------------------------------------------------------------- arguments with an entry for each token


_LAYOUT = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
               max_position_embeddings=POSITIONS)  # fmt: skip


def led():
    return hf.LEDForConditionalGeneration(hf.LEDConfig(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_encoder_position_embeddings=POSITIONS,
        max_decoder_position_embeddings=POSITIONS, attention_window=8,
    ))  # fmt: skip


def a_place(mask):
    """[batch, L, 4] where each word stands, by the number of words before it in its row."""
    left = mask.cumsum(1).clamp(max=9) * 9
    return torch.stack([left, left, left + 5, left + 5], -1) * mask.unsqueeze(-1)


def layoutlmv3():
    return hf.LayoutLMv3Config(**_LAYOUT, coordinate_size=6, shape_size=4, input_size=32, patch_size=16, num_labels=3)


def longformer():
    torch.manual_seed(0)
    return hf.LongformerForSequenceClassification(hf.LongformerConfig(**_LAYOUT, attention_window=8)).eval()


PER_TOKEN = {
    "bbox of LayoutLM": (
        lambda: hf.LayoutLMForTokenClassification(hf.LayoutLMConfig(**_LAYOUT)), "bbox", a_place,
    ),
    "bbox of LiLT": (
        lambda: hf.LiltModel(hf.LiltConfig(**_LAYOUT | dict(hidden_size=48))), "bbox", a_place,
    ),
    "bbox of LayoutLMv3": (
        lambda: hf.LayoutLMv3ForTokenClassification(layoutlmv3()), "bbox", a_place,
    ),
    "bbox of BROS": (
        lambda: hf.BrosForTokenClassification(hf.BrosConfig(**_LAYOUT | dict(hidden_size=64))), "bbox",
        lambda mask: a_place(mask) / 100,
    ),
    "global attention of Longformer": (
        lambda: hf.LongformerModel(hf.LongformerConfig(**_LAYOUT, attention_window=8)), "global_attention_mask",
        lambda mask: mask * (mask.cumsum(1) == 1),
    ),
    "global attention of LED": (led, "global_attention_mask", lambda mask: mask * (mask.cumsum(1) == 1)),
    "languages of XLM": (
        lambda: hf.XLMModel(hf.XLMConfig(
            vocab_size=VOCAB, emb_dim=WIDTH, n_layers=2, n_heads=4, max_position_embeddings=POSITIONS, n_langs=3, pad_index=0,
        )), "langs", lambda mask: mask * 2,
    ),
    "seven types of TAPAS": (
        lambda: hf.TapasModel(hf.TapasConfig(**_LAYOUT)), "token_type_ids",
        lambda mask: torch.stack([mask * (mask.cumsum(1) > 2)] * 7, -1),
    ),
    "paths of MarkupLM": (
        lambda: hf.MarkupLMModel(hf.MarkupLMConfig(**_LAYOUT, max_depth=3)), "xpath_tags_seq",
        lambda mask: torch.stack([mask * 3, mask * 5, mask], -1),
    ),
    "token types of GPT-2": (lambda: backbone("gpt2"), "token_type_ids", lambda mask: mask * (mask.cumsum(1) > 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", PER_TOKEN)
def test_an_argument_with_an_entry_for_each_token_gets_the_prompts_columns(name):
    make, argument, values = PER_TOKEN[name]
    torch.manual_seed(0)
    model = wrapped(make().eval())
    model.add_adapter("b", all_parts(prompt_length=3))
    more = dict(decoder_input_ids=ids(1, 3)) if model.traits.kind.encoder_decoder else {}
    rows, names = [ids(1, 11, seed=1), ids(1, 5, seed=2)], ["default", "b"]

    def run(text, mask, adapters, **arguments):
        more_rows = {key: value.expand(len(text), -1) for key, value in more.items()}
        with torch.no_grad():
            return next(iter(model(text, mask, adapter_ids=adapters, **arguments, **more_rows).values()))

    alone = []
    for row, adapter in zip(rows, names, strict=True):
        mask = torch.ones_like(row)
        alone.append(run(row, mask, [adapter], **{argument: values(mask)})[0])
        none = {argument: values(mask) * 0} if "BROS" in name else {}  # which cannot do without
        assert not torch.allclose(alone[-1], run(row, mask, [adapter], **none)[0], atol=1e-6)  # it does something
    for side in ("left", "right"):
        text, mask = padded(rows, side)
        got = run(text, mask, names, **{argument: values(mask)})
        for i, want in enumerate(alone):
            mine = got[i] if more else got[i][mask[i] == 1]
            torch.testing.assert_close(mine, want, **CLOSE)


def test_the_first_token_has_the_global_attention_that_the_head_of_longformer_gives_it():
    model, rows = wrapped(longformer()), [ids(1, 14, seed=1), ids(1, 5, seed=2)]
    with torch.no_grad():
        alone = torch.cat([model(row).logits for row in rows])
        for side in ("left", "right"):
            text, mask = padded(rows, side)
            first = mask * (mask.cumsum(1) == 1)
            torch.testing.assert_close(model(text, mask).logits, alone, **CLOSE)
            torch.testing.assert_close(model(text, mask, global_attention_mask=first).logits, alone, **CLOSE)
            assert not torch.allclose(model(text, mask, global_attention_mask=mask * 0).logits, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["longformer", "layoutlmv3", "bros"])
def test_a_fresh_adapter_whose_prompt_is_words_is_the_model_with_these_words_after_the_first(name):
    torch.manual_seed(0)
    make = {
        "longformer": longformer,
        "layoutlmv3": lambda: hf.LayoutLMv3ForSequenceClassification(layoutlmv3()),
        "bros": lambda: hf.BrosForTokenClassification(hf.BrosConfig(**_LAYOUT | dict(hidden_size=64))),
    }[name]
    bare, text, words = make().eval(), ids(2, 9), ids(1, 3, seed=5).expand(2, -1)
    model, table = get_ept_model(bare, EPTConfig(prompt_length=3)).eval(), bare.get_input_embeddings().weight
    model.ept.prompt.data.copy_(table[words[0]] / model.ept.embed_scale)
    start = model.ept.prompt_start
    place = a_place(torch.ones_like(text))
    place = place / 100 if name == "bros" else place
    more = {} if name == "longformer" else {"bbox": place}
    with torch.no_grad():
        got = model(text, **more).logits
        longer = torch.cat([text[:, :start], words, text[:, start:]], 1)
        none = place.new_zeros(2, 3, 4)
        more = {} if not more else {"bbox": torch.cat([place[:, :start], none, place[:, start:]], 1)}
        want = bare(longer, **more).logits
    if want.dim() == 3:
        want = torch.cat([want[:, :start], want[:, start + 3 :]], 1)
    torch.testing.assert_close(got, want, **CLOSE)


def test_no_global_attention_is_the_same_as_none_given():
    torch.manual_seed(0)
    model, text = wrapped(led().eval()), ids(2, 6)
    more = dict(decoder_input_ids=ids(2, 3))
    with torch.no_grad():
        want = model(text, **more).logits
        torch.testing.assert_close(model(text, global_attention_mask=torch.zeros_like(text), **more).logits, want)
        both = dict(global_attention_mask=torch.ones_like(text), max_new_tokens=3, min_new_tokens=3)
        want = torch.cat([model.generate(row[None], **{**both, "global_attention_mask": both["global_attention_mask"][:1]})
                          for row in text])  # fmt: skip
        assert torch.equal(model.generate(text, **both), want)


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (lambda: backbone("bert"), dict(mood=torch.zeros(2, 6)), "mood is .2, 6.*leave it out"),
        (lambda: backbone("llama"), dict(seen=torch.zeros(2, 6, 6)), "seen is .2, 6, 6"),
        (lambda: xlnet(hf.AutoModel), dict(perm_mask=torch.zeros(2, 6, 6)), "perm_mask is not supported"),
        (lambda: hf.XLMModel(hf.XLMConfig(
            vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, pad_index=0,
        )).eval(), dict(lengths=torch.tensor([6, 3])), "lengths is not supported: give attention_mask"),
        (lambda: hf.LayoutLMModel(hf.LayoutLMConfig(**_LAYOUT)).eval(), dict(bbox=torch.zeros(2, 5, 4)), "bbox is .2, 5, 4"),
        (lambda: hf.LayoutLMv3ForTokenClassification(layoutlmv3()).eval(),
         dict(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])), "counts positions by columns, where examples are packed"),
    ],
)  # fmt: skip
def test_an_argument_that_would_need_the_prompts_columns_is_named_where_it_cannot_have_them(make, arguments, words):
    with pytest.raises(ValueError, match=words):
        wrapped(make())(ids(2, 6), **arguments)


# ---------------------------------------------------------------- start values


class Tokenizer:
    """As much of a tokenizer as the start of a prompt needs."""

    all_special_ids = (0, 1, 2)

    def __call__(self, text, **_):
        words = torch.tensor([[10 + len(word) for word in text.split()]], dtype=torch.int64)
        return hf.BatchEncoding({"input_ids": words})


def test_the_prompt_starts_from_frequent_tokens_words_or_a_soft_prompt():
    base = backbone("bert")
    rows = base.get_input_embeddings().weight
    counts = torch.zeros(VOCAB)
    counts[[7, 50, 99]] = torch.tensor([5.0, 3.0, 1.0])
    model = get_ept_model(base, all_parts(prompt_length=3), token_counts=counts)
    start = model.ept.reconstruct()[0]
    for token in (7, 50, 99):
        assert (start - rows[token]).abs().sum(1).min() < 1e-5
    model = get_ept_model(base, all_parts(init="text", init_text="a bcd"), tokenizer=Tokenizer())
    torch.testing.assert_close(model.ept.reconstruct()[0], rows[[11, 13, 11, 13, 11]])
    soft_prompt = torch.randn(12, WIDTH)
    model = get_ept_model(base, all_parts(init="decompose"), soft_prompt=soft_prompt)
    assert 0 < model.ept.decomposition_error < 1
    model = get_ept_model(base, all_parts(init="normal", prompt_length=50))
    spread = model.ept.reconstruct()[0].square().mean().sqrt() / rows.square().mean().sqrt()
    assert 0.9 < spread < 1.1  # 1,600 draws


@pytest.mark.parametrize(
    ("config", "extra", "words"),
    [
        (dict(init="text", init_text="a"), dict(), "tokenizer"),
        (dict(init="decompose"), dict(), "soft_prompt"),
        (dict(), dict(soft_prompt=torch.zeros(9, WIDTH)), "soft_prompt"),
        (dict(), dict(token_counts=torch.zeros(VOCAB + 1)), "token_counts"),
        (dict(rank=33, max_text_length=99), dict(), "width"),
        (dict(prompt_length=POSITIONS), dict(), "no room for text"),
    ],
)
def test_settings_that_do_not_fit_the_backbone_are_refused(config, extra, words):
    with pytest.raises(ValueError, match=words):
        get_ept_model(backbone("bert"), all_parts(**config), **extra)


# ---------------------------------------------------------------- what cannot be wrapped


def peft_model():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(backbone("bert"), LoraConfig(target_modules=["query"]))


REFUSED = {
    "nested EPT": (lambda: wrapped(backbone("bert")), "already an EPTModel"),
    "PEFT": (peft_model, "PEFT"),
    "plain module": (lambda: torch.nn.Linear(3, 3), "PreTrainedModel"),
    "T5 sequence classification": (lambda: backbone("t5", SEQ), "end tokens"),
    "multiple choice": (lambda: backbone("bert", hf.AutoModelForMultipleChoice), "not supported"),
    "a model without attention masks": (
        lambda: hf.FNetModel(
            hf.FNetConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, intermediate_size=64)
        ),
        "FNetModel",
    ),
    "convolutions over padding": (
        lambda: hf.ConvBertModel(hf.ConvBertConfig(**_LAYOUT, embedding_size=WIDTH)).eval(),
        "lets padding change",
    ),
    "characters": (
        lambda: hf.CanineModel(
            hf.CanineConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, num_hash_buckets=64
            )
        ),
        "no table of word embeddings",
    ),
    "question answering": (lambda: backbone("bert", hf.AutoModelForQuestionAnswering), "not supported"),
    "vision": (
        lambda: hf.ViTModel(
            hf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
        ),
        "pixel_values",
    ),
}


def test_wrapping_tries_the_backbone_without_gradients():
    base, seen = backbone("bert"), []
    base.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    get_ept_model(base)
    assert seen and not any(seen)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_wrapped_is_refused_with_the_reason(name):
    make, words = REFUSED[name]
    with pytest.raises(TypeError, match=words):
        get_ept_model(make(), all_parts())


def test_a_model_that_needs_ids_beyond_the_look_up_is_refused():
    class NeedsIds(hf.BertModel):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            embeds = self.get_input_embeddings()(input_ids) * 2 if inputs_embeds is None else inputs_embeds
            return super().forward(inputs_embeds=embeds, **kwargs)

    with pytest.raises(TypeError, match="other results for inputs_embeds"):
        get_ept_model(NeedsIds(backbone("bert").config), all_parts())


def test_a_causal_prompt_stands_before_the_text():
    with pytest.raises(ValueError, match="prompt_start=1"):
        get_ept_model(backbone("llama"), all_parts(prompt_start=1))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "make", [mean_pooling, lambda: backbone("bert", SEQ), lambda: backbone("llama", hf.AutoModelForCausalLM)]
)
def test_a_saved_adapter_loads_elsewhere_and_gives_the_same_bits(make, tmp_path):
    model = wrapped(make())
    shake(model)
    if model.head_names:
        torch.nn.init.normal_(model.trained_heads()[0].weight)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(n.startswith("head.") or "." not in n for n in names)
    loaded = EPTModel.from_pretrained(make(), tmp_path).eval()
    assert loaded.ept_config == model.ept_config
    assert torch.equal(loaded(ids(2, 6)).logits, model(ids(2, 6)).logits)
    assert all(p.requires_grad for p in loaded.ept.parameters())


def test_an_adapter_of_a_bf16_backbone_loads_onto_the_fp32_one(tmp_path):
    wrapped(backbone("bert").bfloat16()).save_pretrained(tmp_path)
    EPTModel.from_pretrained(backbone("bert"), tmp_path)


@pytest.mark.parametrize(
    "other",
    [lambda: backbone("bert", seed=9), lambda: backbone("electra"), lambda: backbone("bert", num_hidden_layers=1)],
)
def test_an_adapter_of_another_backbone_is_refused(other, tmp_path):
    wrapped(backbone("bert")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another backbone.*, `model`, or pass `ignore_backbone_mismatch=True`"):
        EPTModel.from_pretrained(other(), tmp_path)


def test_one_changed_embedding_is_noticed_and_the_check_can_be_overridden(tmp_path):
    wrapped(backbone("bert")).save_pretrained(tmp_path)
    base = backbone("bert")
    with torch.no_grad():
        base.get_input_embeddings().weight[77, 3] += 1e-3
    with pytest.raises(ValueError, match="embeddings differ"):
        EPTModel.from_pretrained(base, tmp_path)
    EPTModel.from_pretrained(base, tmp_path, ignore_backbone_mismatch=True)


def edit_weights(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def poison(tensors):
    tensors["prompt"][0, 0] = float("nan")


DAMAGE = {
    "truncated": (truncate, "truncated or damaged"),
    "missing tensor": (lambda d: edit_weights(d, lambda t: t.pop("token_up")), "lacks token_up"),
    "extra tensor": (lambda d: edit_weights(d, lambda t: t.update(lora_a=torch.zeros(1))), "unknown lora_a"),
    "NaN": (lambda d: edit_weights(d, poison), "prompt holds NaN"),
    "wrong shape": (lambda d: edit_weights(d, lambda t: t.update(prompt=torch.zeros(4, WIDTH))), "prompt is"),
    "unknown key": (lambda d: edit_config(d, promt_length=3), "promt_length"),
    "another method": (lambda d: edit_config(d, method="LORA"), "not an EPT adapter"),
    "broken JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_adapter_is_refused_in_one_or_two_lines(name, tmp_path):
    wrapped(mean_pooling()).save_pretrained(tmp_path)
    damage, words = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        EPTModel.from_pretrained(mean_pooling(), tmp_path)
    assert len(str(caught.value)) < 450


def test_weights_of_another_save_are_refused(tmp_path):
    wrapped(mean_pooling()).save_pretrained(tmp_path / "a")
    other = wrapped(mean_pooling())
    shake(other, seed=5)
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="copy both again"):
        EPTModel.from_pretrained(mean_pooling(), tmp_path / "a")


def test_an_adapter_with_nan_is_not_saved_over_a_good_one(tmp_path):
    model = wrapped(mean_pooling())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.ept.prompt[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="prompt holds NaN"):
        model.save_pretrained(tmp_path)
    EPTModel.from_pretrained(mean_pooling(), tmp_path)


@pytest.mark.parametrize("auto", [hf.AutoModelForTokenClassification, SEQ])
def test_label_names_and_the_problem_type_come_back_with_the_adapter(auto, tmp_path):
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    kind = "multi_label_classification" if auto is SEQ else None
    wrapped(backbone("bert", auto, id2label=names, problem_type=kind)).save_pretrained(tmp_path / "a")
    again = EPTModel.from_pretrained(backbone("bert", auto, num_labels=3), tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for config in (again.config, again.base_model.config):
        assert config.id2label == names and config.label2id == {name: i for i, name in names.items()}
        assert config.problem_type == kind
    facts = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("a", "b")]
    for fact in ("label_names", "problem_type", "num_labels"):
        assert facts[0][fact] == facts[1][fact]
    assert facts[1]["label_names"] == list(names.values())


def test_what_an_adapter_does_not_say_of_its_labels_stays_the_backbones(tmp_path):
    wrapped(backbone("bert", SEQ, num_labels=3)).save_pretrained(tmp_path)
    edit_config(tmp_path, label_names=None, problem_type=None)
    names = {0: "a", 1: "b", 2: "c"}
    base = backbone("bert", SEQ, id2label=names, problem_type="multi_label_classification")
    again = EPTModel.from_pretrained(base, tmp_path)
    assert again.config.id2label == names and again.config.problem_type == "multi_label_classification"


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    wrapped(mean_pooling(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"head\.classifier\.weight is"):
        EPTModel.from_pretrained(mean_pooling(num_labels=2), tmp_path)


def test_the_gates_picture_is_written(tmp_path):
    model = wrapped(backbone("bert"))
    assert model.gate_weights().shape == (5, 4)
    model.plot_gates(tmp_path / "gates.png", before=torch.full((5, 4), 0.25))
    assert (tmp_path / "gates.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no spaces"):
        wrapped(backbone("bert"), all_parts(num_spaces=0)).plot_gates()


@pytest.mark.parametrize("config", [None, EPTConfig(), EPTConfig.input_only(), EPTConfig.paper()])
def test_the_presets_wrap_a_model_as_they_are(config):
    assert get_ept_model(mean_pooling(), config).eval()(ids(1, 4)).logits.shape == (1, 3)


@pytest.mark.parametrize("gradients", [False, True])
def test_train_and_zero_grad_call_nothing_of_torchs_modules_where_nothing_changed(gradients):
    """torch's walks call a function for each module and parameter: hundreds for this model."""
    model = wrapped(backbone("bert", hf.AutoModelForSequenceClassification)).train()
    if gradients:
        model(input_ids=ids(2, 5), labels=torch.tensor([0, 1])).loss.backward()
    assert calls_of_modules(model.zero_grad) == calls_of_modules(model.train) == []
    model.base_model.bert.encoder.layer[0].output.dropout = torch.nn.Dropout(0.5)
    assert len(calls_of_modules(model.train)) > 100 and calls_of_modules(model.train) == []
    model.ept.prompt = torch.nn.Parameter(model.ept.prompt.detach())
    assert len(calls_of_modules(model.zero_grad)) > 100


def calls_of_modules(function):
    """The names of what it calls of torch's file of modules, each as often as it is called."""
    module, names, before = inspect.getfile(torch.nn.Module), [], sys.getprofile()

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == module:
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return names


def test_train_walks_through_the_modules_once_and_notices_a_mode_that_its_owner_changed(monkeypatch):
    model, walks = wrapped(backbone("bert", hf.AutoModelForSequenceClassification)), []
    walk = torch.nn.Module.train
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: (walks.append(self), walk(self, mode))[1])
    model.train()
    walks.clear()
    assert model.train() is model and not walks
    dropout = model.base_model.bert.encoder.layer[1].output.dropout
    dropout.train()
    model.train()
    assert not dropout.training and model.ept.training
    model.base_model.bert.encoder.layer[0].output.dropout = dropout = torch.nn.Dropout(0.5)  # in training mode
    model.train()
    assert not dropout.training
    model.eval()
    assert not any(module.training for module in model.modules())
    model.add_adapter("other")
    model.set_adapter("other")
    model.train()
    assert model.ept.training and model.trained_heads()[0].training and not dropout.training


def test_zero_grad_clears_the_gradients_of_all_parameters_also_of_new_ones():
    model = wrapped(backbone("bert", hf.AutoModelForSequenceClassification)).train()
    some = model.base_model.bert.encoder.layer[0].output.dense.weight.requires_grad_(True)  # its owner thaws a layer
    changes = (
        lambda: None,
        lambda: setattr(model.ept, "prompt", torch.nn.Parameter(model.ept.prompt.detach())),
        lambda: setattr(model.base_model.bert.encoder.layer[0], "new", torch.nn.Parameter(torch.ones(1))),
    )
    for change in changes:
        change()
        if hasattr(model.base_model.bert.encoder.layer[0], "new"):
            model.base_model.bert.encoder.layer[0].new.grad = torch.ones(1)
        model(input_ids=ids(2, 5), labels=torch.tensor([0, 1])).loss.backward()
        assert some.grad is not None and model.ept.prompt.grad is not None
        model.zero_grad()
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_on_the_last_token_does_not_warn_of_padding_which_the_model_moves(name, caplog, monkeypatch):
    monkeypatch.setattr(hf.utils.logging.get_logger("transformers"), "propagate", True)
    hf.utils.logging.warning_once.cache_clear()
    base = backbone(name, SEQ, num_labels=3, pad_token_id=0)
    wrapped(base)(input_ids=torch.full((2, 5), 7), attention_mask=torch.ones(2, 5, dtype=torch.int64))
    assert "will not detect padding tokens" not in caplog.text
    hf.utils.logging.warning_once.cache_clear()
    base(inputs_embeds=torch.zeros(2, 5, WIDTH))  # the bare model by itself
    assert "will not detect padding tokens" in caplog.text
