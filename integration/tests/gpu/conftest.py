"""Tests of what a CPU cannot show. ``GPU_TESTS_ON=cpu`` runs their code there all the same."""

import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        why = pytest.mark.skip(reason=f"torch {torch.__version__} has no CUDA device here")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(why)


@pytest.fixture(scope="session")
def device():
    """Where the tests run, the first device of its kind."""
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
