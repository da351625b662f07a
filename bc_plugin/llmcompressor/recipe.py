"""What stands in the recipe before the modifier."""

from __future__ import annotations

from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationMixin

from ..errors import BiasCompensationError


def quantizers_before(modifier: Modifier) -> list[Modifier]:
    """The modifiers before this one that quantize weights.

    Raises:
        BiasCompensationError: there are none.
    """
    recipe = active_session().lifecycle.recipe.modifiers
    place = next((n for n, each in enumerate(recipe) if each is modifier), len(recipe))
    before, after = recipe[:place], recipe[place + 1 :]
    found = [each for each in before if _quantizes_weights(each)]
    if found:
        return found
    names = ", ".join(type(each).__name__ for each in before) or "nothing"
    if any(map(_quantizes_weights, after)):
        why = "the quantizer comes after it; put BiasCompensationModifier last"
    elif any(isinstance(each, QuantizationMixin) for each in before):
        why = f"{names} quantizes no weights (a KV cache has no bias to compensate); add a scheme"
    else:
        why = (
            f"before it stands {names}, and sparsity or a transform alone is not compensated; put "
            "GPTQModifier or QuantizationModifier before it"
        )
    raise BiasCompensationError(
        f"BiasCompensationModifier compensates quantized weights, but {why}."
    )


def _quantizes_weights(modifier: Modifier) -> bool:
    if not isinstance(modifier, QuantizationMixin):
        return False
    schemes = modifier.resolved_config.config_groups.values()
    return any(scheme.weights is not None for scheme in schemes)
