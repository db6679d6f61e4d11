"""The gradient of each loss term taken as soon as the term is there, so that backward has one view's activations to wait for, not all.

It serves a loss that is a sum of terms, each of which comes from a forward of its own: one view's query against keys and negatives
that have no gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def sum_of_terms(terms: Mapping[str, Callable[[], Tensor]], network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of scalar terms, and each of them without gradient. A term is computed, and its gradient taken with respect to the
    trained parameters of `network`, before the next one begins.

    Backward of the sum, which can be had once, hands the summed gradients on: to DistributedDataParallel as well, where it must follow
    each forward before the next one. Where gradients are off, or nothing is trained, the terms are only computed.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not (torch.is_grad_enabled() and trained):
        values = [term() for term in terms.values()]
        return torch.stack(values).sum(), dict(zip(terms, values, strict=True))
    total, *values = _TermByTerm.apply(list(terms.values()), *trained)
    return total, dict(zip(terms, values, strict=True))


class _TermByTerm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Sequence[Callable[[], Tensor]], *trained: Tensor) -> tuple[Tensor, ...]:
        kept, values = [parameter.grad for parameter in trained], []
        try:
            for parameter in trained:
                parameter.grad = None
            for term in terms:
                with torch.enable_grad():
                    value = term()
                value.backward(inputs=trained)  # each gradient is added while it is in the cache, and makes room at once
                values.append(value.detach())
                del value
            ctx.gradients = [parameter.grad for parameter in trained]
        finally:
            for parameter, gradient in zip(trained, kept, strict=True):
                parameter.grad = gradient
        ctx.mark_non_differentiable(*values)
        return torch.stack(values).sum(), *values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], grad_outputs[0])
        return None, *gradients
