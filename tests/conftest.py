from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
from tiny_models import tiny_model
from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """Tiny models by family, each built once and never changed."""
    return lru_cache(maxsize=None)(tiny_model)
