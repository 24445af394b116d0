"""Gated recurrences with a diagonal state-to-state map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.zoo.recurrent_cells import WIDTH, plain

HIDDEN = 8


class ParaGru(nn.Module):
    """ParaRNN's GRU (arXiv 2510.21450): the state enters every gate through a diagonal matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.update, self.reset, self.candidate = (nn.Linear(WIDTH, HIDDEN) for _ in range(3))
        self.a_z, self.a_r, self.a_h = (nn.Parameter(0.5 * torch.randn(HIDDEN)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[0], HIDDEN)
        states = []
        for t in range(x.shape[1]):
            z = torch.sigmoid(self.a_z * h + self.update(x[:, t]))
            r = torch.sigmoid(self.a_r * h + self.reset(x[:, t]))
            c = torch.tanh(self.a_h * (h * r) + self.candidate(x[:, t]))
            h = (1 - z) * h + z * c
            states.append(h)
        return torch.stack(states, dim=1)


class ParaLstm(nn.Module):
    """ParaRNN's LSTM (arXiv 2510.21450): diagonal matrices, coupled input and forget gates, peepholes."""

    def __init__(self) -> None:
        super().__init__()
        self.forget, self.out, self.candidate = (nn.Linear(WIDTH, HIDDEN) for _ in range(3))
        self.a_f, self.a_o, self.a_c = (nn.Parameter(0.5 * torch.randn(HIDDEN)) for _ in range(3))
        self.c_f, self.c_o = (nn.Parameter(0.5 * torch.randn(HIDDEN)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.zeros(x.shape[0], HIDDEN)
        c = torch.zeros(x.shape[0], HIDDEN)
        outputs = []
        for xt in x.unbind(1):
            f = torch.sigmoid(self.a_f * h + self.forget(xt) + self.c_f * c)
            z = torch.tanh(self.a_c * h + self.candidate(xt))
            c = f * c + (1 - f) * z
            o = torch.sigmoid(self.a_o * h + self.out(xt) + self.c_o * c)
            h = o * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, dim=1), c


class RgLru(nn.Module):
    """The RG-LRU of Griffin (arXiv 2402.19427): a_t = a^(c r_t), h = a_t h + sqrt(1 - a_t^2) (i_t x_t)."""

    power = 8.0

    def __init__(self) -> None:
        super().__init__()
        self.recurrence_gate = nn.Linear(WIDTH, WIDTH)
        self.input_gate = nn.Linear(WIDTH, WIDTH)
        self.lam = nn.Parameter(torch.linspace(-4.0, -1.0, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r, i = torch.sigmoid(self.recurrence_gate(x)), torch.sigmoid(self.input_gate(x))
        log_a = -self.power * r * F.softplus(self.lam)
        a = torch.exp(log_a)
        gated = torch.sqrt(-torch.expm1(2 * log_a)) * (i * x)
        h = torch.zeros_like(x[:, 0])
        out = torch.zeros_like(x)
        for t in range(x.shape[1]):
            h = a[:, t] * h + gated[:, t]
            out[:, t] = h
        return out


MODELS = (
    plain("para_gru", ParaGru, note="diagonal"),
    plain("para_lstm", ParaLstm, note="diagonal, peepholes"),
    plain("rg_lru", RgLru),
)
