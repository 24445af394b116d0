"""Streams of a model whose every step is compared with the source model over all that each row was given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from seqc.runtime import Session, Stream
from seqc.runtime.manifest import Port
from tests.models.compare import TOLERANCE, relative_error
from tests.models.zoo.base import Inputs, ZooModel, eager

ROWS = 3


@dataclass(frozen=True)
class Streamed:
    """A model of the zoo, and a session of its streaming form."""

    zoo: ZooModel
    source: nn.Module
    session: Session

    def whole(self, inputs: Inputs) -> list[torch.Tensor]:
        """What the source gives for whole sequences."""
        return eager(self.source, inputs)

    def newest(self, inputs: Inputs, steps: int) -> list[torch.Tensor]:
        """What the source gives at the newest steps of whole sequences, of outputs without an axis of steps at the last."""
        ports, dim = self.session.outputs, self.session.manifest.steps_dim
        axes = [p.shape.index(dim) if dim in p.shape else None for p in ports]
        found = zip(self.whole(inputs), axes, strict=True)
        return [t if a is None else t.narrow(a, t.shape[a] - steps, steps) for t, a in found]


@dataclass
class Followed:
    """A stream, and for each row all that it was given since it began; each step is compared with the whole of that."""

    model: Streamed
    stream: Stream
    given: list[Inputs | None] = field(default_factory=lambda: [None] * ROWS)
    seed: int = 0

    def step(self, steps: int, rows: tuple[int, ...] = (0, 1, 2)) -> None:
        self.seed += 1
        new = self.model.zoo.inputs(len(rows), steps, self.seed)
        results = self.stream.step({n: v.numpy() for n, v in new.items()}, rows=list(rows))
        for i, row in enumerate(rows):
            own = {n: v[i : i + 1] for n, v in new.items()}
            before = self.given[row]
            whole = own if before is None else {n: torch.cat([before[n], v], 1) for n, v in own.items()}
            self.given[row] = whole
            got = [results[p.name].take([i], self._rows(p)) for p in self.model.session.outputs]
            assert relative_error(got, self.model.newest(whole, steps)) <= TOLERANCE

    @staticmethod
    def _rows(port: Port) -> int:
        return port.shape.index("batch")

    def reset(self, *rows: int) -> None:
        self.stream.reset(rows)
        for row in rows:
            self.given[row] = None

    def fork(self) -> Followed:
        return Followed(self.model, self.stream.fork(), list(self.given), self.seed + 100)

    def rewind(self, checkpoint: Followed) -> None:
        self.stream.rewind(checkpoint.stream)
        self.given = list(checkpoint.given)
