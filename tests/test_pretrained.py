"""AutoEPTModel finds the backbone that an adapter was trained on, with its class and labels."""

import json

import pytest
import torch
import transformers as hf

from ept import AutoEPTModel, EPTModel, MeanPoolingForSequenceClassification
from ept.backbone.loading import load_classifier, load_whole
from tiny_models import all_parts, backbone, ids, wrapped

BACKBONES = {
    "encoder": lambda: backbone("bert"),
    "mean": lambda: MeanPoolingForSequenceClassification(backbone("bert"), 3),
    "classifier": lambda: backbone("roberta", hf.AutoModelForSequenceClassification, num_labels=3),
    "tagger": lambda: backbone("distilbert", hf.AutoModelForTokenClassification, num_labels=3),
    "causal": lambda: backbone("llama", hf.AutoModelForCausalLM),
    "causal-pooled": lambda: backbone("llama", hf.AutoModelForSequenceClassification, num_labels=3),
    "seq2seq": lambda: backbone("t5", hf.AutoModelForSeq2SeqLM),
}


def saved(base, directory, config=None):
    """The backbone behind an adapter, both written to directories; of a head on the mean the encoder alone."""
    whole = base.encoder if isinstance(base, MeanPoolingForSequenceClassification) else base
    whole.save_pretrained(directory / "backbone")
    base.config._name_or_path = str(directory / "backbone")
    model = wrapped(base, config)
    shake_head(model)
    model.save_pretrained(directory / "adapter")
    return model


@torch.no_grad()
def shake_head(model):
    for head in model.trained_heads():
        for parameter in head.parameters():
            parameter += 0.1


def result(model):
    with torch.no_grad():
        labels = {"labels": ids(2, 4)} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids(2, 6), **labels)[1 if labels else 0]


@pytest.mark.parametrize("name", BACKBONES)
def test_an_adapter_of_every_kind_finds_its_backbone(name, tmp_path):
    base = BACKBONES[name]()
    if base.config.num_labels == 3:
        base.config.id2label = {0: "bad", 1: "so", 2: "good"}
        base.config.label2id = {"bad": 0, "so": 1, "good": 2}
    model = saved(base, tmp_path)
    loaded = AutoEPTModel.from_pretrained(tmp_path / "adapter", "mine")
    assert isinstance(loaded, EPTModel) and not loaded.training and loaded.list_adapters() == ["mine"]
    assert type(loaded.base_model) is type(base) and loaded.config.id2label == base.config.id2label
    torch.testing.assert_close(result(loaded), result(model), rtol=1e-5, atol=1e-6)
    assert any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_backbones_settings_and_another_place_are_taken(tmp_path):
    model = saved(BACKBONES["causal"](), tmp_path)
    loaded = AutoEPTModel.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.base_model.dtype == torch.bfloat16 and loaded.ept.prompt.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager"
    (tmp_path / "backbone").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="backbone: no such directory"):
        AutoEPTModel.from_pretrained(tmp_path / "adapter")
    loaded = AutoEPTModel.from_pretrained(tmp_path / "adapter", name_or_path=str(tmp_path / "moved"))
    torch.testing.assert_close(result(loaded), result(model))


def test_frozen_weights_that_the_checkpoint_lacks_are_named_and_not_random(tmp_path, caplog):
    saved(backbone("bert", hf.AutoModelForMaskedLM), tmp_path)
    assert AutoEPTModel.from_pretrained(tmp_path / "adapter").base_model.cls.predictions.bias is not None
    backbone("bert").save_pretrained(tmp_path / "backbone")  # the encoder alone
    with pytest.raises(
        ValueError, match=r"lacks weights of a BertForMaskedLM that .*: cls.predictions, .*Give a check"
    ):
        AutoEPTModel.from_pretrained(tmp_path / "adapter")
    place = str(tmp_path / "no pooler")
    backbone("bert", hf.AutoModelForMaskedLM).save_pretrained(place)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification that .*: bert.pooler.dense.*`head=mean`"):
        load_classifier(place, 2, "single_label_classification")
    assert not caplog.records
    load_classifier(place, 2, "single_label_classification", head="mean")
    assert not caplog.records
    load_whole(hf.AutoModel, place)
    assert "has no pooler" in caplog.text


def test_another_kind_of_backbone_or_one_without_a_name_is_refused(tmp_path):
    saved(BACKBONES["causal"](), tmp_path)
    backbone("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"adapts a LlamaForCausalLM, and .*bert is a bert: give the model that"):
        AutoEPTModel.from_pretrained(tmp_path / "adapter", name_or_path=str(tmp_path / "bert"))
    other = backbone("llama", hf.AutoModelForCausalLM, seed=3)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="embeddings"):
        AutoEPTModel.from_pretrained(tmp_path / "adapter", name_or_path=str(tmp_path / "other"))
    AutoEPTModel.from_pretrained(
        tmp_path / "adapter", name_or_path=str(tmp_path / "other"), ignore_backbone_mismatch=True
    )
    config_file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config_file.read_text())
    for name, value, message in (
        ("base_model_class", "PreTrainedConfig", "adapts a PreTrainedConfig, which transformers has not"),
        (
            "base_model_class",
            "MyOwnModel",
            "adapts a MyOwnModel, which transformers has not: load the backbone yourself",
        ),
        ("base_model_name_or_path", None, "does not say what model it was trained on"),
    ):
        config_file.write_text(json.dumps(settings | {name: value}))
        with pytest.raises(ValueError, match=message):
            AutoEPTModel.from_pretrained(tmp_path / "adapter")


def test_a_folded_adapter_finds_its_backbone_too(tmp_path):
    model = saved(BACKBONES["classifier"](), tmp_path, all_parts())
    model.fold().save_pretrained(tmp_path / "folded")
    loaded = AutoEPTModel.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(result(loaded), result(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_model_with_a_head_on_the_mean_comes_back_whole_and_is_no_encoder(tmp_path):
    base = MeanPoolingForSequenceClassification(backbone("bert"), 3, "single_label_classification").eval()
    base.save_pretrained(tmp_path)
    again = MeanPoolingForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids(2, 6)).logits, base(input_ids=ids(2, 6)).logits)
    assert again.config.num_labels == 3 and again.config.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match=r"lacks weights of a BertModel.*from_pretrained"):
        MeanPoolingForSequenceClassification.from_encoder(tmp_path, num_labels=3)
