"""Every form of every scan op in ONNX Runtime: against the reference, at many lengths, with extreme decays."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
import seqc.ops
from seqc.backends.onnx import export
from seqc.errors import UnsupportedOpError, UsageError
from seqc.lowerings import FORMS
from seqc.lowerings.lower import Lower
from seqc.lowerings.table import LOWERINGS
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import TARGETS
from tests.helpers.onnx import assert_same, run, session

ops = torch.ops.seqc
LENGTHS = (1, 2, 15, 16, 17, 257, 4096)
B, H, K, V, D, N = 2, 2, 4, 3, 4, 8
Tensors = tuple[torch.Tensor, ...]
Inputs = Callable[[int], Tensors]


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Tensors]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        return tuple(self.function(*inputs))


def decays(length: int, kind: str, *shape: int) -> torch.Tensor:
    """In (0, 1), or with 0, 1e-38 and 1 among them."""
    values = torch.rand(length, *shape)
    if kind == "extreme":
        extremes = torch.tensor([0.0, 1e-38, 1.0, 1.0])
        values = torch.where(torch.rand(length, *shape) < 0.5, extremes[torch.randint(4, (length, *shape))], values)
    return values


def scan_inputs(kind: str) -> Inputs:
    return lambda length: (decays(length, kind, B, D), torch.randn(length, B, D), torch.randn(B, D))


def selective_inputs(kind: str) -> Inputs:
    def make(length: int) -> Tensors:
        dt = -decays(length, kind, B, D).log().clamp_min(-200)
        return (
            torch.randn(length, B, D), dt, -torch.rand(D, N),
            torch.randn(length, B, N), torch.randn(length, B, N), torch.randn(B, D, N),
        )  # fmt: skip

    return make


def attention_inputs(kind: str, per_key: bool, shared: bool) -> Inputs:
    def make(length: int) -> Tensors:
        heads = 1 if shared else H
        key = torch.nn.functional.normalize(torch.randn(length, B, heads, K), dim=-1)
        if kind == "correlated":
            key = torch.nn.functional.normalize(key * 0.2 + 1.0, dim=-1)
            rate = torch.full((length, B, H), 0.93)
        else:
            rate = 2 * torch.rand(length, B, H)
        return (
            torch.randn(length, B, heads, K), key, torch.randn(length, B, H, V), torch.randn(B, H, K, V),
            decays(length, kind, B, H, K if per_key else 1).log(), rate,
        )  # fmt: skip

    return make


def attention(decayed: bool, delta: bool, reverse: bool) -> Callable[..., Tensors]:
    def call(q, k, v, s, g, beta):
        return ops.linear_attention(q, k, v, s, g if decayed else None, beta if delta else None, reverse)

    return call


def cases() -> dict[str, tuple[str, Callable[..., Tensors], Inputs, bool]]:
    """Name -> (op, function, inputs, reverse)."""
    found: dict[str, tuple[str, Callable[..., Tensors], Inputs, bool]] = {}
    for reverse, kind in itertools.product((False, True), ("plain", "extreme")):
        name = f"{kind}{' reverse' if reverse else ''}"
        found[f"linear_scan {name}"] = (
            "linear_scan", lambda a, b, s, r=reverse: ops.linear_scan(a, b, s, r), scan_inputs(kind), reverse,
        )  # fmt: skip
        found[f"selective_scan {name}"] = (
            "selective_scan", lambda x, dt, a, b, c, s, r=reverse: ops.selective_scan(x, dt, a, b, c, s, r),
            selective_inputs(kind), reverse,
        )  # fmt: skip
    rules = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}
    for rule, (decayed, delta) in rules.items():
        for kind in ("plain", "extreme") if decayed else ("plain",):
            for per_key in (False, True) if decayed else (False,):
                name = f"linear_attention {rule} {kind}{' per key' if per_key else ''}"
                found[name] = (
                    "linear_attention",
                    attention(decayed, delta, False),
                    attention_inputs(kind, per_key, False),
                    False,
                )
    for rule, (decayed, delta) in {"gated": (True, False), "gated_delta": (True, True)}.items():
        found[f"linear_attention {rule} reverse"] = (
            "linear_attention",
            attention(decayed, delta, True),
            attention_inputs("plain", False, False),
            True,
        )
    found["linear_attention gated shared keys"] = (
        "linear_attention",
        attention(True, False, False),
        attention_inputs("plain", False, True),
        False,
    )
    for rule, (decayed, delta) in {"delta": (False, True), "gated_delta": (True, True)}.items():
        found[f"linear_attention {rule} correlated keys"] = (
            "linear_attention",
            attention(decayed, delta, False),
            attention_inputs("correlated", False, False),
            False,
        )
    return found


CASES = cases()


def lowered(name: str, target: str, form: str, most: int | None = 65536) -> tuple[Program, list[str]]:
    op, function, make, _ = CASES[name]
    torch.manual_seed(0)
    example = make(5)
    sequence = torch.export.Dim("sequence", max=most)
    shapes = [
        {0: sequence, 1: "batch"} if x.shape[0] == 5 else {0: "batch"} if x.shape[0] == B and x.shape != (D, N) else {}
        for x in example
    ]
    program = seqc.trace(Calls(function), example, shapes)
    (record,) = run_passes(program, [Lower(TARGETS[target], {} if form == "auto" else {op: form})])
    return program, list(record.reasons)


@pytest.mark.parametrize(
    ("name", "form"), [(n, f) for n, case in CASES.items() for f in FORMS[case[0]] if f != "standard"]
)  # that one is tested in test_standard_scans
def test_every_form_equals_the_reference(name: str, form: str) -> None:
    _, function, make, _ = CASES[name]
    if why := refusal(name, form):
        with pytest.raises(UnsupportedOpError, match=why):
            lowered(name, "ort-cpu", form)
        return
    program, (reason,) = lowered(name, "ort-cpu", form)
    assert f" as {form}: " in reason
    compiled = session(export(program))
    for length in LENGTHS:
        torch.manual_seed(length)
        given = make(length)
        expected = function(*(x.double() for x in given))
        assert_same(run(compiled, given), [x.float() for x in expected], 2e-5)


def refusal(name: str, form: str) -> str | None:
    """Why ``form`` does not take the case."""
    if form in ("chunked", "parallel_chunks") and "delta" in name:
        return "a form of their own"
    if form in ("chunked_delta", "parallel_delta") and "delta" not in name:
        return "not a delta rule"
    return (
        "a decay for each key dimension"
        if form.split("_")[0] in ("chunked", "parallel") and "per key" in name
        else None
    )


def test_the_first_form_that_the_target_has_is_taken_and_the_refusals_are_said() -> None:
    for target, form in (("onnx", "chunked_delta"), ("ort-cpu", "contrib")):
        op, function, make, _ = CASES["linear_attention gated_delta plain"]
        program = seqc.trace(Calls(function), make(5), [{0: "sequence"}] * 3 + [{}] + [{0: "sequence"}] * 2)
        (record,) = run_passes(program, [Lower(TARGETS[target])])
        assert f"{op} as {form}" in record.reasons[0]
        assert ("contrib: target 'onnx' has no com.microsoft operators" in record.reasons[0]) == (target == "onnx")


def test_a_form_that_the_target_lacks_cannot_be_forced() -> None:
    with pytest.raises(UnsupportedOpError, match=r"target 'onnx' has no com\.microsoft operators"):
        lowered("linear_attention linear plain", "onnx", "contrib")


@pytest.mark.parametrize(
    "name",
    [
        "linear_scan plain", "selective_scan plain", "linear_attention gated plain", "linear_attention delta plain",
        "linear_attention gated_delta reverse",
    ],
)  # fmt: skip
def test_a_target_that_avoids_loops_gets_forms_without_them(name: str) -> None:
    program, (reason,) = lowered(name, "tensorrt", "auto")
    assert "no loop" in reason
    assert not any(node.op_type in ("Loop", "Scan") for node in export(program).graph.all_nodes())


def test_a_scan_over_blocks_needs_a_bound_of_the_length() -> None:
    with pytest.raises(UnsupportedOpError, match="no upper bound: give the dimension one"):
        lowered("linear_scan plain", "onnx", "prefix", None)


def test_forms_are_options_of_the_compiler() -> None:
    with pytest.raises(UsageError, match=r"lowering\.linear_scan"):
        seqc.compile(nn.Identity(), (torch.randn(1, 2),), options={"lowering.linear_scn": "sequential"})
    with pytest.raises(UsageError, match="takes auto or sequential or prefix"):
        seqc.compile(nn.Identity(), (torch.randn(1, 2),), options={"lowering.linear_scan": "fastest"})


def test_the_table_holds_the_forms_that_are_listed() -> None:
    assert {op: tuple(f.name for f in forms) for op, forms in LOWERINGS.items()} == FORMS
