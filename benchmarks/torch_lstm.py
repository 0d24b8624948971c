"""The coordinate-wise LSTM of Andrychowicz et al. 2016 in PyTorch: a meta-training step's peer.

All coordinates of all tensors are one batch of `torch.nn.LSTMCell`, parameters are one flat vector
whose tensors are views, and the optimizee's gradient is taken once a step: what a user who minds
the speed would write.
"""

import math
from collections.abc import Callable

import torch

from advmeta.types import Array

P = 10.0  # of the features
SHAPES = ((784, 20), (20,), (20, 10), (10,))  # of the optimizee's tensors, in order


class CoordinateWise(torch.nn.Module):
    """Two layers of 20 units and a readout; the update is a tenth of what it says."""

    def __init__(self, hidden: int = 20):
        super().__init__()
        self.hidden = hidden
        self.first = torch.nn.LSTMCell(2, hidden)
        self.second = torch.nn.LSTMCell(hidden, hidden)
        self.readout = torch.nn.Linear(hidden, 1)

    def init(self, coordinates: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(coordinates, self.hidden) for _ in range(4))

    def forward(self, gradient, state):
        h1, c1, h2, c2 = state
        h1, c1 = self.first(log_sign(gradient), (h1, c1))
        h2, c2 = self.second(h1, (h2, c2))
        return 0.1 * self.readout(h2).squeeze(-1), (h1, c1, h2, c2)


def log_sign(gradient: torch.Tensor) -> torch.Tensor:
    """The features of the paper's appendix A. [n] -> [n, 2]"""
    magnitude = gradient.abs()
    large = magnitude >= math.exp(-P)
    log = magnitude.clamp(min=math.exp(-P)).log() / P
    sign = torch.where(large, gradient.sign(), math.exp(P) * gradient)
    return torch.stack([log, sign], dim=-1)


def truncation(step: Callable, theta: torch.Tensor, state: tuple, batches: list[tuple]) -> tuple:
    """Inner steps, then d sum of their losses / d weights of the LSTM, which lands in its .grad.

    Args:
      step: a `CoordinateWise`, or one that is compiled.
      theta: the parameters of the optimizee.
      state: of the LSTM.
      batches: (x, y) of each inner step.

    Returns:
      The parameters and the state after the last step.
    """
    total = 0.0
    theta = theta.detach().requires_grad_()
    for x, y in batches:
        loss = torch.nn.functional.cross_entropy(logits(theta, x), y)
        total = total + loss
        # A gradient without a graph: as in the paper, nothing differentiates through it.
        (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
        update, state = step(gradient, state)
        theta = theta + update
    total.backward()
    return theta.detach(), tuple(s.detach() for s in state)


def truncation_as_published(
    lstm: CoordinateWise, theta: torch.Tensor, state: tuple, batches: list[tuple]
) -> tuple:
    """The same by ``loss.backward()`` at each step, as the public notebooks do it.

    That goes back through all earlier steps of the truncation, so that its cost grows with the
    square of their number.
    """
    total = 0.0
    theta = theta.detach().requires_grad_()
    for x, y in batches:
        loss = torch.nn.functional.cross_entropy(logits(theta, x), y)
        total = total + loss
        theta.retain_grad()
        loss.backward(retain_graph=True)
        update, state = lstm(theta.grad.detach(), state)
        theta = theta + update
    lstm.zero_grad()
    total.backward()
    return theta.detach(), tuple(s.detach() for s in state)


def logits(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    w1, b1, w2, b2 = (
        part.view(shape)
        for part, shape in zip(theta.split([math.prod(s) for s in SHAPES]), SHAPES, strict=True)
    )
    return torch.relu(x @ w1 + b1) @ w2 + b2


def flatten(params: dict[str, dict[str, Array]]) -> torch.Tensor:
    """The parameters of an `advmeta.optimizees.mlp` as one vector."""
    layers = [params[name] for name in sorted(params)]
    tensors = [layer[name] for layer in layers for name in ("kernel", "bias")]
    return torch.cat([torch.tensor(t.tolist()).flatten() for t in tensors])
