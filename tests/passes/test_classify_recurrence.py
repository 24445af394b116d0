"""ClassifyRecurrence: which loops are recognised, in every spelling, and which must not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqc
from seqc.passes import DEFAULT
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text
from tests.helpers.programs import dialect_of

B, H, K, V, D, N = 2, 3, 8, 7, 6, 8
Function = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def values(batch: int, length: int) -> dict[str, torch.Tensor]:
    """One value of each kind for [batch, length]."""
    torch.manual_seed(length)
    return {
        "q": torch.randn(batch, length, H, K),
        "k": F.normalize(torch.randn(batch, length, H, K), dim=-1),
        "v": torch.randn(batch, length, H, V),
        "g": torch.randn(batch, length, H),
        "x": torch.randn(batch, length, D),
        "b": torch.randn(batch, length, N),
        "c": torch.randn(batch, length, N),
        "done": torch.rand(batch, length) < 0.2,
    }


class Module(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.rates = nn.Parameter(-torch.rand(D, N) - 0.1)

    def forward(self, q, k, v, g, x, b, c, done):
        return self.function(
            {"q": q, "k": k, "v": v, "g": g, "x": x, "b": b, "c": c, "done": done, "rates": self.rates}
        )


def classified(function: Function) -> tuple[Program, list[str]]:
    """The Program after the default passes, equal to the function at lengths that were not traced; and the reasons."""
    torch.manual_seed(0)
    module = Module(function)
    program = seqc.trace(module, values(B, 9))
    record = next(r for r in run_passes(program, DEFAULT) if r.name == "classify_recurrence")
    assert record.name == "classify_recurrence"
    for batch, length in ((1, 1), (3, 14)):
        given = values(batch, length)
        torch.testing.assert_close(program(*(given[p.name] for p in program.inputs))[0], module(**given))
    return program, list(record.reasons)


def loop(i: dict[str, torch.Tensor], state: torch.Tensor, step: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
    out = []
    for t in range(i["x"].shape[1]):
        state, y = step(state, *(i[name][:, t] for name in ("q", "k", "v", "g")))
        out.append(y)
    return torch.stack(out, 1)


def zeros(i: dict[str, torch.Tensor], *sizes: int) -> torch.Tensor:
    return torch.zeros(i["x"].shape[0], *sizes)


# -- matrix states: each rule in several spellings ---------------------------------------------------------------------


def linear(s, q, k, v, g):
    s = s + k.unsqueeze(-1) * v.unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


def linear_einsum(s, q, k, v, g):
    s = s + torch.einsum("bhk,bhv->bhkv", k, v)
    return s, torch.einsum("bhkv,bhk->bhv", s, q) * K**-0.5


def linear_transposed(s, q, k, v, g):
    s = s.transpose(-1, -2) + v.unsqueeze(-1) @ k.unsqueeze(-2)
    return s.transpose(-1, -2), (s @ q.unsqueeze(-1)).squeeze(-1)


def gated(s, q, k, v, g):
    s = torch.sigmoid(g)[..., None, None] * s + k.unsqueeze(-1) * v.unsqueeze(-2)
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def gated_exp(s, q, k, v, g):
    s = s * torch.exp(-F.softplus(g)).view(*g.shape, 1, 1)
    s = s + torch.einsum("bhk,bhv->bhkv", k, v)
    return s, (q.unsqueeze(-2) @ s).squeeze(-2)


def gated_per_key(s, q, k, v, g):
    s = torch.exp(-k.abs()).unsqueeze(-1) * s + k.unsqueeze(-1) * v.unsqueeze(-2)
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def retention(s, q, k, v, g):
    s = s * torch.tensor([0.9, 0.95, 0.99]).view(1, H, 1, 1) + k.unsqueeze(-1) * v.unsqueeze(-2)
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def delta(s, q, k, v, g):
    beta = torch.sigmoid(g).unsqueeze(-1)
    seen = torch.einsum("bhkv,bhk->bhv", s, k)
    s = s + torch.einsum("bhk,bhv->bhkv", k, beta * (v - seen))
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def delta_erase_write(s, q, k, v, g):
    beta = torch.sigmoid(g)[..., None, None]
    old = (s * k.unsqueeze(-1)).sum(-2, keepdim=True)
    s = s - beta * k.unsqueeze(-1) * old
    s = s + k.unsqueeze(-1) * (beta * v.unsqueeze(-2))
    return s, (s * q.unsqueeze(-1)).sum(-2)


def gated_delta(s, q, k, v, g):
    s = s * torch.exp(-F.softplus(g))[..., None, None]
    memory = (s * k.unsqueeze(-1)).sum(-2)
    s = s + k.unsqueeze(-1) * ((v - memory) * torch.sigmoid(g).unsqueeze(-1)).unsqueeze(-2)
    return s, (s * q.unsqueeze(-1)).sum(-2)


MATRIX = {
    "linear": (linear, linear_einsum, linear_transposed),
    "gated": (gated, gated_exp, gated_per_key, retention),
    "delta": (delta, delta_erase_write),
    "gated_delta": (gated_delta,),
}


@pytest.mark.parametrize(
    ("rule", "step"),
    [(rule, step) for rule, steps in MATRIX.items() for step in steps],
    ids=lambda s: getattr(s, "__name__", s),
)
def test_matrix_states_in_any_spelling_become_linear_attention(rule: str, step: Callable[..., object]) -> None:
    program, reasons = classified(lambda i: loop(i, zeros(i, H, K, V), step))
    assert dialect_of(program) == ["linear_attention"]
    (reason,) = reasons
    assert f"rule '{rule}'" in reason and "confirmed in float64" in reason and "test_classify_recurrence.py:" in reason


def test_the_text_of_the_program_before_and_after() -> None:
    program, _ = classified(lambda i: loop(i, zeros(i, H, K, V), gated))
    lines = text(program, provenance=False).splitlines()
    assert not any("recurrence(" in line for line in lines)
    (line,) = [line for line in lines if "seqc.linear_attention" in line]
    assert line.split(" = ")[0].endswith(f"(f32[sequence, batch, {H}, {V}], f32[batch, {H}, {K}, {V}])")


def test_keys_and_queries_that_all_heads_share_are_not_repeated() -> None:
    def function(i):
        s, out = zeros(i, H, N, V), []
        for t in range(i["x"].shape[1]):
            s = torch.exp(-F.softplus(i["g"][:, t]))[..., None, None] * s
            s = s + i["b"][:, t, None, :, None] * i["v"][:, t].unsqueeze(-2)
            out.append(torch.einsum("bhkv,bk->bhv", s, i["c"][:, t]))
        return torch.stack(out, 1)

    program, _ = classified(function)
    (node,) = [n for n in program.graph.nodes if "seqc.linear_attention" in str(n.target)]
    assert program.shape_of(node.args[1].meta["val"]) == ("sequence", "batch", 1, N)


# -- selective scans ---------------------------------------------------------------------------------------------------


def selective_inside(i):
    h, out = zeros(i, D, N), []
    for t in range(i["x"].shape[1]):
        dt = F.softplus(i["x"][:, t])
        h = torch.exp(dt.unsqueeze(-1) * i["rates"]) * h + (dt * i["x"][:, t]).unsqueeze(-1) * i["b"][:, t].unsqueeze(1)
        out.append((h * i["c"][:, t].unsqueeze(1)).sum(-1))
    return torch.stack(out, 1)


def selective_outside(i):
    dt = F.softplus(i["x"])
    decay = torch.exp(dt.unsqueeze(-1) * i["rates"])
    added = dt.unsqueeze(-1) * i["b"].unsqueeze(2) * i["x"].unsqueeze(-1)
    h, out = zeros(i, D, N), []
    for t in range(i["x"].shape[1]):
        h = decay[:, t] * h + added[:, t]
        out.append(torch.matmul(h, i["c"][:, t].unsqueeze(-1)).squeeze(-1) + 0.5 * i["x"][:, t])
    return torch.stack(out, 1)


def selective_states_first(i):
    h, out = zeros(i, N, D), []
    for t in range(i["x"].shape[1]):
        dt = F.softplus(i["x"][:, t])
        h = torch.exp(torch.einsum("bd,dn->bnd", dt, i["rates"])) * h + torch.einsum("bn,bd->bnd", i["b"][:, t], dt)
        out.append(torch.einsum("bn,bnd->bd", i["c"][:, t], h))
    return torch.stack(out, 1)


@pytest.mark.parametrize("function", [selective_inside, selective_outside])
def test_state_space_models_in_any_spelling_become_a_selective_scan(function: Function) -> None:
    program, _ = classified(function)
    assert dialect_of(program) == ["selective_scan"]


# -- element by element ------------------------------------------------------------------------------------------------


def diagonal(step: Callable[..., torch.Tensor]) -> Function:
    def function(i):
        h, out = zeros(i, D), []
        for t in range(i["x"].shape[1]):
            h = step(h, i["x"][:, t], i["done"][:, t])
            out.append(h)
        return torch.stack(out, 1)

    return function


DIAGONAL: dict[str, Callable[..., torch.Tensor]] = {
    "constant": lambda h, x, done: 0.9 * h + x,
    "gate": lambda h, x, done: torch.sigmoid(x) * h + (1 - torch.sigmoid(x)) * x,
    "interpolation": lambda h, x, done: h + torch.sigmoid(x) * (x - h),
    "lerp": lambda h, x, done: torch.lerp(h, x, torch.sigmoid(x)),
    "division": lambda h, x, done: h / (1 + x.abs()) + x,
    "reset by product": lambda h, x, done: (1 - done.float()).unsqueeze(-1) * h * 0.9 + x,
    "reset by where": lambda h, x, done: torch.where(done.unsqueeze(-1), torch.zeros_like(h), h) * 0.9 + x,
    "reset by masked_fill": lambda h, x, done: h.masked_fill(done.unsqueeze(-1), 0.0) * 0.9 + x,
    "hold": lambda h, x, done: torch.where(done.unsqueeze(-1), h, 0.5 * h + x),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_elements_with_decays_of_their_own_become_a_linear_scan(name: str) -> None:
    program, _ = classified(diagonal(DIAGONAL[name]))
    assert dialect_of(program) == ["linear_scan"]


def test_a_loop_from_the_end_becomes_a_reverse_scan() -> None:
    def function(i):
        h, out = zeros(i, D), []
        for t in reversed(range(i["x"].shape[1])):
            h = 0.9 * h + i["x"][:, t]
            out.append(h)
        return torch.stack(out[::-1], 1)

    program, _ = classified(function)
    (node,) = [n for n in program.graph.nodes if "seqc.linear_scan" in str(n.target)]
    assert node.args[3] is True


def test_independent_states_of_one_loop_are_told_apart() -> None:
    def function(i):
        s, z, out = zeros(i, H, K, V), zeros(i, H, K), []
        for t in range(i["x"].shape[1]):
            k = torch.exp(i["k"][:, t])
            s, z = s + k.unsqueeze(-1) * i["v"][:, t].unsqueeze(-2), z + k
            q = torch.exp(i["q"][:, t])
            out.append(torch.einsum("bhkv,bhk->bhv", s, q) / (z * q).sum(-1, keepdim=True))
        return torch.stack(out, 1)

    program, _ = classified(function)
    assert dialect_of(program) == ["linear_attention", "linear_attention"]  # the second one of a single column


# -- must not match ----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "a mask that depends on the state": (
        lambda h, x, done: torch.where(h > 1, torch.zeros_like(h), h) * 0.9 + x,
        "a choice that depends on the state",
    ),
    "only looks affine": (lambda h, x, done: 0.9 * h.clamp(-1, 1) + x, "aten.clamp.default of the state"),
    "the state times itself": (lambda h, x, done: h * h * 0.1 + x, "a product of the state with itself"),
    "a decay that reads the state": (
        lambda h, x, done: torch.sigmoid(h) * h + x,
        "aten.sigmoid.default of the state",
    ),
    "a division by the state": (lambda h, x, done: x / (2 + h.abs()), "a division by the state"),
    "mixed elements": (lambda h, x, done: 0.5 * h.flip(-1) + x, "aten.flip.default of the state"),
    "a dense matrix": (lambda h, x, done: h @ torch.full((D, D), 0.1) + x, "elements of the state are mixed"),
    "a mean over the state": (
        lambda h, x, done: h - 0.5 * h.sum(-1, keepdim=True) + x,
        "elements of the state are mixed",
    ),
    "rounding": (lambda h, x, done: torch.round(h * 0.9) + x, "aten.round.default of the state"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_element_by_element_stays_a_loop_with_its_reason(name: str) -> None:
    step, why = REFUSED[name]
    program, reasons = classified(diagonal(step))
    assert dialect_of(program) == ["recurrence"]
    (reason,) = reasons
    assert "stays a recurrence" in reason and why in reason


def delta_with_another_key(s, q, k, v, g):
    seen = torch.einsum("bhkv,bhk->bhv", s, q)
    s = s + torch.einsum("bhk,bhv->bhkv", k, v - seen)
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def delta_of_wrong_sign(s, q, k, v, g):
    seen = torch.einsum("bhkv,bhk->bhv", s, k)
    s = s + torch.einsum("bhk,bhv->bhkv", k, v + seen)
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def negative_decay(s, q, k, v, g):
    s = torch.tanh(g)[..., None, None] * s + k.unsqueeze(-1) * v.unsqueeze(-2)
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def rank_two(s, q, k, v, g):
    s = s + k.unsqueeze(-1) * v.unsqueeze(-2) + q.unsqueeze(-1) * v.unsqueeze(-2)
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def two_readouts(s, q, k, v, g):
    s = s + k.unsqueeze(-1) * v.unsqueeze(-2)
    return s, torch.einsum("bhkv,bhk->bhv", s, q) + s.sum(-2)


@pytest.mark.parametrize(
    "step",
    [delta_with_another_key, delta_of_wrong_sign, negative_decay, rank_two, two_readouts],
    ids=lambda s: s.__name__,
)
def test_what_only_resembles_linear_attention_stays_a_loop(step: Callable[..., object]) -> None:
    program, reasons = classified(lambda i: loop(i, zeros(i, H, K, V), step))
    assert dialect_of(program) == ["recurrence"]
    assert all("stays a recurrence" in reason for reason in reasons)


def test_a_diagonal_state_with_a_readout_is_not_taken_for_a_matrix_of_one_column() -> None:
    def function(i):
        h, out = zeros(i, H, K), []
        for t in range(i["x"].shape[1]):
            k = i["k"][:, t]
            h = torch.sigmoid(k) * h + torch.exp(k)
            out.append((h * i["q"][:, t]).sum(-1))
        return torch.stack(out, 1)

    program, reasons = classified(function)
    assert dialect_of(program) == ["recurrence"]
    assert "a diagonal state" in reasons[-1]


# -- what stays a loop is told apart -----------------------------------------------------------------------------------


def two_states(step: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Function:
    def function(i):
        a, b, out = zeros(i, D), zeros(i, D), []
        for t in range(i["x"].shape[1]):
            a, b = step(a, b, i["x"][:, t])
            out.append(a + b)
        return torch.stack(out, 1)

    return function


KINDS: dict[str, tuple[Function, str]] = {
    "a rotation": (two_states(lambda a, b, x: (x.cos() * a - x.sin() * b + x, x.sin() * a + x.cos() * b)),
                   "affine, each element by itself, 2 coupled states"),
    "dense": (diagonal(lambda h, x, done: h @ torch.full((D, D), 0.1) + x), "affine, with elements mixed"),
    "a gate of each element": (diagonal(lambda h, x, done: torch.sigmoid(0.5 * h + x) * h + x),
                               "not linear, each element by itself"),
    "gates of two states": (two_states(lambda a, b, x: (torch.tanh(a * x + b), torch.sigmoid(a) * b)),
                            "not linear, each element by itself, 2 coupled states"),
    "a normalised state": (diagonal(lambda h, x, done: torch.softmax(h + x, -1)), "not linear, with elements mixed"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_what_stays_a_loop_says_what_it_computes(name: str) -> None:
    function, kind = KINDS[name]
    program, reasons = classified(function)
    assert dialect_of(program) == ["recurrence"]
    assert any(f"({kind}) stays a recurrence" in reason for reason in reasons), reasons
