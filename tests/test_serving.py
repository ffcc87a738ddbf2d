"""What ept fold writes for vLLM, and what the plugin's settings say, without vLLM (tests/in_vllm has the rest)."""

import json
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from ept import EPTConfig, EPTModel
from ept.cli import main
from ept.serving import plugin, settings
from ept.serving.checks import check_release
from ept.serving.served_dir import ServedAdapter
from ept.serving.settings import ADAPTER_VARIABLE, SLOTS_VARIABLE, OneAdapter, Slots
from tiny_models import all_parts, backbone, ids, wrapped

CONFIG = all_parts(deep_layers=1, num_spaces=0)


@pytest.fixture
def trained(tmp_path) -> EPTModel:
    """A tiny Llama with every part that acts in inference; its files are in backbone/ and trained/."""
    backbone("llama", hf.AutoModelForCausalLM).save_pretrained(tmp_path / "backbone")
    model = wrapped(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), CONFIG)
    model.save_pretrained(tmp_path / "trained")
    return model


def fold(tmp_path, name: str = "served") -> int:
    return main(["fold", "--adapter", f"{tmp_path}/trained", "--output_dir", f"{tmp_path}/{name}", "--format", "vllm"])


@pytest.fixture
def variables(monkeypatch):
    """Sets the environment's variables; what was read before is forgotten."""

    def put(**values: str) -> None:
        settings.served.cache_clear()
        for name in (ADAPTER_VARIABLE, SLOTS_VARIABLE):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    yield put
    settings.served.cache_clear()


@torch.no_grad()
def test_the_constants_that_are_written_give_the_models_input_and_updates(trained, tmp_path, capsys):
    assert fold(tmp_path) == 0
    adapter = ServedAdapter.read(tmp_path / "served")
    assert capsys.readouterr().out.strip() == adapter.sha256
    tensors = adapter.tensors(tmp_path / "served")
    rows, text = tensors["model.layers.0.ept_rows.lora_A.weight"], ids(1, 9)
    s = tensors["model.layers.0.ept_rows.lora_B.weight"].shape[1]
    assert (s, len(rows)) == (adapter.prompt_rows, adapter.rows) == (5, 5 + 16)

    def updated(number: int, x: torch.Tensor) -> torch.Tensor:
        down, up = (tensors[f"model.layers.{number}.ept_update.lora_{part}.weight"] for part in "AB")
        return x + torch.nn.functional.silu(x @ down.T) @ up.T

    embeds = updated(0, trained.base_model.get_input_embeddings()(text)[0])
    embeds = torch.cat([rows[:s], embeds + rows[s : s + text.shape[1]]])
    torch.testing.assert_close(first_layer_input(trained, text), embeds)
    hidden = torch.randn(1, 3, 32)
    torch.testing.assert_close(trained.ept.layer_updates().apply(0, hidden)[0], updated(1, hidden[0]))


def first_layer_input(model: EPTModel, text: torch.Tensor) -> torch.Tensor:
    """[s + L, d] what the first layer reads."""
    return model.ept(text, None, model.base_model.get_input_embeddings().weight)[0]


def test_the_same_adapter_has_the_same_hash_and_another_has_another(trained, tmp_path, capsys):
    assert fold(tmp_path, "once") == fold(tmp_path, "again") == 0
    with torch.no_grad():
        trained.ept.token_up[0, 0] += 1e-3
    trained.save_pretrained(tmp_path / "trained")
    assert fold(tmp_path, "other") == 0
    once, again, other = (ServedAdapter.read(tmp_path / name).sha256 for name in ("once", "again", "other"))
    assert once == again != other


def test_the_files_are_a_lora_adapters_to_vllm_and_nobodys_to_others(trained, tmp_path):
    assert fold(tmp_path) == 0
    config = json.loads((tmp_path / "served/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6 and "peft_type" not in config
    names = load_file(tmp_path / "served/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    with pytest.raises(ValueError, match="is not an EPT adapter"):
        EPTModel.from_pretrained(backbone("llama", hf.AutoModelForCausalLM), tmp_path / "served")


def test_a_backbone_that_the_plugin_has_no_model_for_is_refused_in_one_line(tmp_path, capsys):
    backbone("gpt2", hf.AutoModelForCausalLM).save_pretrained(tmp_path / "backbone")
    model = wrapped(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), EPTConfig(rank=0, num_spaces=0))
    model.save_pretrained(tmp_path / "trained")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        fold(tmp_path)
    error = capsys.readouterr().err.splitlines()
    assert (
        error[-1].startswith("ept fold: error: ")
        and "the adapter is for GPT2LMHeadModel, and vLLM's plugin serves Llama" in error[-1]
    )
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"r": 8}'), "fold --format vllm writes it"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "is not the file that"),
    ],
)
def test_a_damaged_directory_is_refused(trained, tmp_path, change, message):
    assert fold(tmp_path) == 0
    change(tmp_path / "served")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ServedAdapter.read(tmp_path / "served")


def test_the_environment_says_what_is_served(trained, tmp_path, variables):
    assert fold(tmp_path) == 0
    variables()
    assert plugin.register() is None and ("vllm" not in sys.modules or not settings.is_asked_for())
    variables(**{ADAPTER_VARIABLE: str(tmp_path / "served")})
    one = settings.served()
    assert isinstance(one, OneAdapter) and one.adapter.updated_layers == (0, 1)
    variables(**{SLOTS_VARIABLE: '{"rows": 21, "rank": 6}'})
    assert settings.served() == Slots(21, 6)
    for text in ("21", '{"rows": 21}', '{"rows": 21, "rank": 0}', '{"rows": 21, "rank": 6, "more": 1}'):
        variables(**{SLOTS_VARIABLE: text})
        with pytest.raises(ValueError, match="cannot be read"):
            settings.served()
    variables(**{SLOTS_VARIABLE: '{"rows": 21, "rank": 6}', ADAPTER_VARIABLE: "somewhere"})
    with pytest.raises(ValueError, match="set one of"):
        settings.served()


def test_what_does_not_fit_is_refused_before_it_is_loaded(trained, tmp_path):
    assert fold(tmp_path) == 0
    adapter = ServedAdapter.read(tmp_path / "served")
    Slots(21, 6).check(adapter, "mine")
    for slots, message in ((Slots(20, 6), "has rows 21"), (Slots(21, 5), "has rank 6")):
        with pytest.raises(ValueError, match=message):
            slots.check(adapter, "mine")
    model = dict(architecture="LlamaForCausalLM", classifies=False, hidden_size=32, layers=2)
    adapter.check_model("mine", **model)
    for change, message in (
        (dict(layers=3), "belongs to another backbone: num_hidden_layers was 2, here it is 3"),
        (dict(architecture="Qwen3ForCausalLM"), "the architecture was LlamaForCausalLM, here it is Qwen3ForCausalLM"),
        (dict(architecture="MistralForCausalLM"), "the architecture was LlamaForCausalLM, here it is None"),
        (dict(classifies=True), "is for a model that writes text, and this engine is a classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.check_model("mine", **model | change)


def test_releases_of_vllm_that_were_not_tested_are_refused():
    check_release("0.32.0")
    for version in ("0.31.2", "0.33.0", "0.3.2"):
        with pytest.raises(RuntimeError, match="and this is"):
            check_release(version)
