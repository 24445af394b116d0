"""Every model of the zoo in plain PyTorch: named models, spellings of loops, and models that must be refused."""

from __future__ import annotations

from tests.models.zoo import (
    discretised_models,
    loop_spellings,
    mambapy_models,
    memory_models,
    recurrent_cells,
    refused,
    rnn_models,
    ssm_models,
)
from tests.models.zoo.base import ZooModel

MODELS: tuple[ZooModel, ...] = (
    recurrent_cells.MODELS
    + loop_spellings.MODELS
    + ssm_models.MODELS
    + discretised_models.MODELS
    + rnn_models.MODELS
    + memory_models.MODELS
    + mambapy_models.MODELS
)
REFUSED: tuple[ZooModel, ...] = refused.MODELS
