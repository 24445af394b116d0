"""Diagonal state spaces h' = lam h + B x, each discretised by another rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.zoo.base import Inputs
from tests.models.zoo.recurrent_cells import WIDTH, plain

STATES = 3


class Selective(nn.Module):
    """A real diagonal state space whose step sizes depend on the input, by one of three rules.

    ``hold``: zero-order hold, exp(lam dt) and (exp(lam dt) - 1) / lam; ``bilinear``: Tustin; ``euler``: 1 + lam dt, dt.
    """

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.dt = nn.Linear(WIDTH, WIDTH)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, STATES + 1.0)).repeat(WIDTH, 1))
        self.b = nn.Linear(WIDTH, STATES)
        self.c = nn.Linear(WIDTH, STATES)

    def discretised(self, lam: torch.Tensor, dt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rule == "hold":
            a_bar = torch.exp(lam * dt)
            return a_bar, (a_bar - 1) / lam
        if self.rule == "bilinear":
            return (1 + lam * dt / 2) / (1 - lam * dt / 2), dt / (1 - lam * dt / 2)
        return 1 + lam * dt, dt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lam = -torch.exp(self.log_a)
        dt = F.softplus(self.dt(x) - 2.0)
        b, c = self.b(x), self.c(x)
        h = torch.zeros(x.shape[0], *lam.shape)
        y = []
        for t in range(x.shape[1]):
            a_bar, b_bar = self.discretised(lam, dt[:, t, :, None])
            h = a_bar * h + b_bar * b[:, t, None, :] * x[:, t, :, None]
            y.append((h * c[:, t, None, :]).sum(-1))
        return torch.stack(y, dim=1)


class EventSsm(nn.Module):
    """Event-SSM (arXiv 2404.18508): asynchronous discretisation; ``tau`` is the time since the event before."""

    def __init__(self) -> None:
        super().__init__()
        self.log_real = nn.Parameter(torch.full((STATES,), -0.7))
        self.imag = nn.Parameter(torch.pi * torch.arange(STATES))
        self.log_step = nn.Parameter(torch.linspace(-2.0, -1.0, STATES))
        self.b = nn.Parameter(torch.randn(STATES, WIDTH, 2) / WIDTH**0.5)
        self.c = nn.Parameter(torch.randn(WIDTH, STATES, 2))
        self.d = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        lam = torch.complex(-torch.exp(self.log_real), self.imag)
        step = torch.exp(self.log_step)
        gamma = (torch.exp(lam * step) - 1) / lam
        bu = x.to(lam.dtype) @ (gamma.unsqueeze(-1) * torch.view_as_complex(self.b)).T
        c = torch.view_as_complex(self.c)
        h = torch.zeros(x.shape[0], STATES, dtype=lam.dtype)
        outputs = []
        for t in range(x.shape[1]):
            h = torch.exp(lam * step * tau[:, t, None]) * h + bu[:, t]
            outputs.append(2 * (h @ c.T).real + self.d * x[:, t])
        return torch.stack(outputs, dim=1)


class LiquidS4(nn.Module):
    """Liquid-S4 (arXiv 2209.12951), diagonal: h_t = (A + B x_t) h_{t-1} + B x_t with A, B discretised by Tustin."""

    def __init__(self) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.log(torch.arange(1, STATES + 1.0)).repeat(WIDTH, 1))
        self.log_dt = nn.Parameter(torch.linspace(-4.0, -2.0, WIDTH))
        self.b = nn.Parameter(torch.randn(WIDTH, STATES))
        self.c = nn.Parameter(torch.randn(WIDTH, STATES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = torch.exp(self.log_dt).unsqueeze(-1) / 2 * -torch.exp(self.log_a)
        a_bar = (1 + half) / (1 - half)
        b_bar = torch.exp(self.log_dt).unsqueeze(-1) / (1 - half) * self.b
        h = x.new_zeros(x.shape[0], *a_bar.shape)
        y = []
        for xt in x.unbind(1):
            bu = b_bar * xt.unsqueeze(-1)
            h = (a_bar + bu) * h + bu
            y.append((self.c * h).sum(-1))
        return torch.stack(y, dim=1)


def _with_gaps(batch: int, length: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, WIDTH, generator=generator)
    return {"x": x, "tau": torch.empty(batch, length).exponential_(generator=generator)}


MODELS = (
    plain("ssm_hold", Selective, "hold", note="zero-order hold, dt from the input"),
    plain("ssm_bilinear", Selective, "bilinear", note="dt from the input"),
    plain("ssm_euler", Selective, "euler", note="dt from the input"),
    plain("event_ssm", EventSsm, inputs=_with_gaps, note="asynchronous; complex"),
    plain("liquid_s4", LiquidS4, note="transition depends on the input"),
)
