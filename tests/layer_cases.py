"""Cases of layer_update for its Triton kernels: sizes, dtypes, strides, adapters, and what they must come out as."""

import torch
from kernel_cases import too_far

from ept_kernels import ACTIVATIONS, layer_update

SHAPES = {
    "one": dict(batch=1, columns=1, d=8, q=1),
    "odd": dict(batch=3, columns=19, d=7, q=5),
    "no rows": dict(batch=0, columns=5, d=16, q=4),
    "no columns": dict(batch=2, columns=0, d=16, q=4),
    "wide": dict(batch=2, columns=3, d=1030, q=4),
    "tiles": dict(batch=3, columns=6, d=68, q=9),
    "many units": dict(batch=2, columns=3, d=20, q=64),
    "long": dict(batch=3, columns=35, d=36, q=3),
}
# dtype of the trained tensors, dtype of the hidden states
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
)
AXES = dict(
    shape=tuple(SHAPES), dtypes=DTYPES, activation=ACTIVATIONS, adapters=(None, 1, 3),
    scale=("one", "number", "tensor", "by adapter"), strides=("plain", "turned", "spread", "expanded"),
)  # fmt: skip


def layer_case(seed, *, shape, dtype, source_dtype, activation, adapters, scale, strides, sizes=None):
    """Keyword arguments of layer_update. `sizes` in place of a named shape."""
    batch, columns, d, q = (sizes or SHAPES[shape]).values()
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, std):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    stack = () if adapters is None else (adapters,)
    hidden = strided(draw(batch, columns, d, std=3.0).to(source_dtype), strides)
    case = dict(hidden=hidden, activation=activation)
    case |= dict(down=draw(*stack, q, d, std=d**-0.5).to(dtype), up=draw(*stack, q, d, std=0.3).to(dtype))
    scales = dict(one=1.0, number=2.5) | {"tensor": torch.tensor(2.5)}
    by_adapter = torch.tensor(0.4) if adapters is None else torch.rand(adapters, generator=g) + 0.5
    case["hidden_scale"] = scales.get(scale, by_adapter)
    if adapters is not None:
        index = torch.randint(-1, adapters, (batch,), generator=g)
        case["adapter_index"] = index.to([torch.int64, torch.int32][seed % 2])
    return case


def strided(hidden, strides):
    """The same numbers in memory of another order; "expanded" makes all batch rows the first one's."""
    if strides == "turned":
        return hidden.transpose(0, 1).contiguous().transpose(0, 1)
    if strides == "spread":
        wide = torch.full((*hidden.shape[:2], hidden.shape[2] + 3), float("nan"), dtype=hidden.dtype)
        wide[..., : hidden.shape[2]] = hidden
        return wide[..., : hidden.shape[2]]
    if strides == "expanded":
        return hidden[:1].expand_as(hidden)
    return hidden


def double(case):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}


def run(case: dict, impl: str, **settings) -> dict[str, torch.Tensor]:
    """The result and the gradients of hidden, down and up for a random gradient of the result, the same in any dtype."""
    leaves = {name: case[name].detach().requires_grad_() for name in ("hidden", "down", "up")}
    out = layer_update(**case | leaves, impl=impl, **settings)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grads = torch.autograd.grad(out, list(leaves.values()), weight.half().to(out), allow_unused=True)
    # The plain formula does not ask for the tensors of an adapter that has no row.
    grads = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves.values(), grads, strict=True)]
    return dict(out=out.detach()) | dict(zip(leaves, grads, strict=True))


def errors(case: dict, got: dict[str, torch.Tensor], **limits) -> dict[str, tuple[float, float]]:
    """(error, allowed) of each result that is off by more than allowed: see kernel_cases.too_far."""
    return too_far(got, run(case, "reference"), run(double(case), "reference"), **limits)
