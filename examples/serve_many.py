"""A language model and its adapters behind HTTP: every request names its adapter, and a pool of threads calls the one model.

Run `pip install '.[serve]'`, then `python examples/serve_many.py MODEL reviews=DIR topics=DIR`, and ask:
`curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"text": "The film", "adapter": "reviews"}'`.
`PUT /adapters/NAME?directory=DIR` loads another adapter while requests run, `DELETE /adapters/NAME` drops one. vLLM computes
requests in one batch (docs/vllm.md); here they run side by side."""

import sys

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ept import EPTModel


class Ask(BaseModel):
    text: str = Field(min_length=1)
    adapter: str
    max_new_tokens: int = Field(20, ge=1, le=512)


def serve(model: EPTModel, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """The server of a model in eval mode; FastAPI runs each function that handles a path in a thread of its pool."""
    app = FastAPI()

    @app.exception_handler(ValueError)  # an unknown adapter, a text that is too long, a damaged directory
    @app.exception_handler(OSError)
    def refuse(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=400)

    @app.post("/generate")
    def generate(ask: Ask) -> dict[str, str]:
        batch, settings = tokenizer(ask.text, return_tensors="pt"), {"max_new_tokens": ask.max_new_tokens}
        with torch.inference_mode():
            ids = model.generate(batch.input_ids, adapter_ids=[ask.adapter], do_sample=False, **settings)
        return {"text": tokenizer.decode(ids[0, batch.input_ids.shape[1] :], skip_special_tokens=True)}

    @app.put("/adapters/{name}")
    def load(name: str, directory: str) -> None:
        model.load_adapter(directory, name)

    @app.delete("/adapters/{name}")
    def drop(name: str) -> None:
        model.delete_adapter(name)

    return app


if __name__ == "__main__":
    (first, directory), *others = [pair.split("=", 1) for pair in sys.argv[2:]]
    backbone, tokens = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
    served = EPTModel.from_pretrained(backbone, directory, adapter_name=first).eval()
    for name, directory in others:
        served.load_adapter(directory, name)
    uvicorn.run(serve(served, tokens))
