"""Every model of the zoo in plain PyTorch: named models, spellings of loops, and models that must be refused."""

from __future__ import annotations

from tests.models.zoo import loop_spellings, recurrent_cells, refused
from tests.models.zoo.base import ZooModel

MODELS: tuple[ZooModel, ...] = recurrent_cells.MODELS + loop_spellings.MODELS
REFUSED: tuple[ZooModel, ...] = refused.MODELS
