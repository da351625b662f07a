"""llm-compressor's own pipeline, with its GPTQ, AWQ or rounding to nearest before the modifier."""

from __future__ import annotations

import torch

from bc_plugin import BiasCompensationConfig

GPTQ, AWQ, NEAREST = "gptq", "awq", "nearest"


def quantize(source, calibration, flag, settings):
    """``method`` among the settings is one of the above, ``sym`` whether zero points are 0.

    ``native`` is the modifier's own setting.
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bc_plugin.llmcompressor import BiasCompensationModifier

    settings = dict(settings)
    native = settings.pop("native", False)
    recipe = quantizers(**settings)
    BiasCompensationConfig.parse(flag)  # as the other toolkits' option does
    if flag:
        recipe.append(BiasCompensationModifier(native=native, **(flag if flag is not True else {})))
    rows = [{key: value[0].tolist() for key, value in item.items()} for item in calibration]
    return oneshot(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        dataset=Dataset.from_list(rows),
        tokenizer=AutoTokenizer.from_pretrained(source),
        recipe=recipe,
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )


def quantizers(bits, group_size, method=GPTQ, sym=False):
    """The modifiers that quantize."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier

    weights = {"num_bits": bits, "group_size": group_size, "symmetric": sym, "strategy": "group"}
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    how = {"config_groups": scheme, "ignore": ["lm_head"]}
    if method == GPTQ:
        return [GPTQModifier(**how)]
    return [*([AWQModifier()] if method == AWQ else []), QuantizationModifier(**how)]


def save(model, folder):
    model.save_pretrained(folder)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)
