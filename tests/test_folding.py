"""Folded adapters: the same results, no EPT arithmetic, a stable hash, files of their own; and prompt_embeds."""

import copy
import hashlib
import json
import struct

import pytest
import torch
import transformers as hf

import ept_kernels
import tiny_text
from ept import EPTConfig, EPTModel
from ept.cli import main
from ept.layer.folded import FoldedLayer, fold_layer, prompt_hash
from ept.model.embedding_table import embedding_table
from ept.training.rates import parameter_groups
from tiny_models import all_parts, backbone, ids, mean_pooling, padded, wrapped

SEQ = hf.AutoModelForSequenceClassification
MODELS = {
    "mean": lambda: mean_pooling(),
    "first": lambda: backbone("bert", SEQ),
    "t5": lambda: backbone("t5", hf.AutoModelForSeq2SeqLM),
    "llama": lambda: backbone("llama", hf.AutoModelForCausalLM),
}
CONFIGS = {
    "all": all_parts(),
    "lowrank": all_parts(token_rank=0),
    "token": all_parts(rank=0),
    "prompt": all_parts(rank=0, token_rank=0),
}


def batch(side="right"):
    input_ids, mask = padded([ids(1, 9), ids(1, 4, seed=1)], side)
    return dict(input_ids=input_ids, attention_mask=mask)


def logits(model, **inputs):
    decoder = {"decoder_input_ids": ids(2, 3)} if model.config.is_encoder_decoder else {}
    return model(**inputs, **decoder).logits


@pytest.mark.parametrize("parts", CONFIGS)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_folded_equals_live_to_1e6_and_its_file_loads_back(kind, parts, tmp_path):
    model = wrapped(MODELS[kind](), CONFIGS[parts])
    inputs = batch("left" if kind == "llama" else "right")
    live_embeds, live = model.prompt_embeds(**inputs), logits(model, **inputs)
    assert model.fold() is model
    text = inputs["attention_mask"] if kind == "llama" else inputs["attention_mask"].sort(1, descending=True).values
    torch.testing.assert_close(model.prompt_embeds(**inputs), live_embeds, rtol=1e-6, atol=1e-6)
    assert live_embeds.shape == (2, text.shape[1] + 5, 32)
    torch.testing.assert_close(logits(model, **inputs), live, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = EPTModel.from_pretrained(MODELS[kind](), tmp_path).eval()
    assert isinstance(loaded.ept, FoldedLayer) and loaded.ept.sha256 == model.ept.sha256
    assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))


def test_a_folded_prompt_alone_runs_no_ept_arithmetic(monkeypatch):
    model = wrapped(MODELS["mean"](), all_parts(rank=3, lowrank_update=False, token_rank=0)).fold()
    prompt = model.ept.prompt.clone()
    monkeypatch.setattr(ept_kernels, "text_update", None)
    monkeypatch.setattr(ept_kernels, "reconstruct_prompt", None)
    embeds = model.prompt_embeds(**batch())
    assert torch.equal(embeds[0, :5], prompt)
    assert torch.equal(embeds[0, 5:], model.base_model.get_input_embeddings()(ids(1, 9))[0])
    assert set(model.ept.state_dict()) == {"prompt"}


@torch.no_grad()
def test_folded_generation_goes_on_counting_text_positions():
    model = wrapped(MODELS["llama"](), all_parts(max_text_length=8))
    inputs = batch("left")
    live = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.fold().generate(**inputs, max_new_tokens=6, do_sample=False), live)


def test_the_hash_names_the_prompt_whatever_the_devices_dtype_and_implementation():
    model = wrapped(MODELS["mean"]())
    layer = model.ept
    folded = fold_layer(layer)
    assert folded.sha256 == prompt_hash(folded.prompt) and len(folded.sha256) == 64
    for impl in ("torch", "reference"):
        layer.config.impl = impl
        assert fold_layer(layer).sha256 == folded.sha256
    assert copy.deepcopy(folded).to(torch.bfloat16).sha256 == folded.sha256
    assert fold_layer(folded) is folded
    # The definition: little-endian fp32 after the shape, whatever the machine.
    known = torch.tensor([[0.5, -1.25], [3.0, 0.1]])
    assert prompt_hash(known) == hashlib.sha256(b"2x2:" + struct.pack("<4f", *known.flatten().tolist())).hexdigest()
    assert prompt_hash(known.double()) == prompt_hash(known)
    assert prompt_hash(known.T.contiguous()) != prompt_hash(known)
    assert prompt_hash(known.view(1, 4)) != prompt_hash(known)
    with torch.no_grad():
        layer.prompt[0, 0] += 1e-6
    assert fold_layer(layer).sha256 != folded.sha256


@torch.no_grad()
def test_the_embedding_table_stands_for_the_token_conditioned_update():
    model = wrapped(MODELS["first"](), all_parts(rank=0))
    inputs, live = batch(), model(**batch()).logits
    table = embedding_table(model)
    plain = wrapped(MODELS["first"](), all_parts(rank=0)).fold()
    plain.ept.token_down = None
    plain.base_model.get_input_embeddings().weight.copy_(table)
    torch.testing.assert_close(plain(**inputs).logits, live, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no token-conditioned update"):
        embedding_table(wrapped(MODELS["first"](), all_parts(token_rank=0)))


def test_training_a_folded_adapter_is_refused():
    model = wrapped(MODELS["mean"]()).fold()
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="folded, for inference only"):
        parameter_groups(model)


@torch.no_grad()
def test_prompt_embeds_is_what_the_backbone_reads():
    model = wrapped(MODELS["llama"]())
    for side in ("left", "right"):
        inputs = batch(side)
        embeds = model.prompt_embeds(**inputs)
        alone = model.prompt_embeds(ids(1, 4, seed=1))
        row = embeds[1, 5:] if side == "left" else embeds[1, :9]
        torch.testing.assert_close(row, alone[0])
        out = model.base_model(inputs_embeds=alone).logits[:, 5:]
        torch.testing.assert_close(out, model(input_ids=ids(1, 4, seed=1)).logits)
    given = model.base_model.get_input_embeddings()(ids(2, 7))
    torch.testing.assert_close(model.prompt_embeds(inputs_embeds=given), model.prompt_embeds(ids(2, 7)))
    assert model.prompt_embeds(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 5, 32)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model.prompt_embeds()
    with pytest.raises(ValueError, match="one entry per text token"):
        model.prompt_embeds(ids(2, 7), torch.ones(2, 6, dtype=torch.int64))


def saved(tmp_path, config: EPTConfig, name="bert", auto=SEQ):
    """A model directory, and an adapter on it."""
    tiny_text.save_model(tmp_path / "model", name, auto)
    model = wrapped(auto.from_pretrained(tmp_path / "model"), config)
    model.save_pretrained(tmp_path / "adapter")
    return model


def test_ept_fold_writes_a_small_file_that_gives_the_same_logits(tmp_path, capsys):
    model = saved(tmp_path, all_parts())
    out = str(tmp_path / "folded")
    assert main(["fold", "--adapter", str(tmp_path / "adapter"), "--output_dir", out, "--embedding_table"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == fold_layer(model.ept).sha256
    assert "a folded EPT adapter (its low-rank update" in said.err
    loaded = EPTModel.from_pretrained(SEQ.from_pretrained(tmp_path / "model"), out).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits, rtol=1e-5, atol=1e-5)
    from safetensors.torch import load_file

    assert set(load_file(f"{out}/adapter_model.safetensors")) == {
        "prompt", "text_update", "token_down", "token_up", "head.classifier.weight", "head.classifier.bias",
    }  # fmt: skip
    table = load_file(f"{out}/embedding_table.safetensors")["weight"]
    torch.testing.assert_close(table, embedding_table(model))
    with pytest.raises(SystemExit):
        main(["fold", "--adapter", str(tmp_path / "adapter"), "--output_dir", out])
    assert "holds another adapter" in capsys.readouterr().err


def test_a_folded_adapter_still_knows_that_it_labels_pairs(tmp_path, capsys):
    saved(tmp_path, all_parts())
    adapter, folded, pairs = (tmp_path / name for name in ("adapter", "folded", "pairs.txt"))
    columns = {"text": "a", "text_pair": "b", "label": "label"}
    (adapter / "run.json").write_text(json.dumps({"columns": columns, "max_seq_length": 9}))
    pairs.write_text("the film\ta great story\nvery dull\tthe plot\n")
    assert main(["fold", "--adapter", str(adapter), "--output_dir", str(folded)]) == 0
    capsys.readouterr()
    said = []
    for directory in (adapter, folded):
        assert main(["predict", "--adapter", str(directory), "--input_file", str(pairs)]) == 0
        said.append([line.split("\t") for line in capsys.readouterr().out.splitlines()])
    assert [label for label, _ in said[0]] == [label for label, _ in said[1]]
    assert [float(p) for _, p in said[0]] == pytest.approx([float(p) for _, p in said[1]], abs=2e-6)
    pairs.write_text("one text\n")
    with pytest.raises(SystemExit):
        main(["predict", "--adapter", str(folded), "--input_file", str(pairs)])
    assert "labels pairs" in capsys.readouterr().err


def test_ept_fold_says_why_peft_cannot_hold_an_adapter(tmp_path, capsys):
    saved(tmp_path, all_parts(rank=0, token_rank=0))
    with pytest.raises(SystemExit):
        main([
            "fold", "--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "out"), "--format", "peft",
        ])  # fmt: skip
    assert "its prompt stands at text column 1" in capsys.readouterr().err
