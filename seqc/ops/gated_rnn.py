"""``seqc::gated_rnn``: LSTM, GRU and plain RNN cells over time, their input projections done before.

    pre_t = gates_t + h_{t-1} recurrent^T + bias, in parts of size H, one per gate

    lstm      i, f, g, o = pre    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)    h_t = sigmoid(o) tanh(c_t)
    gru       r, z, n = pre       h_t = (1 - sigmoid(z)) tanh(n) + sigmoid(z) h_{t-1}, where the recurrent part and the
                                  bias of n are multiplied by sigmoid(r)
    gru_reset_before              as gru, but n's recurrent product is that of sigmoid(r) h_{t-1}, and its bias is only added
    rnn_tanh, rnn_relu            h_t = tanh(pre), relu(pre)

``gates`` [T, B, G * H], ``recurrent`` [G * H, H], ``bias`` [G * H], ``state`` [B, H], ``cell`` [B, H] (of an LSTM; any
tensor otherwise). Returns (h_1 .. h_T [T, B, H], h_T, c_T), where c_T is ``cell`` itself unless it is an LSTM. ``reverse``
walks time from the end. Sources: Hochreiter and Schmidhuber, "Long short-term memory" (1997); Cho et al. (2014), whose
GRU is gru_reset_before; torch.nn.LSTM, GRU and RNN, whose order of gates this is.
"""

from __future__ import annotations

import torch

GATES: dict[str, int] = {"lstm": 4, "gru": 3, "gru_reset_before": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""The kinds of cell, and how many gates each has."""


@torch.library.custom_op("seqc::gated_rnn", mutates_args=())
def gated_rnn(
    gates: torch.Tensor,
    recurrent: torch.Tensor,
    bias: torch.Tensor,
    state: torch.Tensor,
    cell: torch.Tensor,
    kind: str,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference implementation: a loop over time. Raises KeyError for an unknown kind."""
    if recurrent.shape[0] != GATES[kind] * state.shape[-1]:
        raise RuntimeError(f"{kind} has {GATES[kind]} gates, not {recurrent.shape[0]} rows for {state.shape[-1]} units")
    steps = state.new_empty((gates.shape[0], *state.shape))
    h, c = state.clone(), cell.clone()
    times = range(gates.shape[0])
    for t in reversed(times) if reverse else times:
        h, c = _step(gates[t], recurrent, bias, h, c, kind)
        steps[t] = h
    return steps, h, c


def _step(
    gates: torch.Tensor, recurrent: torch.Tensor, bias: torch.Tensor, h: torch.Tensor, c: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    product = torch.nn.functional.linear(h, recurrent, bias)
    if kind == "lstm":
        i, f, g, o = (gates + product).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind in ("rnn_tanh", "rnn_relu"):
        pre = gates + product
        return (pre.tanh() if kind == "rnn_tanh" else pre.relu()), c
    size = h.shape[-1]
    r, z = (gates + product)[..., : 2 * size].sigmoid().chunk(2, -1)
    if kind == "gru":
        n = (gates[..., 2 * size :] + r * product[..., 2 * size :]).tanh()
    else:
        n = torch.nn.functional.linear(r * h, recurrent[2 * size :], bias[2 * size :])
        n = (gates[..., 2 * size :] + n).tanh()
    return (1 - z) * n + z * h, c


@gated_rnn.register_fake
def _(
    gates: torch.Tensor,
    recurrent: torch.Tensor,
    bias: torch.Tensor,
    state: torch.Tensor,
    cell: torch.Tensor,
    kind: str,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return state.new_empty((gates.shape[0], *state.shape)), torch.empty_like(state), torch.empty_like(cell)
