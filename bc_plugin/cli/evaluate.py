"""``bc-plugin evaluate``: perplexity, KL, agreement."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..errors import BiasCompensationError
from ..gguf.file import is_gguf
from .arguments import check_loading, check_model, text_of
from .inputs import config_of, load_model, load_tokenizer
from .options import (
    Dataset,
    DeviceMap,
    Dtype,
)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub name or GGUF file.")],
    dataset: Dataset,
    reference: Annotated[str | None, typer.Option(help="The float model to compare with.")] = None,
    without_compensation: Annotated[
        bool, typer.Option("--without-compensation", help="Take the vectors out first.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="About how many tokens to evaluate.")] = 12288,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Perplexity, and the mean KL divergence and top-1 agreement with the float model.

    Example: `bc-plugin evaluate ./out --reference ./SmolLM2-135M --dataset text.txt --tokens 8192`
    """
    check_model("MODEL", model)
    if reference is not None:
        check_model("--reference", reference)
    check_loading(dtype, device_map)
    # Toolkits print to the standard output, which is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        text = text_of(dataset, or_written=False)

        from .. import Compensation, enable
        from .. import evaluate as run
        from ..calibration import windows

        enable("transformers")
        whose = ("--reference", reference) if reference else ("MODEL", model)
        tokenizer = load_tokenizer(*whose)
        batches = windows(text, tokenizer, length, max(1, tokens // length))
        given = {"config": config_of(reference)} if is_gguf(model) and reference else {}
        loaded = load_model("MODEL", model, dtype, device_map, **given)
        if without_compensation:
            compensation = Compensation.attached_to(loaded)
            if compensation is None:
                raise BiasCompensationError(
                    f"{model} is not compensated; drop --without-compensation."
                )
            compensation.detach(loaded)
        float_model = load_model(*whose, dtype, device_map) if reference else None
        found = run(loaded, batches, float_model)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    table = Table("perplexity", "KL from the float model (nats)", "top-1 agreement", "tokens")
    kl = "-" if found.kl is None else f"{found.kl:.4f}"
    top1 = "-" if found.top1 is None else f"{found.top1:.1%}"
    table.add_row(f"{found.perplexity:.3f}", kl, top1, str(found.tokens))
    Console().print(table)
