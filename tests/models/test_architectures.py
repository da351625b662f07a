"""The table of architectures, held against transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bc_plugin.models.architectures import ARCHITECTURES, ENGINES
from bc_plugin.models.blocks import find_blocks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_table_names_what_exists(name):
    """Every linear of the table is a linear of such a model, with a bias when its flag is set."""
    from transformers import AutoConfig

    architecture = ARCHITECTURES[name]
    assert set(architecture.engines) <= set(ENGINES)
    assert all(set(read) <= set(architecture.linears) for read in architecture.engines.values())
    settings = {flag: True for flag in architecture.flags if flag}
    config = AutoConfig.for_model(name, **settings)
    config.num_hidden_layers = 1
    if getattr(config, "num_key_value_heads", 1) is None:  # Nemotron's own default
        config.num_key_value_heads = config.num_attention_heads
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block = find_blocks(model).names[0]
    for linear in architecture.linears:
        assert model.get_submodule(f"{block}.{linear}").bias is not None
    if architecture.last is not None:
        assert architecture.last in architecture.linears
