"""Generating tokens from a streaming artifact of a language model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seqc.errors import ArtifactError, UsageError
from seqc.runtime.drafts import Drafts
from seqc.runtime.inputs import Array
from seqc.runtime.manifest import Manifest, Port
from seqc.runtime.sampling import Sampling
from seqc.runtime.stream import Stream

if TYPE_CHECKING:
    from seqc.runtime.session import Session

OnToken = Callable[[int, int], Any]

_BRANCHES = 3
"""Continuations that are tried at once, one row each."""
_LONGEST_REPEAT = 16
"""Accepted tokens that are read once more with the next proposals; beyond, they go through the model by themselves."""


class Generator:
    """Writes on from prompts: the tokens so far, one text per row, and the choice of the next."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limit: int,
        eos: Collection[int],
        seed: int | None,
        on_token: OnToken | None,
    ) -> None:
        self._session, self._sampling, self._limit, self._eos = session, sampling, limit, eos
        self._tokens, self._logits = token_ports(session.manifest)
        self._on_token = on_token
        self._texts = [list(prompt) for prompt in prompts]
        self._seen = [set(prompt) for prompt in prompts]
        self._starts = [len(prompt) for prompt in prompts]
        # a generator per row: what a row says does not depend on the others
        seeds = np.random.SeedSequence(seed).spawn(len(prompts))
        self._random = [np.random.default_rng(s) for s in seeds]

    @property
    def written(self) -> list[Array]:
        """The new tokens of each row."""
        return [np.array(text[start:], np.int64) for text, start in zip(self._texts, self._starts, strict=True)]

    def plainly(self) -> None:
        """One step of all rows for each token."""
        stream = self._session.stream(len(self._texts))
        logits: dict[int, Array] = {}
        for length in set(self._starts):
            rows = [row for row, start in enumerate(self._starts) if start == length]
            logits |= dict(zip(rows, self._step(stream, [self._texts[r] for r in rows], rows), strict=True))
        while rows := [row for row in logits if self._write(row, logits[row][-1])]:
            logits = dict(zip(rows, self._step(stream, [self._texts[r][-1:] for r in rows], rows), strict=True))

    def speculatively(self, length: int) -> None:
        """Rows one after the other; in each step ``length`` proposed tokens go through the model with the last one.

        What :meth:`plainly` would choose is chosen at each of them, from the same random numbers, until a proposal is not
        what was chosen: the text is the same.
        """
        if self._logits.shape[-2] != self._session.manifest.steps_dim:
            raise ArtifactError(
                f"speculation needs logits of every step; {self._logits} has those of the last one only"
            )
        for row in range(len(self._texts)):
            self._speculate(row, length)

    def _speculate(self, row: int, length: int) -> None:
        stream, drafts, text = self._session.stream(), Drafts(self._texts[row]), self._texts[row]
        read, going = 0, True
        while going:
            pending = text[read:]
            paths = drafts.propose(length, _BRANCHES) if read > 0 and len(pending) <= _LONGEST_REPEAT else []
            paths = paths or [[]]
            trial = stream.fork([0] * len(paths))
            logits = self._step(trial, [pending + path for path in paths], range(len(paths)))
            alive, taken = list(range(len(paths))), 0
            while going and alive:
                going = self._write(row, logits[alive[0]][len(pending) - 1 + taken])
                drafts.append(text[-1])
                if taken == len(paths[0]):
                    stream, read = trial.fork(alive[:1]), read + len(pending) + taken
                    break
                alive = [i for i in alive if paths[i][taken] == text[-1]]
                taken += 1

    def _step(self, stream: Stream, tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Array:
        """Logits ``[rows, steps, vocabulary]``, or of the last step alone."""
        ids = np.array(tokens, self._tokens.dtype)
        logits = stream.step({self._tokens.name: ids}, rows)[self._logits.name]
        return logits if logits.ndim == 3 else logits[:, None]

    def _write(self, row: int, logits: Array) -> bool:
        """Choose the next token of a row. Returns whether there is to be another."""
        token = self._sampling.choose(logits, self._seen[row], self._random[row])
        text = self._texts[row]
        text.append(token)
        self._seen[row].add(token)
        if self._on_token is not None:
            self._on_token(row, token)
        return token not in self._eos and len(text) - self._starts[row] < self._limit


def token_ports(manifest: Manifest) -> tuple[Port, Port]:
    """The input that takes tokens and the output that gives logits. Raises ArtifactError where it is not clear which."""
    if len(manifest.inputs) != 1 or "int" not in manifest.inputs[0].dtype or len(manifest.inputs[0].shape) != 2:
        spelled = ", ".join(map(str, manifest.inputs))
        raise ArtifactError(f"generate needs a model whose one input is tokens [batch, steps]; this takes {spelled}")
    fitting = [
        p for p in manifest.outputs if "float" in p.dtype and len(p.shape) in (2, 3) and isinstance(p.shape[-1], int)
    ]
    found = [p for p in fitting if p.name == "logits"] or fitting
    if len(found) != 1:
        spelled = ", ".join(map(str, manifest.outputs))
        raise ArtifactError(f"generate needs one output of logits [batch, steps, vocabulary]; this gives {spelled}")
    return manifest.inputs[0], found[0]


def prompts_of(ids: Any, vocabulary: int) -> list[list[int]]:
    """One prompt, or several, as lists of tokens. Raises UsageError where a prompt is empty or a token out of range."""
    several = [ids] if len(ids) and np.ndim(ids[0]) == 0 else ids
    prompts = [[int(token) for token in prompt] for prompt in several]
    if not prompts or not all(prompts):
        raise UsageError("generate needs at least one token to go on from, in every prompt")
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < vocabulary:
            raise UsageError(f"token {token} is not one of the model's 0 to {vocabulary - 1}")
    return prompts
