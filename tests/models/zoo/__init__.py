"""The zoo: every model that seqc is tested on, by name."""

from __future__ import annotations

from tests.models.zoo import torch_models, transformers_models
from tests.models.zoo.base import ZooModel

COMPILED: tuple[ZooModel, ...] = transformers_models.MODELS + torch_models.MODELS
REFUSED: tuple[ZooModel, ...] = torch_models.REFUSED
ALL: dict[str, ZooModel] = {model.name: model for model in COMPILED + REFUSED}
