"""Names that end up in checkpoints."""

from __future__ import annotations

# The keyword of toolkits, the entry of a quantization config, and the last part of a tensor's name.
KEY = "bias_compensation"
SUFFIX = "." + KEY
# What ``Compensation.save`` writes: vectors alone.
FILE = "bias_compensation.safetensors"
# In the entry of a checkpoint: of all tensors in its files but the vectors.
FILES_DIGEST = "files_digest"
# And of those settings in its config.json by which the same weights compute otherwise.
SETTINGS_DIGEST = "settings_digest"
