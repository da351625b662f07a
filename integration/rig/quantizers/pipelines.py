"""Every toolkit behind the same three functions, for tests and benchmarks that treat them alike.

Calibration data is a list of ``{"input_ids", "attention_mask"}`` with one sequence each. Every
toolkit has a file of its own here, which imports it only when called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rig.cpu_shims import (
    auto_gptq_on_cpu,
    autoawq_on_cpu,
    llmcompressor_awq_on_cpu,
    optimum_with_auto_gptq_on_cpu,
)

from . import (
    with_auto_gptq,
    with_autoawq,
    with_autoround,
    with_gptqmodel,
    with_llmcompressor,
    with_optimum,
    with_transformers,
)


@dataclass(frozen=True)
class Pipeline:
    """One way to quantize.

    Attributes:
        name: The toolkit's own name, and the method's where it has several.
        needs: Modules that have to be installed.
        lacks: A module whose presence would have another backend chosen.
        quantize: (source, calibration, flag, settings) -> whatever the toolkit returns.
        save: (what was returned, folder) -> None.
        load: (folder) -> the model.
        shims: What it needs to run on a CPU.
        exact: Whether the model in memory computes what it will compute once loaded again.
        settings: What ``quantize`` passes on, apart from the flag.
        dtype: The type that float models are read in.
        joint: Whether its quantizer can be told that biases will follow.
    """

    name: str
    needs: tuple[str, ...]
    quantize: Callable[[str, list, Any, dict[str, Any]], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Path], nn.Module]
    lacks: str = ""
    shims: tuple[Callable[[], Any], ...] = ()
    exact: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    joint: bool = True

    @property
    def installed(self) -> bool:
        """Whether this environment has it."""
        found = {name: importlib.util.find_spec(name) for name in (*self.needs, self.lacks) if name}
        return all(found[name] for name in self.needs) and not found.get(self.lacks)

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """While this lasts it runs without a GPU."""
        with ExitStack() as stack:
            for shim in self.shims:
                stack.enter_context(shim())
            yield


def model_of(result: Any) -> nn.Module:
    """The transformers model in whatever a toolkit returns."""
    return result if isinstance(result, PreTrainedModel) else result.model


# Plain GPTQ as in its paper: asymmetric, columns in their natural order, one percent of damping.
_AS_PUBLISHED = {"sym": False, "act_group_aware": False, "damp_percent": 0.01}

PIPELINES = {
    pipeline.name: pipeline
    for pipeline in (
        Pipeline(
            "transformers",
            ("optimum", "gptqmodel"),
            with_transformers.quantize,
            with_transformers.save,
            with_transformers.load,
            settings=_AS_PUBLISHED,
        ),
        Pipeline(
            "optimum",
            ("optimum", "gptqmodel"),
            with_optimum.quantize,
            with_optimum.save,
            with_transformers.load,
            settings=_AS_PUBLISHED,
        ),
        Pipeline(
            "gptqmodel",
            ("gptqmodel",),
            with_gptqmodel.quantize,
            with_gptqmodel.save,
            with_gptqmodel.load,
            exact=False,  # its kernels misread zero points until the loader has converted them
            settings=_AS_PUBLISHED,
        ),
        Pipeline(
            "gptqmodel-awq",
            ("gptqmodel",),
            with_gptqmodel.quantize,
            with_gptqmodel.save,
            with_gptqmodel.load,
            exact=False,  # another kernel in memory than after loading
            settings={"method": "awq", "format": "gemm", "sym": False},
            dtype=torch.bfloat16,
            joint=False,
        ),
        Pipeline(
            "autoawq",
            ("awq",),
            with_autoawq.quantize,
            with_autoawq.save,
            with_autoawq.load,
            shims=(autoawq_on_cpu,),
            exact=False,  # in half precision once loaded
            joint=False,
        ),
        Pipeline(
            "auto_gptq",
            ("auto_gptq",),
            with_auto_gptq.quantize,
            with_auto_gptq.save,
            with_auto_gptq.load,
            shims=(auto_gptq_on_cpu,),
            settings={"sym": False},
        ),
        Pipeline(
            "transformers-auto_gptq",
            ("optimum", "auto_gptq"),
            with_transformers.quantize_with_auto_gptq,
            with_transformers.save,
            with_transformers.load_in_float32,
            lacks="gptqmodel",
            shims=(auto_gptq_on_cpu, optimum_with_auto_gptq_on_cpu),
        ),
        Pipeline(
            "autoround",
            ("auto_round", "gptqmodel"),
            with_autoround.quantize,
            with_autoround.save,
            with_autoround.load,
            settings={"sym": False},
            joint=False,
        ),
        *(
            Pipeline(
                name,
                ("llmcompressor",),
                with_llmcompressor.quantize,
                with_llmcompressor.save,
                with_llmcompressor.load,
                shims=(llmcompressor_awq_on_cpu,),
                settings={"method": method},
                joint=method == with_llmcompressor.GPTQ,
            )
            for name, method in (
                ("llmcompressor", with_llmcompressor.GPTQ),
                ("llmcompressor-nearest", with_llmcompressor.NEAREST),
                ("llmcompressor-awq", with_llmcompressor.AWQ),
            )
        ),
    )
}
