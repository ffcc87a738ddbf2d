"""One model serves several threads: each gets the bits that it gets alone, and nothing changes on the backbone they share.

Threads meet at a barrier in the middle of their calls, so that all calls are open at once; a short switch interval mixes
them everywhere else.
"""

import contextlib
import copy
import functools
import io
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ept import EPTModel, get_ept_model
from ept.files.adapter_dir import read_adapter
from ept.model import lock
from tiny_models import all_parts, backbone, ids, mean_pooling, padded, wrapped

PATIENCE = 600  # seconds; a safety net alone: nothing here waits for a clock
GENERATION = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
SEQ, LM = hf.AutoModelForSequenceClassification, hf.AutoModelForCausalLM

BACKBONES = {  # how it is made, and a late layer
    "first token": (lambda n: backbone("bert", SEQ, num_hidden_layers=3, num_labels=n), "bert.encoder.layer.2"),
    "mean": (lambda n: mean_pooling(num_labels=n), "encoder.encoder.layer.1"),
    "tokens": (
        lambda n: backbone("bert", hf.AutoModelForTokenClassification, num_hidden_layers=3, num_labels=n),
        "bert.encoder.layer.2",
    ),
    "pooled": (
        lambda n: backbone("llama", SEQ, num_hidden_layers=3, num_labels=n, pad_token_id=0),
        "model.layers.2",
    ),
    "causal": (lambda n: backbone("llama", LM, num_hidden_layers=3), "model.layers.2"),
    "t5": (lambda n: backbone("t5", hf.AutoModelForSeq2SeqLM), "decoder.block.1"),
}
GENERATING = ("causal", "t5")
CLASSIFYING = tuple(name for name in BACKBONES if name not in GENERATING)
ADAPTERS = {  # beside "default", which has 3 labels, and "folded", which has 4
    "flat": (all_parts(prompt_length=3, token_rank=0), 5),
    "shallow": (all_parts(deep_layers=1), 2),
}
MIXED = ["flat", "default", "folded", "shallow"]


@pytest.fixture(autouse=True)
def threads_are_switched_often():
    interval, torch_threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(torch_threads)


class Inside:
    """Runs, once and in the middle of its next pass, what a thread has asked for."""

    def __init__(self, layer: torch.nn.Module):
        self.of_thread = threading.local()
        layer.register_forward_pre_hook(lambda *_: self.run())

    def __call__(self, action: Callable[[], object]) -> None:
        self.of_thread.action = action

    def run(self) -> None:
        action, self.of_thread.action = getattr(self.of_thread, "action", None), None
        if action is not None:
            action()


class Served:
    """A model with four adapters (one of them folded), and another EPTModel around the same backbone."""

    def __init__(self, kind: str, folded):
        make, late = BACKBONES[kind]
        self.kind, self.folded = kind, folded
        self.model = wrapped(make(3), all_parts(deep_layers=-1))
        self.base = self.model.base_model
        self.inside = Inside(self.base.get_submodule(late))
        classifies = kind in CLASSIFYING
        for name, (config, labels) in ADAPTERS.items():
            self.model.add_adapter(name, config, **({"num_labels": labels} if classifies else {}))
        self.model.load_adapter(folded, "folded")
        for seed, name in enumerate(["flat", "shallow", "default"]):
            self.model.set_adapter(name)
            randomise(self.model, seed)
        self.other = get_ept_model(self.base, all_parts(prompt_length=2, deep_layers=-1)).eval()
        randomise(self.other, 7)
        if kind in GENERATING:
            self.base.generation_config.eos_token_id = None
            self.base.generation_config.pad_token_id = 0

    def text(self, seed: int, rows: int = 4) -> dict[str, Tensor]:
        lengths = [9, 4, 6, 7, 5][:rows]
        batch, mask = padded([ids(1, n, seed=seed + n) for n in lengths], "left" if self.kind == "causal" else "right")
        return dict(input_ids=batch, attention_mask=mask)

    def passes(self) -> dict[str, Callable[[], Tensor]]:
        """Forward passes of every sort, each with a text of its own."""
        model, decoder = self.model, (lambda n: dict(decoder_input_ids=ids(n, 3)) if self.kind == "t5" else {})

        def run(seed, adapter_ids=None, of=model, rows=4, **inputs):
            given = {} if adapter_ids is None else dict(adapter_ids=adapter_ids)
            inputs = inputs or self.text(seed, rows)
            with torch.no_grad():
                return of(**inputs, **decoder(len(inputs["input_ids"])), **given).logits

        def disabled(seed):
            with model.disable_adapter():
                return run(seed, rows=3)

        calls = {
            name: lambda name=name: run(len(name), [name] * 4) for name in ["default", "flat", "shallow", "folded"]
        }
        calls |= {
            "active": lambda: run(11),
            "mixed": lambda: run(12, MIXED),
            "mixed, in another order": lambda: run(13, ["shallow", "folded", "flat"], rows=3),
            "of one shape": lambda: run(14, ["default", "shallow", "default", "shallow", "shallow"], rows=5),
            "disabled": lambda: disabled(15),
            "bare": lambda: run(16, of=self.base, rows=2),
            "of the other model": lambda: run(17, of=self.other),
        }
        if self.kind == "causal":
            packed = dict(input_ids=ids(2, 8), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2))
            calls["packed"] = lambda: run(0, ["flat", "default"], **packed)
            calls["continued"] = self.continued
        return calls

    @functools.cached_property
    def alone(self) -> dict:
        """What each pass gives where no other call runs."""
        return alone(self.passes())

    @functools.cached_property
    def generated_alone(self) -> dict:
        return alone(self.generations())

    def continued(self) -> Tensor:
        """Logits of the second half of a text, on a cache of the first."""
        text, cache, names = ids(2, 9), hf.DynamicCache(config=self.model.config), ["shallow", "flat"]
        with torch.no_grad():
            self.model(input_ids=text[:, :5], past_key_values=cache, adapter_ids=names)
            return self.model(input_ids=text[:, 5:], past_key_values=cache, adapter_ids=names).logits

    def generations(self, **settings) -> dict[str, Callable[[], list[Tensor]]]:
        """Generation of every sort, each from a text of its own: the sequences and the logits of each step."""

        def run(seed, adapter_ids=None, of=self.model, rows=4, **more):
            given = {} if adapter_ids is None else dict(adapter_ids=adapter_ids)
            out = of.generate(**self.text(seed, rows), **GENERATION, **settings, **given, **more)
            return [out.sequences, *out.logits]

        def disabled():
            with self.model.disable_adapter():
                return run(7, rows=3)

        static, beams = dict(cache_implementation="static"), dict(num_beams=2)
        return {
            "active": lambda: run(1),
            "flat": lambda: run(2, ["flat"] * 4),
            "folded": lambda: run(3, ["folded"] * 2, rows=2),
            "mixed": lambda: run(4, MIXED),
            "mixed, static cache": lambda: run(5, MIXED[::-1], **static),
            "mixed, beams": lambda: run(6, MIXED, **beams),
            "mixed, beams, static cache": lambda: run(7, ["shallow", "flat"], rows=2, **beams, **static),
            "without a cache": lambda: run(8, ["default", "flat"], rows=2, use_cache=False),
            "disabled": disabled,
            "bare": lambda: run(9, of=self.base, rows=2),
            "of the other model": lambda: run(10, of=self.other),
        }


@torch.no_grad()
def randomise(model: EPTModel, seed: int) -> None:
    """Moves every tensor that trains away from its start value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """Directories of a folded adapter with 4 labels, by backbone."""
    directories = {}
    for kind, (make, _) in BACKBONES.items():
        directories[kind] = tmp_path_factory.mktemp("folded")
        model = wrapped(make(4), all_parts(prompt_length=4, deep_layers=-1))
        randomise(model, 5)
        model.fold().save_pretrained(directories[kind])
    return directories


@pytest.fixture(scope="module")
def served(folded):
    """Models by kind, made once: for tests that leave them as they are."""
    made = {}

    def get(kind: str) -> Served:
        if kind not in made:
            made[kind] = Served(kind, folded[kind])
        return made[kind]

    return get


def in_threads(jobs: list[Callable[[], object]], barrier: threading.Barrier | None = None) -> list:
    """Results of jobs that start together, each in a thread of its own; the first error, if there is any, is raised."""
    start, results, errors = threading.Barrier(len(jobs)), [None] * len(jobs), []

    def run(number: int) -> None:
        try:
            start.wait(PATIENCE)
            results[number] = jobs[number]()
        except BaseException as error:
            errors.append(error)
            if barrier is not None:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread does not come back"
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return results


def same(got, want) -> bool:
    """Whether tensors, or lists of them, are equal to the bit."""
    if isinstance(want, Tensor):
        return torch.equal(got, want)
    return len(got) == len(want) and all(map(torch.equal, got, want))


def alone(calls: dict[str, Callable]) -> dict:
    """What each call gives where no other runs; first it is seen that one thread gives the same bits twice."""
    for call in calls.values():
        call()  # a static cache is as wide as the widest that the backbone has had
    results = {name: call() for name, call in calls.items()}
    for name, call in calls.items():
        assert same(call(), results[name]), f"{name}: one thread does not give the same bits twice"
    return results


def assert_same(results: list, calls: dict, want: dict) -> None:
    wrong = [name for name, result in zip(calls, results, strict=True) if not same(result, want[name])]
    assert not wrong, f"other results than alone: {wrong}"


def state(base: torch.nn.Module) -> dict:
    """What is on the modules of a backbone: which they are, their hooks, mode and parameters, and the head's labels."""
    modules = {
        name: (
            id(module), len(module._forward_hooks), len(module._forward_pre_hooks), module.training,
            "forward" in vars(module), [id(parameter) for parameter in module.parameters(recurse=False)],
        )
        for name, module in base.named_modules()
    }  # fmt: skip
    return modules | {"labels": (base.config.num_labels, dict(base.config.id2label), getattr(base, "num_labels", None))}


class Acting(hf.LogitsProcessor):
    """Runs an action at each step of a generation, which is not changed by it."""

    def __init__(self, action: Callable[[], object]):
        self.action = action

    def __call__(self, input_ids, scores):
        self.action()
        return scores


class ActingCriterion(hf.StoppingCriteria):
    def __init__(self, action: Callable[[], object]):
        self.action = action

    def __call__(self, input_ids, scores, **kwargs):
        self.action()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class ActingStreamer(BaseStreamer):
    def __init__(self, action: Callable[[], object]):
        self.action = action

    def put(self, value):
        self.action()

    def end(self):
        pass


# ---------------------------------------------------------------------- calls side by side


@pytest.mark.parametrize("kind", BACKBONES)
def test_passes_that_are_open_at_the_same_time_give_each_its_own(kind, served):
    case = served(kind)
    calls, want, before = case.passes(), case.alone, state(case.base)
    barrier = threading.Barrier(len(calls))

    def met(call):
        case.inside(lambda: barrier.wait(PATIENCE))
        return call()

    assert len(calls) >= 8
    assert_same(in_threads([lambda call=call: met(call) for call in calls.values()], barrier), calls, want)
    assert state(case.base) == before


@pytest.mark.parametrize("kind", BACKBONES)
def test_passes_in_eight_threads_give_what_each_gives_alone(kind, served):
    case = served(kind)
    calls, want = case.passes(), case.alone
    names = list(calls)

    def work(number):
        order = (names[number:] + names[:number])[:8]
        return [name for name in order if not same(calls[name](), want[name])]

    assert in_threads([lambda number=number: work(number) for number in range(8)]) == [[]] * 8


@pytest.mark.parametrize("kind", GENERATING)
def test_generations_in_step_with_each_other_give_each_its_own(kind, served):
    case = served(kind)
    calls, want, before = case.generations(), case.generated_alone, state(case.base)
    barrier = threading.Barrier(len(calls))
    stepping = case.generations(logits_processor=[Acting(lambda: barrier.wait(PATIENCE))])
    assert len(calls) >= 8
    assert_same(in_threads(list(stepping.values()), barrier), calls, want)
    assert state(case.base) == before


@pytest.mark.parametrize("kind", GENERATING)
def test_generations_and_passes_in_eight_threads_give_what_each_gives_alone(kind, served):
    case = served(kind)
    calls = {f"generate, {name}": call for name, call in case.generations().items()}
    calls |= {name: call for name, call in case.passes().items() if name in ("mixed", "disabled", "bare", "flat")}
    want = case.alone | {f"generate, {name}": result for name, result in case.generated_alone.items()}
    names = list(calls)

    def work(number):
        order = (names[2 * number :] + names[: 2 * number])[:8]
        return [name for name in order if not same(calls[name](), want[name])]

    assert in_threads([lambda number=number: work(number) for number in range(8)]) == [[]] * 8


@pytest.mark.parametrize("kind", GENERATING)
def test_a_live_and_a_folded_model_on_one_backbone_and_a_copy_run_side_by_side(kind, folded):
    case = Served(kind, folded[kind])
    live, copied = get_ept_model(case.base, all_parts(prompt_length=4)).eval(), copy.deepcopy(case.other)
    loaded = EPTModel.from_pretrained(case.base, case.folded).eval()
    randomise(live, 3)
    decoder = dict(decoder_input_ids=ids(4, 3)) if kind == "t5" else {}

    def run(number, model):
        return [model(**case.text(20 + number), **decoder).logits.detach() for _ in range(3)]

    models = [case.model, live, loaded, case.other, copied] * 2
    calls = {number: functools.partial(run, number, model) for number, model in enumerate(models)}
    want = alone(calls)
    assert_same(in_threads(list(calls.values())), calls, want)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_in_some_threads_beside_inference_in_others_are_those_of_each_alone(checkpointed, folded):
    case = Served("causal", folded["causal"])
    case.model.train()
    if checkpointed:
        case.model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in case.model.ept.parameters() if p.requires_grad]

    def gradients(seed):
        text = case.text(seed)
        loss = case.model(**text, labels=text["input_ids"], use_cache=False).loss
        return list(torch.autograd.grad(loss, parameters))

    calls = {f"gradients {seed}": lambda seed=seed: gradients(seed) for seed in range(4)}
    calls |= {name: call for name, call in case.passes().items() if name not in ("packed", "continued")}
    want = alone(calls)
    assert_same(in_threads(list(calls.values())), calls, want)


# ---------------------------------------------------------------------- switched off


@pytest.mark.parametrize("kind", ["first token", "t5", "causal"])
def test_an_adapter_is_switched_off_in_the_thread_that_did_it_and_for_its_model_alone(kind, served):
    case = served(kind)
    calls, want = case.passes(), case.alone
    with case.model.disable_adapter():
        assert_same(in_threads(list(calls.values())), calls, want)  # none of them has switched anything off itself
        assert same(calls["of the other model"](), want["of the other model"])
        assert not same(calls["active"](), want["active"])
        with case.model.disable_adapter(), contextlib.suppress(ZeroDivisionError):
            case.inside(lambda: 1 / 0)
            calls["active"]()
        assert not same(calls["active"](), want["active"])
    assert same(calls["active"](), want["active"])


def test_switching_off_in_one_thread_does_not_end_with_another_threads(served):
    case = served("causal")
    calls, want = case.passes(), case.alone
    with case.model.disable_adapter():
        off = calls["active"]()
    both, one_is_out = threading.Barrier(2), threading.Event()

    def first():
        with case.model.disable_adapter():
            both.wait(PATIENCE)
        one_is_out.set()
        return calls["active"]()

    def second():
        with case.model.disable_adapter():
            both.wait(PATIENCE)
            assert one_is_out.wait(PATIENCE)
            within = calls["active"]()
        return [within, calls["active"]()]

    got, (within, after) = in_threads([first, second], both)
    assert same(got, want["active"]) and same(within, off) and same(after, want["active"])


# ---------------------------------------------------------------------- errors


def explode():
    raise ZeroDivisionError("in the middle of a call")


@pytest.mark.parametrize("kind", BACKBONES)
def test_an_error_in_the_middle_of_a_pass_is_that_threads_alone(kind, served):
    case = served(kind)
    calls, want, before = case.passes(), case.alone, state(case.base)
    barrier = threading.Barrier(len(calls))
    failing = {"mixed", "flat", "disabled", "of the other model"}

    def work(name):
        def meet():
            barrier.wait(PATIENCE)
            if name in failing:
                explode()

        case.inside(meet)
        if name in failing:
            with pytest.raises(ZeroDivisionError):
                calls[name]()
        else:
            assert same(calls[name](), want[name]), name
        return calls[name]()

    assert_same(in_threads([lambda name=name: work(name) for name in calls], barrier), calls, want)
    assert state(case.base) == before


@pytest.mark.parametrize("place", [Acting, ActingStreamer, "a late layer"])
@pytest.mark.parametrize("kind", GENERATING)
def test_an_error_in_the_middle_of_a_generation_is_that_threads_alone(kind, place, served):
    case = served(kind)
    calls = {n: c for n, c in case.generations().items() if place is not ActingStreamer or "beams" not in n}
    want, before = case.generated_alone, state(case.base)
    failing = {name for name in calls if name in ("mixed", "mixed, static cache", "disabled", "bare", "active")}
    if place == "a late layer":
        settings = {}
    elif place is Acting:
        settings = dict(logits_processor=[Acting(case.inside.run)])
    else:
        settings = dict(streamer=ActingStreamer(case.inside.run))
    acting = case.generations(**settings)

    def work(name):
        if name in failing:
            case.inside(explode)
            with pytest.raises(ZeroDivisionError):
                acting[name]()
        return calls[name]()

    assert_same(in_threads([lambda name=name: work(name) for name in calls]), calls, want)
    assert state(case.base) == before


# ---------------------------------------------------------------------- a call within a call

WITHIN = ["bare", "of the other model", "flat", "mixed", "active", "disabled"]


@pytest.mark.parametrize(
    "name", [*WITHIN, *(f"generate, {name}" for name in [*WITHIN, "mixed, static cache", "mixed, beams"])]
)
@pytest.mark.parametrize("kind", GENERATING)
def test_a_call_within_a_generation_gives_what_it_gives_alone(kind, name, served):
    case = served(kind)
    calls = case.passes() | {f"generate, {key}": call for key, call in case.generations().items()}
    want = case.alone | {f"generate, {key}": result for key, result in case.generated_alone.items()}
    outer = "mixed" if not name.endswith("mixed") else "active"
    results = []

    def within():
        results.append(calls[name]())

    acting = case.generations(
        logits_processor=[Acting(within)],
        stopping_criteria=[ActingCriterion(within)],
        streamer=ActingStreamer(within),
    )
    assert same(acting[outer](), want[f"generate, {outer}"])
    assert len(results) == 3 + 3 + 4  # three steps, and the text is streamed, too
    assert all(same(result, want[name]) for result in results)


@pytest.mark.parametrize("kind", GENERATING)
def test_a_call_within_a_generation_that_is_switched_off_is_switched_off_for_the_same_model(kind, served):
    case = served(kind)
    calls, want, results = case.passes(), dict(case.alone), []
    for name in ("flat", "mixed", "active"):
        with case.model.disable_adapter():
            want[name] = calls[name]()

    def within():
        results.extend((name, calls[name]()) for name in WITHIN)

    outer = case.generations(logits_processor=[Acting(within)])["disabled"]
    assert same(outer(), case.generated_alone["disabled"])
    assert len(results) == 3 * len(WITHIN) and all(same(result, want[name]) for name, result in results)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_call_within_a_pass_gives_what_it_gives_alone(kind, served):
    """As a hook of one's own makes it; the pass goes on as if it had not been interrupted."""
    case = served(kind)
    calls, want = case.passes(), case.alone
    with case.model.disable_adapter():
        want_disabled = {name: call() for name, call in calls.items()}
    for outer in ("mixed", "active", "disabled", "bare", "of the other model"):
        for inner in (
            calls if outer == "mixed" else ("bare", "flat", "mixed", "active", "disabled", "of the other model")
        ):
            results = []
            case.inside(lambda inner=inner, results=results: results.append(calls[inner]()))
            assert same(calls[outer](), want[outer]), f"{inner} within {outer}"
            own = want_disabled if outer == "disabled" else want  # what is within `disable_adapter` is switched off
            assert same(results[0], own[inner]), f"{inner} within {outer}"


@pytest.mark.parametrize("kind", GENERATING)
def test_an_error_in_a_call_within_a_generation_leaves_the_outer_one_as_it_is(kind, served):
    case = served(kind)
    calls = case.passes()
    want, results = case.alone, []

    def within():
        for inner in ("disabled", "flat", "bare"):
            case.inside(explode)
            with pytest.raises(ZeroDivisionError):
                calls[inner]()
        results.append(calls["flat"]())

    assert same(case.generations(logits_processor=[Acting(within)])["mixed"](), case.generated_alone["mixed"])
    assert len(results) == 3 and all(same(result, want["flat"]) for result in results)


def test_calls_within_generations_in_eight_threads_give_what_each_gives_alone(served):
    case = served("causal")
    inner, want, want_outer = case.passes(), case.alone, case.generated_alone
    names = ["bare", "flat", "disabled", "of the other model", "mixed", "bare", "packed", "shallow"]
    pairs = list(zip(names, case.generations(), strict=False))
    wrong = []

    def work(name, key):
        def within():
            if not same(inner[name](), want[name]):
                wrong.append(name)

        result = case.generations(logits_processor=[Acting(within)])[key]()
        if not same(result, want_outer[key]):
            wrong.append(f"{key}, with {name} within")

    in_threads([lambda pair=pair: work(*pair) for pair in pairs])
    assert len(pairs) == 8 and not wrong


# ---------------------------------------------------------------------- the shared backbone


@pytest.mark.parametrize("kind", BACKBONES)
def test_nothing_on_the_backbone_changes_during_a_pass_or_after_it(kind, served):
    case = served(kind)
    calls = case.passes()
    before = state(case.base)
    for name, call in calls.items():
        during = []
        case.inside(lambda during=during: during.append(state(case.base)))
        call()
        assert during == [before], f"{name}: during the call"
        assert state(case.base) == before, f"{name}: after the call"


@pytest.mark.parametrize("kind", GENERATING)
def test_nothing_on_the_backbone_changes_during_a_generation_or_after_it(kind, served):
    case = served(kind)
    before, during = state(case.base), []
    for name, call in case.generations(logits_processor=[Acting(lambda: during.append(state(case.base)))]).items():
        call()
        assert during == [before] * 3, f"{name}: during the call"
        assert state(case.base) == before, f"{name}: after the call"
        during.clear()


def test_a_model_that_has_served_threads_is_copied_and_pickled_as_before():
    model = wrapped(backbone("bert", SEQ, num_hidden_layers=3, num_labels=3), all_parts(deep_layers=-1))
    model.add_adapter("flat", all_parts(prompt_length=3), num_labels=5)
    text, names = ids(2, 7), ["flat", "default"]

    def run(of):
        with torch.no_grad():
            return of(input_ids=text, adapter_ids=names).logits

    want = in_threads([lambda: run(model)] * 8)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for copied in copies:
        assert all(same(result, want) for result in in_threads([lambda copied=copied: run(copied)] * 8))
        copied.set_adapter("flat")
        copied.delete_adapter("default")
    assert model.list_adapters() == ["default", "flat"] and not same(run(model), want)


# ---------------------------------------------------------------------- changes

CHANGES = {  # what is called, and what is there afterwards
    "add_adapter": (
        lambda case: case.model.add_adapter("new", all_parts()),
        ["default", "flat", "shallow", "folded", "new"],
    ),
    "load_adapter": (
        lambda case: case.model.load_adapter(case.folded, "new"),
        ["default", "flat", "shallow", "folded", "new"],
    ),
    "delete_adapter": (lambda case: case.model.delete_adapter("flat"), ["default", "shallow", "folded"]),
    "set_adapter": (lambda case: case.model.set_adapter("flat"), ["default", "flat", "shallow", "folded"]),
    "fold": (lambda case: case.model.fold(), ["default", "flat", "shallow", "folded"]),
}


LOOKED_AT = ("flat", "shallow", "folded", "active", "mixed", "disabled")


def call_that_runs(case: Served, action: Callable[[], object]) -> Callable[[], object]:
    """A call with rows of the active adapter, in whose middle an action runs once."""
    if case.kind == "causal":
        acting = case.generations(logits_processor=[Acting(case.inside.run)])["active"]
    else:
        acting = case.passes()["active"]

    def call():
        case.inside(action)
        return acting()

    return call


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["first token", "causal"])
def test_a_change_by_another_thread_waits_until_a_call_has_ended(kind, change, folded):
    case = Served(kind, folded[kind])
    passes = {name: call for name, call in case.passes().items() if name in LOOKED_AT}
    calls = passes | {"outer": call_that_runs(case, lambda: None)}
    want = alone(calls)
    make, names = CHANGES[change]
    inside, changed, within = threading.Event(), threading.Event(), []

    def middle():
        inside.set()
        assert not changed.wait(0.1)  # as long as the call is open
        within.extend(
            passes[name]() for name in ("flat", "mixed", "active")
        )  # a call within it need not wait for the change
        assert not changed.is_set()

    def changing():
        assert inside.wait(PATIENCE)
        make(case)
        changed.set()

    result, _ = in_threads([call_that_runs(case, middle), changing])
    assert same(result, want["outer"]) and changed.is_set()
    assert all(map(same, within, [want["flat"], want["mixed"], want["active"]]))
    assert case.model.list_adapters() == names
    assert case.model.active_adapter == ("flat" if change == "set_adapter" else "default")
    for name in ("shallow", "folded"):
        assert same(passes[name](), want[name]), name
    text = case.text(1)
    with torch.no_grad():
        by_name = case.model(**text, adapter_ids=[case.model.active_adapter] * 4).logits
        assert same(case.model(**text).logits, by_name)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["first token", "causal"])
def test_a_change_from_within_a_call_is_refused_and_changes_nothing(kind, change, folded):
    case = Served(kind, folded[kind])
    calls = {name: call for name, call in case.passes().items() if name in LOOKED_AT}
    calls |= {"outer": call_that_runs(case, lambda: None)}
    want, before = alone(calls), state(case.base)
    refused = []

    def middle():
        with pytest.raises(RuntimeError, match="outside"):
            CHANGES[change][0](case)
        refused.append(state(case.base) == before)

    assert same(call_that_runs(case, middle)(), want["outer"]) and refused == [True]
    assert case.model.list_adapters() == ["default", *ADAPTERS, "folded"] and case.model.active_adapter == "default"
    assert all(same(call(), want[name]) for name, call in calls.items())
    CHANGES[change][0](case)  # outside a call it is made
    assert case.model.list_adapters() == CHANGES[change][1]


def test_a_switch_waits_for_a_call_of_another_model_around_the_same_backbone(folded):
    case = Served("first token", folded["first token"])
    call = case.passes()["of the other model"]
    want = alone({"other": call})["other"]
    inside, changed = threading.Event(), threading.Event()

    def middle():
        inside.set()
        assert not changed.wait(0.1)  # the heads of both stand in the backbone

    def calling():
        case.inside(middle)
        return call()

    def changing():
        assert inside.wait(PATIENCE)
        case.model.set_adapter("flat")
        changed.set()

    assert same(in_threads([calling, changing])[0], want) and changed.is_set()


def test_a_change_has_its_turn_however_many_threads_call(folded):
    case = Served("first token", folded["first token"])
    calls = {name: call for name, call in case.passes().items() if name in ("default", "flat", "folded", "mixed")}
    want = alone(calls)
    done, wrong = threading.Event(), []

    def work(name):
        for _ in range(100):
            if done.is_set():
                return True
            case.inside(lambda: done.wait(0.02))  # so that some call is open at any time
            if not same(calls[name](), want[name]):
                wrong.append(name)
        return False

    def changing():
        try:
            case.model.add_adapter("new", all_parts(prompt_length=6), num_labels=7)
            case.model.set_adapter("shallow")
            case.model.set_adapter("new")
            case.model.set_adapter("default")
            case.model.delete_adapter("new")
        finally:
            done.set()
        return True

    in_time = in_threads([*(lambda name=name: work(name) for name in [*calls, *calls]), changing])
    assert all(in_time) and not wrong
    assert case.model.list_adapters() == ["default", *ADAPTERS, "folded"]


def test_each_call_beside_a_switch_is_of_the_adapter_before_or_the_one_after(folded):
    case = Served("first token", folded["first token"])
    text = case.text(3)

    def call():
        with torch.no_grad():
            return case.model(**text).logits

    want = []
    for name in ("flat", "default"):
        case.model.set_adapter(name)
        want.append(alone({name: call})[name])
    done, wrong = threading.Event(), []

    def work():
        while not done.is_set():
            result = call()
            if not any(same(result, one) for one in want):
                wrong.append(result)

    def changing():
        try:
            for _ in range(10):
                case.model.set_adapter("flat")
                case.model.set_adapter("default")
        finally:
            done.set()

    in_threads([work] * 8 + [changing])
    assert not wrong
    assert same(call(), want[1])


def test_a_change_that_fails_keeps_no_call_waiting(served, tmp_path):
    case = served("first token")
    calls = case.passes()
    want, model = case.alone, case.model
    for refused in (
        lambda: model.delete_adapter("nobody"),
        lambda: model.set_adapter("nobody"),
        lambda: model.add_adapter("flat"),
        lambda: model.load_adapter(tmp_path, "new"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)):
            refused()
        assert_same(in_threads(list(calls.values())), calls, want)


def test_a_copy_shares_the_lock_of_its_own_backbone():
    model = copy.deepcopy(wrapped(BACKBONES["mean"][0](3)))
    model.add_adapter("other")
    beside = get_ept_model(model.base_model, all_parts())
    entered, left = threading.Event(), threading.Event()

    def hold(*_):
        entered.set()
        assert left.wait(PATIENCE)

    handle = model.base_model.encoder.encoder.layer[0].register_forward_hook(hold)
    caller = threading.Thread(target=lambda: beside(input_ids=ids(2, 5)))
    changer = threading.Thread(target=lambda: model.set_adapter("other"))
    caller.start()
    assert entered.wait(PATIENCE)
    changer.start()
    assert model.active_adapter == "default"
    left.set()
    caller.join()
    changer.join()
    handle.remove()
    assert model.active_adapter == "other"


def test_a_call_that_waits_for_a_thread_of_its_own_is_not_held_up_by_a_change(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)
    model = wrapped(BACKBONES["mean"][0](3))
    want, changer = model(input_ids=ids(2, 5)).logits, threading.Thread(target=lambda: model.add_adapter("late"))
    results = []

    def hold(*_):
        handle.remove()
        changer.start()
        while not lock.lock_of(model.base_model)._waiting:
            pass
        worker = threading.Thread(target=lambda: results.append(model(input_ids=ids(2, 5)).logits))
        worker.start()
        worker.join(PATIENCE)

    handle = model.base_model.encoder.encoder.layer[0].register_forward_hook(hold)
    model(input_ids=ids(2, 5))
    changer.join(PATIENCE)
    assert torch.equal(results[0], want) and "late" in model.list_adapters()


def test_saving_beside_switching_writes_whole_adapters(tmp_path):
    model = wrapped(BACKBONES["mean"][0](3))
    model.add_adapter("five", all_parts(prompt_length=3), num_labels=5)
    stop = threading.Event()

    def switch():
        while not stop.is_set():
            model.set_adapter("five")
            model.set_adapter("default")

    changer = threading.Thread(target=switch)
    changer.start()
    try:
        for number in range(12):
            model.save_pretrained(tmp_path / str(number))
    finally:
        stop.set()
        changer.join()
    for number in range(12):
        config, tensors = read_adapter(tmp_path / str(number))
        assert len(tensors["prompt"]) == config["prompt_length"] == (3 if config["num_labels"] == 5 else 5)
        assert len(tensors["head.classifier.weight"]) == config["num_labels"]


def test_wrapping_beside_calls_finds_the_layers():
    base = BACKBONES["first token"][0](3)
    model, stop = wrapped(base), threading.Event()

    def call():
        while not stop.is_set():
            model(input_ids=ids(2, 5))
            base(input_ids=ids(2, 5))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        assert all(get_ept_model(base).ept_config.deep_layers == 2 for _ in range(4))
    finally:
        stop.set()
        for caller in callers:
            caller.join()
