"""Which type a backbone's weights are loaded in, and which attention, on a CPU with or without bfloat16 instructions."""

import pytest
import torch
from transformers import AutoModel

from ept.backbone import precision
from ept.backbone.loading import load_classifier
from ept.backbone.precision import cpu_has_bfloat16, on_cpu
from tiny_models import backbone


@pytest.mark.parametrize("dtype, saved, has_bfloat16, expected", [
    ("auto", torch.float32, True, ("auto", None)),
    ("auto", torch.bfloat16, True, ("bfloat16", "eager")),
    ("auto", torch.bfloat16, False, ("float32", None)),
    ("bfloat16", None, True, ("bfloat16", "eager")),
    ("bfloat16", None, False, ("bfloat16", "eager")),
    ("float32", torch.bfloat16, True, ("float32", None)),
    ("float16", torch.bfloat16, False, ("float16", None)),
])  # fmt: skip
def test_a_cpu_gets_the_type_that_it_computes_fast_and_a_wish_stands(dtype, saved, has_bfloat16, expected):
    chosen = on_cpu(dtype, saved, has_bfloat16=has_bfloat16)
    assert chosen[:2] == expected
    slow = dtype == "bfloat16" and not has_bfloat16
    assert ("warning" in (chosen.remark or "")) == slow and (chosen.remark is None) == (
        chosen[0] == dtype != "bfloat16"
    )


@pytest.mark.parametrize("capabilities, expected", [
    ({"avx512_bf16": True, "amx_bf16": False, "num_logical_cores": 2}, True),
    ({"bf16": True, "neon": True}, True),
    ({"avx2": True, "avx512_bf16": False, "cpu_name": "bf16"}, False),
])  # fmt: skip
def test_bfloat16_instructions_are_known_by_the_cpus_flags(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu_has_bfloat16() == expected


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the choice is a CPU's")
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_checkpoint_in_bfloat16_is_loaded_in_what_is_fast_and_it_is_said_once(
    has_bfloat16, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_bfloat16)
    precision._say_once.cache_clear()
    backbone("bert", AutoModel).to(torch.bfloat16).save_pretrained(tmp_path)
    for head in ("mean", "first"):
        model = load_classifier(str(tmp_path), 2, "single_label_classification", head=head)
        assert model.config._attn_implementation == ("eager" if has_bfloat16 else "sdpa")
        assert next(model.parameters()).dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert capsys.readouterr().err.count("bfloat16 instructions") == 1
