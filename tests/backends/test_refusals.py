"""What has no ONNX form is refused by name, place and reason, all of it at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqc.backends.onnx import export
from seqc.errors import UnsupportedOpError
from seqc.frontend.capture import capture
from seqc.frontend.signature import bind


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x @ x.transpose(1, 2))[..., None]


class Several(nn.Module):
    """Three ops without a form, in two modules, each feeding ops that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.special.i1(x).sin()
        return self.inner(x) + torch.linalg.qr(x).Q.cos() + y


def refusal(model: nn.Module, *inputs: torch.Tensor) -> str:
    signature = bind(model.eval(), inputs, None)
    program = capture(model, signature, signature.trace_sizes()).program
    with pytest.raises(UnsupportedOpError) as caught:
        export(program)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_one_error_names_every_op_with_module_and_source_line() -> None:
    message = refusal(Several(), torch.randn(2, 5, 4))
    first, *details = message.splitlines()
    for op in ("bessel_i1", "linalg_qr", "eigh"):
        assert op in first
        line = next(d for d in details if op in d)
        assert "test_refusals.py:" in line
    assert "inner (" in next(d for d in details if "eigh" in d)


class Op(nn.Module):
    def __init__(self, op: object) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)  # type: ignore[operator, no-any-return]


def test_strided_view_is_refused_because_onnx_has_no_memory_layout() -> None:
    message = refusal(Op(lambda x: x.as_strided((x.shape[0], 2), (x.shape[1] * 4, 3))), torch.randn(2, 5, 4))
    assert "as_strided" in message
    assert "memory" in message


def test_lstm_with_projection_is_refused_with_the_reason() -> None:
    message = refusal(nn.LSTM(4, 5, proj_size=3, batch_first=True), torch.randn(2, 5, 4))
    assert "proj_size" in message
    assert "aten.lstm.input" in message


def test_cdist_of_an_odd_norm_is_refused_with_the_reason() -> None:
    message = refusal(Op(lambda x: torch.cdist(x, x, p=3.0)), torch.randn(2, 5, 4))
    assert "p = 1, 2 and inf, not 3.0" in message


def test_op_whose_result_size_depends_on_values_is_refused() -> None:
    assert "masked_select" in refusal(Op(lambda x: x.masked_select(x > 0)), torch.randn(2, 5, 4))


def test_error_inside_a_translation_is_a_refusal_not_a_traceback() -> None:
    message = refusal(Op(lambda x: x.median(-1).values), torch.randn(2, 5, 4))
    assert "Traceback" not in message
    assert "median" in message
