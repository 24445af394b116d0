"""MakeStateful: tables with an entry for each position, of which a model takes as many as there are steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seqc
from seqc.errors import ArtifactError, UnsupportedModelError
from tests.helpers.streams import in_pieces, random_pieces, stream_form

D, MOST = 4, 40
SHAPES = {"x": {0: "batch", 1: "sequence"}}


class Masked(nn.Module):
    """A mask in a buffer, as for the longest sequence, and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(MOST, D)
        self.register_buffer("mask", torch.tril(torch.ones(1, 1, MOST, MOST)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = x.shape[1]
        x = x + self.position(torch.arange(steps))
        scores = (x @ x.transpose(1, 2))[:, None].masked_fill(self.mask[:, :, :steps, :steps] == 0, -torch.inf)
        return (scores.softmax(-1) @ x[:, None])[:, 0]


class Added(nn.Module):
    """Learned positions as a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, MOST, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.position[:, : x.shape[1]]).cumsum(1)


class LooksAheadAtTheEnd(Masked):
    """The mask lets the last rows of the table read later steps."""

    def __init__(self) -> None:
        super().__init__()
        self.mask[..., MOST - 2, MOST - 1] = 1


@pytest.mark.parametrize("build", [Masked, Added])
def test_entries_are_taken_for_the_positions_at_hand(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    program = seqc.trace(model, (torch.randn(2, 9, D),), SHAPES)
    derived = stream_form(program)
    x = torch.randn(3, MOST, D)
    for pieces in (random_pieces(MOST), [MOST], [1] * MOST):
        (found,) = in_pieces(derived, {"x": x}, pieces)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert {d.name: d.max for d in derived.dims}["sequence"] == MOST
    assert any(
        "a stream takes at most 40 steps" in note and "test_make_stateful_tables" in note for note in derived.notes
    )


def test_every_row_of_a_mask_is_looked_at() -> None:
    program = seqc.trace(LooksAheadAtTheEnd().eval(), (torch.randn(2, 9, D),), SHAPES)
    with pytest.raises(UnsupportedModelError, match="reads later ones"):
        stream_form(program)


def test_a_stream_says_how_many_steps_there_are() -> None:
    torch.manual_seed(0)
    compiled = seqc.compile(Masked().eval(), (torch.randn(2, 9, D),), stateful=True)
    stream = compiled.session.stream()
    stream.step({"x": torch.randn(1, MOST - 1, D).numpy()})
    stream.step({"x": torch.randn(1, 1, D).numpy()})
    with pytest.raises(ArtifactError, match="takes 40 steps in all at most, and these would be 41"):
        stream.step({"x": torch.randn(1, 1, D).numpy()})
    assert stream.positions == (MOST,)
