"""Every opset of the range: declared as asked, valid, and with the same results."""

from __future__ import annotations

import importlib

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqc.backends.onnx import OPSETS, export
from seqc.errors import UnsupportedOpError, UsageError
from seqc.frontend.capture import capture
from seqc.frontend.signature import bind
from seqc.program import Program
from seqc.target import TARGETS, get_target
from tests.helpers.onnx import assert_same, checked, run, session


class Layers(nn.Module):
    """Ops whose ONNX form depends on the opset, or did: attention, norms, activations, padding, reductions of bools."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms, self.group = nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = self.rms(x).unflatten(-1, (4, 2)).transpose(1, 2)
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        a = F.scaled_dot_product_attention(q, q[:, :2], q[:, :2], keep, enable_gqa=True)
        b = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        y = F.gelu(self.norm(x) + (a + b).transpose(1, 2).flatten(-2))
        z = self.group(F.pad(y, (0, 0, 1, 0), mode="circular").transpose(1, 2))
        return self.gru(y)[0], z, (y > 0).amax(-1), y.topk(3).values, F.gelu(y, approximate="tanh").round()


@pytest.fixture(scope="module")
def layers() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Layers().eval()
    signature = bind(model, (torch.randn(2, 5, 8),), None)
    return model, capture(model, signature, signature.trace_sizes()).program


@pytest.mark.parametrize("opset", OPSETS)
def test_model_of_each_opset_declares_it_and_agrees_with_torch(layers: tuple[nn.Module, Program], opset: int) -> None:
    model, program = layers
    exported = export(program, opset)
    proto = checked(exported)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    assert not proto.functions
    sess = session(exported)
    for batch, length in ((1, 1), (2, 13)):
        x = torch.randn(batch, length, 8)
        with torch.no_grad():
            assert_same(run(sess, (x,)), model(x))


@pytest.mark.parametrize("opset", OPSETS)
def test_ir_version_is_the_least_that_carries_the_opset(layers: tuple[nn.Module, Program], opset: int) -> None:
    least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    assert export(layers[1], opset).ir_version == least


@pytest.mark.parametrize("opset", [17, 28])
def test_other_opsets_are_refused(layers: tuple[nn.Module, Program], opset: int) -> None:
    with pytest.raises(UsageError, match="18 to 27"):
        export(layers[1], opset)
    with pytest.raises(UsageError, match="18 to 27"):
        get_target("onnx").check_opset(opset)


def test_target_asks_for_its_default_opset_where_none_is_given() -> None:
    target = get_target("onnx")
    assert target.check_opset(None) == target.default_opset
    assert target.check_opset(24) == 24
    assert all(set(t.opsets) <= set(OPSETS) and t.default_opset in t.opsets for t in TARGETS.values())


def test_what_no_longer_exists_as_it_was_is_refused(
    layers: tuple[nn.Module, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("seqc.backends.onnx.finalize")
    monkeypatch.setattr(module, "_redefined", lambda operator, opset: operator == "TopK")
    with pytest.raises(UnsupportedOpError, match="TopK was redefined between opsets 25 and 26"):
        export(layers[1], 26)
    assert export(layers[1], 25).opset_imports[""] == 25


def test_a_target_says_why_it_ends() -> None:
    with pytest.raises(UsageError, match="18 to 26, not 27: by default ONNX Runtime refuses newer ones"):
        get_target("ort-cpu").check_opset(27)
    with pytest.raises(UsageError, match="not 28: ONNX Runtime, in which compiled models are checked, cannot load"):
        get_target("onnx").check_opset(28)
    with pytest.raises(UsageError, match=r"18 to 26, not 17$"):
        get_target("ort-cpu").check_opset(17)


def test_unknown_target_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'onnx'"):
        get_target("onx")
