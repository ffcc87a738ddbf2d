"""Training through transformers' trainers: resuming after a kill, what is trained, at which rate, and what is saved."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
import transformers as hf
from counted_operations import Operations
from datasets import Dataset
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from ept import EPTConfig, EPTModel, get_ept_model
from ept.plots import plot_loss, smoothed
from ept.training.checkpoints import last_checkpoint
from ept.training.rates import (
    HEAD_LEARNING_RATE,
    LEARNING_RATE,
    EPTSeq2SeqTrainingArguments,
    EPTTrainingArguments,
    parameter_groups,
)
from ept.training.trainer import EPTSeq2SeqTrainer, EPTTrainer, EPTWritingTrainer
from killed_run import STEPS, Tokenizer
from tiny_models import VOCAB, all_parts, backbone, ids, mean_pooling, padded, wrapped

SEQ = hf.AutoModelForSequenceClassification
# The trainer's switch, by the name that the installed transformers has: the older ones know only the second.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in EPTTrainingArguments.__dataclass_fields__
)


# ---------------------------------------------------------------------- resuming

KILLS = {f"step {n}": [{"kill_at": f"step {n}"}, {"resume": True}] for n in range(2, STEPS)}
for file in ("adapter", "optimizer", "state"):  # in the order in which a checkpoint's files are written
    KILLS[f"{file} 6"] = [{"kill_at": f"{file} 6"}, {"resume": True}]
KILLS["twice"] = [{"kill_at": "step 5"}, {"kill_at": "optimizer 8", "resume": True}, {"resume": True}]
KILLS["while an older whole checkpoint is written over"] = [
    {"kill_at": "step 7"},
    {"kill_at": "optimizer 6", "resume": "checkpoint-4"},
    {"resume": True},
]


def test_a_run_resumed_after_a_kill_ends_with_the_bits_of_one_that_was_not_killed(tmp_path):
    here = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, here / "killed_run.py", tmp_path, json.dumps({"whole": [{}]} | KILLS)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    status = json.loads(process.stdout.splitlines()[-1])
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for name, runs in KILLS.items():
        assert status[name] == [SIGKILL] * (len(runs) - 1) + [0], f"{name}: {process.stderr}"
        resumed = load_file(tmp_path / name / "adapter_model.safetensors")
        assert whole.keys() == resumed.keys()
        for key in whole:
            assert torch.equal(whole[key], resumed[key]), f"{name}: {key}"


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"glob'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_resuming_where_there_is_no_whole_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer(wrapped(backbone("bert", SEQ)), tmp_path).train(True)


# ---------------------------------------------------------------------- the trainer


def rows(n: int = 24, num_labels: int = 2) -> list[dict]:
    """Rows of several lengths whose label is written in their first token."""
    made = []
    for i in range(n):
        row = ids(1, 3 + i % 7, seed=i)[0]
        row[0] = 5 + i % num_labels
        made.append({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % num_labels})
    return made


def trainer(model, directory, *, data=None, evaluated=None, callbacks=(), metrics=None, **settings):
    settings = dict(max_steps=4, per_device_train_batch_size=4, save_strategy="no", logging_steps=1) | settings
    args = EPTTrainingArguments(
        str(directory), disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **settings
    )
    data = rows() if data is None else data
    collator = hf.DataCollatorWithPadding(Tokenizer())
    return EPTTrainer(model, args, collator, data, evaluated, callbacks=list(callbacks), compute_metrics=metrics)


def test_training_lowers_the_loss_and_leaves_the_backbone_bit_identical(tmp_path):
    model = get_ept_model(backbone("bert", SEQ, num_labels=2), all_parts())
    frozen = {n: p.clone() for n, p in model.base_model.named_parameters() if not p.requires_grad}
    before = {n: t.clone() for n, t in model.adapter_tensors().items()}
    run = trainer(model, tmp_path, max_steps=40)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert frozen and all(torch.equal(frozen[n], p) for n, p in model.base_model.named_parameters() if n in frozen)
    assert all(not torch.equal(before[n], t) for n, t in model.adapter_tensors().items())


@pytest.mark.parametrize("steps", [3, 41])
def test_a_run_logs_its_loss_at_least_twenty_times_and_a_short_one_every_step(steps, tmp_path):
    settings = dict(max_steps=steps, per_device_train_batch_size=2, save_strategy="no", report_to="none")
    args = EPTTrainingArguments(str(tmp_path), disable_tqdm=True, use_cpu=True, **settings)
    model = get_ept_model(backbone("bert", SEQ, num_labels=2), all_parts())
    run = EPTTrainer(model, args, hf.DataCollatorWithPadding(Tokenizer()), rows(4))
    run.train()
    losses = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == steps if steps < 20 else 20 <= len(losses) <= 40
    args = EPTTrainingArguments(str(tmp_path), eval_strategy="steps", use_cpu=True)
    assert args.eval_steps == 500 and args.dataloader_pin_memory == torch.cuda.is_available()


def test_the_picture_of_the_loss_has_a_smoothed_line_over_faint_points(tmp_path):
    losses = [float(i % 2) for i in range(60)]
    (axis,) = plot_loss({"EPT": (list(range(60)), losses)}, tmp_path / "loss.png").axes
    line, points = axis.get_lines()[0].get_ydata(), axis.collections[0]
    assert max(line[5:-5]) - min(line[5:-5]) < 0.3 and smoothed([1.0] * 45) == [1.0] * 45
    assert line.mean() == pytest.approx(0.5, abs=0.02)
    assert points.get_offsets()[:, 1].tolist() == losses and points.get_alpha() < 0.5


def test_checkpoints_hold_no_weight_of_the_backbone(tmp_path):
    model = get_ept_model(backbone("roberta", SEQ), all_parts())
    trainer(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    names = set(load_file(checkpoint / "adapter_model.safetensors"))
    assert names == set(model.adapter_tensors())
    assert not any((checkpoint / name).exists() for name in ("model.safetensors", "pytorch_model.bin", "config.json"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Adam keeps two numbers for each trained one; a serialised tensor costs a kilobyte more at most.
    assert (checkpoint / "optimizer.pt").stat().st_size < 2 * 4 * trained + 2000 * 2 * len(names)


@pytest.mark.parametrize("name", ["bert", "bart", "opt"])
def test_the_frozen_backbones_dropout_is_off_in_training(name):
    auto = {"bert": hf.AutoModel, "bart": hf.AutoModelForSeq2SeqLM, "opt": hf.AutoModelForCausalLM}[name]
    model = get_ept_model(backbone(name, auto), all_parts()).train()
    given = {"decoder_input_ids": ids(2, 4)} if name == "bart" else {}
    first, second = (model(ids(2, 9), **given)[0] for _ in range(2))
    assert torch.equal(first, second)
    model = get_ept_model(backbone(name, auto), all_parts(backbone_dropout=True)).train()
    first, second = (model(ids(2, 9), **given)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("make", [lambda: backbone("roberta", SEQ), mean_pooling])
def test_the_parameter_groups_hold_each_trained_tensor_once_at_its_rate(make):
    model = get_ept_model(make(), all_parts())
    rates = dict(up_learning_rate=1.0, prompt_learning_rate=2.0, down_learning_rate=3.0, head_learning_rate=4.0)
    groups = parameter_groups(model, **rates, weight_decay=0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    expected = dict(
        prompt=2.0, lowrank_a=3.0, lowrank_b=1.0, space_down=3.0, space_up=1.0, gate_weight=3.0, token_down=3.0, token_up=1.0
    )  # fmt: skip
    assert {name: rate_of[id(p)] for name, p in model.ept.named_parameters()} == expected
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert decay_of[id(p)] == (0.0 if name.endswith("bias") or name == "ept.prompt" else 0.1), name


def test_the_trainers_arguments_reach_the_groups(tmp_path):
    model = get_ept_model(backbone("bert", SEQ), all_parts())
    run = trainer(model, tmp_path, prompt_learning_rate=0.5, up_learning_rate=0.25, down_learning_rate=0.125)
    groups = run.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == [0.5, 0.25, 0.125, HEAD_LEARNING_RATE]
    head = [p for name, p in model.base_model.named_parameters() if p.requires_grad]  # weights and biases
    assert {id(p) for p in groups[3]["params"]} == {id(p) for p in head} and len(head) > 1
    run = trainer(model, tmp_path, weight_decay=0.1)
    assert [group["weight_decay"] for group in run.create_optimizer().param_groups] == [0.0, 0.1, 0.1, 0.1, 0.0]


@pytest.fixture
def as_on_minilm(monkeypatch):
    """The tokens of a tiny random model differ less than MiniLM's, which would lower the layers' rate."""
    monkeypatch.setattr("ept.backbone.layers.USUAL_SPREAD", 0.1)


PRESETS = {"default": EPTConfig(), "input": EPTConfig.input_only(), "paper": EPTConfig.paper()}


@pytest.mark.parametrize(
    ("preset", "rates"),
    [
        ("default", [0.09, 0.005, 0.005, 0.005]),
        ("input", [0.09, 0.018, 0.001, 0.005, 0.005]),
        ("paper", [0.09, 0.018, 0.001, 0.005, 0.005]),
    ],
)
def test_one_learning_rate_moves_every_part_in_fixed_ratios(as_on_minilm, preset, rates, tmp_path):
    model = get_ept_model(backbone("bert", SEQ), PRESETS[preset])
    groups = parameter_groups(model)
    assert [group["lr"] for group in groups] == rates
    for factor in (0.0, 0.5, 100.0):
        scaled = [group["lr"] for group in parameter_groups(model, learning_rate=factor * LEARNING_RATE)]
        assert scaled == pytest.approx([factor * rate for rate in rates])
        run = trainer(model, tmp_path, learning_rate=factor * LEARNING_RATE, prompt_learning_rate=0.25)
        rate_of = {id(p): group["lr"] for group in run.create_optimizer().param_groups for p in group["params"]}
        expected = [(p, rate) for group, rate in zip(groups, [0.25, *scaled[1:]], strict=True) for p in group["params"]]
        assert [rate_of[id(p)] for p, _ in expected] == pytest.approx([rate for _, rate in expected])


def test_updates_in_layers_learn_more_slowly_where_tokens_differ_little(tmp_path):
    base = backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=3)
    assert get_ept_model(copy.deepcopy(base), EPTConfig()).layer_rate >= 0.9
    table = base.get_input_embeddings().weight
    usual = table.std()
    with torch.no_grad():
        table.add_(5 * usual)  # what the tokens have in common is five times what they differ by
    model = get_ept_model(base, EPTConfig())
    sizes = base(input_ids=torch.arange(3, 99, 3).unsqueeze(0), output_hidden_states=True).hidden_states[1:-1]
    spread = torch.stack([(h - h.mean(1, keepdim=True)).norm() / h.norm() for h in sizes]).median().item()
    assert model.layer_rate == pytest.approx(spread / 0.88, abs=0.1) and model.layer_rate < 0.4
    run = trainer(model, tmp_path, learning_rate=2 * LEARNING_RATE)
    rate_of = {group["parts"][0]: group["lr"] for group in run.create_optimizer().param_groups}
    assert rate_of["deep"] == pytest.approx(2 * LEARNING_RATE * model.layer_rate)
    factor = f"{model.layer_rate:g}"
    assert f"deep {2 * LEARNING_RATE * model.layer_rate:g} ({factor} times the usual" in run.rates_in_words()
    assert parameter_groups(model, deep_learning_rate=0.25)[1]["lr"] == 0.25  # what is given stands
    assert get_ept_model(base, EPTConfig.input_only()).layer_rate == 1.0


def test_parts_of_one_rate_and_decay_are_one_group_of_the_optimiser(as_on_minilm, tmp_path):
    model = get_ept_model(backbone("bert", SEQ), EPTConfig())
    groups = trainer(model, tmp_path).create_optimizer().param_groups
    assert [group["parts"] for group in groups] == [["prompt"], ["deep", "head"]]  # at the default rates, without decay
    separate = parameter_groups(model)
    assert [id(p) for group in groups for p in group["params"]] == [
        id(p) for group in separate for p in group["params"]
    ]
    assert [group["parts"] for group in separate] == [["prompt"], ["deep"], ["head"], ["head"]]


@pytest.mark.parametrize(("usual_spread", "groups"), [(0.1, 2), (100.0, 3)])
def test_a_step_of_the_optimiser_is_one_fused_call_for_each_group(usual_spread, groups, tmp_path, monkeypatch):
    """The layers' updates are a group of their own where tokens differ little, so that they learn more slowly than a head."""
    monkeypatch.setattr("ept.backbone.layers.USUAL_SPREAD", usual_spread)
    model = get_ept_model(backbone("bert", SEQ), EPTConfig())
    assert (model.layer_rate == 1) is (groups == 2)
    optimizer = trainer(model, tmp_path).create_optimizer()
    assert optimizer.defaults["fused"] and len(optimizer.param_groups) == groups
    model(input_ids=ids(2, 5), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()  # makes its state
    with Operations() as counted:
        optimizer.step()
    launched = Counter(name for name in counted.names if not name.startswith("_record_function"))
    assert launched == {"_fused_adamw_": groups, "_foreach_add_": groups}  # the second counts the steps


def test_a_checkpoint_whose_parts_are_in_other_groups_goes_on(as_on_minilm, tmp_path):
    """One of before the groups were merged has a group for each part; the run ends with the same weights."""

    def run(steps):
        torch.manual_seed(0)
        model = get_ept_model(backbone("bert", SEQ), EPTConfig())
        return trainer(model, tmp_path, max_steps=steps, save_strategy="steps", save_steps=2)

    whole = run(4)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    optimizer, schedule = (torch.load(checkpoint / f"{name}.pt") for name in ("optimizer", "scheduler"))
    start, groups = 0, []
    for part in parameter_groups(whole.model):
        indices = list(range(start, start := start + len(part["params"])))
        groups.append(optimizer["param_groups"][0 if part["parts"] == ["prompt"] else 1] | {"params": indices})
        del groups[-1]["parts"]
    by_group = {name: [schedule[name][min(i, 1)] for i in range(4)] for name in ("base_lrs", "_last_lr", "lr_lambdas")}
    torch.save(optimizer | {"param_groups": groups}, checkpoint / "optimizer.pt")
    torch.save(schedule | by_group, checkpoint / "scheduler.pt")
    again = run(4)
    again.train(str(checkpoint))
    for (name, want), got in zip(whole.model.ept.named_parameters(), again.model.ept.parameters(), strict=True):
        assert torch.equal(got, want), name
    assert again.optimizer.param_groups[1]["parts"] == ["deep", "head"]


def test_going_on_with_a_checkpoint_of_other_rates_says_so(as_on_minilm, tmp_path, caplog):
    def run(**settings):
        torch.manual_seed(0)
        model = get_ept_model(backbone("bert", SEQ), EPTConfig())
        return trainer(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **settings)

    run().train()
    checkpoint = str(tmp_path / "checkpoint-2")
    run().train(checkpoint)
    assert "go on" not in caplog.text
    again = run(deep_learning_rate=0.001)
    again.train(checkpoint)
    assert (
        f"in place of those above: deep {LEARNING_RATE:g}" in caplog.text
        and "prompt" not in caplog.text.split("go on")[1]
    )
    assert [group["initial_lr"] for group in again.optimizer.param_groups if "deep" in group["parts"]] == [
        LEARNING_RATE
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_learning_rate_reaches_what_is_trained(preset, tmp_path):
    def trained(rate):
        torch.manual_seed(0)
        model = get_ept_model(backbone("bert", SEQ), PRESETS[preset])
        trainer(model, tmp_path, max_steps=3, learning_rate=rate, save_strategy="no").train()
        return dict(model.ept.named_parameters())

    still, moved = trained(1e-9), trained(0.05)
    assert not any(torch.equal(still[name], moved[name]) for name in still)


def test_the_log_has_the_learning_rate_and_that_of_each_part_where_the_schedule_is(as_on_minilm, tmp_path, caplog):
    model = get_ept_model(backbone("bert", SEQ))
    settings = dict(learning_rate=0.01, head_learning_rate=0.5, lr_scheduler_type="linear", warmup_steps=0)
    run = trainer(model, tmp_path, max_steps=4, logging_steps=1, save_strategy="no", **settings)
    with caplog.at_level("INFO", logger="ept"):
        run.train()
    assert "learning rates: prompt 0.18, deep 0.01, head 0.5" in caplog.messages
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    for share, entry in zip((1, 0.75, 0.5, 0.25), entries, strict=True):
        logged = [entry[f"{name}learning_rate"] for name in ("", "prompt_", "deep_", "head_")]
        assert logged == pytest.approx([0.01 * share, 0.18 * share, 0.01 * share, 0.5 * share])


def test_the_trainer_refuses_a_model_without_an_adapter(tmp_path):
    with pytest.raises(TypeError, match="get_ept_model"):
        trainer(backbone("bert", SEQ), tmp_path)


def test_each_evaluation_logs_the_gates_health(tmp_path):
    run = trainer(wrapped(backbone("bert", SEQ)), tmp_path, evaluated=rows(8), eval_strategy="steps", eval_steps=2)
    run.train()
    logged = [entry for entry in run.state.log_history if "gate_entropy" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert sum(entry[f"gate_mean_{k}"] for k in range(4)) == pytest.approx(1, abs=1e-6)
        assert 0 < entry["gate_entropy"] < 1
    assert "gate_entropy" in run.evaluate()


def test_evaluating_does_not_change_the_training(tmp_path):
    def weights(**settings):
        torch.manual_seed(0)
        model = get_ept_model(backbone("roberta", SEQ), all_parts())
        trainer(model, tmp_path, max_steps=14, evaluated=rows(8), **settings).train()
        return model.adapter_tensors()

    often, never = weights(eval_strategy="steps", eval_steps=1), weights(eval_strategy="no")
    assert all(torch.equal(often[name], never[name]) for name in never)


def test_batches_hold_rows_of_similar_length_in_an_order_that_seed_and_epoch_give(tmp_path):
    data = [{"input_ids": torch.arange(n), "labels": 0} for n in torch.randperm(64).tolist()]
    sampler = trainer(wrapped(backbone("bert", SEQ)), tmp_path, data=data)._get_train_sampler()
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    assert first == again != list(sampler)
    assert sorted(first) == list(range(64))
    lengths = [[len(data[i]["input_ids"]) for i in first[k : k + 4]] for k in range(4, 64, 4)]
    assert sum(max(batch) - min(batch) for batch in lengths) / len(lengths) < 64 / 4


def changed(model, before) -> list[str]:
    """The adapters of which any tensor differs from `before`."""
    return [
        name
        for name, tensors in before.items()
        if any(not torch.equal(t, model.adapter_tensors(name)[key]) for key, t in tensors.items())
    ]


def snapshot(model) -> dict[str, dict[str, torch.Tensor]]:
    return {name: copy.deepcopy(model.adapter_tensors(name)) for name in model.list_adapters()}


@pytest.mark.parametrize("resumes", [False, True])
def test_a_second_training_trains_the_adapter_that_is_active_then(resumes, tmp_path):
    model = get_ept_model(backbone("bert", SEQ, num_labels=2), all_parts())
    model.add_adapter("b", all_parts(prompt_length=3))
    run = trainer(model, tmp_path / "a", save_strategy="steps", save_steps=2)
    before = snapshot(model)
    run.train()
    assert changed(model, before) == ["default"]
    first, before = run.optimizer, snapshot(model)
    run.train()
    assert run.optimizer is first and changed(model, before) == ["default"]  # its state goes on, as in transformers
    model.set_adapter("b")
    run.args.output_dir, before = str(tmp_path / "b"), snapshot(model)
    run.train()
    assert changed(model, before) == ["b"]
    rates = [entry["prompt_learning_rate"] for entry in run.state.log_history if "loss" in entry]
    assert rates[-1] < max(rates) == pytest.approx(run.args.rates()["prompt"])  # the schedule is of the new optimiser
    if resumes:
        trained = snapshot(model)["b"]
        model.set_adapter("default")
        run.args.output_dir = str(tmp_path / "a")
        run.train()
        model.set_adapter("b")
        run.train(str(tmp_path / "b" / "checkpoint-2"))
        assert changed(model, {"b": trained}) == []


def test_a_second_training_of_a_folded_adapter_is_refused(tmp_path):
    model = get_ept_model(backbone("bert", SEQ, num_labels=2), all_parts())
    run = trainer(model, tmp_path, max_steps=1)
    run.train()
    model.fold()
    with pytest.raises(ValueError, match="folded"):
        run.train()


def test_an_optimiser_of_another_adapters_tensors_is_refused_before_the_training(tmp_path):
    model = get_ept_model(backbone("bert", SEQ, num_labels=2), all_parts())
    model.add_adapter("b")
    run = trainer(model, tmp_path, max_steps=2)
    run.optimizer = torch.optim.SGD(model.ept.parameters(), lr=0.1)
    run.train()
    model.set_adapter("b")
    before = snapshot(model)
    with pytest.raises(ValueError, match="no tensor that the active adapter 'b' trains"):
        run.train()
    run.optimizer = run.lr_scheduler = None
    run.train()
    assert changed(model, before) == ["b"]


TEXTS = [{"text": "good film", "label": 1}, {"text": "dull", "label": 0}] * 8


def test_rows_whose_lengths_are_not_known_come_in_random_order(tmp_path):
    def collate(rows):
        return dict(
            input_ids=torch.tensor([[len(row["text"]), 7] for row in rows]), labels=torch.tensor([0] * len(rows))
        )

    some = dict(max_steps=2, remove_unused_columns=False, report_to="none", use_cpu=True, disable_tqdm=True)
    made = EPTTrainer(wrapped(backbone("bert", SEQ)), EPTTrainingArguments(str(tmp_path), **some), collate, TEXTS)
    assert sorted(made._get_train_sampler()) == list(range(16)) != list(made._get_train_sampler())
    made.train()


@pytest.mark.parametrize("make", [list, Dataset.from_list])
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_rows_of_text_without_a_collator_for_them_are_named(make, name, tmp_path):
    arguments = EPTTrainingArguments(str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match=rf"{name}: its rows hold text \(text\) and no input_ids: tokenise them"):
        EPTTrainer(wrapped(backbone("bert", SEQ)), arguments, **{name: make(TEXTS)})


def test_label_smoothing_trains_an_encoder_decoder_and_is_refused_where_its_loss_is_another(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9, 10]}] * 4
    model = wrapped(backbone("t5", hf.AutoModelForSeq2SeqLM))
    smoothed = dict(label_smoothing_factor=0.2, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=1)
    arguments = EPTSeq2SeqTrainingArguments(str(tmp_path), **smoothed)
    made = EPTSeq2SeqTrainer(model, arguments, train_dataset=rows)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8, 9, 10]])}
    logits = model(**batch).logits.log_softmax(-1)[0]
    truth = 0.8 * -logits[range(3), [8, 9, 10]].mean() + 0.2 * -logits.mean()
    torch.testing.assert_close(made.compute_loss(model, batch), truth)
    made.train()
    several = backbone("bert", SEQ)
    several.config.problem_type = "multi_label_classification"
    for base in (backbone("llama", hf.AutoModelForCausalLM), several):
        with pytest.raises(ValueError, match="label_smoothing_factor"):
            EPTTrainer(wrapped(base), EPTTrainingArguments(str(tmp_path), **smoothed))


@pytest.mark.parametrize("name", ["neftune_noise_alpha", "use_liger_kernel"])
@pytest.mark.parametrize("arguments", [EPTTrainingArguments, EPTSeq2SeqTrainingArguments])
def test_arguments_without_effect_are_refused(arguments, name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}. would have no effect"):
        arguments(str(tmp_path), **{name: 5})


def test_a_way_to_generate_that_a_causal_models_answers_do_not_take_is_refused(tmp_path):
    model = get_ept_model(backbone("llama", hf.AutoModelForCausalLM), all_parts())
    arguments = EPTSeq2SeqTrainingArguments(str(tmp_path), generation_num_beams=4, use_cpu=True)
    with pytest.raises(ValueError, match=r"generation_num_beams. would have no effect"):
        EPTWritingTrainer(model, arguments, hf.default_data_collator, rows())


def test_a_training_of_no_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps=0"):
        EPTTrainingArguments(str(tmp_path), max_steps=0)


class Best:
    """Metrics that a test dictates: the n-th evaluation gives the n-th number."""

    def __init__(self, *values):
        self.values = iter(values)

    def __call__(self, _):
        return {"quality": next(self.values)}


BEST = dict(
    eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
    metric_for_best_model="quality", greater_is_better=True,
)  # fmt: skip


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = get_ept_model(backbone("bert", SEQ), all_parts())
    run = trainer(model, tmp_path, max_steps=8, evaluated=rows(4), metrics=Best(1, 3, 2, 0), **BEST)
    run.train()
    saved = load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-8" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in model.adapter_tensors().items())
    assert any(not torch.equal(saved[name], t) for name, t in last.items())


def test_early_stopping_stops(tmp_path):
    model, stop = get_ept_model(backbone("bert", SEQ), all_parts()), hf.EarlyStoppingCallback(2)
    run = trainer(model, tmp_path, max_steps=20, evaluated=rows(4), metrics=Best(1, 3, 2, 1), callbacks=[stop], **BEST)
    run.train()
    assert run.state.global_step == 8


# ---------------------------------------------------------------------- gradients


def gradients(model, batches, **settings) -> dict[str, torch.Tensor]:
    """The trained tensors' gradients after one update's batches, as the trainer makes them."""
    seen = {}

    class Look(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    size = len(batches[0])
    run = trainer(
        model, "unused", data=[row for batch in batches for row in batch], callbacks=[Look()], max_steps=1,
        per_device_train_batch_size=size, gradient_accumulation_steps=len(batches), max_grad_norm=0.0,
        train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    run.train()
    return seen


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_accumulated_gradients_are_those_of_the_big_batch(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = rows(8)
    if kind == "causal":
        for row in data:  # rows of unequal length: a token counts the same in every micro-batch
            row["labels"] = row["input_ids"].clone()

    def model():
        torch.manual_seed(0)
        base = backbone("llama", hf.AutoModelForCausalLM) if kind == "causal" else mean_pooling(num_labels=2)
        return wrapped(base)

    class Pad(Tokenizer):
        def pad(self, features, **given):
            labels = [f["labels"] for f in features]
            batch = super().pad([f | {"labels": 0} for f in features], **given)
            if kind == "causal":
                width = batch["input_ids"].shape[1]
                batch["labels"] = torch.full((len(features), width), -100)
                for i, label in enumerate(labels):
                    batch["labels"][i, : len(label)] = label
            else:
                batch["labels"] = torch.tensor(labels)
            return batch

    monkeypatch.setattr(sys.modules[__name__], "Tokenizer", Pad)
    big = gradients(model(), [data])
    small = gradients(model(), [data[:2], data[2:4], data[4:6], data[6:]])
    assert big.keys() == small.keys() and big
    for name in big:
        # fp32 sums in another order: a few units in the last place of the largest term
        torch.testing.assert_close(small[name], big[name], rtol=1e-4, atol=1e-5 * big[name].abs().max().item())


CHECKPOINTED = {
    "bert": lambda: (backbone("bert", SEQ), dict(labels=torch.tensor([0, 1]))),
    "mean": lambda: (mean_pooling(), dict(labels=torch.tensor([0, 1]))),
    "t5": lambda: (backbone("t5", hf.AutoModelForSeq2SeqLM), dict(labels=ids(2, 5, seed=7))),
    "bart": lambda: (backbone("bart", hf.AutoModelForSeq2SeqLM), dict(labels=ids(2, 5, seed=7))),
    "bart with layer drop": lambda: (
        backbone("bart", hf.AutoModelForSeq2SeqLM, encoder_layerdrop=0.5, decoder_layerdrop=0.5), dict(labels=ids(2, 5, seed=7)),
    ),
    "llama": lambda: (backbone("llama", hf.AutoModelForCausalLM), dict(labels=ids(2, 9, seed=1))),
    "opt": lambda: (backbone("opt", hf.AutoModelForCausalLM), dict(labels=ids(2, 9, seed=1))),
    "gpt2": lambda: (backbone("gpt2", hf.AutoModelForCausalLM), dict(labels=ids(2, 9, seed=1))),
}  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_changes_no_gradient(name, reentrant):
    def grads(checkpointing):
        base, given = CHECKPOINTED[name]()
        model = wrapped(base)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            # What the fused path reads is the table itself; a hook on it would turn that path off.
            assert not base.get_input_embeddings()._forward_hooks
        model.train()
        passes = []
        layer = next(module for module in base.modules() if isinstance(module, GradientCheckpointingLayer))
        inner = next(
            module for module in layer.modules() if isinstance(module, (torch.nn.Linear, hf.pytorch_utils.Conv1D))
        )
        inner.register_forward_pre_hook(lambda *_: passes.append(1))
        batch, mask = padded([ids(1, 9, seed=1), ids(1, 6, seed=2)], "right")
        model(batch, mask, **given).loss.backward()
        assert len(passes) == (2 if checkpointing else 1)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = grads(False), grads(True)
    assert plain.keys() == checkpointed.keys() and len(plain) >= 8
    for key in plain:
        # The same operations; where a tensor feeds several layers, their gradients are summed in another order.
        torch.testing.assert_close(checkpointed[key], plain[key], rtol=1e-5, atol=1e-6 * plain[key].abs().max().item())


def test_the_trainers_own_switch_checkpoints_without_dropout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [row | {"labels": row["input_ids"]} for row in rows(8) if len(row["input_ids"]) == 5] * 2

    class Stack:
        def pad(self, features, **_):
            return {key: torch.stack([f[key] for f in features]) for key in features[0]}

    monkeypatch.setattr(sys.modules[__name__], "Tokenizer", Stack)
    plain, checkpointed = (
        gradients(wrapped(backbone("opt", hf.AutoModelForCausalLM)), [data], **{CHECKPOINTING: switch})
        for switch in (False, True)
    )
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key], rtol=1e-5, atol=1e-6 * plain[key].abs().max().item())


@pytest.mark.parametrize("settings", [dict(bf16=True), {"bf16": True, CHECKPOINTING: True}])
def test_bfloat16_autocast_trains(settings, tmp_path):
    model = get_ept_model(backbone("bert", SEQ, num_labels=2), all_parts())
    run = trainer(model, tmp_path, max_steps=40, **settings)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert all(t.dtype == torch.float32 for t in model.adapter_tensors().values())


def test_a_loaded_adapter_trains_on(tmp_path):
    model = get_ept_model(backbone("bert", SEQ, num_labels=2), all_parts())
    trainer(model, tmp_path).train()
    model.save_pretrained(tmp_path / "adapter")
    loaded = EPTModel.from_pretrained(backbone("bert", SEQ, num_labels=2), tmp_path / "adapter")
    before = {name: t.clone() for name, t in loaded.adapter_tensors().items()}
    assert all(torch.equal(before[name], t) for name, t in model.adapter_tensors().items())
    trainer(loaded, tmp_path).train()
    assert all(not torch.equal(before[name], t) for name, t in loaded.adapter_tensors().items())


def test_text_to_text_trains_and_generates_in_evaluation(tmp_path):
    model = get_ept_model(backbone("t5", hf.AutoModelForSeq2SeqLM, eos_token_id=1), all_parts())
    data = [
        {"input_ids": row[:8], "attention_mask": torch.ones(8).long(), "labels": row[:4]} for row in ids(8, 8, seed=3)
    ]
    generated = []
    args = EPTSeq2SeqTrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, predict_with_generate=True, generation_max_length=6,
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    run = EPTSeq2SeqTrainer(
        model, args, hf.default_data_collator, data, data[:4],
        compute_metrics=lambda p: generated.append(p.predictions) or {},
    )  # fmt: skip
    run.train()
    assert torch.tensor(run.evaluate()["eval_loss"]).isfinite()
    # The decoder's start token and at most five others; transformers pads on to its own length.
    texts = torch.tensor(generated[0])
    assert len(texts) == 4 and texts.max() < VOCAB
    assert (texts[:, 1:6] != 0).any() and (texts[:, 6:] == 0).all()
