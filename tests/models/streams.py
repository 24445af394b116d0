"""Which models of the zoo have no streaming form, and what seqc says of them."""

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
    "loop_peeled_last": "a later step is read",  # the last step is computed otherwise
    "loop_whole_chunks_only": "does not walk along all chunks of 4 steps",  # the rest becomes a chunk when it is full
    "loop_no_reads": "known at the end of the sequence only",  # it begins with a mean over the sequence
    "hiss": "has not one element for each step",
}
"""What a model is refused with that reads later steps at an earlier one, whose outputs are not one for each step, or that is
computed for the whole length at once (spectra, triangular systems)."""
