"""Where things are on disk, wherever the code that asks is."""

import os
from pathlib import Path

INTEGRATION = Path(__file__).parents[1]
REPOSITORY = INTEGRATION.parent
# What is fetched, made or trained once and kept between runs.
CACHE = Path(os.environ.get("BC_PLUGIN_CACHE", REPOSITORY / ".cache"))
