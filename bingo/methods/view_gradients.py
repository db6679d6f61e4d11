"""A loss that is a sum of terms, with the activations of only one term in memory: each term's gradient is computed immediately.

`sum_of_terms` runs backward while the loss is computed: a term's forward pass, its backward pass to the parameters, then the next term.
Autograd then sees a single node whose inputs are the parameters; its backward returns the summed gradients, times the gradient of
the loss. It is meant for terms with separate forward passes, such as one view's query against keys and negatives without gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bingo.images.uploads import channels


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
    """The node: `forward` stores the summed gradients in `ctx`, by the number of the parameter."""

    @staticmethod
    def forward(ctx: Any, terms: Sequence[Callable[[], Tensor]], *trained: Tensor) -> tuple[Tensor, ...]:
        values, sums = [], dict[int, Tensor]()
        for term in terms:
            with torch.enable_grad():
                value = term()
            found = torch.autograd.grad(value, trained, channels((1.0,), value.device)[0, 0, 0], allow_unused=True)
            values.append(value.detach())
            del value
            gradients = {number: gradient for number, gradient in enumerate(found) if gradient is not None}
            if both := [number for number in gradients if number in sums]:  # not in place: autograd may give one tensor twice
                added = torch._foreach_add([sums[number] for number in both], [gradients[number] for number in both])
                gradients |= zip(both, added, strict=True)
            sums |= gradients
        ctx.set_materialize_grads(False)  # the values have none
        ctx.sums = {number: _laid_out_as(gradient, trained[number]) for number, gradient in sums.items()}
        ctx.parameters = len(trained)
        ctx.mark_non_differentiable(*values)
        return torch.stack(values).sum(), *values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = torch._foreach_mul(list(ctx.sums.values()), grad_outputs[0])
        gradients, ctx.sums = dict(zip(ctx.sums, scaled, strict=True)), None
        return None, *(gradients.get(number) for number in range(ctx.parameters))


def _laid_out_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with the strides of its parameter, like accumulated gradients and the buckets of DistributedDataParallel. Strides differ
    only for dimensions of size 1, as in 1 x 1 convolutions, so no copy is needed."""
    if gradient.stride() == parameter.stride():
        return gradient
    strides = zip(parameter.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(ours == theirs for length, ours, theirs in strides if length > 1):
        return gradient.as_strided(parameter.shape, parameter.stride())
    return torch.empty_like(parameter).copy_(gradient)
