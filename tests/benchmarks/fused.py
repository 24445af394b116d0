"""Scans as loops in C++, compiled at run time for this processor: what one fused pass over the data costs.

One thread. State and step are read once; the compiler vectorises the innermost loops. Yardsticks, not a runtime: batch 1,
float32, no final state. ``library()`` is None where there is no ``g++``.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

Tensors = tuple[torch.Tensor, ...]

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <vector>
typedef const float *in;
typedef long n_t;

extern "C" void linear_scan(n_t T, n_t D, in a, in b, in s, float *y) {
  std::vector<float> h(s, s + D);
  for (n_t t = 0; t < T; ++t)
    for (n_t d = 0; d < D; ++d) y[t * D + d] = h[d] = a[t * D + d] * h[d] + b[t * D + d];
}

// a is [D, N], the state is kept as [N, D]
extern "C" void selective_scan(n_t T, n_t D, n_t N, in x, in dt, in a, in b, in c, in s, float *y) {
  std::vector<float> h(N * D), rate(N * D);
  for (n_t d = 0; d < D; ++d)
    for (n_t n = 0; n < N; ++n) h[n * D + d] = s[d * N + n], rate[n * D + d] = a[d * N + n];
  for (n_t t = 0; t < T; ++t) {
    in xt = x + t * D, dtt = dt + t * D;
    float *yt = y + t * D;
    std::fill(yt, yt + D, 0.f);
    for (n_t n = 0; n < N; ++n) {
      float *hn = &h[n * D], bn = b[t * N + n], cn = c[t * N + n];
      in rn = &rate[n * D];
      for (n_t d = 0; d < D; ++d) {
        hn[d] = expf(dtt[d] * rn[d]) * hn[d] + bn * xt[d];
        yt[d] += cn * hn[d];
      }
    }
  }
}

// G heads of query and key, 1 or H; g holds one log decay per head
extern "C" void gated_attention(n_t T, n_t H, n_t G, n_t K, n_t V, in q, in k, in v, in s, in g, float *y) {
  std::vector<float> state(s, s + H * K * V);
  for (n_t t = 0; t < T; ++t)
    for (n_t h = 0; h < H; ++h) {
      in qt = q + (t * G + h % G) * K, kt = k + (t * G + h % G) * K, vt = v + (t * H + h) * V;
      float *yt = y + (t * H + h) * V, kept = expf(g[t * H + h]);
      std::fill(yt, yt + V, 0.f);
      for (n_t i = 0; i < K; ++i) {
        float *row = &state[(h * K + i) * V];
        for (n_t j = 0; j < V; ++j) {
          row[j] = kept * row[j] + kt[i] * vt[j];
          yt[j] += qt[i] * row[j];
        }
      }
    }
}

// the weighted mean of H scores of V values each; decay [H] or null; starts from nothing
extern "C" void softmax_scan(n_t T, n_t H, n_t V, in score, in value, in decay, float *y) {
  std::vector<float> top(H, -INFINITY), u(H * V, 0.f), w(H, 0.f);
  for (n_t t = 0; t < T; ++t)
    for (n_t h = 0; h < H; ++h) {
      float s = score[t * H + h], before = top[h] + (decay ? decay[h] : 0.f), m = std::max(before, s);
      float kept = expf(before - m), added = expf(s - m);
      top[h] = m;
      w[h] = kept * w[h] + added;
      for (n_t j = 0; j < V; ++j) {
        u[h * V + j] = kept * u[h * V + j] + added * value[(t * H + h) * V + j];
        y[(t * H + h) * V + j] = u[h * V + j] / w[h];
      }
    }
}
"""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where there is no compiler. Raises CalledProcessError where it fails."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, part, binary = (Path(folder) / f"fused.{kind}" for kind in ("cpp", "o", "so"))
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC"]
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(part)], check=True)
        # linked without -ffast-math, which would add code that turns off subnormal numbers in the whole process
        subprocess.run([compiler, "-shared", str(part), "-o", str(binary)], check=True)
        return ctypes.CDLL(str(binary))


def _call(
    name: str, sizes: tuple[int, ...], inputs: tuple[torch.Tensor | None, ...], like: torch.Tensor
) -> torch.Tensor:
    loops = library()
    assert loops is not None
    out = torch.empty_like(like)
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (*inputs, out)]
    assert all(x is None or (x.is_contiguous() and x.dtype == torch.float32) for x in inputs)
    getattr(loops, name)(*map(ctypes.c_long, sizes), *pointers)
    return out


def linear_scan(a: torch.Tensor, b: torch.Tensor, s: torch.Tensor) -> Tensors:
    return (_call("linear_scan", (len(a), s.numel()), (a, b, s), a),)


def selective_scan(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, s: torch.Tensor
) -> Tensors:
    return (_call("selective_scan", (len(x), *a.shape), (x, dt, a, b, c, s), x),)


def gated_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, g: torch.Tensor, _: torch.Tensor
) -> Tensors:
    sizes = (len(q), v.shape[2], q.shape[2], q.shape[3], v.shape[3])
    return (_call("gated_attention", sizes, (q, k, v, s, g), v),)


def weighted_mean(decayed: bool) -> Callable[..., Tensors]:
    """Of softmax_scan: numerator over denominator, which is what models read; the initial states are those of nothing."""

    def run(score: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, *_: torch.Tensor) -> Tensors:
        heads = score[0].numel()
        sizes = (len(score), heads, value[0].numel() // heads)
        return (_call("softmax_scan", sizes, (score, value, decay if decayed else None), value),)

    return run
