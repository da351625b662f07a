"""llm-compressor: ``BiasCompensationModifier`` in a recipe, also where nobody has imported it."""

from __future__ import annotations

from bc_plugin.supported import SUPPORTED
from bc_plugin.toolkits.patch import Patch, Toolkit, argument

NAME = "BiasCompensationModifier"

# Config


def _create(wrapped, factory, args, kwargs):
    if argument("type_", 0, args, kwargs) == NAME:
        import bc_plugin.llmcompressor  # noqa: F401, which registers it
    return wrapped(*args, **kwargs)


# Quantizing: the modifier's own work, by its life cycle.

# Saving: the modifier's, too.

# Loading: transformers'.

# Toolkit

FACTORY = "llmcompressor.modifiers.factory:ModifierFactory"
LLMCOMPRESSOR = Toolkit(
    name="llmcompressor",
    supported=SUPPORTED["llmcompressor"],
    config=(Patch(f"{FACTORY}.create", _create, ("type_",)),),
)
