"""Every model of the zoo compiles once and computes the source model's numbers at every length and batch it accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import seqc
from seqc.errors import UnsupportedModelError
from tests.models.compare import TOLERANCE, relative_error
from tests.models.zoo import COMPILED, REFUSED, refused
from tests.models.zoo.base import BATCHES, ZooModel, eager, tensors

EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 7
SOURCE = Path(refused.__file__).read_text().splitlines()


def _example(zoo: ZooModel) -> dict[str, torch.Tensor]:
    length = EXAMPLE_LENGTH if EXAMPLE_LENGTH in zoo.lengths else zoo.lengths[0]
    return zoo.inputs(EXAMPLE_BATCH, length, 0)


@pytest.mark.parametrize("zoo", COMPILED, ids=lambda zoo: zoo.name)
def test_compiled_model_equals_source_at_every_length_and_batch(zoo: ZooModel) -> None:
    compiled = seqc.compile(zoo.build(), _example(zoo), dynamic_shapes=zoo.dynamic_shapes, check=False)
    source = zoo.build()
    errors = {}
    for length in zoo.lengths:
        for batch in BATCHES:
            inputs = zoo.inputs(batch, length, 1000 * length + batch)
            got = tensors(compiled(*inputs.values()))
            errors[f"length {length}, batch {batch}"] = relative_error(got, eager(source, inputs))
    assert {where: error for where, error in errors.items() if not error <= TOLERANCE} == {}


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
