"""optimum-quanto, weights and activations: its own files, and the vectors beside them."""

from functools import partial

import pytest
import torch
from helpers import images

pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")

import with_quanto
from helpers.images import inputs, tiny
from optimum.quanto import Calibration, qint4, qint8, quantize, quantize_activation

import bc_plugin
from bc_plugin import Compensation
from bc_plugin.shift.statistics import ShiftStatistics

KEEP = ["vit.embeddings*", "vit.layernorm", "classifier"]

output = partial(images.output, kind="vit")


@pytest.mark.parametrize("bits", [(8, 8), (4, 8)])
def test_a_compensated_model_is_loaded_as_it_was(tmp_path, bits):
    model = tiny("vit")
    quantized = with_quanto.quantize(model, bits, inputs("vit"), KEEP, tmp_path)
    plain = output(quantized)
    compensation = bc_plugin.compensate(quantized, model, inputs("vit"))
    assert len(compensation.vectors) == 2 * 7
    assert all(errors.after <= errors.before for errors in compensation.errors.values())
    compensation.attach(quantized)
    expected = output(quantized)
    assert not torch.equal(expected, plain)
    compensation.save(tmp_path)
    other = with_quanto.load(model, tmp_path)
    assert torch.equal(output(other), plain)
    Compensation.load(tmp_path).attach(other)
    assert torch.equal(output(other), expected)


def test_the_shift_of_a_quantized_output_is_measured():
    values, rows = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    output = quantize_activation(values, qint8, torch.tensor(0.1))
    statistics = ShiftStatistics(0)
    statistics.update(values, output, rows, None)
    expected = (values - output.dequantize()).mean(0)
    torch.testing.assert_close(statistics.vectors()[0].float(), expected)


def test_activations_have_8_bits_only():
    model = tiny("vit")
    quantize(model, weights=qint4, activations=qint4, exclude=KEEP)
    with pytest.raises(ValueError, match="8-bit"), Calibration(), torch.no_grad():
        model(**inputs("vit", 1)[0])
