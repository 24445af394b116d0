"""``seqc::gated_rnn`` and ``seqc::onnx_rnn`` against torch's own layers, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seqc.ops  # noqa: F401
from seqc.ops.gated_rnn import GATES

ops = torch.ops.seqc
T, B, D, H = 7, 2, 3, 4

LAYERS = {
    "lstm": nn.LSTM(D, H, dtype=torch.float64),
    "gru": nn.GRU(D, H, dtype=torch.float64),
    "rnn_tanh": nn.RNN(D, H, dtype=torch.float64),
    "rnn_relu": nn.RNN(D, H, nonlinearity="relu", dtype=torch.float64),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_cells_are_torchs_layers(kind: str, reverse: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]
    x, h, c = torch.randn(T, B, D).double(), torch.randn(B, H).double(), torch.randn(B, H).double()
    state = (h[None], c[None]) if kind == "lstm" else h[None]
    expected, final = layer(x.flip(0) if reverse else x, state)
    expected = expected.flip(0) if reverse else expected
    parts = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
    steps, last, cell = ops.onnx_rnn(x, *parts, h, c, kind, reverse)
    last_h, last_c = final if kind == "lstm" else (final, c)
    torch.testing.assert_close(steps, expected)
    torch.testing.assert_close(last, last_h.reshape(B, H))
    torch.testing.assert_close(cell, last_c.reshape(B, H))


def test_a_reset_before_the_product_is_that_of_the_first_paper() -> None:
    torch.manual_seed(0)
    gates, matrix, bias = torch.randn(T, B, 3 * H), torch.randn(3 * H, H), torch.randn(3 * H)
    h = torch.randn(B, H)
    steps, _, _ = ops.gated_rnn(gates, matrix, bias, h, h, "gru_reset_before")
    for t in range(T):
        row = torch.empty(B, H)
        for b in range(B):
            rz = torch.sigmoid(gates[t, b, : 2 * H] + matrix[: 2 * H] @ h[b] + bias[: 2 * H])
            n = torch.tanh(gates[t, b, 2 * H :] + matrix[2 * H :] @ (rz[:H] * h[b]) + bias[2 * H :])
            row[b] = rz[H:] * h[b] + (1 - rz[H:]) * n
        h = row
        torch.testing.assert_close(steps[t], h)


@pytest.mark.parametrize("kind", GATES)
def test_no_steps_leave_the_state_as_it_is(kind: str) -> None:
    rows = GATES[kind] * H
    h, c = torch.randn(B, H), torch.randn(B, H)
    steps, last, cell = ops.gated_rnn(torch.empty(0, B, rows), torch.randn(rows, H), torch.randn(rows), h, c, kind)
    assert steps.shape == (0, B, H)
    torch.testing.assert_close((last, cell), (h, c))


def test_a_wrong_number_of_gates_is_refused() -> None:
    h = torch.randn(B, H)
    with pytest.raises(RuntimeError, match="lstm has 4 gates"):
        ops.gated_rnn(torch.randn(T, B, 3 * H), torch.randn(3 * H, H), torch.randn(3 * H), h, h, "lstm")
