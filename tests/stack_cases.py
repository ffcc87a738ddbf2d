"""Cases of prompt_embed with the constants of several adapters, and what they must come out as."""

import torch
from kernel_cases import mask_of, too_far

from ept_kernels import ACTIVATIONS, prompt_embed, prompt_embed_inputs

SHAPES = {
    "one": dict(adapters=1, s=1, n=1, r=1, q=1, d=8, length=1, batch=1),
    "plain": dict(adapters=3, s=3, n=7, r=3, q=2, d=20, length=18, batch=4),
    "odd": dict(adapters=3, s=5, n=21, r=3, q=5, d=33, length=23, batch=3),
    "no text": dict(adapters=2, s=4, n=3, r=2, q=2, d=20, length=0, batch=2),
    "no prompt": dict(adapters=4, s=0, n=6, r=2, q=4, d=40, length=2, batch=5),
    "many ranks": dict(adapters=2, s=3, n=9, r=11, q=12, d=70, length=6, batch=3),
    "no row": dict(adapters=2, s=3, n=9, r=1, q=1, d=16, length=6, batch=0),
}
# dtype of the constants, dtype of E
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
)
AXES = dict(
    shape=tuple(SHAPES), dtypes=DTYPES, lowrank=("none", "factors", "table"), token=(False, True),
    text=("all", "left", "holes", "positions"), start=("first", "last", "by row"), lengths=(False, True),
    index=(torch.int64, torch.int32), inputs=(False, True), activation=ACTIVATIONS, e=(1.0, 0.055),
)  # fmt: skip
VOCAB = 30


def stack_case(seed, *, shape, dtype, source_dtype, lowrank, token, text, start, lengths, index, inputs, activation, e):
    """Keyword arguments of prompt_embed or, with `inputs`, of prompt_embed_inputs."""
    adapters, s, n, r, q, d, length, batch = SHAPES[shape].values()
    g = torch.Generator().manual_seed(seed)

    def draw(*size, std):
        return (torch.randn(*size, generator=g, dtype=torch.float64) * std).to(dtype)

    def whole(high, *size):
        return torch.randint(high, size, generator=g, dtype=index)

    case = dict(
        prompt=draw(adapters, s + 2, d, std=e)[:, 2:], lowrank_a=None, lowrank_b=None
    )  # the last rows of longer ones
    if lowrank == "factors":
        case |= dict(lowrank_a=draw(adapters, n, r, std=r**-0.5), lowrank_b=draw(adapters, r, d, std=0.3))
    elif lowrank == "table":
        case["lowrank_a"] = draw(adapters, n, d, std=e)
    if token:
        case |= dict(token_down=draw(adapters, q, d, std=d**-0.5), token_up=draw(adapters, q, d, std=0.3))
    case |= dict(
        space_down=None, space_up=None, gate_weight=None, scale=8 / r**0.5, embed_scale=e, activation=activation
    )
    starts = dict(first=0, last=length) | {"by row": whole(length + 1, batch)}
    case |= dict(prompt_start=starts[start], adapter_index=whole(adapters, batch) if adapters > 1 else None)
    if lengths:
        case["prompt_lengths"] = whole(s + 2, adapters)  # some beyond s
    if text == "positions":
        case |= dict(attention_mask=None, text_positions=whole(n + 4, batch, length) - 1)
    else:
        case["attention_mask"] = mask_of("none" if text == "all" or not batch else text, batch, length, g)
    table = (torch.randn(VOCAB, d + 3, generator=g, dtype=torch.float64) * e).to(source_dtype)[
        :, :d
    ]  # of other strides
    ids = whole(VOCAB, batch, length)
    return case | (dict(inputs_embeds=table[ids.long()]) if inputs else dict(input_ids=ids, embedding_weight=table))


def double(case):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}


def run(case: dict, impl: str) -> torch.Tensor:
    function = prompt_embed_inputs if "inputs_embeds" in case else prompt_embed
    return function(**case, impl=impl)


def errors(case: dict, got: torch.Tensor, **limits) -> dict[str, tuple[float, float]]:
    """(error, allowed) where the result is off by more than allowed: see kernel_cases.too_far."""
    results = (dict(out=each) for each in (got, run(case, "reference"), run(double(case), "reference")))
    return too_far(*results, **limits)
