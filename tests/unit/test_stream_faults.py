"""Streams when something goes wrong: killed while saving, damaged and foreign state files, full disks, many threads."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.errors import ArtifactError
from seqc.runtime import Session, Stream, load

D = 4
Array = np.ndarray[Any, Any]


class Small(nn.Module):
    """A state of fixed size and one that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(D, D, batch_first=True)
        self.wide, self.back = nn.Linear(D, 512), nn.Linear(512, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.back(self.wide(self.cell(x)[0]).relu())
        return F.scaled_dot_product_attention(y, x, x, is_causal=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    compiled = seqc.compile(Small(), (torch.randn(2, 9, D),), stateful=True, check=False)
    return compiled.save(tmp_path_factory.mktemp("faults") / "artifact")


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return load(artifact)


def given(steps: int, rows: int = 2, seed: int = 0) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((rows, steps, D)).astype(np.float32)}


@contextmanager
def untouched(stream: Stream) -> Iterator[None]:
    """Whatever happens inside, the stream goes on as if it had not."""
    twin, positions = stream.fork(), stream.positions
    yield
    assert stream.positions == positions
    expected = twin.step(given(2, len(positions), seed=9))["output"]
    np.testing.assert_array_equal(stream.step(given(2, len(positions), seed=9))["output"], expected)


def refused(stream: Stream, path: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match) as error:
        stream.load(path)
    assert "\n" not in str(error.value)


@pytest.fixture
def saved(session: Session, tmp_path: Path) -> Path:
    stream = session.stream(2)
    stream.step(given(5))
    stream.reset([1])
    stream.step(given(2, seed=1))
    stream.save(tmp_path / "state")
    return tmp_path / "state"


# The child that dies runs without torch; it is killed at each of the moments at which a file might be half there.
_DIES = """
import io, os, pathlib, signal, sys
import numpy as np
from seqc.runtime import load
artifact, target, steps = sys.argv[1:]
session = load(artifact)
stream = session.stream(2)
stream.step({"x": np.ones((2, int(steps), 4), np.float32)})
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
opened, replace = pathlib.Path.open, pathlib.Path.replace

class Half(io.FileIO):
    def write(self, data):
        super().write(data[: len(data) // 2])
        die()

def after(path, to):
    replace(path, to)
    die()

moments = {
    "half written": lambda: setattr(pathlib.Path, "open", lambda path, mode: Half(path, mode)),
    "written": lambda: setattr(os, "fsync", die),
    "before it appears": lambda: setattr(pathlib.Path, "replace", die),
    "after it appeared": lambda: setattr(pathlib.Path, "replace", after),
}
for name, prepare in moments.items():
    child = os.fork()
    if child == 0:
        prepare()
        stream.save(target)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    fresh = session.stream(2)
    fresh.load(target)
    print(name, status, fresh.positions[0], len(os.listdir(os.path.dirname(target))), sep=",")
"""


def test_killed_while_saving_the_old_state_is_whole_or_the_new_one_is(
    session: Session, artifact: Path, tmp_path: Path
) -> None:
    stream = session.stream(2)
    stream.step(given(3))
    stream.save(tmp_path / "state")
    result = subprocess.run(
        [sys.executable, "-c", _DIES, artifact, tmp_path / "state", "7"], capture_output=True, text=True, timeout=120
    )
    killed = str(-signal.SIGKILL)
    assert result.stdout.splitlines() == [
        f"half written,{killed},3,2",
        f"written,{killed},3,3",
        f"before it appears,{killed},3,4",
        f"after it appeared,{killed},7,4",
    ], result.stderr
    # what the killed ones left beside it is in nobody's way
    stream.save(tmp_path / "state")
    again = session.stream(2)
    again.load(tmp_path / "state")
    assert again.positions == (3, 3)


def test_every_byte_of_a_saved_state_counts(session: Session, saved: Path) -> None:
    data = saved.read_bytes()
    stream = session.stream(2)
    stream.step(given(4))
    with untouched(stream):
        for at in range(0, len(data), 5):
            saved.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
            refused(stream, saved, "truncated or altered")
        for length in (*range(40), *range(40, len(data), 29)):
            saved.write_bytes(data[:length])
            refused(stream, saved, "truncated or altered")
        saved.write_bytes(data + b"\0")
        refused(stream, saved, "truncated or altered")
    saved.write_bytes(data)
    stream.load(saved)
    assert stream.positions == (7, 2)


def test_a_state_whose_hash_was_made_to_fit_gives_no_other_error(session: Session, saved: Path) -> None:
    body = saved.read_bytes()[32:]
    stream = session.stream(2)
    for at in range(0, len(body), 3):
        altered = body[:at] + bytes([body[at] ^ 0x11]) + body[at + 1 :]
        saved.write_bytes(hashlib.sha256(altered).digest() + altered)
        try:
            stream.load(saved)
        except ArtifactError as error:
            assert "\n" not in str(error)
            assert stream.positions == (0, 0)
        else:
            stream.step(given(1))
            stream.reset()


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Array]], None]) -> None:
    with np.load(io.BytesIO(path.read_bytes()[32:])) as archive:
        arrays = dict(archive)
    header = json.loads(bytes(arrays.pop("header")))
    change(header, arrays)
    body = io.BytesIO()
    np.savez(body, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    path.write_bytes(hashlib.sha256(body.getvalue()).digest() + body.getvalue())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, a: a.update({"0.0": a["0.0"].astype(np.float64)}), "state 'past.*must be float32.* got float64"),
        (lambda h, a: a.update({"1.0": a["1.0"][..., :3]}), r"state 'past.*got float32\(1, 2, 3\)"),
        (lambda h, a: a.update({"0.1": a["0.1"][:, :-1]}), r"state 'past.*got"),
        (lambda h, a: a.pop("1.1"), "is no saved state: it lacks '1.1'"),
        (lambda h, a: h["groups"].pop(), "is no saved state: its rows are"),
        (lambda h, a: h["groups"][0].update(rows=[0, 1]), "is no saved state"),
        (lambda h, a: h["groups"][0].update(positions=[-1]), "is no saved state"),
        (lambda h, a: h.pop("groups"), "is no saved state: it lacks 'groups'"),
        (lambda h, a: h.update(groups=3), "is no saved state"),
        (lambda h, a: h.pop("model"), "is no saved state: it lacks 'model'"),
        (lambda h, a: h.update(format=99), "has format 99, this seqc reads 1"),
        (lambda h, a: h.update(batch_size=3), "is the state of 3 rows, this stream has 2"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(
    session: Session, saved: Path, change: Callable[[dict[str, Any], dict[str, Array]], None], message: str
) -> None:
    stream = session.stream(2)
    stream.step(given(4))
    rewritten(saved, change)
    with untouched(stream):
        refused(stream, saved, message)


def test_the_state_of_the_same_model_with_other_weights_is_another_ones(
    artifact: Path, saved: Path, tmp_path: Path
) -> None:
    changed = Path(shutil.copytree(artifact, tmp_path / "other"))
    weights = np.fromfile(changed / "model.onnx.data", np.float32) * 2
    weights.tofile(changed / "model.onnx.data")
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["files"]["model.onnx.data"]["sha256"] = hashlib.sha256(weights.tobytes()).hexdigest()
    (changed / "manifest.json").write_text(json.dumps(manifest))
    other = load(changed).stream(2)
    other.step(given(4))
    with untouched(other):
        refused(other, saved, "is the state of another model")


def test_files_that_were_never_a_state(session: Session, tmp_path: Path) -> None:
    stream = session.stream(2)
    stream.step(given(4))
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    (tmp_path / "text").write_text("hello\n" * 20)
    with untouched(stream):
        for name in ("other.npz", "text"):
            refused(stream, tmp_path / name, "is no saved state, or was truncated or altered")
        refused(stream, tmp_path, "cannot read the state .*directory")
        refused(stream, tmp_path / "text" / "x", "cannot read the state .*Not a directory")


def test_a_full_disk_leaves_the_old_file_and_the_stream(
    session: Session, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    stream = session.stream(2)
    stream.step(given(4))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with untouched(stream):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ArtifactError, match=f"cannot write the state {saved}: No space left on device"):
                stream.save(saved)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(ArtifactError, match=r"cannot write the state .*File too large"):
                stream.save(saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for place in (saved / "x", saved.parent, Path("")):
            with pytest.raises(ArtifactError, match="cannot write the state"):
                stream.save(place)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["state"]
    again = session.stream(2)
    again.load(saved)
    assert again.positions == (7, 2)


def story(session: Session, seed: int) -> list[Array]:
    """Outputs of a stream that is stepped, forked, rewound and reset at random."""
    chance = random.Random(seed)
    stream = session.stream(3)
    mark = stream.fork()
    outputs = []
    for number in range(25):
        rows = sorted(chance.sample(range(3), chance.choice((1, 2, 3, 3, 3))))
        piece = given(chance.choice((1, 1, 2, 5)), len(rows), seed=100 * seed + number)
        outputs.append(stream.step(piece, rows=rows)["output"])
        match chance.randrange(8):
            case 0:
                stream.reset([chance.randrange(3)])
            case 1:
                mark = stream.fork()
            case 2:
                stream.rewind(mark)
            case 3:
                stream = stream.fork()
    return outputs


def test_streams_in_many_threads_do_what_they_do_alone(session: Session) -> None:
    alone = [story(session, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: story(session, seed), range(8)))
    for one, other in zip(alone, together, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
