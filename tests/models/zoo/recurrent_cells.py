"""Sequence models in plain PyTorch, their loops over time in Python as papers and their authors write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.zoo.base import Inputs, ZooModel, floats, randomised

WIDTH = 6
"""Channels of every input x: [batch, sequence, WIDTH]."""

_X = floats("x", width=WIDTH)

DYNAMIC = {"x": {0: "batch", 1: "sequence"}}


class LstmCellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[0], 8)
        c = x.new_zeros(x.shape[0], 8)
        outputs = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(h)
        return self.head(torch.stack(outputs, dim=1))


class GruCellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.zeros(x.size(0), 8)
        outputs = []
        for t in range(x.size(1)):
            h = self.cell(x[:, t, :], h)
            outputs.append(h.unsqueeze(1))
        return torch.cat(outputs, dim=1), h


class MinGru(nn.Module):
    """minGRU of "Were RNNs All We Needed?" (arXiv 2410.01201), sequential form: h = (1 - z) h + z h~."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 8)
        self.candidate = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        states = []
        for t in range(x.shape[1]):
            z = torch.sigmoid(self.gate(x[:, t]))
            h = (1 - z) * h + z * self.candidate(x[:, t])
            states.append(h)
        return torch.stack(states, 1)


class PeeledEma(nn.Module):
    """Exponential moving average that starts from the first value."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decay = torch.sigmoid(self.logit)
        y = x[:, 0]
        outputs = [y]
        for t in range(1, x.shape[1]):
            y = decay * y + (1 - decay) * x[:, t]
            outputs.append(y)
        return torch.stack(outputs, dim=1)


class S4d(nn.Module):
    """S4D (arXiv 2206.11893): complex diagonal state space, zero-order hold, by FFT or by recurrence."""

    def __init__(self, recurrent: bool, states: int = 4) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.log_dt = nn.Parameter(torch.linspace(-3.0, -1.0, WIDTH))
        self.log_a_real = nn.Parameter(torch.log(0.5 * torch.ones(WIDTH, states)))
        self.a_imag = nn.Parameter(torch.pi * torch.arange(states).repeat(WIDTH, 1))
        self.c = nn.Parameter(torch.view_as_real(torch.complex(torch.ones(WIDTH, states), torch.ones(WIDTH, states))))
        self.d = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        u = x.transpose(1, 2)
        dt = torch.exp(self.log_dt)
        a = -torch.exp(self.log_a_real) + 1j * self.a_imag
        a_bar = torch.exp(a * dt.unsqueeze(-1))
        c = torch.view_as_complex(self.c) * (a_bar - 1.0) / a
        if self.recurrent:
            h = torch.zeros(x.shape[0], *a.shape, dtype=a_bar.dtype)
            outputs = []
            for t in range(length):
                h = a_bar * h + u[:, :, t].unsqueeze(-1)
                outputs.append(2 * (c * h).sum(-1).real)
            y = torch.stack(outputs, dim=-1)
        else:
            powers = (a * dt.unsqueeze(-1)).unsqueeze(-1) * torch.arange(length)
            kernel = 2 * torch.einsum("dn,dnl->dl", c, torch.exp(powers)).real
            y = torch.fft.irfft(torch.fft.rfft(kernel, n=2 * length) * torch.fft.rfft(u, n=2 * length), n=2 * length)
            y = y[..., :length]
        return (y + u * self.d.unsqueeze(-1)).transpose(1, 2)


class S4dParameter(nn.Module):
    """The recurrence of S4D, its poles and readout kept as complex64 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.poles = nn.Parameter(
            torch.complex(torch.full((WIDTH, 3), 0.4), torch.linspace(-0.7, 0.7, 3).repeat(WIDTH, 1))
        )
        self.readout = nn.Parameter(torch.complex(torch.ones(WIDTH, 3), torch.zeros(WIDTH, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        poles = self.poles / (1 + self.poles.abs())
        h = torch.zeros(x.shape[0], WIDTH, 3, dtype=torch.complex64)
        y = []
        for t in range(x.shape[1]):
            h = poles * h + x[:, t, :, None]
            y.append((self.readout * h).sum(-1).real)
        return torch.stack(y, 1)


class _Heads(nn.Module):
    """Queries, keys and values [batch, sequence, heads, size]."""

    def __init__(self, heads: int = 2, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(WIDTH, 3 * heads * size)
        self.beta = nn.Linear(WIDTH, heads)
        self.out = nn.Linear(heads * size, WIDTH)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, self.heads, self.size).unbind(2)
        return q, k, v


class LinearAttention(_Heads):
    """Linear attention (arXiv 2006.16236): S += k v^T, z += k, with elu + 1 as the feature map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.zeros(x.shape[0], self.heads, self.size, self.size)
        norm = torch.zeros(x.shape[0], self.heads, self.size)
        outputs = []
        for t in range(x.shape[1]):
            state = state + torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
            norm = norm + k[:, t]
            numerator = torch.einsum("bhi,bhij->bhj", q[:, t], state)
            outputs.append(numerator / (q[:, t] * norm).sum(-1, keepdim=True))
        return self.out(torch.stack(outputs, dim=1).flatten(2))


class DeltaNet(_Heads):
    """DeltaNet (arXiv 2406.06484): S += beta k (v - S^T k)^T."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        k = F.normalize(k, dim=-1)
        beta = torch.sigmoid(self.beta(x)).unsqueeze(-1)
        state = torch.zeros(x.shape[0], self.heads, self.size, self.size)
        y = torch.zeros_like(v)
        for t in range(x.shape[1]):
            kt = k[:, t]
            error = v[:, t] - torch.einsum("bhij,bhi->bhj", state, kt)
            state = state + kt.unsqueeze(-1) * (beta[:, t] * error).unsqueeze(-2)
            y[:, t] = torch.einsum("bhij,bhi->bhj", state, q[:, t])
        return self.out(y.flatten(2))


class Aaren(nn.Module):
    """Attention as an RNN (arXiv 2405.13956): running maximum, numerator and denominator of a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(WIDTH))
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = 0.7 * (self.key(x) @ self.query)
        values = self.value(x)
        top = torch.full((x.shape[0],), float("-inf"))
        numerator = torch.zeros(x.shape[0], 5)
        denominator = torch.zeros(x.shape[0])
        outputs = []
        for t in range(x.shape[1]):
            new_top = torch.maximum(top, scores[:, t])
            old, new = torch.exp(top - new_top), torch.exp(scores[:, t] - new_top)
            numerator = numerator * old.unsqueeze(-1) + values[:, t] * new.unsqueeze(-1)
            denominator = denominator * old + new
            top = new_top
            outputs.append(numerator / denominator.unsqueeze(-1))
        return torch.stack(outputs, dim=1)


class LightNet(_Heads):
    """LightNet's additive recurrence (arXiv 2405.21022): z is the logarithm of the summed exponentials of the keys so far."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        z = torch.full((x.shape[0], self.heads, self.size), float("-inf"))
        state = torch.zeros(x.shape[0], self.heads, self.size, self.size)
        outputs = []
        for t in range(x.shape[1]):
            following = torch.logaddexp(z, k[:, t])
            decay, key = torch.exp(z - following), torch.exp(k[:, t] - following)
            state = decay.unsqueeze(-1) * state + key.unsqueeze(-1) * v[:, t].unsqueeze(-2)
            outputs.append(torch.einsum("bhi,bhij->bhj", q[:, t], state))
            z = following
        return self.out(torch.stack(outputs, dim=1).flatten(2))


class Slstm(nn.Module):
    """sLSTM (xLSTM, arXiv 2405.04517): exponential gates kept relative to their largest, with or without a hidden state."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.gates = nn.Linear(WIDTH, 4 * 8)
        self.recurrent = nn.Linear(8, 4 * 8, bias=False) if recurrent else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = c = n = m = x.new_zeros(x.shape[0], 8)
        outputs = []
        for t in range(x.shape[1]):
            gates = self.gates(x[:, t])
            if self.recurrent is not None:
                gates = gates + self.recurrent(h)
            z, i, f, o = gates.chunk(4, dim=-1)
            kept = F.logsigmoid(f) + m
            m = torch.maximum(kept, i)
            i, f = torch.exp(i - m), torch.exp(kept - m)
            c, n = f * c + i * torch.tanh(z), f * n + i
            h = torch.sigmoid(o) * c / n
            outputs.append(h)
        return torch.stack(outputs, dim=1), c, n, m


class _Mamba(nn.Module):
    """A selective state space (arXiv 2312.00752) with a causal convolution, its scan a loop."""

    def __init__(self, inner: int = 8, states: int = 3) -> None:
        super().__init__()
        self.states = states
        self.into = nn.Linear(WIDTH, 2 * inner)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.project = nn.Linear(inner, 1 + 2 * states)
        self.dt = nn.Linear(1, inner)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, states + 1.0)).repeat(inner, 1))
        self.out = nn.Linear(inner, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        u, gate = self.into(x).chunk(2, dim=-1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length].transpose(1, 2))
        dt, b, c = self.project(u).split([1, self.states, self.states], dim=-1)
        dt = F.softplus(self.dt(dt))
        a_bar = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.log_a))
        b_bar = (dt * u).unsqueeze(-1) * b.unsqueeze(2)
        h = torch.zeros_like(a_bar[:, 0])
        outputs = []
        for t in range(length):
            h = a_bar[:, t] * h + b_bar[:, t]
            outputs.append((h * c[:, t].unsqueeze(1)).sum(-1))
        return self.out(torch.stack(outputs, dim=1) * F.silu(gate))


class BidirectionalMamba(nn.Module):
    """Two directions, the second on the flipped sequence, with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = _Mamba()
        self.backwards = _Mamba()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.forwards(x) + self.backwards(x.flip(1)).flip(1)


class UniversalTransformer(nn.Module):
    """Universal Transformer (arXiv 1807.03819) of fixed depth: one layer applied three times, a step embedding each."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.steps = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.into(x)
        for step in range(3):
            h = self.layer(h + self.steps[step])
        return h


class _Recurrent(nn.Module):
    """nn.LSTM, nn.GRU or nn.RNN as a whole; returns its outputs and last states."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, state = self.rnn(x)
        return (y, *state) if isinstance(state, tuple) else (y, state)


def plain(
    name: str,
    make: Callable[..., nn.Module],
    *args: object,
    loops: bool = True,
    note: str = "",
    inputs: Callable[[int, int, int], Inputs] = _X,
) -> ZooModel:
    """A model of the group "pytorch" whose inputs are all [batch, sequence, ...]."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomised(make(*args))

    shapes = dict.fromkeys(inputs(1, 1, 0), DYNAMIC["x"])
    return ZooModel(name, "pytorch", build, inputs, shapes, loops=loops, note=note)


def _library(name: str, kind: str, **options: object) -> ZooModel:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomised(_Recurrent(getattr(nn, kind)(WIDTH, 8, batch_first=True, **options)))

    return ZooModel(name, "pytorch", build, floats("x", width=WIDTH), DYNAMIC)


MODELS = (
    _library("lstm", "LSTM"),
    _library("lstm_bidirectional", "LSTM", bidirectional=True),
    _library("lstm_stacked", "LSTM", num_layers=2),
    _library("gru", "GRU"),
    _library("gru_bidirectional", "GRU", bidirectional=True),
    _library("gru_stacked_bidirectional", "GRU", num_layers=2, bidirectional=True),
    plain("lstm_cell_loop", LstmCellLoop),
    plain("gru_cell_loop", GruCellLoop),
    plain("mingru", MinGru),
    plain("ema_peeled", PeeledEma),
    plain("s4d_fft", S4d, False, loops=False, note="complex"),
    plain("s4d_recurrence", S4d, True, note="complex"),
    plain("s4d_complex_parameters", S4dParameter, note="complex64 parameters"),
    plain("linear_attention", LinearAttention),
    plain("deltanet", DeltaNet, note="writes y[:, t]"),
    plain("aaren", Aaren, note="starts from -inf"),
    plain("lightnet", LightNet, note="starts from -inf"),
    plain("slstm", Slstm, True),
    plain("slstm_without_recurrent_weights", Slstm, False),
    plain("mamba_bidirectional", BidirectionalMamba, note="by flip"),
    plain("universal_transformer", UniversalTransformer, loops=False, note="depth 3"),
)
