"""Real models as streams in the runtime: rows that begin anew and wait, forks, checkpoints, saved states, padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import seqc
from seqc.errors import ArtifactError
from seqc.runtime import Stream, load
from tests.models.compare import TOLERANCE, relative_error
from tests.models.followed import Followed, Streamed
from tests.models.zoo import ALL
from tests.models.zoo.base import Inputs, ZooModel

Arrays = dict[str, np.ndarray[Any, Any]]


class Masked(nn.Module):
    """A language model that is told which of its tokens are padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def _shallow(name: str, layers: str) -> ZooModel:
    """A model of the zoo with the first of its equal layers only."""

    def build() -> nn.Module:
        model = ALL[name].build()
        kept = model.get_submodule(layers)
        assert isinstance(kept, nn.ModuleList)
        model.set_submodule(layers, kept[:1])
        return model

    return replace(ALL[name], build=build)


def _masked(zoo: ZooModel) -> ZooModel:
    """A language model that takes a mask besides its tokens."""

    def inputs(batch: int, length: int, seed: int) -> Inputs:
        given = zoo.inputs(batch, length, seed)
        return {**given, "attention_mask": torch.ones_like(given["input_ids"])}

    shapes = {n: {0: "batch", 1: "sequence"} for n in ("input_ids", "attention_mask")}
    return ZooModel(f"{zoo.name}_with_a_mask", zoo.group, lambda: Masked(zoo.build()), inputs, shapes)


MASKED = _masked(_shallow("llama", "model.layers"))
MODELS = (
    _shallow("mamba", "backbone.layers"),
    _shallow("rwkv", "rwkv.blocks"),
    ALL["recurrent_gemma"],
    ALL["lstm_stacked"],
    ALL["loop_padded_chunks"],
    MASKED,
)


@dataclass(frozen=True)
class Compiled(Streamed):
    directory: Path


def _compiled(zoo: ZooModel, directory: Path) -> Compiled:
    example = zoo.inputs(2, 7, 0)
    artifact = seqc.compile(zoo.build(), example, dynamic_shapes=zoo.dynamic_shapes, stateful=True, check=False)
    path = artifact.save(directory / zoo.name)
    return Compiled(zoo, zoo.build(), load(path), path)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return _compiled(MASKED, tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="module", params=MODELS, ids=lambda zoo: zoo.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if request.param is MASKED:
        found: Compiled = request.getfixturevalue("masked")
        return found
    return _compiled(request.param, tmp_path_factory.mktemp("stream"))


def test_rows_begin_anew_at_different_times_and_wait(model: Compiled) -> None:
    rows = Followed(model, model.session.stream(3))
    rows.step(5)
    rows.step(3, (2, 0))
    rows.reset(1)
    rows.step(1)
    rows.step(12, (1,))
    rows.reset(0, 2)
    for steps in (7, 1, 1):
        rows.step(steps)
    counts = [0 if g is None else next(iter(g.values())).shape[1] for g in rows.given]
    assert rows.stream.positions == tuple(counts) == (9, 22, 9)


def test_a_fork_goes_its_own_way_and_a_checkpoint_is_gone_back_to(model: Compiled) -> None:
    rows = Followed(model, model.session.stream(3))
    rows.step(11)
    checkpoint = rows.fork()
    other = rows.fork()
    other.step(4)
    rows.step(1)
    rows.rewind(checkpoint)
    rows.step(9)
    other.step(1)


def test_a_saved_stream_is_gone_on_from_in_another_session(model: Compiled, tmp_path: Path) -> None:
    rows = Followed(model, model.session.stream(3))
    rows.step(10)
    rows.step(2, (1,))
    rows.stream.save(tmp_path / "state")
    again = Followed(model, load(model.directory).stream(3), list(rows.given), rows.seed)
    again.stream.load(tmp_path / "state")
    again.step(1)
    again.step(6, (0, 1))


def test_greedy_text_is_that_of_the_source_model(model: Compiled) -> None:
    if [p.name for p in model.session.inputs] != ["input_ids"]:
        with pytest.raises(ArtifactError, match="generate needs a model whose one input is tokens"):
            model.session.generate([[1]], 3)
        return
    prompts = [model.zoo.inputs(1, n, n)["input_ids"] for n in (3, 8)]
    expected = []
    for prompt in prompts:
        text = prompt
        for _ in range(12):
            (logits,) = model.whole({"input_ids": text})
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        expected.append(text[0, prompt.shape[1] :].tolist())
    found = model.session.generate([p[0].tolist() for p in prompts], 12)
    assert [text.tolist() for text in found] == expected


PROMPTS = (4, 9, 7)


def _padded(prompts: list[torch.Tensor], left: bool) -> Inputs:
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def _in_two(stream: Stream, inputs: Inputs) -> np.ndarray[Any, Any]:
    """The logits of a prompt that comes in two pieces."""
    pieces = [{n: v[:, a:b].numpy() for n, v in inputs.items()} for a, b in ((0, 5), (5, None))]
    return np.concatenate([stream.step(piece)["output"] for piece in pieces], 1)


def test_padding_on_the_left_changes_nothing_in_prompts_nor_in_what_follows(masked: Compiled) -> None:
    prompts = [masked.zoo.inputs(1, n, n)["input_ids"][0] for n in PROMPTS]
    follow = masked.zoo.inputs(3, 6, 1)
    stream = masked.session.stream(3)
    first = _in_two(stream, _padded(prompts, left=True))
    then = [stream.step({n: v[:, t : t + 1].numpy() for n, v in follow.items()})["output"] for t in range(6)]
    for row, prompt in enumerate(prompts):
        ids = torch.cat([prompt, follow["input_ids"][row]])[None]
        (alone,) = masked.whole({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        got = np.concatenate([first[row, -len(prompt) :], *(t[row] for t in then)])
        assert relative_error([got], [alone[0]]) <= TOLERANCE


def test_padding_on_the_right_changes_nothing_in_prompts_and_is_never_read_later(masked: Compiled) -> None:
    prompts = [masked.zoo.inputs(1, n, n)["input_ids"][0] for n in PROMPTS]
    follow, padded = masked.zoo.inputs(3, 6, 1), _padded(prompts, left=False)
    stream = masked.session.stream(3)
    first = _in_two(stream, padded)
    then = stream.step({n: v.numpy() for n, v in follow.items()})["output"]
    for row, prompt in enumerate(prompts):
        (alone,) = masked.whole(
            {"input_ids": prompt[None], "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
        )
        assert relative_error([first[row, : len(prompt)]], [alone[0]]) <= TOLERANCE
    # The source model, too, counts the padding in its positions: it is what the rest is compared with.
    (whole,) = masked.whole({n: torch.cat([padded[n], follow[n]], 1) for n in padded})
    assert relative_error([then], [whole[:, -6:]]) <= TOLERANCE
    altered = {**padded, "input_ids": padded["input_ids"] + 7 * (1 - padded["attention_mask"])}
    other = masked.session.stream(3)
    _in_two(other, altered)
    assert relative_error([other.step({n: v.numpy() for n, v in follow.items()})["output"]], [then]) <= 1e-6
