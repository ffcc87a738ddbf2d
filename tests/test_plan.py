"""`ept plan`: what it predicts from a config is what a training step takes, on tiny models of every kind."""

import json

import pytest
import torch
import transformers as hf
from transformers.integrations import sdpa_attention

from ept import EPTConfig, get_ept_model
from ept.cli import main
from ept.inspect.memory import gpu_memory, largest_batch, plan_step
from ept.inspect.storages import StorageCounter
from tiny_models import CONFIGS, VOCAB, all_parts, ids

AUTO = {
    "bert": hf.AutoModelForSequenceClassification,
    "llama": hf.AutoModelForCausalLM,
    "gpt2": hf.AutoModelForCausalLM,
    "t5": hf.AutoModelForSeq2SeqLM,
    "bart": hf.AutoModelForSeq2SeqLM,
}
BATCH, LENGTH = 6, 40


def measured(name: str, dtype: torch.dtype, checkpointing: bool, settings: EPTConfig) -> dict[str, int]:
    """Bytes of a real step: the storages that were alive at once, and what was there before."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.use_cache = False
    model = get_ept_model(AUTO[name].from_config(config, dtype=dtype), settings).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    held = list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    with StorageCounter() as counter:
        batch, mask = ids(BATCH, LENGTH), torch.ones(BATCH, LENGTH, dtype=torch.int64)
        mask[-1, 20:] = 0
        labels = batch.clone() if name != "bert" else torch.zeros(BATCH, dtype=torch.int64)
        model(input_ids=batch, attention_mask=mask, labels=labels).loss.backward()
    return {"peak": counter.peak, "weights": sum(t.nbytes for t in held if not t.requires_grad)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "preset"), [*((name, "all parts") for name in AUTO), ("llama", "default"), ("t5", "default")]
)
def test_the_predicted_peak_is_that_of_a_real_step(name, preset, checkpointing):
    dtype, settings = "bfloat16" if name == "llama" else "float32", EPTConfig() if preset == "default" else all_parts()
    real = measured(name, getattr(torch, dtype), checkpointing, settings)
    planned = plan_step(CONFIGS[name](), settings, batch=BATCH, length=LENGTH, dtype=dtype, checkpointing=checkpointing)
    # On fakes transformers always makes a decoder's causal mask, which is a twentieth of the smallest model here.
    assert planned["activations"] + planned["logits"] == pytest.approx(real["peak"], rel=0.07)
    assert planned["weights"] == pytest.approx(real["weights"], rel=0.001)
    assert planned["peak"] == sum(planned[part] for part in ("weights", "adapter", "activations", "logits"))
    if name == "llama":
        assert planned["logits"] >= BATCH * LENGTH * VOCAB * 4  # the loss is computed in fp32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_presets_updates_keep_a_layers_states_as_they_are_and_q_numbers_a_token(dtype):
    config = hf.BertConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2, pad_token_id=0
    )  # fmt: skip
    settings, batch, length = EPTConfig(), 4, 48
    columns = length + settings.prompt_length

    def of_a_layer(settings, **more):
        activations = []
        for config.num_hidden_layers in (3, 5):
            plan = plan_step(config, settings, batch=batch, length=length, dtype=dtype, **more)
            activations.append(plan["activations"] - 4 * plan["trained"])  # without their gradients
        return (activations[1] - activations[0]) / 2

    size = {"float32": 4, "bfloat16": 2}[dtype]
    states, numbers = batch * columns * 64 * size, batch * columns * settings.token_rank * 4
    bare = of_a_layer(EPTConfig.input_only(prompt_length=settings.prompt_length))
    assert of_a_layer(settings, kernels=True) - bare == pytest.approx(states + numbers, rel=0.05)
    in_torch = states + numbers * (2 if dtype == "float32" else 1)  # torch's own silu keeps what it reads, too
    assert of_a_layer(settings) - bare == pytest.approx(in_torch, rel=0.05)


def test_for_a_gpu_attention_is_planned_without_a_fused_kernel_where_a_masks_numbers_are_apart(monkeypatch):
    """T5's position bias is handed on so up to transformers 5.19. Kept are then, in fp32, scores, query, key and value."""

    def bias_as_it_is(bias, mask, *_):
        return bias if mask is None else torch.where(mask, bias, -1.0)

    monkeypatch.setattr(sdpa_attention, "create_position_bias_mask", bias_as_it_is)
    settings, heads, width = EPTConfig.input_only(), 4, 8

    def of_a_layer(**more):
        activations = []
        for layers in (4, 5):
            config = hf.T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=width, d_ff=64, num_layers=layers, num_decoder_layers=1, num_heads=heads,
                pad_token_id=0, decoder_start_token_id=0,
            )  # fmt: skip
            plan = plan_step(config, settings, batch=BATCH, length=LENGTH, target_length=2, dtype="bfloat16", **more)
            activations.append(plan["activations"])
        return activations[1] - activations[0]

    rows = BATCH * heads * (LENGTH + settings.prompt_length)
    scores, states = rows * (LENGTH + settings.prompt_length), rows * width
    # The mask for each row; query, key, value, result; a number for each row.
    fused = 2 * scores + 4 * 2 * states + 4 * rows
    assert of_a_layer(kernels=True) - of_a_layer() == 4 * scores + 3 * 4 * states - fused


def test_the_largest_batch_fits_and_one_more_by_a_twentieth_does_not():
    def peak(rows):
        return plan_step(CONFIGS["bert"](), EPTConfig(), batch=rows, length=20)["peak"]

    room = peak(40) + 10
    rows = largest_batch(peak, room)
    assert peak(rows) <= room < peak(int(rows * 1.05) + 1)
    assert largest_batch(lambda rows: 100 * rows, 99) == 0 and largest_batch(lambda rows: 100 * rows, 150) == 1
    bent = lambda rows: max(100 * rows, 150 * rows - 1000)  # noqa: E731
    assert 38 <= largest_batch(bent, 5000) <= 40  # of 40, by a chord that lies above the bend


def test_checkpointing_saves_activations_and_half_precision_halves_the_weights():
    config, given = CONFIGS["bert"](), dict(batch=8, length=32)
    plain = plan_step(config, EPTConfig.input_only(), **given)
    assert (
        plan_step(config, EPTConfig.input_only(), **given, checkpointing=True)["activations"]
        < 0.8 * plain["activations"]
    )
    half = plan_step(config, EPTConfig.input_only(), **given, dtype="bfloat16")
    assert half["weights"] < 0.51 * plain["weights"] and half["activations"] < 0.6 * plain["activations"]
    assert plain["adapter"] == 3 * 4 * plain["trained"] == half["adapter"]


def test_quantised_weights_take_their_bits_and_their_scales():
    config = hf.LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )  # fmt: skip
    given = dict(batch=2, length=16)
    whole, eight, four = (
        plan_step(config, EPTConfig.input_only(), **given, dtype=d)["weights"] for d in ("bfloat16", "8bit", "4bit")
    )
    quantised = 2 * (4 * 256 * 256 + 3 * 256 * 512)
    rows = 2 * (5 * 256 + 2 * 512)
    assert whole - eight == quantised - 4 * rows
    assert whole - four == quantised * 3 // 2 - 4 * quantised // 64


def test_the_backbones_config_is_left_as_it_is():
    config = CONFIGS["gpt2"]()
    before = config.to_dict()
    plan_step(config, EPTConfig.input_only(), batch=1, length=4, task="classification", checkpointing=True)
    assert config.to_dict() == before


@pytest.mark.parametrize("said, size", [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("H100", 80 * 10**9)])
def test_a_gpu_is_named_or_given_by_its_memory(said, size):
    assert gpu_memory(said) == size


def plan(*argv) -> int:
    return main(["plan", *map(str, argv)])


def test_the_command_prints_a_table_and_says_what_fits(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["bert"]().to_dict()))
    assert plan("--model", file, "--batch", 4, "--length", 16, "--gpu", "24GB", "--preset", "paper") == 0
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [(row["dtype"], row["checkpointing"]) for row in rows] == [
        (dtype, ck) for dtype in ("float32", "bfloat16", "8bit", "4bit") for ck in (False, True)
    ]
    assert len(table) == 9 and all(row["fits"] for row in rows) and table[0].split()[-2:] == ["fits", "24GB"]
    assert plan("--model", file, "--dtype", "float32", "--gpu", "2GB", "--length", 16, "--largest_batch", "true") == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].endswith("largest batch") and all(row["largest_batch"] > 32 for row in json.loads(last)["rows"])
    assert plan("--model", file, "--dtype", "float32", "--gpu", "1GB", "--batch", 4, "--length", 16) == 0
    # A gigabyte is set aside for the driver's context, so that nothing fits into one.
    assert not any(row["fits"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])


@pytest.mark.parametrize(
    "argv, said",
    [
        (("--gpu", "abacus"), "--gpu abacus is unknown: give its memory (24GB), or one of t4,"),
        (("--length", 64, "--preset", "input"), "length 64 does not fit: the model has positions for 60 tokens"),
        (("--task", "text2text"), "a distilbert writes no text: use the task classification"),
        (("--largest_batch", "true"), "--largest_batch asks what a --gpu holds: give it"),
        (("--batch", 0), "--batch 0 must be at least 1"),
        (("--model", "./nowhere"), "./nowhere: no such directory or file"),
    ],
)
def test_what_cannot_be_planned_is_one_line(argv, said, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["distilbert"]().to_dict()))
    with pytest.raises(SystemExit) as stopped:
        plan("--model", file, *argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
