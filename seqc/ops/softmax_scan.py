"""``seqc::softmax_scan``: sums weighted by exponentials of scores, kept relative to the largest score so far.

    m_t = max(m_{t-1} + decay_t, score_t)                                                  m_0 = top
    u_t = exp(m_{t-1} + decay_t - m_t) u_{t-1} + exp(score_t - m_t) value_t                u_0 = numerator
    w_t = exp(m_{t-1} + decay_t - m_t) w_{t-1} + exp(score_t - m_t)                        w_0 = denominator
    returns (m_1 .. m_T, u_1 .. u_T, w_1 .. w_T, m_T, u_T, w_T)

so that without decay u_t / w_t is the softmax-weighted mean of the values up to t, and m_t + log w_t the logarithm of the sum
of their weights, at scores of any size.

``score``        [T, ...]  broadcasts against ``top``
``value``        [T, ...]  broadcasts against ``numerator``
``decay``        [T, ...]  broadcasts against ``top``; [1, ...] where it is the same in each step; None for 0
``top``          [...]     the maximum so far; -inf where there is nothing yet
``denominator``  [...]     of the shape of ``top``
``numerator``    [...]     of the same rank; ``top`` broadcasts against it: size 1 where a score weighs a vector (attention),
                           the same size where each channel has a score of its own. With an axis of size 0 there is none.

exp(-inf - -inf) counts as 0: scores of -inf have no weight, also where there is no other yet. ``reverse`` walks time from the
end.

It is a scan over the monoid (d, m, u, w) of a stretch of steps, (d2, m2, u2, w2) after (d1, m1, u1, w1) being
(d1 + d2, m, e^(m1 + d2 - m) u1 + e^(m2 - m) u2, e^(m1 + d2 - m) w1 + e^(m2 - m) w2) with m = max(m1 + d2, m2).
Sources: Feng et al., "Attention as an RNN" (2024), section 3; Peng et al., "RWKV" (2023), appendix D.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("seqc::softmax_scan", mutates_args=())
def softmax_scan(
    score: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    top: torch.Tensor,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference implementation: a loop over time. Raises RuntimeError where the shapes do not broadcast."""
    count = score.shape[0]
    m, u, w = top.clone(), numerator.clone(), denominator.clone()
    steps = [state.new_empty((count, *state.shape)) for state in (m, u, w)]
    for t in reversed(range(count)) if reverse else range(count):
        kept = m if decay is None else m + decay[t if decay.shape[0] == count else 0]
        m = torch.maximum(kept, score[t])
        finite = m.clamp_min(torch.finfo(m.dtype).min)
        old, new = torch.exp(kept - finite), torch.exp(score[t] - finite)
        u, w = old * u + new * value[t], old * w + new
        for column, state in zip(steps, (m, u, w), strict=True):
            column[t] = state
    return steps[0], steps[1], steps[2], m, u, w


@softmax_scan.register_fake
def _(
    score: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor | None,
    top: torch.Tensor,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    m, u, w = (state.new_empty((score.shape[0], *state.shape)) for state in (top, numerator, denominator))
    return m, u, w, torch.empty_like(top), torch.empty_like(numerator), torch.empty_like(denominator)
