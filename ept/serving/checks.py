"""What an engine of vLLM must be for the plugin to serve adapters in it; refused in one line otherwise."""

from typing import Any

from ept.serving.served_dir import ServedAdapter
from ept.serving.settings import SLOTS_VARIABLE, OneAdapter, Served, Slots

__all__ = ["RELEASES", "check_adapter", "check_engine", "check_head", "check_release"]

RELEASES = ("0.32.",)  # whose model classes, LoRA layers and input processor the plugin was written for and tested with


def check_release(version: str) -> None:
    """Raises RuntimeError if the plugin was not tested with a release of vLLM."""
    if not version.startswith(RELEASES):
        releases = ", ".join(f"{release}*" for release in RELEASES)
        raise RuntimeError(f"EPT serves adapters in vLLM {releases}, and this is {version}: install one of those")


def check_engine(vllm_config: Any, what: Served) -> None:
    """Raises ValueError if an engine's settings do not go together with what it shall serve."""
    if isinstance(what, Slots) and vllm_config.lora_config is None:
        raise ValueError("adapters by request need vLLM's LoRA requests: start it with --enable-lora --max-loras N")
    if isinstance(what, Slots) and what.rank > vllm_config.lora_config.max_lora_rank:
        raise ValueError(
            f"{SLOTS_VARIABLE} asks for rank {what.rank}: start vLLM with a --max-lora-rank of at least that"
        )
    if isinstance(what, OneAdapter) and vllm_config.lora_config is not None:
        raise ValueError("one adapter serves every request here: start vLLM without --enable-lora")
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or parallel.tensor_parallel_size > 1:
        raise ValueError("EPT's plugin is tested on one device: leave pipeline and tensor parallelism at 1")
    if vllm_config.speculative_config is not None:
        raise ValueError("EPT's plugin does not serve speculative decoding: leave --speculative-config out")


def check_adapter(adapter: ServedAdapter, name: str, model_config: Any) -> None:
    """Raises ValueError if an adapter does not belong to the model of an engine."""
    adapter.check_model(
        name, model_config.architecture, classifies=model_config.runner_type == "pooling",
        hidden_size=model_config.get_hidden_size(), layers=model_config.hf_text_config.num_hidden_layers,
    )  # fmt: skip


def check_head(adapter: ServedAdapter, name: str, model_config: Any, lora_config: Any) -> None:
    """Raises ValueError if vLLM has not as many labels as the head of an adapter that a request names."""
    labels = adapter.num_labels
    limit = lora_config.max_lora_cls_labels or model_config.hf_text_config.num_labels
    if labels is not None and labels > limit:
        raise ValueError(f"the adapter {name} has {labels} labels, more than {limit}: raise --max-lora-cls-labels")
