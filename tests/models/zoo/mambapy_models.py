"""Mamba of the package mambapy (pure PyTorch), with its scan as a tree in place or as a loop."""

from __future__ import annotations

from mambapy.mamba import Mamba, MambaConfig
from torch import nn

from tests.models.zoo.recurrent_cells import WIDTH, plain


def _mamba(pscan: bool) -> nn.Module:
    return Mamba(MambaConfig(d_model=WIDTH, n_layers=1, d_state=3, pscan=pscan))


MODELS = (
    plain("mambapy_pscan", _mamba, True, note="package mambapy; parallel scan, an autograd Function"),
    plain("mambapy_sequential", _mamba, False, note="package mambapy"),
)
