"""``seqc::linear_attention``: a matrix state per head with a rank-1 update, the four rules of ONNX opset 27.

    linear        S_t = S_{t-1} + k_t v_t^T
    gated         S_t = exp(g_t) S_{t-1} + k_t v_t^T
    delta         S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
    gated_delta   the same on exp(g_t) S_{t-1}
    o_t = S_t^T q_t                                              S_0 = state
    returns (o_1 .. o_T, S_T)

``query, key``  [T, B, H, K], or H of size 1 where all heads share them
``value``       [T, B, H, V]
``state``       [B, H, K, V]
``decay``       g_t <= 0 in log space, [T, B, H, 1] for one decay per head or [T, B, H, K] for one per key dimension
``beta``        [T, B, H], update rate of the delta rules

``reverse`` walks time from the end. Sources: Katharopoulos et al. 2020 (linear); Yang et al., "Gated linear attention"
2023; Schlag et al. 2021 and Yang et al. 2024 (delta rule); Yang et al., "Gated delta networks" 2024; the operator
LinearAttention of ONNX 27.
"""

from __future__ import annotations

import torch

RULES = ("linear", "gated", "delta", "gated_delta")


@torch.library.custom_op("seqc::linear_attention", mutates_args=())
def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation: a loop over time. The rule follows from which of decay and beta are given."""
    out = torch.empty_like(value)
    times = range(value.shape[0])
    final = state.clone()
    for t in reversed(times) if reverse else times:
        k, v = key[t].unsqueeze(-1), value[t].unsqueeze(-2)
        if decay is not None:
            final = torch.exp(decay[t]).unsqueeze(-1) * final
        if beta is not None:
            v = beta[t].unsqueeze(-1).unsqueeze(-1) * (v - (final * k).sum(-2, keepdim=True))
        final = final + k * v
        out[t] = (final * query[t].unsqueeze(-1)).sum(-2)
    return out, final


@linear_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(value, memory_format=torch.contiguous_format), torch.empty_like(state)


def rule_of(decay: object, beta: object) -> str:
    """The name of the update rule, by which of the two are given (not None)."""
    return (
        ("gated_" if decay is not None else "") + "delta"
        if beta is not None
        else ("gated" if decay is not None else "linear")
    )
