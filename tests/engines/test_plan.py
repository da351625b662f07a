"""Which vectors a plain bias can stand for."""

from helpers.language import crudely_quantized, tiny_model, token_batches

import bc_plugin
from bc_plugin.engines.plan import make_plan
from bc_plugin.models.architectures import ARCHITECTURES


def test_a_norm_after_the_last_linear_keeps_the_blocks_vector_out():
    model = tiny_model("opt", do_layer_norm_before=False)
    quantized = crudely_quantized(model)
    found = bc_plugin.compensate(quantized, model, token_batches(), {"positions": 0})
    plan = make_plan(found, ARCHITECTURES["opt"], model.config.to_dict(), "transformers")
    assert set(plan.left) == {f"model.decoder.layers.{i}" for i in range(3)}
