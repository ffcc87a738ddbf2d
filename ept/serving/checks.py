"""What an engine of vLLM must be for the plugin to serve adapters in it; refused in one line otherwise."""

from typing import Any

from ept.serving.settings import OneAdapter, Served, Slots

__all__ = ["RELEASES", "check_engine", "check_release"]

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
    if isinstance(what, OneAdapter) and vllm_config.lora_config is not None:
        raise ValueError("one adapter serves every request here: start vLLM without --enable-lora")
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1 or parallel.tensor_parallel_size > 1:
        raise ValueError("EPT's plugin is tested on one device: leave pipeline and tensor parallelism at 1")
    if vllm_config.speculative_config is not None:
        raise ValueError("EPT's plugin does not serve speculative decoding: leave --speculative-config out")
