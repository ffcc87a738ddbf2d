"""Classifiers in vLLM: an adapter's head per request gives EPTModel's logits, also where the numbers of labels differ."""

import importlib.util

import pytest
import torch
import transformers as hf

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

from ept import EPTConfig, get_ept_model
from in_vllm.served_models import CONFIGS, Served, backbone, shaken, slots, texts

LENGTHS = (4, 17, 40)
CONFIG = dict(rank=0, num_spaces=0)


@pytest.fixture(scope="module", params=CONFIGS)
def served(request, tmp_path_factory) -> Served:
    """Two adapters of three labels, and one of five, on a classifier whose own head has three."""
    served = Served(request.param, tmp_path_factory.mktemp(request.param))
    auto = hf.AutoModelForSequenceClassification
    backbone(served.kind, auto, num_labels=3).save_pretrained(served.directory / "backbone")
    for seed, (name, labels) in enumerate({"three": 3, "also": 3, "five": 5}.items(), start=1):
        config = EPTConfig(prompt_length=seed, **CONFIG)
        model = get_ept_model(backbone(served.kind, auto, num_labels=labels), config).eval()
        with torch.no_grad():
            model.base_model.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
        served.add(name, shaken(model, seed))
    return served


def logits(served: Served, name: str, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return served.models[name](input_ids=torch.tensor([ids])).logits[0]


def test_requests_of_one_batch_have_heads_of_their_own(served):
    names = ["three", "also", "five", None]
    asked = [(name, ids) for ids in texts(*LENGTHS) for name in names]
    rounds = [[served.request(name, ids) for name, ids in asked]]
    outcome = served.run(
        rounds, slots(), runner="pooling", enable_lora=True, max_loras=3, max_lora_cls_labels=5,
        max_num_batched_tokens=256,
    )  # fmt: skip
    for (name, ids), got in zip(asked, outcome["rounds"][0], strict=True):
        if name is None:
            assert len(got["scores"]) == 3
        else:
            torch.testing.assert_close(torch.tensor(got["scores"]), logits(served, name, ids), rtol=1e-4, atol=1e-4)


def test_one_classifier_for_all_requests(served):
    if served.kind != "llama":
        pytest.skip("the head is loaded alike for all")
    rounds = [[served.request("also", ids) for ids in texts(*LENGTHS)]]
    outcome = served.run(rounds, {"EPT_VLLM_ADAPTER": served.adapters["also"]}, runner="pooling")
    for ids, got in zip(texts(*LENGTHS), outcome["rounds"][0], strict=True):
        torch.testing.assert_close(torch.tensor(got["scores"]), logits(served, "also", ids), rtol=1e-4, atol=1e-4)
