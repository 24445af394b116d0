"""The check: which sizes are tried, what counts as a failure, and what is said about it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from seqc.check import CheckReport, case_inputs, check, first_divergence, plan_sizes, to_numpy
from seqc.errors import VerificationError
from seqc.exact import in_float64
from seqc.frontend.signature import Signature, bind


class Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


def signature_of(*shape: int, dynamic: object = None) -> Signature:
    generator = torch.Generator().manual_seed(0)
    return bind(Sum(), (torch.randn(shape, generator=generator),), None if dynamic is None else {"x": dynamic})


def source(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {"y": to_numpy(inputs["x"].cumsum(1))}


def right(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": inputs["x"].cumsum(1)}


def frozen(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Right up to length 7, as a model is whose loop was unrolled while tracing."""
    y = right(inputs)["y"]
    y[:, 7:] = y[:, 6:7]
    return {"y": y}


def message(report: CheckReport) -> str:
    with pytest.raises(VerificationError) as caught:
        report.raise_if_failed()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sizes_are_one_the_example_a_prime_and_four_times_at_batch_one_and_three() -> None:
    sizes = plan_sizes(signature_of(2, 7, 4))
    assert sizes == [{"batch": b, "sequence": n} for n in (1, 7, 19, 28) for b in (1, 3)]
    longer = plan_sizes(signature_of(2, 64, 4), extra_lengths=(257, 1))
    assert [s["sequence"] for s in longer if s["batch"] == 1] == [1, 64, 131, 256, 257]


def test_sizes_stay_in_their_range() -> None:
    spec = {0: "batch", 1: torch.export.Dim("sequence", min=4, max=20)}
    sizes = plan_sizes(signature_of(2, 7, 4, dynamic=spec))
    assert [s["sequence"] for s in sizes if s["batch"] == 3] == [4, 7, 19, 20]


@pytest.mark.parametrize(
    ("dynamic", "batch"),
    [({0: "batch", 1: "sequence"}, "batch"), ({0: "sequence", 1: "batch"}, "batch"), ({0: "n", 1: "t"}, "n")],
)
def test_the_batch_is_told_by_its_name_or_its_place(dynamic: dict[int, str], batch: str) -> None:
    sizes = plan_sizes(signature_of(5, 5, 4, dynamic=dynamic))
    assert {s[batch] for s in sizes} == {1, 3}


def test_a_model_without_a_batch_is_checked_at_several_lengths() -> None:
    assert [s["time"] for s in plan_sizes(signature_of(7, 4, dynamic={0: "time"}))] == [1, 7, 19, 28]


def test_a_fixed_model_is_checked_once() -> None:
    assert plan_sizes(signature_of(2, 7, dynamic={})) == [{}]
    assert check(source, right, signature_of(2, 7, dynamic={})).ok


def test_several_lengths_vary_together_and_alone() -> None:
    sizes = plan_sizes(signature_of(2, 7, 5, dynamic={0: "batch", 1: "rows", 2: "columns"}))
    pairs = {(s["rows"], s["columns"]) for s in sizes}
    assert {(1, 1), (7, 5), (19, 23), (28, 20)} <= pairs
    assert {(1, 5), (28, 5), (7, 1), (7, 20)} <= pairs


def test_a_right_model_passes() -> None:
    report = check(source, right, signature_of(2, 7, 4))
    assert report.ok
    report.raise_if_failed()
    assert report.error < 1e-5
    assert len(report.cases) == 9
    assert report.cases[0].seed is None
    assert report.lines()[0].startswith("batch=2, sequence=7 (example inputs): ok, y: error")
    assert report.lines()[-1].startswith("9 sizes compared: largest error")


def test_the_first_case_is_the_example_itself() -> None:
    signature = signature_of(2, 7, 4)
    seen: list[torch.Tensor] = []

    def watching(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        seen.append(inputs["x"].clone())
        return source(inputs)

    report = check(watching, right, signature)
    assert torch.equal(seen[0], signature.examples["x"])
    for case, x in zip(report.cases, seen, strict=True):
        assert torch.equal(case_inputs(signature, case.sizes, case.seed)["x"], x)


def test_a_frozen_length_fails_and_is_called_that() -> None:
    report = check(source, frozen, signature_of(2, 7, 4))
    assert not report.ok
    said = message(report)
    assert "differs from the source at batch=" in said
    assert "y: error" in said
    assert "tolerance 0.0001" in said
    assert "exactly the sizes beyond the example's sequence=7 fail" in said


def test_a_model_that_is_wrong_everywhere_is_called_that() -> None:
    assert "every size fails" in message(check(source, lambda i: {"y": -i["x"]}, signature_of(2, 7, 4)))


def test_a_batch_size_that_fails_is_told_from_a_length() -> None:
    def only_one(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        y = right(inputs)["y"]
        y[2:] = 0
        return {"y": y}

    assert "the example's sizes agree, 4 of 9 fail" in message(check(source, only_one, signature_of(2, 7, 4)))


def test_a_refusal_of_the_source_is_no_failure() -> None:
    def short(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        if inputs["x"].shape[1] > 20:
            raise ValueError("at most 20 positions\nsecond line")
        return source(inputs)

    report = check(short, right, signature_of(2, 7, 4))
    assert report.ok
    assert report.lines()[-2] == "batch=3, sequence=28: the source model refuses: ValueError: at most 20 positions"
    assert "7 sizes compared, 2 refused by the source model" in report.lines()[-1]


def test_a_source_that_refuses_everything_is_an_error() -> None:
    def never(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        raise RuntimeError("no")

    report = check(never, right, signature_of(2, 7, 4))
    assert not report.ok
    assert "refuses all 9 sizes" in message(report)
    assert "RuntimeError: no" in message(report)


def test_a_compiled_model_that_raises_where_the_source_does_not_fails() -> None:
    def brittle(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if inputs["x"].shape[1] == 1:
            raise IndexError("length 1")
        return right(inputs)

    report = check(source, brittle, signature_of(2, 7, 4))
    assert report.error == math.inf
    said = message(report)
    assert "raises where the source does not, at batch=1, sequence=1: IndexError: length 1" in said
    assert "the example's sizes agree, 2 of 9 fail" in said


def test_a_missing_output_fails() -> None:
    assert "y: is missing" in message(check(source, lambda i: {}, signature_of(2, 7, 4)))


def test_a_source_that_is_not_deterministic_is_named_as_the_cause() -> None:
    def dropout(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {"y": to_numpy(torch.nn.functional.dropout(inputs["x"].cumsum(1)))}

    report = check(dropout, right, signature_of(2, 7, 4))
    assert not report.deterministic
    assert "is dropout on? call .eval() first" in message(report)


def test_a_model_that_writes_into_its_inputs_does_not_spoil_the_comparison() -> None:
    signature = signature_of(2, 7, 4)
    before = signature.examples["x"].clone()

    def writing(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {"y": to_numpy(inputs["x"].cumsum_(1))}

    assert check(writing, right, signature).ok
    assert torch.equal(signature.examples["x"], before)


def test_the_report_is_strict_json() -> None:
    def nan_at_one(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        y = right(inputs)["y"]
        return {"y": y * np.float32(math.nan) if y.shape[1] == 1 else y}

    data = json.loads(json.dumps(check(source, nan_at_one, signature_of(2, 7, 4)).to_json(), allow_nan=False))
    assert data["ok"] is False
    assert data["error"] == "inf"
    assert data["cases"][1]["sizes"] == {"batch": 1, "sequence": 1}
    assert data["cases"][1]["outputs"][0]["relative"] == "inf"
    assert data["cases"][0]["ok"] is True


def test_the_tolerance_may_differ_by_output() -> None:
    def rough(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": right(inputs)["y"] * np.float32(1.001)}

    assert not check(source, rough, signature_of(2, 7, 4)).ok
    assert check(source, rough, signature_of(2, 7, 4), tolerance={"y": 0.01}).ok


def test_the_first_stage_that_differs_is_named() -> None:
    inputs = {"x": torch.ones(2, 9, 4)}

    def writing(given: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {"y": to_numpy(given["x"].cumsum_(1))}

    def broken(given: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return frozen({"x": to_numpy(given["x"])})

    def raising(given: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        raise IndexError

    assert first_divergence(source, [("trace", source), ("hoist", source)], inputs) is None
    assert first_divergence(source, [("trace", writing), ("hoist", broken), ("fuse", raising)], inputs) == "hoist"
    assert first_divergence(source, [("trace", source), ("fuse", raising), ("hoist", broken)], inputs) == "fuse"


def lossy(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """1 for every number in float32 whose exponential rounds to 1; in float64 these are told apart."""
    x = 1e-9 * inputs["x"]
    return {"y": to_numpy((torch.exp(x) - 1) / 1e-9)}


def kept(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": np.expm1(np.float32(1e-9) * inputs["x"]) / np.float32(1e-9)}


def wide(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return lossy({name: x.double() for name, x in inputs.items()})


def test_the_source_in_float64_decides_where_the_source_lost_its_digits() -> None:
    assert not check(lossy, kept, signature_of(2, 7, 4)).ok
    report = check(lossy, kept, signature_of(2, 7, 4), exact=wide)
    assert report.ok and report.error < 1e-6
    assert all(case.source_error == 1.0 for case in report.cases)
    assert "against the source in float64; its own is 1" in str(report.cases[0])
    assert report.to_json()["cases"][0]["source_error"] == 1.0


def test_float64_does_not_excuse_a_compiled_model_that_is_wrong() -> None:
    off = check(source, lambda i: {"y": right(i)["y"] * np.float32(1.001)}, signature_of(2, 7, 4), exact=source)
    assert not off.ok and all(case.source_error is None for case in off.cases)

    def farther(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        return {"y": source(inputs)["y"] * np.float32(1 - 3e-5)}

    # Within the tolerance of float64, but farther from it than the source, which differs: no reason to trust it.
    assert not check(
        source, lambda i: {"y": right(i)["y"] * np.float32(1 - 12e-5)}, signature_of(2, 7, 4), exact=farther
    ).ok


def test_a_source_tied_to_its_type_leaves_the_verdict_as_it_is() -> None:
    def tied(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        raise RuntimeError("expected Float")

    report = check(lossy, kept, signature_of(2, 7, 4), exact=tied)
    assert not report.ok and report.cases[0].source_error is None


def test_a_model_in_float64_keeps_its_complex_weights_and_the_original_its_type() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Parameter(torch.complex(torch.ones(4), torch.full((4,), 2.0)))
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.c * x).imag * self.w + torch.zeros(4)

    model = Turned()

    def build(module: nn.Module):
        return lambda inputs: {"y": to_numpy(module(**inputs))}

    found = in_float64(model, build)({"x": torch.full((2, 3, 4), 0.1)})["y"]
    assert found.dtype == np.float64 and np.allclose(found, 2 * np.float64(np.float32(0.1)), rtol=1e-15)
    assert model.w.dtype == torch.float32 and torch.get_default_dtype() == torch.float32
