"""Models that no static graph can compute as they are written: seqc must refuse each, naming the line at fault."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.models.zoo.base import ZooModel, floats, randomised

WIDTH = 6
HIDDEN = 5

DYNAMIC = {"x": {0: "batch", 1: "sequence"}}


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(WIDTH, HIDDEN)
        self.u = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def step(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.w(x) + self.u(h))


class AdaptiveHalting(_Loop):
    """Thinks until its state has settled: the number of steps depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], HIDDEN)
        for _ in range(20):
            h = self.step(x.mean(dim=1), h)
            if h.abs().mean() > 0.5:
                break
        return h


class HaltingWhile(_Loop):
    """Stops reading when it has seen enough."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, budget, t = torch.zeros(x.shape[0], HIDDEN), 0.0, 0
        while t < x.shape[1] and budget < 1.0:
            h = self.step(x[:, t], h)
            budget += h.abs().mean().item()
            t += 1
        return h


class GrowingState(_Loop):
    """Its state is as long as what was read: the body changes shape with t."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        history, out = torch.zeros(x.shape[0], 1, HIDDEN), []
        for t in range(x.shape[1]):
            h = self.step(x[:, t], torch.softmax(history, dim=1).sum(dim=1) * history.amax(dim=1))
            history = torch.cat([history, h.unsqueeze(1)], dim=1)
            out.append(h)
        return torch.stack(out, dim=1)


class QuadraticLiteral(_Loop):
    """A number of the body is 0.1 t^2: copies differ by a literal that is not linear in t."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = torch.zeros(x.shape[0], HIDDEN), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.w(x[:, t]) + (0.1 * t**2) * self.u(h))
            out.append(h)
        return torch.stack(out, dim=1)


class EveryThird(_Loop):
    """Every third step is another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = torch.zeros(x.shape[0], HIDDEN), []
        for t in range(x.shape[1]):
            h = torch.relu(self.u(h)) if t % 3 == 0 else self.step(x[:, t], h)
            out.append(h)
        return torch.stack(out, dim=1)


class LookupByStep(_Loop):
    """A Python list of numbers indexed by t, of which a trace sees only the first few."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = [((17 * i) % 11) / 11 for i in range(x.shape[1])]
        h, out = torch.zeros(x.shape[0], HIDDEN), []
        for t in range(x.shape[1]):
            h = weights[t] * self.step(x[:, t], h)
            out.append(h)
        return torch.stack(out, dim=1)


class RandomAccess(_Loop):
    """Reads the steps in an order that no stride describes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out, length = torch.zeros(x.shape[0], HIDDEN), [], x.shape[1]
        for t in range(length):
            h = self.step(x[:, (t * t) % length], h)
            out.append(h)
        return torch.stack(out, dim=1)


def _refused(name: str, make: Callable[[], nn.Module], culprit: str, note: str, loops: bool = True) -> ZooModel:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomised(make())

    inputs = floats("x", width=WIDTH)
    return ZooModel(f"refused_{name}", "refused", build, inputs, DYNAMIC, loops=loops, note=note, culprit=culprit)


MODELS = (
    _refused("adaptive_halting", AdaptiveHalting, "if h.abs().mean() > 0.5", "trip count depends on data"),
    _refused("halting_while", HaltingWhile, "", "trip count depends on data"),
    _refused("growing_state", GrowingState, "", "the state grows with t"),
    _refused("quadratic_literal", QuadraticLiteral, "(0.1 * t**2)", "a literal that is not linear in t"),
    _refused("every_third", EveryThird, "", "if t % 3 == 0"),
    _refused("lookup_by_step", LookupByStep, "weights[t]", "numbers from a Python list"),
    _refused("random_access", RandomAccess, "", "x[:, (t * t) % L]"),
)
