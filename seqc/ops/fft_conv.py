"""``seqc::fft_conv``: a causal convolution of whole sequences, by transforms of twice the length.

    y[b, d, t] = sum_{l <= t} kernel[d, l] * x[b, d, t - l]

``x`` and y [B, D, T], ``kernel`` [D, L] with L >= T, of which the first T are read. Source: Gu, Goel and Ré, "Efficiently
modeling long sequences with structured state spaces" (2022), section 2.4.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("seqc::fft_conv", mutates_args=())
def fft_conv(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The reference implementation. Raises RuntimeError where the shapes do not fit."""
    length = x.shape[2]
    size = 2 * length
    product = torch.fft.rfft(x, size) * torch.fft.rfft(kernel[:, :length], size)
    y: torch.Tensor = torch.fft.irfft(product, size)
    return y[..., :length].contiguous()


@fft_conv.register_fake
def _(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
