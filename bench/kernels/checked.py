"""Work that is held against its formula in float64 before it is timed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["WAYS", "CannotRun", "Case", "Inputs", "Work", "WrongResult", "results"]

WAYS = ("forward", "backward", "both")
Inputs = dict[str, Any]  # tensors by the names of the arguments; None for a part that is off


class CannotRun(Exception):
    """Something that an implementation needs is not here; the message says what."""


class WrongResult(AssertionError):
    """A result or a gradient is further from float64 than it may be."""


@dataclasses.dataclass(eq=False)
class Case:
    """Inputs, of which those that ask for a gradient are trained, and the plain formula of what is to come out."""

    inputs: Inputs
    formula: Callable[[Inputs], Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.inputs.items() if t is not None and t.requires_grad}

    @functools.cached_property
    def truth(self) -> dict[str, Tensor]:
        """The formula in float64 on the same numbers."""
        double = {
            name: t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
            for name, t in self.inputs.items()
        }
        return results(self.formula, double)

    @functools.cached_property
    def plain(self) -> dict[str, Tensor]:
        """The formula in the dtypes that are measured."""
        return results(self.formula, self.inputs)


def results(function: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The result and the gradient of every leaf, for one fixed gradient of the result."""
    leaves = {name: t for name, t in inputs.items() if t is not None and t.requires_grad}
    out = function(inputs)
    grad = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device)
    grad = grad.bfloat16().to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"the result": out.detach()} | {f"the gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}


@dataclasses.dataclass(eq=False)
class Work:
    """One way of computing a case."""

    case: Case
    function: Callable[[Inputs], Tensor]
    compiled_calls: tuple[int, int] | None = None  # kernel calls in compiled code, forward and backward

    def check(self) -> float:
        """The largest error over what is allowed among the result and the gradients; `WrongResult` if it is above 1.

        Errors are in norm against the formula in float64 on the same numbers. Allowed is three times what the formula
        itself is off by in the dtypes that are measured, and never less than three times half a unit in the last place,
        which rounding the exact value costs anybody. Three, where two is the rule of the tests: the gradients of a few
        tensors pass through as few as s·K = 8 numbers, so that the formula's own error is a draw that scatters.
        """
        truth, plain = self.case.truth, self.case.plain
        worst = 0.0
        for what, value in results(self.function, self.case.inputs).items():
            floor = torch.finfo(value.dtype).eps / 2 * truth[what].norm().item()
            error = (value.double() - truth[what]).norm().item()
            allowed = 3 * max((plain[what].double() - truth[what]).norm().item(), floor)
            share = error / allowed if allowed else float(error > 0)
            if not share <= 1:  # also a NaN
                raise WrongResult(f"{what} is off by {share:.3g} times what is allowed: no time is given for it")
            worst = max(worst, share)
        return worst

    def call(self, way: str) -> Callable[[], Any]:
        """What is timed. The forward is that of training: it keeps what the backward needs."""
        function, inputs, leaves = self.function, self.case.inputs, list(self.case.leaves.values())
        if way == "forward":
            return lambda: function(inputs)
        out = function(inputs)
        grad = torch.randn_like(out)
        if way == "backward":
            return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
        return lambda: torch.autograd.grad(function(inputs), leaves, grad)
