"""The toolkits that can be patched: one short file each, all of one shape."""

from .auto_gptq import AUTO_GPTQ
from .autoawq import AUTOAWQ
from .gptqmodel import GPTQMODEL
from .llmcompressor import LLMCOMPRESSOR
from .optimum import OPTIMUM
from .transformers import TRANSFORMERS

TOOLKITS = (OPTIMUM, TRANSFORMERS, AUTO_GPTQ, GPTQMODEL, AUTOAWQ, LLMCOMPRESSOR)
