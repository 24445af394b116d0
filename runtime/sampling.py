"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from seqc.errors import UsageError
from seqc.runtime.inputs import Array


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; the default is the likeliest one.

    The steps are those of transformers' generate, in its order: ``repetition_penalty`` (Keskar et al. 2019, "CTRL") divides the
    positive logits of tokens that were seen, and multiplies the negative ones; ``temperature`` divides all; ``top_k`` leaves
    the k likeliest (Fan et al. 2018), ``top_p`` the fewest whose probabilities sum to p (Holtzman et al. 2020), then one is
    drawn. Temperature 0 takes the likeliest. Raises UsageError where a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, fine, wanted in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
        ):
            if not fine:
                raise UsageError(f"{name} must be {wanted}, not {value}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p != 1.0):
            raise UsageError("top_k and top_p choose among what is drawn: give a temperature above 0 with them")

    def choose(self, logits: Array, seen: Collection[int], generator: np.random.Generator) -> int:
        """The next token. ``logits`` are of rank one, ``seen`` the tokens so far."""
        if self.temperature == 0:
            return int(self._penalised(logits, seen).argmax())
        return int(generator.choice(len(logits), p=self.chances(logits, seen)))

    def chances(self, logits: Array, seen: Collection[int]) -> Array:
        """The probability of each token, at a temperature above 0."""
        scores = self._penalised(logits, seen) / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        chances: Array = np.exp(scores - scores.max())
        chances /= chances.sum()
        if self.top_p < 1.0:
            order = np.argsort(-chances, kind="stable")
            before = np.cumsum(chances[order]) - chances[order]
            chances[order[before >= self.top_p]] = 0.0
            chances /= chances.sum()
        return chances

    def _penalised(self, logits: Array, seen: Collection[int]) -> Array:
        scores: Array = logits.astype(np.float64)
        if self.repetition_penalty != 1.0 and seen:
            at = np.fromiter(seen, np.int64)
            scores[at] *= np.where(scores[at] < 0, self.repetition_penalty, 1 / self.repetition_penalty)
        return scores
