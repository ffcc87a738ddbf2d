"""How many operations a call adds to the bare model's, and that none waits for the device: counted where no GPU is.

The kernels' launchers are replaced by torch, so that impl="auto" takes the operators on a CPU. How many launches an operator
is, tests/test_repeat.py counts: one forward, at most two backward. Values are not read, as on a GPU.
"""

import copy
from collections import Counter

import pytest
import torch
import transformers as hf
from counted_operations import Operations
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config

from ept import EPTConfig
from ept.layer.folded import fold_layer
from ept.model.inputs import Inputs
from ept.model.routing import Member, OneAdapter
from tiny_models import all_parts, backbone, ids, padded, shake, wrapped

pytest.importorskip("triton")
import ept.model.layout
from ept_kernels import availability

WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


def operations(run):
    with Operations() as counted, torch.no_grad():
        run()
    return counted.names


def waits(names):
    """How often a value is read: transformers asks itself whether a mask is all ones."""
    return sum(name in WAITS for name in names)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The operators of the kernels in place of torch's operations, and no value that can be read without a wait.

    Gradients are of the right shapes and hold anything.
    """
    from ept_kernels.layer_update import checks as layer_checks
    from ept_kernels.layer_update import eager as layer_eager
    from ept_kernels.layer_update import triton_op as layer_op
    from ept_kernels.prompt_columns import eager as columns_eager
    from ept_kernels.prompt_columns import triton_op as columns_op
    from ept_kernels.prompt_embed import checks as embed_checks
    from ept_kernels.prompt_embed import eager, reference, triton_op

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

    def embed_backward(grad_out, grad_gate, text, weights, kept, settings, input_grad):
        return triton_op.triton_backward.empty_grads(text, weights, input_grad)

    def update_backward(grad_out, tensors, z, settings, *wanted):
        return layer_op.triton_backward.empty_grads(tensors, *wanted)

    empty_embed = triton_op.triton_forward.empty_results
    monkeypatch.setattr(availability, "_resolved", lambda impl, device: "triton" if impl == "auto" else impl)
    monkeypatch.setattr(triton_op.triton_forward, "forward", embed)
    monkeypatch.setattr(triton_op.triton_by_row, "forward", embed_by_row)
    monkeypatch.setattr(triton_op.triton_backward, "backward", embed_backward)
    monkeypatch.setattr(layer_op.triton_forward, "forward", update)
    monkeypatch.setattr(layer_op.triton_backward, "backward", update_backward)
    monkeypatch.setattr(columns_op.triton_forward, "forward", columns_eager.prompt_columns)
    for operators in (triton_op, layer_op, columns_op):
        monkeypatch.setattr(operators, "repeat", lambda call, key, function, tensors: function(*tensors))
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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "t5"])
def test_the_same_holds_in_torch(name, preset):
    """In torch each part costs several operations, and a batch has the parts of all its adapters: the dearest one counts."""
    model, batch = with_adapters(name, PRESETS[preset])
    live = check_in_torch(model, batch, len(PRESETS[preset]))
    fold_all(model)
    assert check_in_torch(model, batch, len(PRESETS[preset])) <= live


def check_in_torch(model, batch, kinds):
    """Operations of a mixed batch, which are at most 10 more than the dearest of its adapters takes alone."""
    alone = [count_of(model, batch, [name] * BATCH) for name in model.list_adapters()[:kinds]]
    mixed = {count_of(model, batch, names_of(model, adapters)) for adapters in (max(kinds, 2), 32)}
    assert len(mixed) == 1 and max(mixed) <= max(alone) + 10, (mixed, alone)
    return max(mixed)


def count_of(model, batch, adapters):
    def run():
        return model(**batch, adapter_ids=adapters)

    with torch.no_grad():
        run()  # what is kept is made once
    return len(operations(run))


def fold_all(model):
    model.fold()
    for adapter in model.inactive_adapters:
        adapter.layer = fold_layer(adapter.layer)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_folded_adapter_launches_no_more_than_a_live_one(as_on_a_gpu, name, preset):
    model, batch = with_adapters(name, PRESETS[preset])
    live = [len(operations(lambda: model(**batch))), count_of(model, batch, names_of(model, 8))]
    fold_all(model)
    folded = [len(operations(lambda: model(**batch))), count_of(model, batch, names_of(model, 8))]
    assert folded[0] <= live[0] and folded[1] <= live[1], (folded, live)


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_on_the_left_takes_two_launches_and_no_wait(as_on_a_gpu, preset):
    model = wrapped(MODELS["llama"](), PRESETS[preset][0])
    text, mask = padded([ids(1, n, seed=n) for n in (4, 9, 6)], "left")
    inputs, routing = Inputs(text, attention_mask=mask, labels=text), OneAdapter(Member(model.ept, []))
    with Operations() as counted:
        model._backbone.lay_out(inputs, routing, None, None, {})
    assert counted.names == ["prompt_columns", "prompt_embed"]
    logits = model(text, mask).logits
    for row, tokens in enumerate(text):
        alone = model(tokens[mask[row] == 1][None]).logits[0]
        torch.testing.assert_close(logits[row][mask[row] == 1], alone, rtol=1e-4, atol=1e-5)


# An encoder's mask: where each row's prompt stands, from the padding on the right, and the columns in their new order.
MASK_COLUMNS = {"bitwise_not": 1, "cat": 1, "gather": 2, "ne": 1, "new_full": 1, "sort": 1}
TRAINED = {  # the model of so many layers, the labels of its text, and what the input stage launches before `prompt_embed`
    "bert": (
        lambda layers: backbone("bert", SEQ, num_labels=3, num_hidden_layers=layers),
        lambda text: torch.tensor([0, 1, 2]),
        MASK_COLUMNS,
    ),
    "llama": (lambda layers: backbone("llama", LM, num_hidden_layers=layers), lambda text: text, {"prompt_columns": 1}),
    "t5": (
        lambda layers: backbone("t5", hf.AutoModelForSeq2SeqLM, num_layers=layers, num_decoder_layers=2),
        lambda text: ids(len(text), 2),
        MASK_COLUMNS,
    ),
}


@pytest.mark.parametrize("updates", [2, 5])
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_adds_one_operator_each_way_for_each_layer_and_a_few_for_all(as_on_a_gpu, name, updates):
    make, labels_of, before_embed = TRAINED[name]
    model = wrapped(make(updates + 1), EPTConfig()).train()  # the first layer's is the input stage's
    text, mask = padded([ids(1, n, seed=n) for n in (4, 9, 6)], "left" if name == "llama" else "right")
    labels = labels_of(text)
    forward, backward = operations_of_a_step(lambda: model(text, mask, labels=labels).loss)
    model.zero_grad()
    floor = inputs_of_the_floor(model, text, labels)
    with model.disable_adapter():
        floor_forward, floor_backward = operations_of_a_step(lambda: model.base_model(**floor).loss)
    scaled = {"div": 1, "mul": 1}  # D/h and W·h, of all layers at once
    assert more(forward, floor_forward) == {"layer_update": updates, "prompt_embed": 1} | before_embed | scaled
    assert more(backward, floor_backward) == {
        "layer_update_backward": updates, "prompt_embed_backward": 1, "stack": 2,  # the gradients of all layers' D and W
    } | scaled  # fmt: skip


def operations_of_a_step(loss_of):
    with Operations() as forward:
        loss = loss_of()
    with Operations() as backward:
        loss.backward()
    return Counter(forward.names), Counter(backward.names)


def inputs_of_the_floor(model, text, labels):
    """What the bare backbone gets: ready-made embeddings of EPT's columns that ask for their gradient."""
    rows, columns = len(text), text.shape[1] + model.ept_config.prompt_length
    embeds = torch.zeros(rows, columns, model.config.hidden_size, requires_grad=True)
    mask = torch.ones(rows, columns, dtype=torch.int64)
    mask[0, 0] = 0  # padding somewhere
    inputs = dict(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    if labels is text:  # a causal model's
        inputs |= dict(labels=torch.zeros(rows, columns, dtype=torch.int64), position_ids=mask)
    return inputs


def more(counted, floor):
    """What was counted beyond the floor, and, with a minus, what the floor has beyond that."""
    return {name: counted[name] - floor[name] for name in counted | floor if counted[name] != floor[name]}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("config", "input_stage"), [(EPTConfig.deep(), 1), (all_parts(deep_layers=-1), 2)])
def test_a_token_takes_few_launches(as_on_a_gpu, config, input_stage, fold):
    """The stage before the first layer takes the place of the backbone's look-up; then one launch for each layer's update."""
    model = wrapped(backbone("llama", LM, num_hidden_layers=4), config)
    model = model.fold() if fold else model
    text, mask = padded([ids(1, n, seed=n) for n in (4, 9, 6)], "left")

    def of_a_token(generate):
        settings = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
        few, many = (
            operations(lambda n=n: generate(text, attention_mask=mask, max_new_tokens=n, **settings)) for n in (2, 6)
        )
        return (len(many) - len(few)) / 4, (waits(many) - waits(few)) / 4

    def bare(*args, **kwargs):
        with model.disable_adapter():
            return model.generate(*args, **kwargs)

    (operations_of_ept, waits_of_ept), (operations_of_backbone, waits_of_backbone) = map(
        of_a_token, (model.generate, bare)
    )
    assert operations_of_ept == operations_of_backbone - 1 + input_stage + 3
    assert waits_of_ept == waits_of_backbone


def test_a_token_of_a_mixed_batch_takes_no_more(as_on_a_gpu):
    model, batch = with_adapters("llama", PRESETS["default"])
    settings = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generate(**batch, adapter_ids=names_of(model, 8), max_new_tokens=1, **settings)

    def of_a_token(**adapters):
        few, many = (
            len(operations(lambda n=n: model.generate(**batch, **adapters, max_new_tokens=n, **settings)))
            for n in (2, 6)
        )
        return (many - few) / 4

    assert of_a_token(adapter_ids=names_of(model, 8)) == of_a_token(adapter_ids=names_of(model, 2)) == of_a_token()


@pytest.mark.parametrize(
    ("name", "lengths", "columns"),
    [
        ("bert", [(4, 9, 6)], {}),
        pytest.param("llama", [(4, 9, 6), (7, 5), (3, 11, 2, 8)], {"prompt_columns": 1}, marks=pytest.mark.full),
    ],
)
def test_a_compiled_training_pass_calls_one_operator_for_each_stage(as_on_a_gpu, name, lengths, columns):
    """In changing sizes, too. The backward is traced and not run."""
    model = wrapped(MODELS[name](), EPTConfig()).train()
    forward, backward = [], []

    def keep_in(graphs):
        def compiler(graph, inputs):
            names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            graphs.append(Counter(name.split(".")[1] for name in names if name.startswith("ept_kernels")))
            return make_boxed_func(graph.forward)

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep_in(forward), bw_compiler=keep_in(backward))
    fast = torch.compile(model, fullgraph=True, backend=backend)
    for of_a_batch in lengths:
        text, mask = padded([ids(1, n, seed=n) for n in of_a_batch], "left")
        labels = torch.zeros(len(text), dtype=torch.int64) if name == "bert" else text
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            losses = [run(text, mask, labels=labels).loss for run in (fast, model)]
        assert torch.equal(*losses)
    of_a_pass = {"prompt_embed": 1, "layer_update": 1} | columns
    of_its_backward = {"prompt_embed_backward": 1, "layer_update_backward": 1}
    assert 1 <= len(forward) <= 2
    assert forward == [of_a_pass] * len(forward) and backward == [of_its_backward] * len(forward)


def logits_of(model, batch, count=4):
    with torch.no_grad():
        return model(**batch, adapter_ids=names_of(model, count)).logits


def test_what_is_kept_is_made_anew_when_a_tensor_has_changed():
    model, batch = with_adapters("bert", PRESETS["other sizes"])
    before = logits_of(model, batch)
    assert torch.equal(logits_of(model, batch), before)
    changes = [
        lambda: (model.ept.deep_up.data.copy_(model.ept.deep_up + 1), model.train().eval()),
        lambda: torch.nn.init.normal_(model.inactive_adapters[0].layer.token_up),
        lambda: setattr(model.inactive_adapters[1].layer, "prompt", torch.nn.Parameter(torch.randn(7, 32))),
        lambda: torch.nn.init.normal_(model.inactive_adapters[2].heads[0].weight),
    ]
    for number, change in enumerate(changes):
        with torch.no_grad():
            change()
        after = logits_of(model, batch)
        changed = [
            row for row in range(BATCH) if not torch.allclose(after[row], before[row], atol=1e-6, equal_nan=True)
        ]
        assert changed == [row for row in range(BATCH) if row % 4 == number]
        before = after
    with torch.inference_mode():
        fresh = copy.deepcopy(model)(**batch, adapter_ids=names_of(model, 4)).logits
    assert torch.equal(fresh, before)


def test_what_is_kept_in_inference_mode_serves_a_backward_pass():
    model, batch = with_adapters("bert", PRESETS["default"])
    with torch.inference_mode():
        want = model(**batch, adapter_ids=names_of(model, 4)).logits
    logits = model(**batch, adapter_ids=names_of(model, 4)).logits
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
    logits.isfinite().float()
    logits[logits.isfinite()].sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in trained.values()), trained.keys()
    rows = torch.tensor([row for row in range(BATCH) if row % 4 == 0])  # the active adapter's
    model.zero_grad()
    own = {name: tensor[rows] for name, tensor in batch.items()}
    model(**own).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_adapters_of_several_activations_and_implementations_share_a_batch():
    configs = [all_parts(activation=name, prompt_length=length, impl=impl, deep_layers=-1)
               for name, length, impl in (("silu", 3, "auto"), ("relu", 5, "torch"), ("gelu", 2, "reference"))]  # fmt: skip
    for name in ("bert", "llama"):
        model, batch = with_adapters(name, configs)
        batch = {key: tensor[:6] for key, tensor in batch.items()}
        adapters = names_of(model, 4)[:6]
        with torch.no_grad():
            logits = model(**batch, adapter_ids=adapters).logits
        for row, adapter in enumerate(adapters):
            alone = logits_of_row(model, {key: tensor[row : row + 1] for key, tensor in batch.items()}, adapter)
            torch.testing.assert_close(
                logits[row][batch["attention_mask"][row] == 1] if name == "llama" else logits[row, : alone.shape[-1]],
                alone[batch["attention_mask"][row] == 1] if name == "llama" else alone, rtol=1e-4, atol=1e-5,
            )  # fmt: skip


def logits_of_row(model, batch, adapter):
    with torch.no_grad():
        return model(**batch, adapter_ids=[adapter]).logits[0]


def test_adapters_by_their_places_are_those_by_name():
    model, batch = with_adapters("bert", PRESETS["other sizes"])
    names = names_of(model, 5)
    numbers = torch.tensor([model.list_adapters().index(name) for name in names], dtype=torch.int32)
    with torch.no_grad():
        by_number, by_name = (model(**batch, adapter_ids=adapters).logits for adapters in (numbers, names))
    torch.testing.assert_close(by_number[:, : by_name.shape[1]], by_name)
    model.set_adapter("3")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, adapter_ids=numbers).logits, by_number)
    for adapters, error, words in (
        (numbers + 30, ValueError, "adapters are 0 … 31"),
        (numbers.float(), TypeError, "must hold integers"),
        (numbers[:2], ValueError, "one number per row of 32"),
    ):
        with pytest.raises(error, match=words):
            model(**batch, adapter_ids=adapters)


@pytest.mark.parametrize("name", ["bert", "roberta"])  # heads of one linear map and of two
def test_heads_of_several_dtypes_share_a_batch(name):
    model, batch = with_adapters(name, PRESETS["other sizes"])
    want = logits_of(model, batch)
    model.base_model.bfloat16()  # with the active head alone
    logits = logits_of(model, batch)
    finite = want.isfinite()
    torch.testing.assert_close(logits[finite].float(), want[finite], rtol=0.05, atol=0.02)
