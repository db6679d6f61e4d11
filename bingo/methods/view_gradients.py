"""A loss that is a sum of terms, with the activations of only one term in memory: each term's gradient is computed immediately.

`sum_of_terms` runs backward while the loss is computed: a term's forward, its backward into the parameters' gradients, the
next term. Autograd then sees a single node whose inputs are the parameters; its backward passes on the sums, times the gradient of
the loss. It is meant for terms with separate forward passes, such as one view's query against keys and negatives without gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def sum_of_terms(terms: Mapping[str, Callable[[], Tensor]], network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of scalar terms, and each of them without gradient; gradients are computed for the trained parameters of `network`.

    Backward of the sum works once, also under DistributedDataParallel, where it must follow each forward before the next one. If
    gradients are disabled, or nothing is trained, the terms are only computed.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not (torch.is_grad_enabled() and trained):
        values = [term() for term in terms.values()]
        return torch.stack(values).sum(), dict(zip(terms, values, strict=True))
    total, *values = _TermByTerm.apply(list(terms.values()), *trained)
    return total, dict(zip(terms, values, strict=True))


class _TermByTerm(torch.autograd.Function):
    """The node: `forward` stores the summed gradients in `ctx`, and restores the previous `grad` of the parameters."""

    @staticmethod
    def forward(ctx: Any, terms: Sequence[Callable[[], Tensor]], *trained: Tensor) -> tuple[Tensor, ...]:
        kept, values = [parameter.grad for parameter in trained], []
        try:
            for parameter in trained:
                parameter.grad = None
            for term in terms:
                with torch.enable_grad():
                    value = term()
                value.backward(inputs=trained)  # each gradient is added while it is in the cache, and freed immediately
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
