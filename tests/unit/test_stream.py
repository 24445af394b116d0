"""A compiled streaming artifact: pieces, rows, forks, checkpoints, saved states, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.cli.main import run
from seqc.errors import ArtifactError
from seqc.runtime import Session, load
from seqc.runtime.room import places
from seqc.runtime.stream import Stream

D = 4
Arrays = dict[str, np.ndarray[Any, Any]]


class Hybrid(nn.Module):
    """Something of everything: a convolution, a recurrent layer, attention with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, padding=2, groups=D)
        self.cell = nn.GRU(D, D, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        x = x + self.cell(x)[0]
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
        a, b = x.chunk(2, -1)
        q = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return x + F.scaled_dot_product_attention(q, q, x, is_causal=True)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Hybrid().eval()


@pytest.fixture(scope="module")
def artifact(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = seqc.compile(model, (torch.randn(2, 9, D),), stateful=True)
    assert compiled.report["check"]["ok"] and compiled.report["check_in_chunks"]["ok"]
    return compiled.save(tmp_path_factory.mktemp("stream") / "artifact")


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return load(artifact)


def given(rows: int, steps: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, steps, D)).astype(np.float32)


def whole(model: nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def close(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_manifest_names_the_states(session: Session) -> None:
    assert [(s.port.name, s.following, s.port.shape) for s in session.manifest.states] == [
        ("past_key_values.0.conv_state", "present.0.conv_state", ("batch", 4, 2)),
        ("past_key_values.0.recurrent_state", "present.0.recurrent_state", (1, "batch", 4)),
        ("past_key_values.0.value", "present.0.value", ("batch", "capacity", 4)),
        ("past_key_values.0.key", "present.0.key", ("batch", "capacity", 4)),
        ("past_position", "present_position", ()),
    ]


def test_both_forms_share_one_file_of_weights(artifact: Path) -> None:
    import onnx

    places = {}
    for name in ("model.onnx", "step.onnx"):
        graph = onnx.load(artifact / name, load_external_data=False).graph
        stored = [t for t in graph.initializer if t.external_data]
        assert all({e.key: e.value for e in t.external_data}["location"] == "model.onnx.data" for t in stored)
        places[name] = {t.name: {e.key: e.value for e in t.external_data}["offset"] for t in stored}
    assert places["model.onnx"] == places["step.onnx"]


def test_pieces_and_single_steps_are_the_whole(model: nn.Module, session: Session) -> None:
    x = given(3, 23)
    stream, out, at = session.stream(3), [], 0
    for count in (5, 1, 1, 9, 1, 6):
        out.append(stream.step({"x": x[:, at : at + count]})["output"])
        at += count
    close(np.concatenate(out, 1), whole(model, x))
    close(session.run({"x": x})["output"], whole(model, x))


def test_rows_begin_anew_and_go_on_by_themselves(model: nn.Module, session: Session) -> None:
    x, y = given(3, 12), given(1, 7, 1)
    stream = session.stream(3)
    stream.step({"x": x[:, :5]})
    stream.reset([1])
    assert stream.positions == (5, 0, 5)
    mixed = np.concatenate([x[:1, 5:12], y, x[2:, 5:12]])
    first = stream.step({"x": mixed[:, :3]})["output"]
    second = stream.step({"x": mixed[:, 3:]})["output"]
    expected = np.concatenate([whole(model, x[:1])[:, 5:], whole(model, y), whole(model, x[2:])[:, 5:]])
    close(np.concatenate([first, second], 1), expected)


def test_some_rows_take_steps_and_the_others_wait(model: nn.Module, session: Session) -> None:
    x = given(3, 6)
    stream = session.stream(3)
    stream.step({"x": x[[2, 0], :4]}, rows=[2, 0])
    stream.step({"x": x[1:2, :4]}, rows=[1])
    assert stream.positions == (4, 4, 4)
    close(stream.step({"x": x[:, 4:]})["output"], whole(model, x)[:, 4:])


def test_a_fork_goes_its_own_way_and_a_checkpoint_can_be_gone_back_to(model: nn.Module, session: Session) -> None:
    x, y = given(1, 10), given(1, 10, 1)
    stream = session.stream()
    stream.step({"x": x[:, :6]})
    other = stream.fork()
    other.step({"x": y[:, 6:]})
    stream.step({"x": y[:, 6:8]})
    stream.rewind(stream.fork())
    stream.step({"x": y[:, 8:]})
    assert stream.positions == (10,)
    checkpoint = session.stream()
    checkpoint.step({"x": x[:, :6]})
    stream.rewind(checkpoint)
    close(stream.step({"x": x[:, 6:]})["output"], whole(model, x)[:, 6:])
    assert other.positions == (10,)


def test_a_saved_state_is_gone_on_from(model: nn.Module, session: Session, artifact: Path, tmp_path: Path) -> None:
    x = given(2, 9)
    stream = session.stream(2)
    stream.step({"x": x[:, :5]})
    stream.save(tmp_path / "state")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    again = load(artifact).stream(2)
    again.load(tmp_path / "state")
    assert again.positions == (5, 5)
    close(again.step({"x": x[:, 5:]})["output"], whole(model, x)[:, 5:])


def test_a_damaged_or_foreign_state_is_refused_and_nothing_is_lost(session: Session, tmp_path: Path) -> None:
    stream = session.stream(2)
    stream.step({"x": given(2, 3)})
    path = tmp_path / "state"
    stream.save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "altered").write_bytes(bytes(data))
    (tmp_path / "short").write_bytes(bytes(data[:50]))
    for name in ("altered", "short"):
        with pytest.raises(ArtifactError, match="truncated or altered"):
            stream.load(tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot read the state"):
        stream.load(tmp_path / "none")
    with pytest.raises(ArtifactError, match="of 2 rows, this stream has 1"):
        session.stream(1).load(path)
    with pytest.raises(ArtifactError, match="cannot write the state"):
        stream.save(tmp_path / "no" / "such" / "folder")
    assert stream.positions == (3, 3)


def test_inputs_that_do_not_fit_leave_the_stream_as_it_was(session: Session) -> None:
    stream = session.stream(2)
    stream.step({"x": given(2, 3)})
    with pytest.raises(ArtifactError, match="the inputs have 3 rows, but 2 are to take the steps"):
        stream.step({"x": given(3, 1)})
    with pytest.raises(ArtifactError, match="must be float32"):
        stream.step({"x": given(2, 1).astype(np.float64)})
    with pytest.raises(ArtifactError, match="row 2 is not one of 0 to 1"):
        stream.reset([2])
    with pytest.raises(ArtifactError, match="named twice"):
        stream.step({"x": given(2, 1)}, rows=[0, 0])
    with pytest.raises(ArtifactError, match="at least one row"):
        session.stream(0)
    assert stream.positions == (3, 3)


def test_a_fork_takes_rows_in_any_order_and_number(model: nn.Module, session: Session) -> None:
    x, y = given(3, 4), given(4, 5, 1)
    stream = session.stream(3)
    stream.step({"x": x[:, :2]})
    stream.step({"x": x[2:, 2:]}, rows=[2])
    chosen = [2, 0, 2, 1]
    beams = stream.fork(chosen)
    assert (beams.batch_size, beams.positions) == (4, (4, 2, 4, 2))
    out = beams.step({"x": y})["output"]
    for i, row in enumerate(chosen):
        seen = beams.positions[i] - 5
        close(out[i : i + 1], whole(model, np.concatenate([x[row : row + 1, :seen], y[i : i + 1]], 1))[:, seen:])
    assert stream.positions == (2, 2, 4)
    with pytest.raises(ArtifactError, match="row 3 is not one of 0 to 2"):
        stream.fork([3])


def test_memory_is_told_before_a_stream_is_made(session: Session) -> None:
    memory, stream = session.memory(), session.stream(2)
    assert (memory.fixed, memory.per_step) == (4 * (8 + 4) + 8, 4 * 8)
    stream.step({"x": given(2, 5)})
    shared_position = 8
    assert stream.memory() == memory.total(rows=2, steps=places(5)) - shared_position


def caches(stream: Stream) -> list[int]:
    """Where the growing states are in memory."""
    (group,) = stream._groups
    kept = zip(stream._session.states, group.states, strict=True)
    return [value.numpy().__array_interface__["data"][0] for state, value in kept if state.grows is not None]


def test_growing_states_are_written_in_place(session: Session, model: nn.Module) -> None:
    x, stream = given(1, 80), session.stream()
    out, buffers = [], [caches(stream)]
    for i in range(80):
        out.append(stream.step({"x": x[:, i : i + 1]})["output"])
        buffers.append(caches(stream))
    close(np.concatenate(out, 1), whole(model, x))
    changes = [i for i, (a, b) in enumerate(itertools.pairwise(buffers)) if a != b]
    assert changes == [0, 33, 66]  # room for 33, 66 and 99 steps


def test_forks_share_what_is_filled_until_both_go_on(session: Session, model: nn.Module) -> None:
    x, y = given(1, 9), given(1, 9, seed=2)
    stream = session.stream()
    stream.step({"x": x[:, :5]})
    fork, checkpoint = stream.fork(), stream.fork()
    assert caches(fork) == caches(stream)
    close(stream.step({"x": x[:, 5:]})["output"], whole(model, x)[:, 5:])
    both = np.concatenate([x[:, :5], y[:, 5:]], 1)
    close(fork.step({"x": y[:, 5:]})["output"], whole(model, both)[:, 5:])
    assert caches(fork) != caches(stream) == caches(checkpoint)
    stream.rewind(checkpoint)
    close(stream.step({"x": y[:, 5:]})["output"], whole(model, both)[:, 5:])


def test_no_number_behind_the_position_is_read(session: Session, model: nn.Module) -> None:
    x, stream = given(1, 9), session.stream()
    stream.step({"x": x[:, :5]})
    before = stream.fork()
    with np.errstate(invalid="ignore"):
        assert np.isnan(stream.step({"x": np.full_like(x, np.nan)})["output"]).all()
    for again in (before.fork(), before.fork([0, 0])):
        rows = np.repeat(x[:, 5:], again.batch_size, 0)
        close(again.step({"x": rows})["output"][:1], whole(model, x)[:, 5:])


def test_the_command_line_streams_and_goes_on_from_a_saved_state(
    model: nn.Module, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = given(2, 11)
    for name, part in (("first", x[:, :6]), ("rest", x[:, 6:])):
        np.savez(tmp_path / f"{name}.npz", x=part)
    command = ["run", str(artifact), "--stream", "4"]
    state, out = str(tmp_path / "state"), tmp_path / "out.npz"
    assert run([*command, "--inputs", str(tmp_path / "first.npz"), "--save-state", state]) == 0
    assert "6 steps were seen in all" in capsys.readouterr().err
    assert run([*command, "--inputs", str(tmp_path / "rest.npz"), "--load-state", state, "-o", str(out)]) == 0
    assert "11 steps were seen in all" in capsys.readouterr().err
    close(np.load(out)["output"], whole(model, x)[:, 6:])
    assert run(["run", str(artifact), "--random", "batch=1", "--save-state", state]) == 2
    assert "--load-state and --save-state go with --stream N" in capsys.readouterr().err
    assert run(["inspect", str(artifact)]) == 0
    assert "56 B a row, and 32 B for each step" in capsys.readouterr().out


def test_streams_of_one_session_run_at_once(model: nn.Module, session: Session) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def one(seed: int) -> float:
        x = given(1, 12, seed)
        stream = session.stream()
        out = [stream.step({"x": x[:, t : t + 1]})["output"] for t in range(12)]
        return float(np.abs(np.concatenate(out, 1) - whole(model, x)).max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(one, range(8))) < 1e-5


def test_an_artifact_of_whole_sequences_has_no_stream(tmp_path: Path) -> None:
    compiled = seqc.compile(nn.Linear(D, D), (torch.randn(2, 3, D),), check=False)
    with pytest.raises(ArtifactError, match="compile it with --stateful"):
        compiled.session.stream()
