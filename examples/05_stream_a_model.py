"""A causal language model as a stream: nobody writes a cache. Driven by seqc's runtime, then by plain onnxruntime alone."""

import json
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import seqc
import seqc.runtime

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    use_cache=False,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 97, (2, 9))
compiled = seqc.compile(
    model, {"input_ids": ids}, dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}}, stateful=True
)
directory = compiled.save(Path(tempfile.mkdtemp()) / "llama")
for state in compiled.manifest["states"]:
    print(f"{state['name']} {state['dtype']} {state['shape']}, from {state['initial']}")

prompt = torch.randint(1, 97, (1, 12)).numpy()  # 0 pads: transformers would not read it
stream = seqc.runtime.load(directory).stream()
logits = stream.step({"input_ids": prompt})["logits"]
written = []
for _ in range(20):
    written.append(int(logits[0, -1].argmax()))
    logits = stream.step({"input_ids": np.array([[written[-1]]])})["logits"]
print("stream:      ", *written)

# The same from the manifest alone, as it could be done in any language that has ONNX Runtime.
manifest = json.loads((directory / "manifest.json").read_text())
sizes = {"batch": 1, "capacity": 64}  # room for the steps to come
states = {
    s["name"]: np.full([sizes.get(n, n) for n in s["shape"]], s["initial"], s["dtype"]) for s in manifest["states"]
}
whole, step = (onnxruntime.InferenceSession(directory / name) for name in ("model.onnx", "step.onnx"))
names = ["logits", *(s["next"] for s in manifest["states"])]
tokens, plain = prompt, []
for _ in range(20):
    session = step if tokens.shape[1] == 1 else whole
    logits, *following = session.run(names, {"input_ids": tokens, **states})
    states = dict(zip(states, following, strict=True))
    plain.append(int(logits[0, -1].argmax()))
    tokens = np.array([[plain[-1]]])
print("onnxruntime: ", *plain)

with torch.no_grad():
    source = model.generate(torch.from_numpy(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0)
print("transformers:", *source[0, 12:].tolist())
assert written == plain == source[0, 12:].tolist()
