"""The C++ loops that benchmarks compare with compute what the ops compute."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

from tests.benchmarks import fused
from tests.benchmarks.scans import CASES, bound, written


@pytest.mark.skipif(fused.library() is None, reason="no g++ here")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fused is not None])
def test_a_fused_loop_equals_the_op(name: str) -> None:
    case = CASES[name]
    assert case.fused is not None
    for length in (1, 5):
        torch.manual_seed(length)
        given = case.inputs(length)
        expected = case.function(*(x.double() for x in given))[0]
        (found,) = case.fused(*given)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(fused.library() is None, reason="no g++ here")
def test_loading_the_loops_leaves_subnormal_numbers_on() -> None:
    assert float(torch.tensor(1e-40) * 0.5) > 0.0


def test_without_a_compiler_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert fused.library.__wrapped__() is None


def test_a_call_bound_to_a_device_gives_what_a_call_gives() -> None:
    """How forms are timed on a GPU, here on the CPU."""
    case = CASES["diagonal, 2048"]
    found = written(case, "sequential")
    assert found is not None
    session = onnxruntime.InferenceSession(found[0])
    given = case.inputs(3)
    binding = bound(session, given, "cpu")
    session.run_with_iobinding(binding)
    expected = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)})
    for result, wanted in zip(binding.copy_outputs_to_cpu(), expected, strict=True):
        assert (result == wanted).all()
