"""QuantizeCaches: keys and values in int8 with a scale for each row; states that are computed of themselves stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.caches import SCHEMES, Int8
from seqc.cli.main import run
from seqc.compiler import Compiled
from seqc.errors import UsageError, VerificationError
from seqc.options import CACHES
from seqc.passes import QuantizeCaches
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.runtime import load
from seqc.text import text
from tests.helpers.modules import Applied
from tests.helpers.programs import capture_program
from tests.helpers.streams import in_pieces, random_pieces, stream_form

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


class Attends(nn.Module):
    """Two heads, and a recurrence in front."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.decay = nn.Linear(16, 48), nn.Parameter(torch.rand(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, steps = torch.zeros(x.shape[0], 16), []
        for t in range(x.shape[1]):
            h = self.decay * h + x[:, t]
            steps.append(h)
        heads = self.qkv(torch.stack(steps, 1)).unflatten(-1, (6, 8)).transpose(1, 2)
        q, k, v = heads.chunk(3, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Speaks(nn.Module):
    """Tokens in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attends, self.out = nn.Embedding(11, 16), Attends(), nn.Linear(16, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.attends(self.table(ids)))


def small(model: nn.Module, x: torch.Tensor = X, **told: Any) -> Compiled:
    torch.manual_seed(0)
    return seqc.compile(model.eval(), (x,), stateful=True, options={"cache": "int8", **told.pop("options", {})}, **told)


def stored(program: Program, scheme: Int8 | None = None) -> tuple[Program, tuple[str, ...], int]:
    (record,) = run_passes(program, [QuantizeCaches(scheme or Int8())])
    return program, record.reasons, record.changes


def attending(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def within(x: torch.Tensor) -> torch.Tensor:
    at = torch.arange(x.shape[1])
    back = at[:, None] - at
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(back >= 0) & (back < 4))


def values(program: Program, target: Any) -> list[str]:
    return [line.split(": ", 1)[1] for line in text(program, provenance=False).splitlines() if f"= {target}(" in line]


def test_rows_are_rounded_once_written_and_read_as_floats() -> None:
    program = stream_form(capture_program(Applied(attending), X))
    assert values(program, "aten.scatter.src") == [
        "f32[batch, capacity, 16] = aten.scatter.src(%past_key_values.0.key, 1, %6, %x)"
    ]
    program, reasons, changes = stored(program)
    assert changes == 1 and reasons == (
        "past_key_values.0.key is stored as int8: past_key_values.0.key, past_key_values.0.key_scale",
    )
    assert text(program, provenance=False).splitlines()[1:3] == [
        "input %past_key_values.0.key: i8[batch, capacity, 16]",
        "input %past_key_values.0.key_scale: f32[batch, capacity, 1]",
    ]
    data, scale = values(program, "aten.scatter.src")
    assert data.startswith("i8[batch, capacity, 16] = aten.scatter.src(%past_key_values.0.key, 1,")
    assert scale.startswith("f32[batch, capacity, 1] = aten.scatter.src(%past_key_values.0.key_scale, 1,")
    assert len(values(program, "aten.round")) == 1
    (read,) = values(program, "aten.mul.Tensor")
    assert read.startswith("f32[batch, capacity, 16]")
    assert [(s.name, s.initial.dtype, tuple(s.initial.shape)) for s in program.states[:2]] == [
        ("past_key_values.0.key", torch.int8, (1, 0, 16)),
        ("past_key_values.0.key_scale", torch.float32, (1, 0, 1)),
    ]


@pytest.mark.parametrize("function", [attending, within])
def test_what_comes_out_depends_on_no_pieces_and_is_that_of_rounded_rows(function: Any) -> None:
    plain = stream_form(capture_program(Applied(function), X))
    program, _, changes = stored(plain.copy())
    assert changes == 1 and torch.int8 in {s.initial.dtype for s in program.states}
    x = torch.randn(2, 23, 16)
    (whole,) = in_pieces(program, {"x": x}, [23])
    for seed in range(3):
        torch.testing.assert_close(in_pieces(program, {"x": x}, random_pieces(23, seed))[0], whole)
    scale = x.abs().amax(-1, keepdim=True) / 127
    rows = (x / scale).round() * scale
    back = torch.arange(23)[:, None] - torch.arange(23)
    mask = (back >= 0) & ((back < 4) if function is within else (back >= 0))
    torch.testing.assert_close(whole, F.scaled_dot_product_attention(x, rows, rows, attn_mask=mask))
    exact, _, _ = stored(plain.copy(), Int8(rounded=False))
    torch.testing.assert_close(in_pieces(exact, {"x": x}, [5, 18])[0], function(x))


def test_a_row_of_zeros_stays_one() -> None:
    program, _, _ = stored(stream_form(capture_program(Applied(attending), X)))
    assert in_pieces(program, {"x": torch.zeros(1, 3, 16)}, [1, 2])[0].eq(0).all()


def test_a_recurrent_state_is_never_stored_so() -> None:
    plain = stream_form(capture_program(Applied(lambda x: x.cumsum(1)), X))
    before = text(plain)
    program, reasons, changes = stored(plain)
    assert (changes, reasons, text(program)) == (0, (), before)
    with pytest.raises(UsageError, match="cache=int8 is about keys and values that a stream keeps, and there are none"):
        small(Applied(lambda x: x.cumsum(1)))


def test_a_cache_whose_rows_are_changed_is_none() -> None:
    program = stream_form(capture_program(Applied(attending), X))
    (scatter,) = [n for n in program.graph.nodes if n.target is aten.scatter.src]
    past = scatter.args[0]
    with program.graph.inserting_before(scatter):
        decayed = program.graph.call_function(aten.mul.Tensor, (past, 0.9))
    decayed.meta["val"] = past.meta["val"]
    scatter.args = (decayed, *scatter.args[1:])
    _, reasons, changes = stored(program)
    assert changes == 0
    assert reasons == ("past_key_values.0.key stays as it is: its rows are not only written, moved and read",)


def test_rows_that_would_not_become_smaller_stay() -> None:
    narrow = torch.randn(2, 9, 1)
    _, reasons, changes = stored(stream_form(capture_program(Applied(attending), narrow)))
    assert changes == 0 and "rows of 1 numbers would not become smaller" in reasons[0]


@pytest.fixture(scope="module")
def made() -> Compiled:
    return small(Speaks(), torch.randint(0, 11, (2, 9)))


def test_the_check_tells_rounding_from_error(made: Compiled) -> None:
    assert made.report["check"]["ok"] and made.report["check"]["error"] < 1e-4  # with floats, the source
    found = made.report["quantization"]
    assert found["check_of_caches"]["ok"] and found["caches"] == 2
    assert 1e-4 < found["drift"] < 0.1
    assert found["state_bytes"]["after"]["per_step"] == 2 * 2 * (8 + 4) < found["state_bytes"]["before"]["per_step"]
    (note,) = [n for n in made.manifest["notes"] if "caches are int8" in n]
    assert f"off from the source by up to {found['drift']:.2g} of an output's scale, which is not limited" in note
    assert {s["name"].rpartition(".")[2]: s["dtype"] for s in made.manifest["states"]} == {
        "recurrent_state": "float32",
        "key": "int8",
        "key_scale": "float32",
        "value": "int8",
        "value_scale": "float32",
        "past_position": "int64",
    }


def test_streams_fork_save_and_write_on_with_small_caches(
    made: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = load(made.save(tmp_path / "art"))
    assert session.memory().per_step == 2 * 2 * (8 + 4)
    assert run(["inspect", str(tmp_path / "art")]) == 0
    assert "and 48 B for each step" in capsys.readouterr().out
    ids = np.random.default_rng(0).integers(0, 11, (2, 12))
    whole = session.run({"ids": ids})["output"]
    stream = session.stream(2)
    stream.step({"ids": ids[:, :5]})
    other = stream.fork()
    np.testing.assert_allclose(stream.step({"ids": ids[:, 5:]})["output"], whole[:, 5:], rtol=1e-4, atol=1e-5)
    other.save(tmp_path / "state")
    back = session.stream(2)
    back.load(tmp_path / "state")
    steps = [back.step({"ids": ids[:, t : t + 1]})["output"] for t in range(5, 12)]
    np.testing.assert_allclose(np.concatenate(steps, 1), whole[:, 5:], rtol=1e-4, atol=1e-5)
    back.rewind(other)
    np.testing.assert_allclose(back.step({"ids": ids[:, 5:]})["output"], whole[:, 5:], rtol=1e-4, atol=1e-5)
    written = session.generate([[1, 2, 3], [4, 5]], 6)
    assert [len(w) for w in written] == [6, 6]
    assert (session.generate([[1, 2, 3]], 6, speculate=3)[0] == written[0]).all()


def test_verify_accepts_what_the_rounding_was_measured_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Attends().eval()
    art = str(small(model).save(tmp_path / "made"))
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=100)},)
    torch.export.save(torch.export.export(Applied(attending), (X,), dynamic_shapes=shapes), tmp_path / "other.pt2")
    torch.save(model, tmp_path / "model.pt")
    assert run(["verify", art, "--against", str(tmp_path / "model.pt"), "--allow-pickle"]) == 0
    out = capsys.readouterr().out
    assert "compared with the source as it is (its caches are int8), within 2 times what it was off when it was" in out
    assert run(["verify", art, "--against", str(tmp_path / "other.pt2")]) == 1


def test_a_wrong_form_of_the_rows_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: Int8, emit: Any, parts: Any, dtype: torch.dtype) -> Any:
        return emit(aten.mul.Tensor, emit(aten._to_copy.default, parts[0], dtype=torch.float32), 0.01)

    monkeypatch.setattr(Int8, "dequantise", off)
    with pytest.raises(VerificationError, match="differs from the source"):
        small(Attends())


def test_small_caches_go_with_narrow_types_and_small_weights() -> None:
    found = small(Attends(), options={"dtype": "fp16", "weights": "int8"})
    assert found.report["quantization"]["caches"] == 2 and found.manifest["quantization"]["weights"] == "int8"
    assert found.report["quantization"]["check"]["ok"] and found.report["quantization"]["check_of_caches"]["ok"]


def test_an_engine_takes_and_gives_int8() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    ranges = {"profile.batch": (1, 2, 4), "profile.sequence": (1, 9, 32), "profile.capacity": (16, 64, 64)}
    found = small(Attends(), target="tensorrt-rtx", options={"sm": 89, **ranges}, check=False)
    outputs = [kernel["outputs"] for kernel in found.report["engines"][1]["kernels"]]
    assert sum(any(o.startswith("Int8[") for o in given) for given in outputs) >= 2
    assert not any(engine["has_step_loop"] for engine in found.manifest["engines"])


def test_only_streams_have_caches() -> None:
    assert tuple(SCHEMES) == CACHES
    with pytest.raises(UsageError, match="cache=int8 is about what streams keep: compile with --stateful"):
        seqc.compile(Attends(), (X,), options={"cache": "int8"})
