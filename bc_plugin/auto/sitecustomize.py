"""Imported by Python when it starts under ``bc-plugin run``, in child processes as well.

Nothing of this package is imported until the program imports a toolkit.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import wrapt

TOOLKITS = ("transformers", "optimum", "gptqmodel", "auto_gptq", "awq")


def _enable(_toolkit):
    import bc_plugin

    bc_plugin.enable()


def _run_the_other_one():
    """The environment's own ``sitecustomize``, which this one stands in front of."""
    here = Path(__file__).parent
    path = [entry for entry in sys.path if Path(entry or ".").resolve() != here.resolve()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


for name in TOOLKITS:
    wrapt.register_post_import_hook(_enable, name)
_run_the_other_one()
