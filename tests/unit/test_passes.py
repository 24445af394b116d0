"""The list of passes: each satisfies the protocol, names are unique."""

from __future__ import annotations

import dataclasses

import pytest

from seqc.passes import BY_NAME, DEFAULT, Hoist, register
from seqc.rewrite import Pass


def test_default_passes_satisfy_the_protocol_and_are_found_by_name() -> None:
    assert [p.name for p in DEFAULT] == [
        "fuse_discretization",
        "fold_constants",
        "split_complex",
        "split_projections",
        "split_recurrence",
        "hoist",
        "sink_readouts",
        "sink",
        "causal_conv",
        "causal_masks",
        "group_queries",
        "fold_lti",
        "classify_recurrence",
        "fuse_flips",
    ]
    assert list(BY_NAME) == [p.name for p in DEFAULT]
    for step in DEFAULT:
        assert isinstance(step, Pass) and dataclasses.is_dataclass(step)
        with pytest.raises(dataclasses.FrozenInstanceError):
            step.anything = 1  # type: ignore[attr-defined]


def test_two_passes_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="'hoist'"):
        register([*DEFAULT, Hoist(max_growth=2.0)])
