"""``seqc::linear_scan``: the first-order linear recurrence, element by element.

    h_t = decay_t * h_{t-1} + update_t          h_0 = state
    returns (h_1 .. h_T, h_T)

``decay`` and ``update`` are [T, ...] with axes that broadcast against each other and against ``state`` [...]; time is
axis 0. ``reverse`` walks time from the end: h_t then follows from h_{t+1}. With no steps the final state is ``state``.
It is an associative scan over pairs, (a2, b2) after (a1, b1) = (a2 a1, a2 b1 + b2): Blelloch, "Prefix sums and their
applications" (1990); Martin and Cundy, "Parallelizing linear recurrent neural nets over sequence length" (2018).
"""

from __future__ import annotations

import torch


@torch.library.custom_op("seqc::linear_scan", mutates_args=())
def linear_scan(
    decay: torch.Tensor, update: torch.Tensor, state: torch.Tensor, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation: a loop over time. Raises RuntimeError where the shapes do not broadcast."""
    steps = torch.empty((update.shape[0], *state.shape), dtype=state.dtype, device=state.device)
    times = range(update.shape[0])
    final = state.clone()
    for t in reversed(times) if reverse else times:
        final = decay[t] * final + update[t]
        steps[t] = final
    return steps, final


@linear_scan.register_fake
def _(
    decay: torch.Tensor, update: torch.Tensor, state: torch.Tensor, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    return state.new_empty((update.shape[0], *state.shape)), torch.empty_like(state)
