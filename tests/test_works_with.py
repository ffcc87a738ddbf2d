"""EPTModel in the hands of transformers' trainers, TRL, accelerate, torch.compile and quantised backbones."""

import copy
import inspect
import types

import pytest
import torch
import transformers as hf
from test_generation import tokenizer
from torch import nn

from ept import EPTModel
from ept.training import EPTTrainer, EPTTrainingArguments
from tiny_models import all_parts, backbone, ids, mean_pooling, shake, wrapped

SMALL = dict(
    max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no", learning_rate=0.05
)


def rows(number=8):
    return [
        {"input_ids": ids(1, 6, seed=i)[0].tolist(), "labels": ids(1, 4, seed=i)[0].tolist()} for i in range(number)
    ]


def trained(model, trainer):
    """Runs the trainer; whether the adapter moved and the backbone did not."""
    adapter = {name: p.clone() for name, p in model.ept.named_parameters()}
    frozen = {name: p.clone() for name, p in model.base_model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in model.base_model.named_parameters())
    return all(not torch.equal(p, adapter[name]) for name, p in model.ept.named_parameters())


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_transformers_own_trainers_train_evaluate_and_generate(kind, tmp_path):
    seq2seq = kind == "t5"
    model = wrapped(backbone(kind, hf.AutoModelForSeq2SeqLM if seq2seq else hf.AutoModelForCausalLM))
    model.base_model.generation_config.max_new_tokens = 4
    data = rows()
    if not seq2seq:
        data = [row | {"labels": row["input_ids"]} for row in data]
    trainer = hf.Seq2SeqTrainer(
        model,
        hf.Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, **SMALL),
        train_dataset=data, eval_dataset=data[:2], data_collator=hf.default_data_collator,
    )  # fmt: skip
    assert trained(model, trainer)
    out = trainer.predict(data[:2])
    want = model.eval().generate(torch.tensor([row["input_ids"] for row in data[:2]]), do_sample=False)
    assert out.predictions[:, : want.shape[1]].tolist() == want.tolist()


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_plain_trainer_saves_and_resumes_a_model_with_tied_weights(kind, tmp_path):
    auto = hf.AutoModelForSeq2SeqLM if kind == "t5" else hf.AutoModelForCausalLM
    data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8
    settings = SMALL | dict(save_strategy="steps", save_steps=2, max_steps=4, disable_tqdm=True)

    def trainer(where):
        model = wrapped(backbone(kind, auto, tie_word_embeddings=True))
        return hf.Trainer(model, hf.TrainingArguments(str(where), **settings), train_dataset=data)

    whole, resumed = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, one), other in zip(whole.model.ept.named_parameters(), resumed.model.ept.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_a_state_dict_names_a_tied_tensor_once_and_loads_strictly():
    model = wrapped(backbone("gpt2", hf.AutoModelForCausalLM, tie_word_embeddings=True))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "base_model.transformer.wte.weight" in state and "base_model.lm_head.weight" not in state
    other = wrapped(backbone("gpt2", hf.AutoModelForCausalLM, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(ids(2, 6)).logits, model(ids(2, 6)).logits)
    other.load_state_dict(state | {"base_model.lm_head.weight": state["base_model.transformer.wte.weight"]})
    untied = wrapped(backbone("llama", hf.AutoModelForCausalLM, tie_word_embeddings=False))
    assert "base_model.lm_head.weight" in untied.state_dict()


KEPT = {  # what the wrapped model takes, beside input_ids and labels
    "bart": (lambda: backbone("bart", hf.AutoModelForSeq2SeqLM), {"decoder_input_ids": [50, 8]}),
    "layoutlm": (lambda: hf.LayoutLMForTokenClassification(hf.LayoutLMConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )), {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]]}),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("trainer", [hf.Trainer, EPTTrainer])
def test_a_trainer_keeps_the_columns_that_the_wrapped_model_takes(name, trainer, tmp_path):
    datasets = pytest.importorskip("datasets")
    make, columns = KEPT[name]
    torch.manual_seed(0)
    model = wrapped(make().eval())
    row = dict(input_ids=[5, 6], labels=[0, 1], unknown=[1, 2]) | columns
    arguments = EPTTrainingArguments if trainer is EPTTrainer else hf.TrainingArguments
    data = datasets.Dataset.from_list([row] * 2)
    made = trainer(model, arguments(str(tmp_path), **SMALL), train_dataset=data, eval_dataset=data)
    assert set(next(iter(made.get_train_dataloader()))) == {"input_ids", "labels", *columns}
    with torch.no_grad():
        want = model(**{key: torch.tensor([value]) for key, value in row.items() if key != "unknown"}).loss
    assert made.evaluate()["eval_loss"] == pytest.approx(want.item(), rel=1e-3)


def test_the_signature_names_what_the_wrapped_model_takes_and_copies_keep_it():
    model = wrapped(mean_pooling())
    names = inspect.signature(model.forward).parameters
    assert list(names)[:3] == ["input_ids", "attention_mask", "token_type_ids"] and list(names)[-1] == "kwargs"
    assert {"pooling_mask", "adapter_ids"} <= set(names) and "self" not in names
    assert "decoder_input_ids" in inspect.signature(wrapped(backbone("bart")).forward).parameters
    other = copy.deepcopy(model)
    assert other.forward.__self__ is other and "pooling_mask" not in inspect.signature(EPTModel.forward).parameters


def test_an_offloaded_table_of_words_is_looked_up_through_its_module(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    places = dict.fromkeys(("model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= dict.fromkeys(("model.embed_tokens", "model.layers.1"), "disk")

    def make():
        return backbone("llama", hf.AutoModelForCausalLM)

    base = accelerate.dispatch_model(make(), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert base.get_input_embeddings().weight.is_meta
    offloaded, plain = (wrapped(each, all_parts(deep_layers=-1)) for each in (base, make()))
    text = ids(2, 6)
    assert offloaded.ept_config == plain.ept_config and torch.equal(offloaded.ept.deep_scale, plain.ept.deep_scale)
    with torch.no_grad():
        want = plain(text, labels=text)
        torch.testing.assert_close(offloaded(text, labels=text).logits, want.logits)
    settings = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(offloaded.generate(text, **settings), plain.generate(text, **settings))
    offloaded.save_pretrained(tmp_path / "adapter")
    EPTModel.from_pretrained(make(), tmp_path / "adapter")  # the same words


def test_trls_sft_trainer_trains_with_and_without_packing(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: make test-interop")
    datasets = pytest.importorskip("datasets")

    class Trainer(trl.SFTTrainer):  # docs/generation.md says why
        compute_loss = hf.Trainer.compute_loss

    text = datasets.Dataset.from_list(
        [{"text": " ".join(f"w{7 + i * j % 50}" for j in range(3 + i % 5))} for i in range(8)]
    )
    losses = {}
    for packing in (False, True):
        model = wrapped(backbone("llama", hf.AutoModelForCausalLM)).train()
        settings = dict(packing=packing, padding_free=packing, max_length=32, logging_steps=1, bf16=False)
        trainer = Trainer(model, trl.SFTConfig(str(tmp_path), **SMALL, **settings), train_dataset=text,
                          processing_class=tokenizer())  # fmt: skip
        assert trained(model, trainer)
        losses[packing] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(loss > 0 for run in losses.values() for loss in run)


def test_accelerate_prepares_the_model_and_steps():
    accelerate = pytest.importorskip("accelerate")
    model = wrapped(backbone("llama", hf.AutoModelForCausalLM))
    row = ids(2, 6)
    want = model(row, labels=row).loss
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    loss = prepared(row, labels=row).loss
    torch.testing.assert_close(loss, want)
    accelerator.backward(loss)
    optimizer.step()
    assert prepared(row, labels=row).loss < want
    assert accelerator.unwrap_model(prepared) is model


def test_a_compiled_backbone_gives_the_same_logits_and_gradients():
    model = wrapped(backbone("llama", hf.AutoModelForCausalLM, num_hidden_layers=1))
    row = ids(2, 6)
    parameters = list(model.ept.parameters())
    want = model(row, labels=row)
    want_grads = torch.autograd.grad(want.loss, parameters)
    model.base_model.compile(backend="aot_eager")
    got = model(row, labels=row)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(got.loss, parameters), want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("packed", [False, True])
def test_checkpointed_activations_give_equal_gradients(packed):
    row = ids(2, 6)
    positions = dict(position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]])) if packed else {}
    grads = []
    for on in (False, True):
        model = wrapped(backbone("llama", hf.AutoModelForCausalLM)).train()
        if on:
            model.activation_checkpointing_enable()
        loss = model(row, labels=row, **positions).loss
        grads.append(torch.autograd.grad(loss, list(model.ept.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


HEADS = ["classifier", "lm_head"]  # not quantised


def quantised(library):
    """transformers' settings for frozen weights in a library's 8 or 4 bits; skips where it is not installed."""
    name = library.split()[0]
    pytest.importorskip(name, reason=f"{name} is not installed: make test-interop")
    if name == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return hf.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=HEADS)
    if library.endswith("4 bits"):
        return hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=HEADS)
    return hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS)


@pytest.mark.parametrize("name, library", [
    ("llama", "torchao 8 bits"), ("bert", "torchao 8 bits"), ("llama", "bitsandbytes 8 bits"),
    ("bert", "bitsandbytes 8 bits"), ("llama", "bitsandbytes 4 bits"), ("bert", "bitsandbytes 4 bits"),
])  # fmt: skip
def test_a_quantised_backbone_trains_and_stays_as_it_is(name, library, tmp_path):
    quantization_config = quantised(library)
    head = hf.AutoModelForCausalLM if name == "llama" else hf.AutoModelForSequenceClassification
    wide_enough_for_4_bits = dict(hidden_size=128, intermediate_size=128, head_dim=32)
    backbone(name, head, **wide_enough_for_4_bits).save_pretrained(tmp_path)
    base = head.from_pretrained(tmp_path, quantization_config=quantization_config)
    row = ids(2, 6)
    frozen = base(row).logits
    model = wrapped(base, all_parts())
    labels = row if name == "llama" else torch.tensor([0, 1])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(row, labels=labels).loss
    before.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.ept.parameters())
    optimizer.step()
    assert model(row, labels=labels).loss < before
    with model.disable_adapter():
        assert torch.equal(model(row).logits, frozen) == (name == "llama")  # a head is trained with the adapter


def test_4_bit_weights_that_are_packed_for_inference_are_refused():
    base = backbone("llama", hf.AutoModelForCausalLM)
    packed = base.model.layers[0].mlp.up_proj  # as bitsandbytes' Linear4bit on a CPU after a pass without gradients
    packed.support_avx512bf16_for_cpu = True
    wrapped(base)
    assert packed.support_avx512bf16_for_cpu is False
    packed.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match="up_proj for inference on a CPU"):
        wrapped(base)


class Int8Linear(nn.Module):
    """A stand-in with the interface of bitsandbytes' Linear8bitLt: int8 weight [out, in], its scales, no gradient."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_an_8_bit_backbone_trains_and_generates():
    base = backbone("llama", hf.AutoModelForCausalLM)
    for layer in base.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Int8Linear(child))
    base.is_loaded_in_8bit = True
    model = wrapped(base, all_parts())
    row = ids(2, 6)
    before = model(row, labels=row).loss
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before.backward()
    optimizer.step()
    assert model(row, labels=row).loss < before
    model.base_model.generation_config.eos_token_id = None
    out = model.generate(row, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(out).logits.argmax(-1)[:, 5:-1], out[:, 6:])
    model.add_adapter("b", all_parts(prompt_length=3))
    model.set_adapter("b")
    shake(model)
    assert not torch.equal(model(row).logits, model(row, adapter_ids=["default"] * 2).logits)
