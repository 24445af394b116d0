"""The choice of the next token: the distributions are transformers' own, the draws are reproducible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from seqc.errors import UsageError
from seqc.runtime.sampling import Sampling

LOGITS = np.array([1.0, -2.0, 3.0, 0.5, 2.5], np.float32)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.1, 3),
    st.none() | st.integers(1, 12),
    st.sampled_from([1.0, 0.95, 0.5, 0.1]),
    st.sampled_from([1.0, 1.3, 0.8]),
)
def test_the_distribution_is_that_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float, penalty: float
) -> None:
    generator = np.random.default_rng(seed)
    logits, seen = generator.standard_normal(9).astype(np.float32) * 3, [1, 4, 4, 7]
    found = Sampling(temperature, top_k, top_p, penalty).chances(logits, set(seen))
    steps = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    steps += [] if top_k is None else [TopKLogitsWarper(top_k)]
    steps += [] if top_p == 1.0 else [TopPLogitsWarper(top_p)]
    scores = LogitsProcessorList(steps)(torch.tensor([seen]), torch.from_numpy(logits.astype(np.float64))[None])
    np.testing.assert_allclose(found, scores[0].softmax(-1).numpy(), rtol=1e-6, atol=1e-9)


def test_without_a_temperature_the_likeliest_is_taken() -> None:
    generator = np.random.default_rng(0)
    assert Sampling().choose(LOGITS, (), generator) == 2
    assert Sampling(repetition_penalty=2.0).choose(LOGITS, {2}, generator) == 4
    assert generator.random() == np.random.default_rng(0).random()


def test_draws_follow_the_distribution() -> None:
    sampling, generator = Sampling(temperature=1.0, top_k=3), np.random.default_rng(0)
    drawn = np.bincount([sampling.choose(LOGITS, (), generator) for _ in range(4000)], minlength=5) / 4000
    np.testing.assert_allclose(drawn, sampling.chances(LOGITS, ()), atol=0.03)
    assert drawn[1] == drawn[3] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, not -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, not nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be 1 or more, not 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, not 0.0"),
        ({"top_k": 3}, "give a temperature above 0 with them"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
