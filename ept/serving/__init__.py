"""Adapters in vLLM: the directory that `ept fold --format vllm` writes, and the plugin that serves it (docs/vllm.md)."""
