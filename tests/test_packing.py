"""Packed rows: every example sees its own prompt and itself alone, or the call is refused."""

import pytest
import torch
import transformers as hf
from test_model import WINDOWED
from torch.nn import functional as F

from tiny_models import CAUSAL, VOCAB, all_parts, backbone, ids, shake, wrapped

CLOSE = dict(rtol=1e-4, atol=1e-5)  # as in test_model
EXAMPLES = [ids(1, 7, seed=1), ids(1, 1, seed=2), ids(1, 4, seed=3)]


def causal(name, seed=0):
    if name in WINDOWED:
        torch.manual_seed(seed)
        return hf.AutoModelForCausalLM.from_config(WINDOWED[name]()).eval()
    return backbone(name, hf.AutoModelForCausalLM)


def packed(examples):
    """input_ids and restarting position_ids of one row that holds the examples."""
    return torch.cat(examples, 1), torch.cat([torch.arange(e.shape[1]) for e in examples]).unsqueeze(0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*CAUSAL, "mistral"])
def test_a_packed_rows_logits_loss_and_gradients_are_those_of_its_examples_alone(name, attention):
    base = causal(name)
    base.set_attn_implementation(attention)
    model = wrapped(base, all_parts(max_text_length=6))
    row, positions = packed(EXAMPLES)
    labels = torch.cat([F.pad(e[:, 1:], (1, 0), value=-100) for e in EXAMPLES], 1)  # as DataCollatorWithFlattening
    out = model(row, position_ids=positions, labels=labels)
    alone = [model(e, labels=e) for e in EXAMPLES if e.shape[1] > 1]
    want = torch.cat([model(e).logits for e in EXAMPLES], 1)
    assert out.logits.shape == (1, 12, VOCAB)
    torch.testing.assert_close(out.logits, want, **CLOSE)
    loss = (alone[0].loss * 6 + alone[1].loss * 3) / 9
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(model(row, position_ids=positions, labels=row).loss, loss)  # first labels do not count
    parameters = list(model.ept.parameters())
    got, want = (torch.autograd.grad(x, parameters, materialize_grads=True) for x in (out.loss, loss))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_attention_windows_stay_those_of_an_example_alone(name):
    model = wrapped(causal(name))
    examples = [ids(1, 20, seed=1), ids(1, 14, seed=2)]
    row, positions = packed(examples)
    with torch.no_grad():
        want = torch.cat([model(e).logits for e in examples], 1)
        torch.testing.assert_close(model(row, position_ids=positions).logits, want, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_rows_of_a_batch_may_differ_in_examples_and_in_padding(side):
    model = wrapped(causal("llama"))
    row, positions = packed(EXAMPLES)
    short, own = packed(EXAMPLES[:1])
    pad = (12 - 7, 0) if side == "left" else (0, 12 - 7)
    batch, positions = torch.cat([row, F.pad(short, pad)]), torch.cat([positions, F.pad(own, pad)])
    mask = torch.cat([torch.ones_like(row), F.pad(torch.ones_like(short), pad)])
    with torch.no_grad():
        logits = model(batch, mask, position_ids=positions).logits
        torch.testing.assert_close(logits[:1], torch.cat([model(e).logits for e in EXAMPLES], 1), **CLOSE)
        torch.testing.assert_close(logits[1:][mask[1:] == 1], model(short).logits[0], **CLOSE)


def test_sequence_lengths_embeddings_and_kept_logits_say_the_same_as_positions_and_ids():
    model = wrapped(causal("qwen2"))
    row, positions = packed(EXAMPLES)
    with torch.no_grad():
        want = model(row, position_ids=positions).logits
        lengths = dict(cu_seq_lens_q=torch.tensor([0, 7, 8, 12]), cu_seq_lens_k=torch.tensor([0, 7, 8, 12]))
        torch.testing.assert_close(model(row, **lengths, max_length_q=7, max_length_k=7).logits, want, **CLOSE)
        embeds = model.get_input_embeddings()(row)
        torch.testing.assert_close(model(inputs_embeds=embeds, position_ids=positions).logits, want, **CLOSE)
        last = model(row, position_ids=positions, logits_to_keep=3).logits
        torch.testing.assert_close(last, want[:, -3:], **CLOSE)
        some = model(row, position_ids=positions, logits_to_keep=torch.tensor([2, 7])).logits
        torch.testing.assert_close(some, want[:, [2, 7]], **CLOSE)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_an_encoders_tokens_are_told_apart_too(name):
    model = wrapped(backbone(name, hf.AutoModelForTokenClassification, num_labels=4))
    first = model.traits.first_position
    row, positions = packed(EXAMPLES)
    labels = torch.randint(4, row.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(row, position_ids=positions + first, labels=labels)
        torch.testing.assert_close(out.logits, torch.cat([model(e).logits for e in EXAMPLES], 1), **CLOSE)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[0], labels[0]))


def test_transformers_flattening_collator_fits():
    model = wrapped(causal("llama"))
    shake(model)
    rows = [{"input_ids": e[0].tolist()} for e in EXAMPLES]
    with torch.no_grad():
        for settings in (dict(), dict(return_flash_attn_kwargs=True, return_seq_idx=True)):
            batch = hf.DataCollatorWithFlattening(return_tensors="pt", **settings)(rows)
            want = torch.cat([model(e).logits for e in EXAMPLES], 1)
            torch.testing.assert_close(model(**batch).logits, want, **CLOSE)


SEQ = hf.AutoModelForSequenceClassification
REFUSED = {
    "one label per row": (lambda: backbone("bert", SEQ), dict(), "one result per row"),
    "one label per row, causal": (lambda: backbone("llama", SEQ, pad_token_id=0), dict(), "one result per row"),
    "no positions": (lambda: backbone("bloom", hf.AutoModelForCausalLM), dict(), "takes no position_ids"),
    "a cache": (lambda: causal("llama"), dict(use_cache=True), "do not go together"),
    "numbers alone": (
        lambda: causal("llama"),
        dict(seq_idx=torch.arange(12)[None], position_ids=None),
        "seq_idx numbers several",
    ),
    "wrong lengths": (lambda: causal("llama"), dict(cu_seq_lens_q=torch.tensor([0, 7, 11])), "must rise from 0"),
    "a 4-d mask": (lambda: causal("llama"), dict(attention_mask=torch.ones(1, 1, 12, 12)), "position_ids that restart"),
    "too long": (lambda: causal("gpt2"), dict(position_ids=torch.tensor([[*range(50, 62)]])), "positions 0 … 63"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name):
    make, changes, words = REFUSED[name]
    row, positions = packed(EXAMPLES)
    with pytest.raises(ValueError, match=words):
        wrapped(make())(**dict(input_ids=row, position_ids=positions) | changes)


def test_a_backbone_that_ignores_what_keeps_examples_apart_is_refused():
    class Leaky(hf.LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids, inputs_embeds=inputs_embeds, **kwargs)

    model = wrapped(Leaky(backbone("llama").config).eval())
    row, positions = packed(EXAMPLES)
    with pytest.raises(ValueError, match="see each other"):
        model(row, position_ids=positions)
