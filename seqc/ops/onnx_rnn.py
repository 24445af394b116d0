"""``seqc::onnx_rnn``: ONNX's operators LSTM, GRU and RNN, one direction: ``seqc::gated_rnn`` with the input projection inside.

``x`` [T, B, D], ``weight`` [G * H, D], ``recurrent`` [G * H, H], ``bias`` [G * H] of the input and ``recurrent_bias``
[G * H]; all else, the results and the order of gates (which is not ONNX's) as for ``seqc::gated_rnn``, the reference.
"""

from __future__ import annotations

import torch

from seqc.ops.gated_rnn import gated_rnn


@torch.library.custom_op("seqc::onnx_rnn", mutates_args=())
def onnx_rnn(
    x: torch.Tensor,
    weight: torch.Tensor,
    recurrent: torch.Tensor,
    bias: torch.Tensor,
    recurrent_bias: torch.Tensor,
    state: torch.Tensor,
    cell: torch.Tensor,
    kind: str,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference implementation. Raises RuntimeError where the shapes do not fit."""
    gates = torch.nn.functional.linear(x, weight, bias)
    steps, last, last_cell = gated_rnn(gates, recurrent, recurrent_bias, state, cell, kind, reverse)
    return steps, last, last_cell


@onnx_rnn.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    recurrent: torch.Tensor,
    bias: torch.Tensor,
    recurrent_bias: torch.Tensor,
    state: torch.Tensor,
    cell: torch.Tensor,
    kind: str,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return state.new_empty((x.shape[0], *state.shape)), torch.empty_like(state), torch.empty_like(cell)
