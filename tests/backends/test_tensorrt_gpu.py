"""Engines on a real GPU: ``tests/run -m gpu``. Skipped, with the reason, where there is none that the package builds for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import seqc
from seqc.backends.tensorrt.package import PACKAGES
from seqc.errors import SeqcError
from seqc.runtime import load
from seqc.runtime.cuda import open_device
from tests.backends.test_tensorrt_engines import Attends, Decays, MambaLike

pytestmark = pytest.mark.gpu
RANGES = {"profile.batch": (1, 2, 4), "profile.sequence": (1, 9, 32)}
TOLERANCE = 1e-3
"""Of an output's scale: TensorRT may take TF32 for products of float32 matrices."""


@pytest.fixture(params=PACKAGES.values(), ids=lambda package: package.distribution)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What to compile with: the package, and the compute capability of the GPU."""
    package = request.param
    try:
        package.version()
        capability = open_device().capability
        sms = package.check_sms((capability,)) if package.sms else ()
    except SeqcError as error:
        pytest.skip(str(error))
    return {"target": package.distribution, "options": {**RANGES, **({"sm": sms} if sms else {})}}


def assert_near(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("model", [Decays, Attends, MambaLike])
def test_an_engine_computes_what_the_onnx_form_does(
    model: type[nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    artifact = seqc.compile(model(), (torch.randn(2, 9, 4),), **settings).save(tmp_path / "made")
    session, plain = load(artifact, providers=[settings["target"]]), load(artifact, ["CPUExecutionProvider"])
    for rows, steps in ((1, 1), (2, 9), (4, 32), (3, 5)):
        given = {"x": torch.randn(rows, steps, 4).numpy()}
        assert_near(session.run(given)["output"], plain.run(given)["output"])


@pytest.mark.parametrize("model", [Attends, MambaLike])
def test_a_stream_of_an_engine_is_that_of_the_onnx_form(
    model: type[nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    artifact = seqc.compile(model(), (torch.randn(2, 9, 4),), stateful=True, **settings).save(tmp_path / "made")
    stream = load(artifact, providers=[settings["target"]]).stream(2)
    plain = load(artifact, ["CPUExecutionProvider"]).stream(2)
    for steps in (5, 1, 1, 1, 7, 1):
        given = {"x": torch.randn(2, steps, 4).numpy()}
        assert_near(stream.step(given)["output"], plain.step(given)["output"])
    other = stream.fork()
    given = {"x": torch.randn(2, 1, 4).numpy()}
    expected = plain.step(given)["output"]
    assert_near(stream.step(given)["output"], expected)
    assert_near(other.step(given)["output"], expected)
