"""``seqc::lti_scan``: a time-invariant linear state space per channel, of one input and one output.

    y_t = C h_{t-1} + D u_t         h_t = A h_{t-1} + B u_t         h_0 = state
    returns (y_1 .. y_T, h_T)

A channel has m blocks of k states each; states are coupled within their block only: k is 1 for real diagonal systems, 2
for complex ones (real and imaginary parts), m is 1 for dense ones.

``transition``   A [channels, m, k, k]
``input``        B [channels, m, k]
``readout``      C [channels, m, k], of the state in front of the step; that behind it is read by C A, with C B in D
``feedthrough``  D [channels]
``u``            [T, batch, channels]
``state``        [batch, channels, m, k]

``reverse`` walks time from the end. With no steps the final state is ``state``. Sources: Gu et al., "Combining recurrent,
convolutional, and continuous-time models with linear state space layers" (2021); "On the parameterization and
initialization of diagonal state space models" (2022).
"""

from __future__ import annotations

import torch


@torch.library.custom_op("seqc::lti_scan", mutates_args=())
def lti_scan(
    transition: torch.Tensor,
    input: torch.Tensor,
    readout: torch.Tensor,
    feedthrough: torch.Tensor,
    u: torch.Tensor,
    state: torch.Tensor,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation: a loop over time. Raises RuntimeError where the shapes do not fit."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    times = range(u.shape[0])
    final = state.clone()
    for t in reversed(times) if reverse else times:
        y[t] = (readout * final).sum((-2, -1)) + feedthrough * u[t]
        kept = (transition @ final.unsqueeze(-1)).squeeze(-1)
        final = kept + input * u[t].unsqueeze(-1).unsqueeze(-1)
    return y, final


@lti_scan.register_fake
def _(
    transition: torch.Tensor,
    input: torch.Tensor,
    readout: torch.Tensor,
    feedthrough: torch.Tensor,
    u: torch.Tensor,
    state: torch.Tensor,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty_like(state)
