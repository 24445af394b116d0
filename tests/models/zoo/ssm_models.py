"""State space models as their papers write them: structured, dense, companion, with resets, and stacked over two rates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.zoo.base import Inputs
from tests.models.zoo.recurrent_cells import WIDTH, plain

KERNEL = 260
"""Steps of S4's convolution kernel, as its l_max; longer inputs see no further back."""


def hippo(states: int) -> torch.Tensor:
    """The HiPPO-LegS matrix (arXiv 2008.07669), [states, states]."""
    root = torch.sqrt(1 + 2 * torch.arange(states, dtype=torch.float64))
    return -(torch.tril(torch.outer(root, root)) - torch.diag(torch.arange(states, dtype=torch.float64)))


def hippo_nplr(states: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HiPPO-LegS as V (diag(lam) - p p*) V*: the complex vectors lam, p and V* b, each [states]."""
    n = torch.arange(states, dtype=torch.float64)
    low_rank = torch.sqrt(n + 0.5)
    skew = hippo(states) + torch.outer(low_rank, low_rank)
    imag, basis = torch.linalg.eigh(skew * -1j)
    lam = torch.complex(torch.diagonal(skew).mean().expand(states), imag)
    back = basis.conj().T
    return lam, back @ low_rank.to(lam), back @ torch.sqrt(2 * n + 1).to(lam)


class S4(nn.Module):
    """S4 (arXiv 2111.00396): A = diag(lam) - p q* with q = p, its kernel by Cauchy sums, or step by step."""

    def __init__(self, recurrent: bool, states: int = 4) -> None:
        super().__init__()
        self.recurrent, self.states = recurrent, states
        lam, p, b = (v.to(torch.complex64).repeat(WIDTH, 1) for v in hippo_nplr(states))
        self.log_dt = nn.Parameter(torch.linspace(-4.0, -2.0, WIDTH))
        self.log_real = nn.Parameter(torch.log(-lam.real))
        self.imag = nn.Parameter(lam.imag.clone())
        self.p = nn.Parameter(torch.view_as_real(p).clone())
        self.b = nn.Parameter(torch.view_as_real(b).clone())
        self.c = nn.Parameter(torch.randn(WIDTH, states, 2))
        self.d = nn.Parameter(torch.ones(WIDTH))

    def weights(self) -> tuple[torch.Tensor, ...]:
        lam = torch.complex(-torch.exp(self.log_real), self.imag)
        p, b, c = (torch.view_as_complex(v) for v in (self.p, self.b, self.c))
        return lam, p, b, c, 2 / torch.exp(self.log_dt).unsqueeze(-1)

    def discrete(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bilinear: (2/dt - A)^-1 (2/dt + A) and 2 (2/dt - A)^-1 b, the inverse by Woodbury's identity."""
        lam, p, b, _, rate = self.weights()
        inverse = 1 / (rate - lam)
        dp = inverse * p
        scale = 1 / (1 + (p.conj() * dp).sum(-1)).unsqueeze(-1)
        left = torch.diag_embed(inverse) - (dp * scale).unsqueeze(-1) * (p.conj() * inverse).unsqueeze(-2)
        right = torch.diag_embed(rate + lam) - p.unsqueeze(-1) * p.conj().unsqueeze(-2)
        return left @ right, 2 * (left @ b.unsqueeze(-1)).squeeze(-1)

    def kernel(self) -> torch.Tensor:
        """Re c A^k b for k below KERNEL, from its generating function at the roots of unity; [WIDTH, KERNEL]."""
        lam, p, b, c, rate = self.weights()
        a_bar, _ = self.discrete()
        power = torch.linalg.matrix_power(a_bar, KERNEL)
        c = c - (c.unsqueeze(-2) @ power).squeeze(-2)
        omega = torch.exp(-2j * torch.pi * torch.arange(KERNEL) / KERNEL)
        z = rate * (1 - omega) / (1 + omega)

        def cauchy(v: torch.Tensor) -> torch.Tensor:
            return (v.unsqueeze(-1) / (z.unsqueeze(-2) - lam.unsqueeze(-1))).sum(-2)

        low_rank = cauchy(c * p) * cauchy(p.conj() * b) / (1 + cauchy(p.conj() * p))
        return torch.fft.ifft(2 / (1 + omega) * (cauchy(c * b) - low_rank)).real

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, length = x.transpose(1, 2), x.shape[1]
        if self.recurrent:
            a_bar, b_bar = self.discrete()
            c = torch.view_as_complex(self.c)
            h = torch.zeros(x.shape[0], WIDTH, self.states, dtype=a_bar.dtype)
            outputs = []
            for t in range(length):
                h = (a_bar @ h.unsqueeze(-1)).squeeze(-1) + b_bar * u[:, :, t].unsqueeze(-1)
                outputs.append((c * h).sum(-1).real)
            y = torch.stack(outputs, dim=-1)
        else:
            kernel = self.kernel()[:, :length]
            n = 2 * length
            y = torch.fft.irfft(torch.fft.rfft(kernel, n=n) * torch.fft.rfft(u, n=n), n=n)[..., :length]
        return (y + self.d.unsqueeze(-1) * u).transpose(1, 2)


class Lssl(nn.Module):
    """LSSL (arXiv 2110.13985): a dense HiPPO matrix per layer, a step size per channel, discretised by Tustin's rule."""

    def __init__(self, states: int = 4) -> None:
        super().__init__()
        self.a = nn.Parameter(hippo(states).float())
        self.b = nn.Parameter(torch.sqrt(2 * torch.arange(states) + 1.0))
        self.c = nn.Parameter(torch.randn(WIDTH, states))
        self.d = nn.Parameter(torch.ones(WIDTH))
        self.log_dt = nn.Parameter(torch.linspace(-4.0, -2.0, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = torch.exp(self.log_dt)[:, None, None] / 2 * self.a
        eye = torch.eye(len(self.a))
        a_bar = torch.linalg.solve(eye - half, eye + half)
        b_bar = torch.linalg.solve(eye - half, torch.exp(self.log_dt)[:, None] * self.b)
        h = torch.zeros(x.shape[0], WIDTH, len(self.b))
        outputs = []
        for t in range(x.shape[1]):
            h = torch.einsum("dnm,bdm->bdn", a_bar, h) + b_bar * x[:, t].unsqueeze(-1)
            outputs.append((self.c * h).sum(-1) + self.d * x[:, t])
        return torch.stack(outputs, dim=1)


class SpaceTime(nn.Module):
    """SpaceTime (arXiv 2303.09489): companion matrices, their last column normalised; y is read before the update."""

    def __init__(self, states: int = 4) -> None:
        super().__init__()
        self.register_buffer("shift", torch.eye(states)[:, 1:])
        self.a = nn.Parameter(torch.randn(WIDTH, states))
        self.b = nn.Parameter(torch.randn(WIDTH, states))
        self.c = nn.Parameter(torch.randn(WIDTH, states))
        self.d = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        column = self.a / self.a.abs().sum(-1, keepdim=True)
        companion = torch.cat([self.shift.expand(WIDTH, -1, -1), column.unsqueeze(-1)], dim=-1)
        h = torch.zeros(x.shape[0], *self.b.shape)
        y = torch.empty_like(x)
        for t in range(x.shape[1]):
            y[:, t] = (self.c * h).sum(-1) + self.d * x[:, t]
            h = torch.einsum("dnm,bdm->bdn", companion, h) + self.b * x[:, t, :, None]
        return y


class ResettableS5(nn.Module):
    """S5 for in-context RL (arXiv 2303.03982): complex diagonal, zero-order hold; ``done`` starts an episode anew."""

    def __init__(self, states: int = 4) -> None:
        super().__init__()
        self.log_real = nn.Parameter(torch.full((states,), -0.7))
        self.imag = nn.Parameter(torch.pi * torch.arange(states))
        self.b = nn.Parameter(torch.randn(states, WIDTH, 2) / WIDTH**0.5)
        self.c = nn.Parameter(torch.randn(WIDTH, states, 2) / states**0.5)
        self.d = nn.Parameter(torch.ones(WIDTH))
        self.log_dt = nn.Parameter(torch.linspace(-3.0, -1.0, states))

    def forward(self, x: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
        lam = torch.complex(-torch.exp(self.log_real), self.imag)
        lam_bar = torch.exp(lam * torch.exp(self.log_dt))
        b_bar = ((lam_bar - 1) / lam).unsqueeze(-1) * torch.view_as_complex(self.b)
        c = torch.view_as_complex(self.c)
        bu = x.to(b_bar.dtype) @ b_bar.T
        h = torch.zeros(x.shape[0], len(lam), dtype=lam.dtype)
        outputs = []
        for t in range(x.shape[1]):
            kept = 1 - done[:, t, None].float()
            h = lam_bar * (kept * h) + bu[:, t]
            outputs.append(2 * (h @ c.T).real + self.d * x[:, t])
        return torch.stack(outputs, dim=1)


class _DiagonalSsm(nn.Module):
    """S4D-Real with zero-order hold, step by step: [batch, length, width] to the same shape."""

    def __init__(self, width: int, states: int = 3) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.log(torch.arange(1, states + 1.0)).repeat(width, 1))
        self.log_dt = nn.Parameter(torch.linspace(-3.0, -1.0, width))
        self.b = nn.Parameter(torch.ones(width, states))
        self.c = nn.Parameter(torch.randn(width, states))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = -torch.exp(self.log_a)
        a_bar = torch.exp(a * torch.exp(self.log_dt).unsqueeze(-1))
        b_bar = (a_bar - 1) / a * self.b
        h = x.new_zeros(x.shape[0], *a.shape)
        y = []
        for t in range(x.shape[1]):
            h = a_bar * h + b_bar * x[:, t].unsqueeze(-1)
            y.append((h * self.c).sum(-1))
        return torch.stack(y, dim=1)


class Hiss(nn.Module):
    """Hierarchical state space model (arXiv 2402.10211): one over each chunk, one over the chunks' last outputs."""

    chunk = 4

    def __init__(self) -> None:
        super().__init__()
        self.low = _DiagonalSsm(WIDTH)
        self.between = nn.Linear(WIDTH, 8)
        self.high = _DiagonalSsm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        x = F.pad(x, (0, 0, 0, -length % self.chunk))
        chunks = x.reshape(-1, self.chunk, width)
        features = self.low(chunks)[:, -1].reshape(batch, -1, width)
        return self.head(self.high(F.gelu(self.between(features))))


def _with_resets(batch: int, length: int, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, WIDTH, generator=generator)
    return {"x": x, "done": torch.rand(batch, length, generator=generator) < 0.2}


MODELS = (
    plain("s4_kernel", S4, False, loops=False, note="NPLR by Cauchy sums and FFT; complex"),
    plain("s4_recurrence", S4, True, note="NPLR; complex"),
    plain("lssl", Lssl, note="dense, bilinear"),
    plain("spacetime", SpaceTime, note="companion; y before the update"),
    plain("s5_resets", ResettableS5, inputs=_with_resets, note="complex, resets"),
    plain("hiss", Hiss, note="chunks of 4, then one step per chunk"),
)
