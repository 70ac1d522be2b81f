"""Heads: the small networks that fine-tuning and perturbation response train on a frozen embedding.

A head is so small that autograd takes longer than its multiplications: its gradients are written out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from datawall.models.sparse import bernoulli

N_HIDDEN, DROPOUT = 128, 0.2  # the original study's

type Judge = Callable[[Tensor], tuple[Tensor, Tensor]]


class Heads(nn.Module):
    """Heads side by side: Linear, ReLU, dropout, Linear.

    All begin with the same weights and drop the same hidden units, so that each learns as it would alone.
    """

    def __init__(self, n_heads: int, n_inputs: int, n_outputs: int):
        super().__init__()
        first, last = nn.Linear(n_inputs, N_HIDDEN), nn.Linear(N_HIDDEN, n_outputs)
        layout = {
            "first_weight": first.weight.T,  # (n_heads, n_inputs, N_HIDDEN)
            "first_bias": first.bias[None],  # (n_heads, 1, N_HIDDEN)
            "last_weight": last.weight,  # (n_heads, n_outputs, N_HIDDEN)
            "last_bias": last.bias[:, None],  # (n_heads, n_outputs, 1)
        }
        for name, values in layout.items():
            self.register_parameter(name, nn.Parameter(values.detach().repeat(n_heads, 1, 1)))

    def forward(self, X: Tensor) -> Tensor:
        """Outputs of each head for its own inputs: (n_heads, n_cells, n_inputs) to (n_heads, n_outputs, n_cells)."""
        hidden = torch.baddbmm(self.first_bias, X, self.first_weight).relu()  # (n_heads, n_cells, N_HIDDEN)
        if self.training:
            hidden = hidden * self._kept(X)
        return torch.baddbmm(self.last_bias, self.last_weight, hidden.transpose(1, 2))

    def loss(self, X: Tensor, judge: Judge) -> Tensor:
        """The loss of a training step; `judge` tells it, and its gradient, of `forward`'s outputs."""
        weights = self.first_weight, self.first_bias, self.last_weight, self.last_bias
        return _Loss.apply(X, self._kept(X), judge, *weights)

    def _kept(self, X: Tensor) -> Tensor:
        """What dropout multiplies hidden units with, (n_cells, N_HIDDEN)."""
        kept = bernoulli(X.shape[1] * N_HIDDEN, 1 - DROPOUT, X.device)
        return kept.view(X.shape[1], N_HIDDEN) / (1 - DROPOUT)


class _Loss(torch.autograd.Function):
    """The loss, with gradients by the weights taken on the way forward."""

    @staticmethod
    def forward(ctx, X, kept, judge, first_weight, first_bias, last_weight, last_bias) -> Tensor:
        hidden = torch.baddbmm(first_bias, X, first_weight).relu_().mul_(kept)  # (n_heads, n_cells, N_HIDDEN)
        loss, slope = judge(torch.baddbmm(last_bias, last_weight, hidden.transpose(1, 2)))
        d_hidden = torch.bmm(slope.transpose(1, 2), last_weight).mul_(kept)
        d_hidden = torch.ops.aten.threshold_backward(d_hidden, hidden, 0)  # of ReLU: 0 where the unit is
        first = X.transpose(1, 2) @ d_hidden, d_hidden.sum(1, keepdim=True)
        ctx.gradients = *first, slope @ hidden, slope.sum(2, keepdim=True)
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(part * gradient for part in ctx.gradients)
