"""Tests of what a CPU cannot show. ``GPU_TESTS_ON=cpu`` runs their code there all the same."""

import os
from pathlib import Path

import pytest
import torch

import bc_plugin

# Widths that every kernel takes, with groups of 32.
SHAPE = {"hidden_size": 256, "intermediate_size": 512}
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes compensated checkpoints, each once: by method, with vectors and without."""
    made = {}

    def make(method):
        if method not in made:
            from rig.subjects.served import served_checkpoint

            folder = tmp_path_factory.mktemp(method)
            made[method] = served_checkpoint(folder, "llama", 1, method, factor=4.0, **SHAPE)
            bc_plugin.enable()  # for the test, since making AWQ's has disabled it
        return made[method]

    return make
