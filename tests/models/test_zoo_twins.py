"""Models of the zoo that are written in two ways, or claim something of their numbers, in eager PyTorch: are they that?"""

from __future__ import annotations

import pytest
import torch

from tests.models.compare import TOLERANCE, relative_error
from tests.models.zoo import ALL
from tests.models.zoo.base import LENGTHS, eager
from tests.models.zoo.memory_models import CorrelatedDelta


@pytest.mark.parametrize(("one", "other"), [("s4_kernel", "s4_recurrence"), ("mambapy_pscan", "mambapy_sequential")])
def test_parallel_and_sequential_form_are_the_same_model(one: str, other: str) -> None:
    for length in LENGTHS:
        inputs = ALL[one].inputs(2, length, length)
        wanted = [y.numpy() for y in eager(ALL[other].build(), inputs)]
        assert relative_error(wanted, eager(ALL[one].build(), inputs)) <= TOLERANCE


@pytest.mark.parametrize("name", ["delta_correlated", "gated_delta_correlated"])
def test_keys_are_as_correlated_as_is_said(name: str) -> None:
    model = ALL[name].build()
    assert isinstance(model, CorrelatedDelta)
    with torch.no_grad():
        x = ALL[name].inputs(2, 64, 0)["x"]
        keys, strength = model.keys(x), torch.sigmoid(model.beta(x))
    cosines = torch.einsum("bthk,bshk->bhts", keys, keys)
    assert 0.92 < float(cosines.mean()) < 0.96
    assert 0.9 < float(strength.mean()) < 0.96
