"""PEFT's own files: adapters that PEFT trained come in, adapters that PEFT loads go out; DePT's checkpoints."""

import json
import math

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import tiny_text
from ept import (
    EPTConfig,
    EPTModel,
    MeanPoolingForSequenceClassification,
    from_peft,
    get_ept_model,
    read_soft_prompt,
    save_peft,
)
from ept.cli import main
from ept.peft_format import why_not_peft
from tiny_models import all_parts, backbone, ids, mean_pooling, padded, wrapped

KINDS = {
    "seq_cls": ("bert", hf.AutoModelForSequenceClassification, "SEQ_CLS"),
    "seq_cls_causal": ("llama", hf.AutoModelForSequenceClassification, "SEQ_CLS"),
    "token_cls": ("roberta", hf.AutoModelForTokenClassification, "TOKEN_CLS"),
    "causal": ("llama", hf.AutoModelForCausalLM, "CAUSAL_LM"),
    "gpt2": ("gpt2", hf.AutoModelForCausalLM, "CAUSAL_LM"),
    "gemma3": ("gemma3", hf.AutoModelForCausalLM, "CAUSAL_LM"),
    "t5": ("t5", hf.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    "bare": ("bert", hf.AutoModel, "FEATURE_EXTRACTION"),
}
ONLY_PROMPT = dict(rank=0, token_rank=0, prompt_start=0)


def result(model, rows: int = 0):
    """What a model gives for a fixed batch, without the first `rows` columns where it is one per token."""
    input_ids, mask = padded([ids(1, 9), ids(1, 9, seed=1)], "right")
    decoder = {"decoder_input_ids": ids(2, 3)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model.eval()(input_ids=input_ids, attention_mask=mask, **decoder)
    out = out.logits if "logits" in out else out.last_hidden_state
    return out[:, rows:] if rows and out.dim() == 3 and not decoder else out


def of_peft(kind, path, **settings):
    """A PEFT prompt-tuning adapter with a random prompt and head, saved; returns the PEFT model."""
    name, auto, task = KINDS[kind]
    torch.manual_seed(3)
    model = backbone(name, auto)
    config = peft.PromptTuningConfig(
        task_type=task, num_virtual_tokens=4, **dict(num_transformer_submodules=1) | settings
    )
    tuned = peft.get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(path)
    return tuned


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_adapter_gives_the_same_logits_as_an_ept_adapter(kind, tmp_path):
    tuned = of_peft(kind, tmp_path)
    name, auto, _ = KINDS[kind]
    model = from_peft(backbone(name, auto), tmp_path)
    assert model.trainable_parameters()["prompt"] == 4 * 32
    # Gemma multiplies every embedding, PEFT's prompt too, so logits are of another size there: relative to it.
    want = result(tuned, rows=4)
    torch.testing.assert_close(result(model), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_adapter_loads_in_peft_with_the_same_logits(kind, tmp_path):
    name, auto, _ = KINDS[kind]
    model = wrapped(backbone(name, auto), all_parts(lowrank_update=False, token_rank=0, prompt_start=0))
    for name_of_head in model.head_names:
        for parameter in model.base_model.get_submodule(name_of_head).parameters():
            torch.nn.init.normal_(parameter)
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(backbone(name, auto), tmp_path)
    want = result(model)
    torch.testing.assert_close(result(loaded, rows=5), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    torch.testing.assert_close(result(from_peft(backbone(name, auto), tmp_path)), want, rtol=1e-4, atol=1e-5)


def test_ept_fold_then_ept_import_is_the_way_to_peft_and_back(tmp_path, capsys):
    auto = hf.AutoModelForCausalLM
    tiny_text.save_model(tmp_path / "model", "llama", auto)
    model = wrapped(auto.from_pretrained(tmp_path / "model"), all_parts(**ONLY_PROMPT))
    model.save_pretrained(tmp_path / "adapter")
    paths = {name: str(tmp_path / name) for name in ("adapter", "peft", "back")}
    assert main(["fold", "--adapter", paths["adapter"], "--output_dir", paths["peft"]]) == 0
    assert "a PEFT prompt-tuning adapter" in capsys.readouterr().err
    loaded = peft.PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "model"), paths["peft"])
    torch.testing.assert_close(result(loaded, rows=5), result(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a PEFT adapter: ept import makes"):
        EPTModel.from_pretrained(auto.from_pretrained(tmp_path / "model"), paths["peft"])
    assert main(["import", "--adapter", paths["peft"], "--output_dir", paths["back"]]) == 0
    back = EPTModel.from_pretrained(auto.from_pretrained(tmp_path / "model"), paths["back"])
    torch.testing.assert_close(result(back), result(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit):
        main(["import", "--adapter", paths["back"], "--output_dir", paths["back"] + "2"])
    assert "is an EPT adapter already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_ept_import_gives_the_model_as_many_labels_as_the_adapters_head(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    auto = KINDS["seq_cls"][1]
    tiny_text.save_model(tmp_path / "model", name)
    tuned = peft.get_peft_model(
        auto.from_pretrained("model", num_labels=3),  # PEFT notes the path as it was given
        peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    )
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "peft")
    assert main(["import", "--adapter", "peft", "--output_dir", "ept"]) == 0
    config = json.loads((tmp_path / "ept" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    model = EPTModel.from_pretrained(auto.from_pretrained(tmp_path / "model", num_labels=3), tmp_path / "ept")
    assert result(model).shape == (2, 3)
    torch.testing.assert_close(result(model), result(tuned), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (lambda: backbone("bert", KINDS["seq_cls"][1]), ONLY_PROMPT | dict(prompt_start=None), "column 1"),
        (mean_pooling, ONLY_PROMPT, "reads the mean"),
        (lambda: backbone("llama", hf.AutoModelForCausalLM), ONLY_PROMPT | dict(rank=2), "low-rank update"),
        (lambda: backbone("llama", hf.AutoModelForCausalLM), ONLY_PROMPT | dict(token_rank=2), "token-conditioned"),
    ],
)
def test_what_peft_cannot_express_is_refused_with_the_reason(make, settings, words, tmp_path):
    model = wrapped(make(), all_parts(**settings))
    assert words in why_not_peft(model)
    with pytest.raises(ValueError, match=words) as refusal:
        save_peft(model, tmp_path)
    changes_the_text = bool(settings.get("rank") or settings.get("token_rank"))
    assert ("EPTConfig.input_only(token_rank=0)" in str(refusal.value)) == changes_the_text
    assert not list(tmp_path.iterdir())


def test_a_peft_prompt_is_decomposed_by_init_decompose(tmp_path):
    of_peft("causal", tmp_path / "adapter")
    soft = read_soft_prompt(tmp_path / "adapter")
    assert soft.shape == (4, 32)
    config = EPTConfig.paper(prompt_length=1, rank=3, max_text_length=3, init="decompose")
    model = get_ept_model(backbone("llama", hf.AutoModelForCausalLM), config, soft_prompt=soft)
    assert model.ept.decomposition_error < 1e-6  # three rows, rank three
    update = model.ept_config.embed_scale * model.ept_config.scale * model.ept.lowrank_a @ model.ept.lowrank_b
    torch.testing.assert_close(torch.cat([model.ept.reconstruct()[0][:0], update]), soft[1:], rtol=1e-4, atol=1e-5)
    save_file({"anything": soft}, tmp_path / "soft.safetensors")
    assert torch.equal(read_soft_prompt(tmp_path / "soft.safetensors"), soft)


def depts_forward(tensors, alpha, word_embeddings, input_ids):
    """DePT's input as its fork computes it: the update is added to all max_length columns, padding too."""
    a, b = (tensors[f"prompt_encoder.lora_embedding_{x}"] for x in "AB")
    text = word_embeddings(input_ids) + alpha / math.sqrt(a.shape[1]) * (a @ b).repeat(len(input_ids), 1, 1)
    return torch.cat([tensors["prompt_embeddings"].repeat(len(input_ids), 1, 1), text], dim=1)


def dept(path, rows=6, rank=3, length=12, alpha=8, **settings):
    """A checkpoint in the form of DePT's published ones."""
    g = torch.Generator().manual_seed(5)
    tensors = {
        "prompt_embeddings": torch.randn(rows, 32, generator=g),
        "prompt_encoder.lora_embedding_A": torch.randn(length, rank, generator=g),
        "prompt_encoder.lora_embedding_B": torch.randn(rank, 32, generator=g),
    }
    config = {
        "base_model_name_or_path": "t5-base", "bias": "none", "hidden_size": 32, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": alpha, "max_length": length, "num_attention_heads": 4, "num_layers": 2,
        "num_transformer_submodules": 1, "num_virtual_tokens": rows, "peft_type": "PROMPT_TUNING_LORA",
        "prompt_tuning_init": "TEXT", "r": rank, "task_type": "SEQ_2_SEQ_LM", "token_dim": 32,
    }  # fmt: skip
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config | settings))
    torch.save(tensors, path / "adapter_model.bin")
    return tensors


@torch.no_grad()
def test_a_dept_checkpoint_gives_depts_embeddings_to_rounding(tmp_path):
    tensors = dept(tmp_path / "dept", alpha=5)
    model = from_peft(backbone("t5", hf.AutoModelForSeq2SeqLM), tmp_path / "dept").eval()
    input_ids, mask = padded([ids(1, 12), ids(1, 7, seed=1)], "right")  # DePT pads to max_length
    want = depts_forward(tensors, 5, model.base_model.get_input_embeddings(), input_ids)
    got = model.prompt_embeds(input_ids, mask)
    # A few roundings of values up to about 20: P and B are stored over e and multiplied by it.
    text = torch.nn.functional.pad(mask, (6, 0), value=1).bool()
    torch.testing.assert_close(got[text], want[text], rtol=1e-6, atol=4 * 2**-24 * want.abs().max().item())
    # DePT adds its update to padding too, which the backbone does not look at.
    backbone_mask = torch.nn.functional.pad(mask, (6, 0), value=1)
    decoder = ids(2, 3)
    theirs = model.base_model(inputs_embeds=want, attention_mask=backbone_mask, decoder_input_ids=decoder).logits
    ours = model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_partial_and_unknown_checkpoints_are_refused(tmp_path):
    t5 = backbone("t5", hf.AutoModelForSeq2SeqLM)

    def refused(path, words, error=ValueError):
        with pytest.raises(error, match=words):
            from_peft(t5, path)

    tensors = dept(tmp_path / "part")
    torch.save({"prompt_embeddings": tensors["prompt_embeddings"]}, tmp_path / "part" / "adapter_model.bin")
    refused(tmp_path / "part", "only a part of a DePT checkpoint.*read_soft_prompt")
    assert torch.equal(read_soft_prompt(tmp_path / "part"), tensors["prompt_embeddings"])
    dept(tmp_path / "lora", peft_type="LORA")
    refused(tmp_path / "lora", "peft_type LORA")
    dept(tmp_path / "rows", num_virtual_tokens=5)
    refused(tmp_path / "rows", "num_virtual_tokens is 5")
    of_peft("t5", tmp_path / "two", num_transformer_submodules=2)
    refused(tmp_path / "two", "second prompt of 4 rows for the decoder")
    (tmp_path / "part" / "adapter_model.bin").write_bytes(b"PK\x03\x04nothing")
    refused(tmp_path / "part", "truncated or damaged")
    (tmp_path / "part" / "adapter_model.bin").unlink()
    refused(tmp_path / "part", "the copy is incomplete", FileNotFoundError)
    refused(tmp_path, "holds no adapter_config.json", FileNotFoundError)
    wide = of_peft("bare", tmp_path / "wide").get_prompt_embedding_to_save("default")
    save_file({"prompt_embeddings": torch.cat([wide, wide], 1)}, tmp_path / "wide" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="width 64, but the model's embeddings have 32"):
        from_peft(backbone("bert"), tmp_path / "wide")
    of_peft("seq_cls", tmp_path / "head")
    with pytest.raises(ValueError, match=r"classifier.*which LlamaForSequenceClassification has not"):
        from_peft(backbone("llama", KINDS["seq_cls"][1]), tmp_path / "head")


def test_ept_train_starts_from_a_decomposed_peft_prompt(tmp_path, capsys):
    tiny_text.save_model(tmp_path / "model", pooling=True)
    tiny_text.write_csv(tmp_path / "train.csv", tiny_text.reviews(8))
    of_peft("bare", tmp_path / "peft")
    command = [
        "train", "--model_name_or_path", str(tmp_path / "model"), "--train_file", str(tmp_path / "train.csv"),
        "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--learning_rate", "0", "--prompt_learning_rate", "0",
        "--prompt_length", "2", "--rank", "2", "--init", "decompose", "--report_to", "none", "--disable_tqdm", "true",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(command)
    assert "--init decompose and --soft_prompt go together" in capsys.readouterr().err
    assert main([*command, "--soft_prompt", str(tmp_path / "peft")]) == 0
    assert "decomposed with a relative error of" in capsys.readouterr().err
    soft = read_soft_prompt(tmp_path / "peft")
    model = EPTModel.from_pretrained(
        MeanPoolingForSequenceClassification.from_encoder(str(tmp_path / "model"), 2), tmp_path / "out"
    )
    torch.testing.assert_close(model.ept.prompt * model.ept_config.embed_scale, soft[:2], rtol=1e-5, atol=1e-6)
