"""Generating: what the source model says when it reads the whole text for each token, plain and speculative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import seqc
from seqc.cli.main import run
from seqc.errors import ArtifactError, UsageError
from seqc.runtime import Session, load
from seqc.runtime.drafts import Drafts
from tests.unit.test_stream import Hybrid

VOCABULARY = 13
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 4, 5], [9, 8, 7]]


class Language(nn.Module):
    """Attention, a convolution and a GRU between an embedding and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 4)
        self.body = Hybrid()
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": 4 * self.head(self.body(self.table(ids)))}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(5)
    return Language().eval()


@pytest.fixture(scope="module")
def artifact(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = seqc.compile(model, (torch.randint(VOCABULARY, (2, 9)),), stateful=True)
    return compiled.save(tmp_path_factory.mktemp("generate") / "artifact")


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return load(artifact)


def naively(model: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            text.append(int(model(torch.tensor([text]))["logits"][0, -1].argmax()))
    return text[len(prompt) :]


def lists(written: Sequence[np.ndarray[Any, Any]]) -> list[list[int]]:
    return [w.tolist() for w in written]


def test_greedy_text_is_that_of_the_source_model(model: nn.Module, session: Session) -> None:
    expected = [naively(model, p, 25) for p in PROMPTS]
    assert len({token for text in expected for token in text}) > 3
    assert lists(session.generate(PROMPTS, 25)) == expected
    assert lists(session.generate(np.array(PROMPTS[1]), 25)) == expected[1:2]


def test_speculation_writes_the_same_in_fewer_calls(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = lists(session.generate(PROMPTS, 60))
    calls = 0
    run_step = session.run_step

    def counting(inputs: Mapping[str, Any], states: Sequence[Any], steps: int) -> Any:
        nonlocal calls
        calls += 1
        return run_step(inputs, states, steps)

    monkeypatch.setattr(session, "run_step", counting)
    assert lists(session.generate(PROMPTS, 60, speculate=6)) == plain
    assert calls < 3 * 60 / 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [1, 3, 8])
def test_speculation_draws_the_same(session: Session, seed: int, length: int) -> None:
    options = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "seed": seed}
    plain = session.generate(PROMPTS, 30, **options)  # type: ignore[arg-type]
    assert lists(session.generate(PROMPTS, 30, speculate=length, **options)) == lists(plain)  # type: ignore[arg-type]


def test_what_a_row_says_depends_on_its_seed_and_number_alone(session: Session) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 7}
    together = lists(session.generate(PROMPTS, 20, **options))
    assert lists(session.generate(PROMPTS[:1], 20, **options)) == together[:1]
    assert lists(session.generate(PROMPTS, 20, **options)) == together
    assert lists(session.generate(PROMPTS, 20, temperature=1.0, seed=8)) != together


@pytest.mark.parametrize("speculate", [0, 4])
def test_a_text_ends_with_its_end_token_and_tokens_are_told_as_they_come(session: Session, speculate: int) -> None:
    whole = lists(session.generate(PROMPTS, 25))
    eos = whole[0][4]
    told: list[list[int]] = [[], [], []]
    written = lists(
        session.generate(PROMPTS, 25, eos=eos, on_token=lambda row, t: told[row].append(t), speculate=speculate)
    )
    assert written == [w[: w.index(eos) + 1] if eos in w else w for w in whole] == told


def test_what_cannot_be_generated_is_refused(session: Session, tmp_path: Path) -> None:
    for ids, message in (([], "at least one token"), ([[1], []], "at least one token"), ([1, 13], "13 is not one of")):
        with pytest.raises(UsageError, match=message):
            session.generate(ids, 5)
    with pytest.raises(UsageError, match="max_new_tokens must be 1 or more"):
        session.generate([1], 0)
    whole = seqc.compile(nn.Embedding(5, 5), (torch.randint(5, (2, 9)),), check=False)
    with pytest.raises(ArtifactError, match="compile it with --stateful"):
        load(whole.save(tmp_path / "whole")).generate([1], 3)
    floats = seqc.compile(Hybrid().eval(), (torch.randn(2, 9, 4),), stateful=True, check=False)
    with pytest.raises(ArtifactError, match=r"whose one input is tokens .* x: float32"):
        load(floats.save(tmp_path / "floats")).generate([1], 3)


class LastLogits(Language):
    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": super().forward(ids)["logits"][:, -1]}


def test_logits_of_the_last_step_are_enough_except_for_speculation(model: nn.Module, tmp_path: Path) -> None:
    last = LastLogits().eval()
    last.load_state_dict(model.state_dict())
    compiled = seqc.compile(last, (torch.randint(VOCABULARY, (2, 9)),), stateful=True, check=False)
    session = load(compiled.save(tmp_path / "last"))
    assert lists(session.generate(PROMPTS, 12)) == [naively(model, p, 12) for p in PROMPTS]
    with pytest.raises(ArtifactError, match="speculation needs logits of every step"):
        session.generate(PROMPTS, 12, speculate=2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6), st.integers(1, 4))
def test_proposals_are_different_and_of_one_length_and_the_first_continues_an_earlier_suffix(
    text: list[int], length: int, count: int
) -> None:
    found = Drafts(text).propose(length, count)
    assert len(found) <= count and len({tuple(p) for p in found}) == len(found)
    assert len({len(p) for p in found}) <= 1 and all(1 <= len(p) <= length for p in found)
    pairs = set(pairwise(text))
    assert all(pair in pairs for p in found for pair in pairwise([text[-1], *p]))
    if tuple(text[-2:]) in set(pairwise(text[:-1])):
        assert found


def test_the_longest_suffix_is_copied_from_where_it_was_last() -> None:
    assert Drafts([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3]).propose(3, 1) == [[9, 7, 2]]
    assert Drafts([1, 2, 3, 9, 2, 3, 8, 2, 3]).propose(2, 1) == [[8, 2]]
    assert Drafts([1, 2, 3, 4]).propose(3, 2) == []


def test_the_command_prints_the_text(artifact: Path, session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(artifact), "--ids", "1,2,3", "-n", "9"]) == 0
    expected = lists(session.generate([1, 2, 3], 9))[0]
    assert capsys.readouterr().out.split() == [str(t) for t in expected]
    assert run(["generate", str(artifact), "--ids", "1,2,3", "--ids", "4", "-n", "3", "--json"]) == 0
    assert '"ids"' in capsys.readouterr().out
    assert run(["generate", str(artifact), "--prompt", "hello"]) == 2
    assert "error: the model has 13 tokens: give --tokenizer" in capsys.readouterr().err
    assert run(["generate", str(artifact), "--ids", "1,x"]) == 2
    assert run(["generate", str(artifact)]) == 2
    assert "give either --prompt TEXT or --ids N,N,..." in capsys.readouterr().err
