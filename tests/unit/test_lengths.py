"""What a trace tells about loops, chunks and branches, and at which pairs of lengths a model is traced."""

from __future__ import annotations

from collections.abc import Callable

import torch

from seqc.frontend import lengths
from seqc.frontend.capture import Capture, capture
from seqc.frontend.signature import Signature, bind
from tests.helpers.modules import Applied

Function = Callable[[torch.Tensor], torch.Tensor]


def first_trace(function: Function, **limits: int) -> tuple[Capture, Signature]:
    sequence = torch.export.Dim("sequence", **limits)
    signature = bind(Applied(function), (torch.randn(2, 9, 4),), {"x": {0: "batch", 1: sequence}})
    return capture(Applied(function), signature, signature.trace_sizes()), signature


def steps(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[:, t].sin() for t in range(x.shape[1])], 1)


def stepwise_while(x: torch.Tensor) -> torch.Tensor:
    out, t = [], 0
    while t < x.shape[1]:
        out.append(x[:, t].sin())
        t += 1
    return torch.stack(out, 1)


def chunked(width: int) -> Function:
    return lambda x: torch.cat([x[:, i : i + width].cumsum(1) for i in range(0, x.shape[1], width)], 1)


def test_a_model_without_loops_has_no_looped_dimension() -> None:
    assert lengths.looped_dims(first_trace(lambda x: x.softmax(1) @ torch.ones(4, 4))[0]) == []


def test_loops_by_range_and_by_while_are_seen() -> None:
    assert lengths.looped_dims(first_trace(steps)[0]) == ["sequence"]
    assert lengths.looped_dims(first_trace(stepwise_while)[0]) == ["sequence"]


def test_a_loop_over_the_batch_is_seen() -> None:
    found = lengths.looped_dims(first_trace(lambda x: torch.stack([x[b].sin() for b in range(x.shape[0])]))[0])
    assert found == ["batch"]


def test_chunk_widths_come_from_slices_bounds_and_splits() -> None:
    bounded = first_trace(
        lambda x: torch.cat([x[:, i : min(i + 24, x.shape[1])].sin() for i in range(0, x.shape[1], 24)], 1)
    )[0]
    assert lengths.chunk_widths(first_trace(chunked(4))[0]) == [4]
    assert 24 in lengths.chunk_widths(bounded)
    assert lengths.chunk_widths(first_trace(lambda x: torch.cat([p.sin() for p in x.split(3, 1)], 1))[0]) == [3]


def test_thresholds_of_branches_carry_their_line() -> None:
    found = lengths.thresholds(first_trace(lambda x: x * 2 if x.shape[1] > 10 else x)[0], "sequence")
    assert list(found) == [10] and "test_lengths.py:" in found[10]
    assert list(lengths.thresholds(first_trace(lambda x: x * 2 if x.shape[1] % 6 else x)[0], "sequence")) == [6]
    assert lengths.thresholds(first_trace(lambda x: x.softmax(1))[0], "sequence") == {}


def test_both_lengths_of_a_pair_show_four_chunks_and_ragged_ends_that_differ() -> None:
    first, signature = first_trace(chunked(4))
    a, b = (sizes["sequence"] for sizes in next(lengths.pairs_of_sizes(first, signature)))
    assert min(a, b) > 12 and len({a % 4, b % 4, 0}) == 3 and -(-a // 4) != -(-b // 4)


def test_lengths_stay_in_the_declared_range() -> None:
    for low, high in ((2, 6), (4, 5), (10, 12), (2, 100)):
        first, signature = first_trace(steps, min=low, max=high)
        pairs = [(a["sequence"], b["sequence"]) for a, b in lengths.pairs_of_sizes(first, signature)]
        assert pairs and all(low <= b < a <= high for a, b in pairs)


def test_two_looped_dimensions_never_share_a_size_or_a_change_of_size() -> None:
    first, signature = first_trace(
        lambda x: torch.stack([torch.stack([x[b, t] for t in range(x.shape[1])]) for b in range(x.shape[0])])
    )
    for a, b in lengths.pairs_of_sizes(first, signature):
        assert len({*a.values(), *b.values()}) == 4
        assert a["batch"] - b["batch"] != a["sequence"] - b["sequence"]
