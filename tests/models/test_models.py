"""Every model of the zoo compiles once and computes the source model's numbers at every length and batch it accepts, and in
any pieces, if it has a streaming form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import seqc
from seqc.errors import SeqcError, UnsupportedModelError
from seqc.passes import DEFAULT, SplitComplex
from seqc.program import Program
from tests.helpers.program_session import program_session
from tests.helpers.streams import in_pieces, stream_form
from tests.models.compare import TOLERANCE, relative_error
from tests.models.followed import Followed, Streamed
from tests.models.measure import became
from tests.models.streams import LOOKS_AHEAD
from tests.models.zoo import COMPILED, REFUSED, refused
from tests.models.zoo.base import BATCHES, ZooModel, eager, tensors

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 7
BECAME = {
    "mamba": "selective_scan",
    "recurrent_gemma": "linear_scan",
    "mingru": "linear_scan",
    "ema_peeled": "linear_scan",
    "linear_attention": "linear_attention",
    "deltanet": "linear_attention",
    "aaren": "softmax_scan",
    "rwkv": "softmax_scan",
    "lightnet": "linear_attention, softmax_scan",
    "slstm_without_recurrent_weights": "softmax_scan",
    "slstm": "loop",
    "lstm_cell_loop": "gated_rnn",
    "gru_cell_loop": "gated_rnn",
    "loop_layers_inside": "gated_rnn",
    "s4_recurrence": "lti_scan",
    "hiss": "lti_scan",
}
"""The class of the loops of models whose mathematics is known, however they spell it."""

SOURCE = Path(refused.__file__).read_text().splitlines()


def _example(zoo: ZooModel) -> dict[str, torch.Tensor]:
    length = EXAMPLE_LENGTH if EXAMPLE_LENGTH in zoo.lengths else zoo.lengths[0]
    return zoo.inputs(EXAMPLE_BATCH, length, 0)


@dataclass(frozen=True)
class Keep:
    """A pass that keeps a copy of the Program, so that one trace serves every test of a model."""

    kept: list[Program]

    name: ClassVar[str] = "keep"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, program: Program) -> int:
        self.kept.append(program.copy())
        return 0


Compilation = tuple[ZooModel, seqc.Compiled, Program]


@pytest.fixture(scope="module", params=COMPILED, ids=lambda zoo: zoo.name)
def compilation(request: pytest.FixtureRequest) -> Compilation:
    """A model of the zoo, compiled, and its Program as it was traced."""
    zoo: ZooModel = request.param
    kept: list[Program] = []
    compiled = seqc.compile(
        zoo.build(), _example(zoo), dynamic_shapes=zoo.dynamic_shapes, passes=[Keep(kept), *DEFAULT], check=False
    )
    return zoo, compiled, kept[0]


def test_compiled_model_equals_source_at_every_length_and_batch(compilation: Compilation) -> None:
    zoo, compiled, _ = compilation
    if zoo.name in BECAME:
        assert became(compiled.report) == BECAME[zoo.name]
    source = zoo.build()
    errors = {}
    for length in zoo.lengths:
        for batch in BATCHES:
            inputs = zoo.inputs(batch, length, 1000 * length + batch)
            got = tensors(compiled(*inputs.values()))
            errors[f"length {length}, batch {batch}"] = relative_error(got, eager(source, inputs))
    assert {where: error for where, error in errors.items() if not error <= TOLERANCE} == {}


def test_step_form_equals_source_in_any_pieces_or_is_refused(compilation: Compilation, tmp_path: Path) -> None:
    zoo, _, traced = compilation
    expected = LOOKS_AHEAD.get(zoo.name)
    if expected is not None:
        with pytest.raises(SeqcError, match=expected):
            stream_form(traced)
        return
    program, source = stream_form(traced), zoo.build()
    errors = {}
    for batch, pieces in ((3, (1,) * 9), (2, (19,)), (3, (5, 1, 2, 11, 1))):
        inputs = zoo.inputs(batch, sum(pieces), 7 + batch)
        errors[pieces] = relative_error(in_pieces(program, inputs, pieces), eager(source, inputs))
    assert {pieces: error for pieces, error in errors.items() if not error <= TOLERANCE} == {}
    SplitComplex()(program)  # the runtime's arrays are real
    _live_a_life(Streamed(zoo, source, program_session(program)), tmp_path)


def _live_a_life(model: Streamed, directory: Path) -> None:
    """Rows that wait and begin anew at different times, a fork, a checkpoint that is gone back to, a saved stream."""
    rows = Followed(model, model.session.stream(3))
    rows.step(5)
    rows.step(2, (2, 0))
    rows.reset(1)
    checkpoint, other = rows.fork(), rows.fork()
    other.step(3)
    rows.step(1)
    rows.rewind(checkpoint)
    rows.stream.save(directory / "state")
    rows.reset(0, 2)
    rows.stream.load(directory / "state")
    rows.given = list(checkpoint.given)
    rows.step(4, (1, 2))
    rows.reset(2)
    rows.step(1)
    other.step(1)
    lengths = tuple(0 if g is None else next(iter(g.values())).shape[1] for g in rows.given)
    assert rows.stream.positions == lengths == (8, 5, 1)


@pytest.mark.parametrize("zoo", REFUSED, ids=lambda zoo: zoo.name)
def test_model_without_a_static_graph_is_refused_with_its_source_line(zoo: ZooModel) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        seqc.compile(zoo.build(), _example(zoo), dynamic_shapes=zoo.dynamic_shapes, check=False)
    named = [int(number) for number in re.findall(r"zoo/refused\.py:(\d+)", str(refusal.value))]
    assert any(zoo.culprit in SOURCE[number - 1] for number in named), str(refusal.value)


def test_compiling_leaves_the_source_model_as_it_was() -> None:
    zoo = next(z for z in COMPILED if z.name == "recurrent_gemma")
    model = zoo.build()
    inputs = zoo.inputs(3, 11, 5)
    before = eager(model, inputs)
    seqc.compile(model, _example(zoo), dynamic_shapes=zoo.dynamic_shapes, check=False)
    assert all(torch.equal(a, b) for a, b in zip(eager(model, inputs), before, strict=True))
