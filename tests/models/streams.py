"""Which models of the zoo have no streaming form, and what seqc says of them; running those that have one in pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from seqc.passes import MakeStateful
from seqc.program import Program
from seqc.verify import verify
from tests.models.zoo.base import Inputs

LOOKS_AHEAD = {
    "bert": "each step attends to later ones|known at the end of the sequence only",  # attention; its pooled output
    "roberta": "each step attends to later ones|known at the end of the sequence only",
    "t5_encoder": "each step attends to later ones",
    "whisper_encoder": "a streaming model has one dimension of steps",
    "lstm_bidirectional": "walks from the end of the sequence too",
    "gru_bidirectional": "walks from the end of the sequence too",
    "gru_stacked_bidirectional": "walks from the end of the sequence too",
    "mamba_bidirectional": "mixes the steps of the sequence",
    "universal_transformer": "each step attends to later ones",
    "loop_reversed": "the loop walks from the end of the sequence",
    "loop_reversed_not_restored": "mixes the steps of the sequence",
    "loop_negative_index": "mixes the steps of the sequence",
    "loop_bidirectional": "the loop walks from the end of the sequence",
    "s4d_fft": "mixes the steps of the sequence",
    "s4_kernel": "mixes the steps of the sequence",
    "sessa": "mixes the steps of the sequence",
    "loop_strided": "has not one element for each step",
    "loop_fixed_steps": "known at the end of the sequence only",
    "hiss": "has not one element for each step",
}
"""What a model is refused with that reads later steps at an earlier one, whose outputs are not one for each step, or that is
computed for the whole length at once (spectra, triangular systems)."""

NOT_YET = {
    "qwen3_moe": "mixes the steps of the sequence",  # tokens of all rows sorted by expert
    "minimax": "mixes the steps of the sequence",  # the same
    "olmo_hybrid": "begins at its end, or leaves steps out",  # its convolution reads the last steps by a negative index
    "loop_padded_buffer": "mixes the steps of the sequence",
    "loop_peeled_last": "a later step is read",
    "loop_padded_chunks": "computes in chunks of",  # loops over chunks
    "loop_ragged_chunks": "computes in chunks of",
    "loop_split_chunks": "computes in chunks of",
    "loop_wide_chunks": "computes in chunks of",
    "loop_while_chunks": "computes in chunks of",
    "loop_chunk_writes": "computes in chunks of",
    "loop_whole_chunks_only": "computes in chunks of",
    "loop_last_chunk_state": "computes in chunks of",
    "loop_no_reads": "known at the end of the sequence only",
}
"""What a model is refused with that is causal: seqc has no rule for it yet. One that gets a rule has to leave this table."""


def stream_form(program: Program) -> Program:
    """The derived step form of a traced Program, verified."""
    derived = program.copy()
    MakeStateful()(derived)
    verify(derived)
    return derived


def in_pieces(program: Program, inputs: Inputs, pieces: Sequence[int]) -> list[torch.Tensor]:
    """The outputs over all steps of ``inputs``, taken in pieces of these lengths; those without steps from the last one."""
    rows = next(iter(inputs.values())).shape[0]
    states = [
        s.initial if s.batch_axis is None else torch.cat([s.initial] * rows, s.batch_axis) for s in program.states
    ]
    found: list[tuple[torch.Tensor, ...]] = []
    at, count = 0, len(program.own_outputs)
    for steps in pieces:
        given = [inputs[p.name].narrow(p.shape.index("sequence"), at, steps) for p in program.given_inputs]
        results = program(*given, *states)
        found.append(results[:count])
        states = list(results[count:])
        at += steps
    return [
        torch.cat([f[i] for f in found], list(port.shape).index("sequence"))
        if "sequence" in port.shape
        else found[-1][i]
        for i, port in enumerate(program.own_outputs)
    ]
