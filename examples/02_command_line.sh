#!/usr/bin/env bash
# The same from the command line: a Hugging Face directory in, an artifact out, run at a length never traced.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python - "$work" <<'PY'
import sys
import torch
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=256, hidden_size=64, state_size=16, num_hidden_layers=2))
model.save_pretrained(f"{sys.argv[1]}/model")
PY
seqc compile "$work/model" -o "$work/artifact"
seqc inspect "$work/artifact"
seqc run "$work/artifact" --random batch=2,sequence=300
seqc verify "$work/artifact" --against "$work/model"
