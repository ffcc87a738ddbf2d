"""vLLM's entry point into the package, called once in each of its processes (group vllm.general_plugins)."""

from ept.serving.settings import is_asked_for, served

__all__ = ["register"]

MODELS = {
    "LlamaForCausalLM": "EPTLlamaForCausalLM",
    "Qwen3ForCausalLM": "EPTQwen3ForCausalLM",
    "Gemma3ForCausalLM": "EPTGemma3ForCausalLM",
    "Gemma3TextForCausalLM": "EPTGemma3ForCausalLM",  # what vLLM looks for where it is a classifier
}


def register() -> None:
    """Puts the plugin's models in the place of vLLM's where an adapter is to be served; else does nothing.

    Raises:
        RuntimeError: of this release of vLLM it is not known that the results are right.
    """
    if not is_asked_for():
        return
    import vllm

    from ept.serving.checks import check_release
    from ept.serving.requests import wrap_input_processor

    check_release(vllm.__version__)
    served()  # what cannot be read is said before the engine starts
    for architecture, name in MODELS.items():
        vllm.ModelRegistry.register_model(architecture, f"ept.serving.models:{name}")
    wrap_input_processor()
