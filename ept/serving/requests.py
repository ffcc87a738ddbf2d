"""A request's prompt with room for its adapter's rows: the one place where the plugin wraps a function of vLLM's."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine.input_processor import InputProcessor

from ept.serving.checks import check_adapter, check_head
from ept.serving.served_dir import ServedAdapter
from ept.serving.settings import OneAdapter, Slots, served

__all__ = ["wrap_input_processor"]


def wrap_input_processor() -> None:
    """Wraps `InputProcessor.process_inputs`, once in a process."""
    if not hasattr(InputProcessor.process_inputs, "__wrapped__"):
        InputProcessor.process_inputs = _with_rows(InputProcessor.process_inputs)


def _with_rows(process_inputs: Callable) -> Callable:
    """`process_inputs` of prompts that start with their adapter's rows."""
    signature = inspect.signature(process_inputs)
    adapters = _AdaptersOfRequests()

    @functools.wraps(process_inputs)
    def with_rows(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        arguments = call.arguments
        adapter = adapters.find(self, arguments["lora_request"])
        if adapter is not None:
            if isinstance(arguments["params"], PoolingParams) and arguments["params"].task != "classify":
                raise VLLMValidationError(
                    f"an adapter of EPT classifies texts, and does not serve {arguments['params'].task}"
                )
            if arguments["resumable"]:
                raise VLLMValidationError("a prompt that comes in pieces cannot have an adapter of EPT: send it whole")
            prompt = _rendered(self, arguments["prompt"], arguments["tokenization_kwargs"])
            arguments["prompt"] = _with_room(prompt, adapter)
        return process_inputs(*call.args, **call.kwargs)

    return with_rows


class _AdaptersOfRequests:
    """What the front end knows of the adapters that requests name, by vLLM's number of each."""

    def __init__(self) -> None:
        self.by_number: dict[int, tuple[str, ServedAdapter]] = {}
        self.is_checked = False

    def find(self, processor: InputProcessor, lora_request: Any) -> ServedAdapter | None:
        """The adapter of a request; None where it has none. VLLMValidationError where it cannot be served."""
        what = served()
        if isinstance(what, OneAdapter):
            self._check_once(processor, what)
            return what.adapter
        if lora_request is None or processor.lora_config is None:  # without LoRA vLLM refuses the request itself
            return None
        number, path = lora_request.lora_int_id, lora_request.lora_path
        if number not in self.by_number or lora_request.load_inplace:
            self.by_number[number] = path, self._read(processor, what, lora_request)
        before, adapter = self.by_number[number]
        if before != path:
            raise VLLMValidationError(
                f"lora_int_id {number} is the adapter in {before}: give the one in {path} a number of its own"
            )
        return adapter

    def _check_once(self, processor: InputProcessor, one: OneAdapter) -> None:
        """Raises VLLMValidationError if vLLM runs a model that has no place for the adapter."""
        if not self.is_checked:
            try:
                check_adapter(one.adapter, one.directory, processor.model_config)
            except ValueError as error:
                raise VLLMValidationError(str(error)) from error
            self.is_checked = True

    def _read(self, processor: InputProcessor, slots: Slots, lora_request: Any) -> ServedAdapter:
        name = lora_request.lora_name
        try:
            adapter = ServedAdapter.read(Path(lora_request.lora_path).expanduser())
            slots.check(adapter, name)
            check_adapter(adapter, name, processor.model_config)
            check_head(adapter, name, processor.model_config, processor.lora_config)
        except (OSError, ValueError) as error:
            raise VLLMValidationError(str(error), parameter="lora_request") from error
        return adapter


def _rendered(processor: InputProcessor, prompt: Any, tokenization_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """A prompt as token ids, as `process_inputs` makes them of one that is not rendered yet."""
    if isinstance(prompt, dict) and "type" in prompt:
        return prompt
    renderer = processor.renderer
    settings = renderer.default_cmpl_tok_params.with_kwargs(**(tokenization_kwargs or {}))
    (rendered,) = renderer.render_cmpl([parse_model_prompt(processor.model_config, prompt)], settings)
    return dict(rendered)


def _with_room(prompt: dict[str, Any], adapter: ServedAdapter) -> dict[str, Any]:
    """A prompt with s ids before its own, where the prompt's rows go, and the adapter's hash in the prefix cache's key.

    The ids are the text's first: they have no meaning, and penalties see no token that the text has not.
    """
    if prompt["type"] != "token":
        raise VLLMValidationError(f"an adapter of EPT needs a prompt of tokens, not {prompt['type']}")
    ids, rows = prompt["prompt_token_ids"], adapter.prompt_rows
    salts = [adapter.sha256, prompt.get("cache_salt")]
    extended = {**prompt, "prompt_token_ids": ids[:1] * rows + ids, "cache_salt": ":".join(filter(None, salts))}
    if prompt.get("prompt_token_offsets"):
        extended["prompt_token_offsets"] = [(0, 0)] * rows + prompt["prompt_token_offsets"]
    return extended
