"""Models that accelerate keeps on the CPU or on disk: what works, and what says so at once."""

import copy
import sys

import pytest
import torch
from helpers.language import crudely_quantized, tiny_model, token_batches

import bc_plugin
from bc_plugin import BiasCompensationError
from bc_plugin.models.blocks import find_blocks
from bc_plugin.models.float_blocks import BlockSnapshot

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    model = tiny_model()
    return model, crudely_quantized(model)


def _offloaded(model, **options):
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device=CPU, **options)


def test_a_quantized_model_is_refused_before_the_pass(pair, monkeypatch):
    model, quantized = pair
    monkeypatch.setattr(
        sys.modules["bc_plugin.models.record"], "_record", None
    )  # the pass would call it
    with pytest.raises(BiasCompensationError, match=r"layers\.0.*offloaded.*device_map"):
        bc_plugin.compensate(_offloaded(quantized), model, token_batches())


def test_a_float_model_may_be(pair):
    model, quantized = pair
    found = bc_plugin.compensate(quantized, _offloaded(model), token_batches())
    expected = bc_plugin.compensate(quantized, model, token_batches())
    assert all(torch.equal(found.vectors[n], v) for n, v in expected.vectors.items())


def test_its_blocks_are_not_kept_for_a_toolkit(pair):
    with pytest.raises(BiasCompensationError, match="offloaded"):
        BlockSnapshot(_offloaded(pair[0]), find_blocks(pair[0]))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_vectors_are_attached_to_an_offloaded_model(pair, tmp_path, offload):
    model, quantized = pair
    found = bc_plugin.compensate(quantized, model, token_batches())
    whole = copy.deepcopy(quantized)
    found.attach(whole)
    if offload == "cpu":
        offloaded = _offloaded(quantized)
    else:
        offloaded = accelerate.disk_offload(copy.deepcopy(quantized), tmp_path, CPU)
    found.attach(offloaded)
    batch = token_batches(1, seed=3)[0]
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**batch).logits, whole(**batch).logits)
    other = crudely_quantized(model, step=0.1)
    with pytest.raises(BiasCompensationError, match="digest"):
        found.attach(_offloaded(other))


@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("buffers", [False, True])
def test_a_compensated_model_may_be_offloaded(pair, positions, buffers):
    model, quantized = pair[0], copy.deepcopy(pair[1])
    found = bc_plugin.compensate(quantized, model, token_batches(), {"positions": positions})
    found.attach(quantized)
    batch = token_batches(1, seed=3)[0]
    with torch.no_grad():
        expected = quantized(**batch).logits
        offloaded = accelerate.cpu_offload(quantized, execution_device=CPU, offload_buffers=buffers)
        torch.testing.assert_close(offloaded(**batch).logits, expected)
