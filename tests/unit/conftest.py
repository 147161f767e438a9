"""The unit tests import no torch. Where they run alone, that is checked after each of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if _alone(request.config):
        assert "torch" not in sys.modules, "a unit test, or what it tests, has imported torch"


def _alone(config: pytest.Config) -> bool:
    """Whether only unit tests were asked for: the modules of the other rings import torch when they are collected."""
    here = Path(__file__).parent
    return all((config.invocation_params.dir / arg.split("::")[0]).is_relative_to(here) for arg in config.args)
