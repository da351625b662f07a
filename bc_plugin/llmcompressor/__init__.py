"""llm-compressor: ``BiasCompensationModifier``, a modifier for its recipes.

Importing this imports llm-compressor, and makes the modifier known to recipes in YAML.
"""

from ..supported import SUPPORTED

SUPPORTED["llmcompressor"].check()

from llmcompressor.modifiers import ModifierFactory  # noqa: E402

from .modifier import BiasCompensationModifier  # noqa: E402

ModifierFactory.register("BiasCompensationModifier", BiasCompensationModifier)

__all__ = ["BiasCompensationModifier"]
