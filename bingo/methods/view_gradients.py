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

    Backward of the sum, which can be had once, hands the summed gradients on: to DistributedDataParallel as well. Where gradients
    are off, or nothing is trained, the terms are only computed.
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
        values, sums = [], None
        for term in terms:
            with torch.enable_grad():
                value = term()
            gradients = torch.autograd.grad(value, trained, materialize_grads=True)
            if sums is None:
                sums = _apart(gradients)
            else:
                torch._foreach_add_(sums, gradients)
            values.append(value.detach())
            del value, gradients
        ctx.gradients = sums
        ctx.mark_non_differentiable(*values)
        return torch.stack(values).sum(), *values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, grad_outputs[0])
        return None, *gradients


def _apart(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The same gradients, each in memory of its own: autograd may give one tensor, or parts of one, for several parameters."""
    seen, apart = set(), []
    for gradient in gradients:
        storage = gradient.untyped_storage()
        alone = storage.nbytes() == gradient.nbytes and storage.data_ptr() not in seen
        apart.append(gradient if alone else gradient.clone(memory_format=torch.contiguous_format))
        seen.add(storage.data_ptr())
    return apart
