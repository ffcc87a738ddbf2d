"""How many operations a call adds to the bare model's, and that none waits for the device: counted where no GPU is.

The kernels' launchers are replaced by torch, so that impl="auto" takes the operators on a CPU: each is one launch on a GPU.
Values are not read, as on a GPU.
"""

import contextlib

import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode

from ept import EPTConfig
from tiny_models import all_parts, backbone, ids, padded, shake, wrapped

pytest.importorskip("triton")
import ept.model.layout
from ept_kernels import availability, layer_update, prompt_columns, prompt_embed

# What moves no data and launches nothing.
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "expand", "narrow", "new_empty", "permute", "reshape", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "lift_fresh",
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


class Operations(TorchDispatchMode):
    """The names of the operations inside, without views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **kwargs or {})


def operations(run):
    with Operations() as counted, torch.no_grad():
        run()
    return counted.names


def waits(names):
    """How often a value is read: transformers asks itself whether a mask is all ones."""
    return sum(name in WAITS for name in names)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The operators of the kernels in place of torch's operations, and no value that can be read without a wait."""
    from ept_kernels.layer_update import eager as layer_eager
    from ept_kernels.layer_update import triton_op as layer_op
    from ept_kernels.prompt_columns import eager as columns_eager
    from ept_kernels.prompt_columns import triton_op as columns_op
    from ept_kernels.prompt_embed import api, eager, reference, triton_op
    from ept_kernels.prompt_embed import checks as embed_checks
    from ept_kernels.layer_update import checks as layer_checks

    def embed(text, weights, settings, save):
        results = empty_embed(text, weights, settings, save)
        start = settings.prompt_start if text.starts is None else text.starts
        prompt, gate = eager.reconstruct_prompt(weights, settings)
        rows = text.source if text.ids is None else text.source[text.ids]
        positions = None if text.mask is None else reference.text_positions(text.mask)
        rows = eager.text_update(rows, positions, weights.of_text(settings.lowrank_update), settings)
        return results._replace(out=eager.insert_prompt(prompt, rows, start), gate=gate)

    def embed_by_row(text, stack, settings):
        start = settings.prompt_start if text.starts is None else text.starts
        rows = text.source if text.ids is None else text.source[text.ids]
        positions = stack.positions if text.mask is None else reference.text_positions(text.mask)
        return eager.prompt_embed_by_row(rows, positions, stack, start, settings, torch.float32)

    def update(tensors, settings, save):
        scale = settings.hidden_scale if tensors.scales is None else tensors.scales
        hidden, down, up, index, _ = tensors
        out = layer_eager.layer_update(hidden, down, up, scale, settings.activation, index)
        return layer_op.triton_forward.empty_results(tensors, save)._replace(out=out)

    empty_embed = triton_op.triton_forward.empty_results
    monkeypatch.setattr(availability, "_resolved", lambda impl, device: "triton" if impl == "auto" else impl)
    monkeypatch.setattr(triton_op.triton_forward, "forward", embed)
    monkeypatch.setattr(triton_op.triton_by_row, "forward", embed_by_row)
    monkeypatch.setattr(layer_op.triton_forward, "forward", update)
    monkeypatch.setattr(columns_op.triton_forward, "forward", columns_eager.prompt_columns)
    for module in (embed_checks, layer_checks, ept.model.layout):
        monkeypatch.setattr(module, "has_readable_values", lambda tensor: False)


SEQ, LM = hf.AutoModelForSequenceClassification, hf.AutoModelForCausalLM
MODELS = {
    "bert": lambda: backbone("bert", SEQ, num_labels=3),
    "roberta": lambda: backbone("roberta", SEQ, num_labels=3),
    "llama": lambda: backbone("llama", LM),
    "llama with a head": lambda: backbone("llama", SEQ, num_labels=3, pad_token_id=0),
    "t5": lambda: backbone("t5", hf.AutoModelForSeq2SeqLM),
}
PRESETS = {
    "default": [EPTConfig()],
    "paper": [EPTConfig.paper(prompt_length=4, rank=3, max_text_length=16)],
    "other sizes": [
        EPTConfig(), all_parts(prompt_length=5, token_rank=3, deep_layers=1), all_parts(prompt_length=7, rank=2),
        all_parts(prompt_length=3, rank=0, num_spaces=0, token_rank=0),
    ],
}  # fmt: skip
ADAPTERS, BATCH = 32, 32


def with_adapters(name, configs):
    """A model of 32 adapters whose configs are given in turn, and a batch of 32 rows."""
    model = wrapped(MODELS[name](), configs[0])
    for number in range(1, ADAPTERS):
        labels = dict(num_labels=2 + number % 3) if model.head_names and len(configs) > 1 else {}
        model.add_adapter(f"{number}", configs[number % len(configs)], **labels)
        shake(type("Holder", (), {"ept": model.inactive_adapters[-1].layer}), seed=number)
    side = "left" if name.startswith("llama") else "right"
    text, mask = padded([ids(1, 9 - row % 3, seed=row) for row in range(BATCH)], side, pad=model.config.pad_token_id)
    batch = dict(input_ids=text, attention_mask=mask)
    return model.eval(), batch | ({"decoder_input_ids": ids(BATCH, 2)} if name == "t5" else {})


def names_of(model, count):
    return [model.list_adapters()[row % count] for row in range(BATCH)]


def check_mixed(name, configs, more):
    model, batch = with_adapters(name, configs)
    counts = {}
    for count in (1, 2, 8, 32):
        def run(count=count):
            return model(**batch, adapter_ids=names_of(model, count)).logits

        with torch.no_grad():
            run()  # what is kept is made once
        names = operations(run)
        assert waits(names) == waits(operations(lambda: model.base_model(**batch)))
        counts[count] = len(names)
    print(counts)
    assert counts[2] == counts[8] == counts[32] <= counts[1] + more, counts
    return counts


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_launches_as_much_whatever_the_number_of_adapters(as_on_a_gpu, name, preset):
    check_mixed(name, PRESETS[preset], 10)
