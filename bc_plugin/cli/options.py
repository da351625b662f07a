"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Dataset = Annotated[
    str, typer.Option(help="A .txt or .jsonl file (field `text`), or `wikitext2` or `c4`.")
]
CalibrationData = Annotated[
    str,
    typer.Option(
        "--dataset",
        help="A .txt or .jsonl file (field `text`), `wikitext2`, `c4`, or `self`: what the float "
        "model writes.",
    ),
]
Positions = Annotated[
    str, typer.Option(help="Leading tokens with a vector of their own: 0, 1, ... or `all`.")
]
Sites = Annotated[str, typer.Option(help="What to compensate: `linear`, `block`, or both.")]
Scales = Annotated[
    bool, typer.Option("--scales", help="Fit the scales of the quantized linears as well.")
]
Integers = Annotated[
    bool,
    typer.Option("--integers", help="Choose the quantized linears' integers and scales again."),
]
OffloadActivations = Annotated[
    bool,
    typer.Option("--offload-activations", help="Keep activations in temporary files (in TMPDIR)."),
]
BatchTokens = Annotated[
    int, typer.Option(help="Tokens per forward pass; with fewer, it takes less memory.")
]
Length = Annotated[int, typer.Option(min=1, help="Tokens per sequence.")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration sequences, at most.")]
FloatModel = Annotated[str, typer.Argument(metavar="FLOAT", help="The model it came from.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")]
Dtype = Annotated[str, typer.Option(help="Type to load models in; `auto` takes the checkpoint's.")]
DeviceMap = Annotated[str, typer.Option(help="Where to load models: `cpu`, `cuda`, `auto`.")]
