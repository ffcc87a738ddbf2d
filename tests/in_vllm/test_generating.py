"""Greedy tokens of adapters in vLLM are EPTModel.generate's, whatever else is in the batch and in the cache."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

from ept import EPTConfig, get_ept_model
from in_vllm.served_models import ADAPTERS, CONFIGS, MODEL_LENGTH, Served, backbone, slots, texts

NAMES = [*ADAPTERS, None]
LENGTHS = (4, 17, 40)


@pytest.fixture(scope="module", params=CONFIGS)
def served(request, tmp_path_factory) -> Served:
    return Served.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def zeros(served) -> list[int]:
    """The ids whose embeddings are the prompt of the adapter "zero", whose updates are all zero."""
    ids = [7, 11, 13]
    model = get_ept_model(backbone(served.kind), EPTConfig(prompt_length=3, rank=0, num_spaces=0)).eval()
    with torch.no_grad():
        model.ept.init_prompt(model.base_model.get_input_embeddings()(torch.tensor(ids)))
        model.ept.token_up.zero_()
        model.ept.deep_up.zero_()
        prompt = model.base_model.get_input_embeddings()(torch.tensor(ids))
    if torch.equal(model.ept.reconstruct()[0], prompt):  # else e·(P/e) is not P to the bit
        served.add("zero", model)
    return ids


def mixed(served: Served) -> list[tuple[str | None, list[int]]]:
    """Every adapter and none on every text, neighbours different."""
    return [(name, ids) for ids in texts(*LENGTHS) for name in NAMES]


@pytest.fixture(scope="module")
def by_request(served, zeros) -> dict:
    """Rounds of an engine with two slots for four adapters; chunks of 32 tokens."""
    batch = [served.request(name, ids) for name, ids in mixed(served)]
    penalised = [served.request(name, ids, repetition_penalty=1.5) for name, ids in mixed(served)[:5]]
    longest = texts(MODEL_LENGTH - 40 - 1)[0]
    rounds = [
        batch,
        batch,  # what was computed once is found by its prefix
        penalised,
        [served.request("long", longest, 1), served.request(None, texts(MODEL_LENGTH - 1)[0], 1)],
        [served.request("long", [*longest, 5], 1)],
        [{"ids": [5, 6], "adapter": ["nobody", 77, "/nowhere"], "sampling": {}}],
        [served.request("default", texts(17)[0])],
        [served.request(None, texts(40)[0], 4, logprobs=5, prompt_logprobs=5)],
    ]
    if "zero" in served.adapters:
        rounds.append([served.request("zero", texts(40)[0], 4, logprobs=5, prompt_logprobs=5)])
    return served.run(rounds, slots(), enable_lora=True, max_loras=2, max_cpu_loras=8)


def test_a_mixed_batch_gets_the_tokens_of_each_adapter_alone(served, by_request):
    for (name, ids), outcome in zip(mixed(served), by_request["rounds"][0], strict=True):
        assert outcome["tokens"] == served.tokens(name, ids), (name, len(ids))
    assert len({tuple(outcome["tokens"]) for outcome in by_request["rounds"][0]}) == len(mixed(served))


def test_prefix_hits_belong_to_one_adapter(served, by_request):
    first, second = by_request["rounds"][:2]
    assert not any(outcome["cached"] for outcome in first)  # the same text under another adapter is no hit
    assert [outcome["tokens"] for outcome in second] == [outcome["tokens"] for outcome in first]
    assert all(outcome["cached"] >= 32 for outcome in second[-len(NAMES) :])


def test_penalties_see_the_text_alone(served, by_request):
    for (name, ids), outcome in zip(mixed(served)[:5], by_request["rounds"][2], strict=True):
        assert outcome["tokens"] == served.tokens(name, ids, repetition_penalty=1.5), name
        assert outcome["tokens"] != served.tokens(name, ids), name


def test_the_longest_prompt_runs_and_a_longer_one_is_refused_with_its_adapters_rows(served, by_request):
    longest, longer = by_request["rounds"][3], by_request["rounds"][4]
    assert longest[0]["tokens"] == served.tokens("long", texts(MODEL_LENGTH - 40 - 1)[0], 1)
    assert longest[1]["tokens"] == served.tokens(None, texts(MODEL_LENGTH - 1)[0], 1)
    assert "longer than the maximum model length" in longer


def test_an_adapter_that_is_not_there_is_its_requests_error_alone(served, by_request):
    assert "/nowhere holds no adapter_config.json" in by_request["rounds"][5]
    assert by_request["rounds"][6][0]["tokens"] == served.tokens("default", texts(17)[0])


def test_updates_of_zeros_and_requests_without_an_adapter_give_the_bits_of_plain_vllm(served, zeros, by_request):
    text = texts(40)[0]
    rounds = [[served.request(None, ids, 4, logprobs=5, prompt_logprobs=5)] for ids in ([*text], [*zeros, *text])]
    plain = served.run(rounds, {})["rounds"]
    assert by_request["rounds"][7] == plain[0]
    if "zero" in served.adapters:
        (ours,), (theirs,) = by_request["rounds"][8], plain[1]
        assert ours["tokens"] == theirs["tokens"] and ours["logprobs"] == theirs["logprobs"]
        # The first rows' entries are the likelihoods of ids that differ; those of the text are the same.
        assert ours["prompt_logprobs"][len(zeros) + 1 :] == theirs["prompt_logprobs"][len(zeros) + 1 :]


def test_one_adapter_for_all_requests_within_the_compiled_graph(served):
    name = "all"
    batch = [served.request(name, ids) for ids in texts(*LENGTHS)]
    penalised = [served.request(name, texts(17)[0], repetition_penalty=1.5)]
    environment = {"EPT_VLLM_ADAPTER": served.adapters[name]}
    outcome = served.run([batch, batch, penalised], environment)
    for ids, once, again in zip(texts(*LENGTHS), *outcome["rounds"][:2], strict=True):
        assert once["tokens"] == again["tokens"] == served.tokens(name, ids)
    assert outcome["rounds"][1][-1]["cached"] >= 32
    assert outcome["rounds"][2][0]["tokens"] == served.tokens(name, texts(17)[0], repetition_penalty=1.5)


def test_requests_that_are_preempted_start_anew_and_get_their_tokens(served):
    if served.kind != "llama":
        pytest.skip("the scheduler knows no architectures")
    names = ["default", "all", "shallow", None, "default", "all"]
    ids, new = texts(30)[0], 60
    batch = [served.request(name, ids, new) for name in names]
    outcome = served.run(
        [batch], slots(), enable_lora=True, max_loras=4, num_gpu_blocks_override=11, max_num_seqs=6,
        max_num_batched_tokens=128,
    )  # fmt: skip
    assert outcome["preemptions"][0] > 0
    for name, got in zip(names, outcome["rounds"][0], strict=True):
        assert got["tokens"] == served.tokens(name, ids, new), name
