"""Models of Hugging Face transformers: code nobody here wrote, in tiny random configurations, nothing downloaded.

Without the kernel packages (causal-conv1d, mamba-ssm, flash-linear-attention, xlstm, kernels) every model takes its own
path of plain PyTorch, the one that loops in Python. Caches are off: the output is that of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tests.models.zoo.base import LENGTHS, VOCABULARY, Inputs, ZooModel, randomised, tokens

transformers.logging.set_verbosity_error()

_TOKENS = {"input_ids": {0: "batch", 1: "sequence"}}
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ATTENTION: dict[str, Any] = {
    **_SMALL,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 320,
}
_DELTA: dict[str, Any] = {
    **_ATTENTION,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"],
}


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def _build(model: str, config: str, seed: int = 0, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        return randomised(getattr(transformers, model)(getattr(transformers, config)(**options)), seed)

    return build


def _causal(name: str, family: str, loops: bool = False, note: str = "", **options: Any) -> ZooModel:
    build = _build(f"{family}ForCausalLM", f"{family}Config", **options)
    return ZooModel(name, "transformers", build, tokens(), _TOKENS, loops=loops, note=note)


def _encoder(name: str, model: str, config: str, note: str = "", **options: Any) -> ZooModel:
    return ZooModel(name, "transformers", _build(model, config, **options), tokens(), _TOKENS, note=note)


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=5,
        encoder_layers=2,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        encoder_ffn_dim=24,
        d_model=16,
        max_source_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    encoder: nn.Module = transformers.WhisperModel(config).get_encoder()
    return randomised(encoder)


def _mel(batch: int, length: int, seed: int) -> Inputs:
    return {"input_features": torch.randn(batch, 5, length, generator=torch.Generator().manual_seed(seed))}


RECURRENT = (
    _causal("mamba", "Mamba", loops=True, state_size=4, **_SMALL),
    _causal("falcon_mamba", "FalconMamba", loops=True, state_size=4, **_SMALL),
    _causal(
        "mamba2",
        "Mamba2",
        note="chunks of 4",
        **_SMALL,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
    ),
    _causal(
        "jamba",
        "Jamba",
        loops=True,
        note="dense",
        **_ATTENTION,
        mamba_d_state=4,
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
    ),
    _causal(
        "zamba2",
        "Zamba2",
        note="chunks of 4",
        **{**_ATTENTION, "num_hidden_layers": 3, "num_key_value_heads": 2},
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=4,
        n_mamba_heads=4,
        chunk_size=4,
        adapter_rank=4,
    ),
    _causal(
        "recurrent_gemma",
        "RecurrentGemma",
        loops=True,
        note="attention window of 8",
        **_without(_ATTENTION, "max_position_embeddings"),
        attention_window_size=8,
        block_types=["recurrent", "attention"],
    ),
    _causal("rwkv", "Rwkv", loops=True, context_length=320, **_SMALL),
    _causal(
        "xlstm",
        "xLSTM",
        loops=True,
        note="chunks of 8, then single steps",
        **_SMALL,
        num_heads=2,
        chunk_size=8,
        ffn_round_up_to_multiple_of=8,
        autocast_kernel_dtype="float32",
    ),
    _causal("qwen3_next", "Qwen3Next", loops=True, note="dense; chunks of 64", mlp_only_layers=[0, 1], **_DELTA),
    _causal(
        "olmo_hybrid",
        "OlmoHybrid",
        loops=True,
        note="chunks of 64",
        **{k: v for k, v in _DELTA.items() if k != "head_dim"},
    ),
    _causal(
        "minimax",
        "MiniMax",
        loops=True,
        note="blocks of 4; mixture of experts",
        **_ATTENTION,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=4,
        seed=1,  # with seed 0 two experts tie at one token of 257, to the last bit: no one right choice
        layer_types=["linear_attention", "full_attention"],
    ),
    _causal(
        "lfm2",
        "Lfm2",
        **_ATTENTION,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"],
    ),
)

ATTENTION = (
    _encoder(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=320,
        use_cache=False,
    ),
    _causal("llama", "Llama", **_ATTENTION),
    _causal("mistral", "Mistral", note="sliding window of 8", **_ATTENTION, sliding_window=8),
    _causal("qwen3", "Qwen3", **_ATTENTION, head_dim=8),
    _causal(
        "qwen3_moe",
        "Qwen3Moe",
        note="fused mixture of experts",
        **_ATTENTION,
        head_dim=8,
        moe_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    ),
    ZooModel(
        "gemma3",
        "transformers",
        _build(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **_ATTENTION,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        tokens(),
        _TOKENS,
        note="text model; sliding window of 8 in one layer",
    ),
    _encoder("bert", "BertModel", "BertConfig", **_ATTENTION),
    _encoder("roberta", "RobertaModel", "RobertaConfig", note="positions depend on the token ids", **_ATTENTION),
    _encoder(
        "t5_encoder",
        "T5EncoderModel",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        use_cache=False,
    ),
    ZooModel(
        "whisper_encoder",
        "transformers",
        _whisper,
        _mel,
        {"input_features": {0: "batch"}},
        lengths=(40,),
        note="the model itself takes one mel length only, twice max_source_positions: 40 here; batch is dynamic",
    ),
)

MODELS = RECURRENT + ATTENTION
assert all(set(m.lengths) <= set(LENGTHS) for m in MODELS if m.name != "whisper_encoder")
