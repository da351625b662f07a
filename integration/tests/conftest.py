import os

import pytest
import torch

import bc_plugin

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# Compiling the dequantization takes longer than a tiny model's whole test.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture
def enabled():
    """The plugin, enabled for one test."""
    bc_plugin.enable()
    yield bc_plugin
    bc_plugin.disable()
