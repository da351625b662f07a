"""``bc-plugin``: quantize, compensate, refine, export, evaluate and inspect."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import BiasCompensationError
from .files import new_folder
from .models.architectures import ENGINES

app = typer.Typer(
    name="bc-plugin",
    help="Bias compensation for quantized language models (Gong et al., arXiv 2404.01892).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

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
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
FloatModel = Annotated[str, typer.Argument(metavar="FLOAT", help="The model it came from.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")]
Dtype = Annotated[str, typer.Option(help="Type to load models in; `auto` takes the checkpoint's.")]
DeviceMap = Annotated[str, typer.Option(help="Where to load models: `cpu`, `cuda`, `auto`.")]


def main() -> None:
    """Entry point: errors of this package are printed without a traceback."""
    try:
        app()
    except BiasCompensationError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise SystemExit(1) from error


def _settings(positions: str, sites: str) -> dict[str, Any]:
    count = int(positions) if positions.isdecimal() else positions
    return {"positions": count, "sites": sites.replace(",", " ").split()}


def _load(folder: str, dtype: str, device_map: str, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=device_map, **kwargs
    ).eval()


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _calibration(
    dataset: str, tokenizer: Any, length: int, samples: int, float_model: Callable[[], Any]
) -> list[dict[str, Any]]:
    from .calibration.sample import sample_from
    from .calibration.text import read_text, windows

    if dataset == "self":
        return sample_from(float_model(), tokenizer, length, samples)
    return windows(read_text(dataset), tokenizer, length, samples)


@app.command()
def quantize(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")],
    out: Out,
    dataset: CalibrationData,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale; -1: a row.")] = 128,
    sym: Annotated[bool, typer.Option(help="Symmetric quantization.")] = True,
    desc_act: Annotated[bool, typer.Option(help="Activation order.")] = False,
    positions: Positions = "1",
    sites: Sites = "linear block",
    joint: Annotated[bool, typer.Option(help="Let GPTQ know that vectors will follow.")] = True,
    refine_steps: Annotated[int, typer.Option(help="Then train the vectors so many steps.")] = 0,
    samples: Samples = 128,
    length: Length = 512,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Quantize with GPTQ through transformers and Optimum, and compensate.

    Example: `bc-plugin quantize ./SmolLM2-135M ./out --bits 3 --group-size 64 --dataset text.txt`
    """
    from transformers import GPTQConfig

    from . import enable

    enable("transformers")
    with new_folder(out) as part:
        tokenizer = _tokenizer(float_model)
        config = GPTQConfig(
            bits=bits,
            group_size=group_size,
            sym=sym,
            desc_act=desc_act,
            dataset=_calibration(
                dataset, tokenizer, length, samples, lambda: _load(float_model, dtype, device_map)
            ),
            tokenizer=tokenizer,
            bias_compensation={
                **_settings(positions, sites),
                "joint": joint,
                "refine_steps": refine_steps,
            },
        )
        model = _load(float_model, dtype, device_map, quantization_config=config)
        model.config.quantization_config.dataset = None  # tokens of the text: not to be published
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    _print_sites(out, by_group=True)


@app.command()
def compensate(
    quantized: Annotated[str, typer.Argument(metavar="QUANTIZED", help="Quantized checkpoint.")],
    float_model: FloatModel,
    out: Out,
    dataset: CalibrationData,
    positions: Positions = "1",
    sites: Sites = "linear block",
    samples: Samples = 128,
    length: Length = 512,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Compensate a checkpoint that is quantized already.

    Vectors that it has are computed anew.

    Example: `bc-plugin compensate ./gptq ./SmolLM2-135M ./out --dataset text.txt --positions 0`
    """
    from . import Compensation, enable
    from . import compensate as run

    enable("transformers")
    settings = _settings(positions, sites)
    with new_folder(out) as part:
        tokenizer = _tokenizer(float_model)
        reference = _load(float_model, dtype, device_map)
        calibration = _calibration(dataset, tokenizer, length, samples, lambda: reference)
        model = _load(quantized, dtype, device_map)
        before = Compensation.attached_to(model)
        joint = before is not None and before.joint
        if joint and "linear" not in settings["sites"]:
            raise BiasCompensationError(
                f"{quantized} was quantized jointly with its linears' vectors and is worth little "
                "without them; keep linear among the sites."
            )
        if before is not None:
            before.detach(model)
        compensation = run(model, reference, calibration, settings)
        compensation.joint = joint
        compensation.attach(model)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    _print_sites(out, by_group=True)


@app.command()
def refine(
    compensated: Annotated[Path, typer.Argument(metavar="COMPENSATED", help="A checkpoint.")],
    float_model: FloatModel,
    out: Out,
    dataset: CalibrationData,
    steps: Annotated[int, typer.Option(help="Steps of training; by block, in each.")] = 64,
    by: Annotated[str, typer.Option(help="Compare the `model`, or each `block`.")] = "model",
    learning_rate: Annotated[float, typer.Option(help="Change per step, as a share.")] = 0.1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    mixed_precision: Annotated[str, typer.Option(help="`no` or `bf16`.")] = "no",
    samples: Samples = 128,
    length: Length = 512,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Train the vectors of a compensated checkpoint against the float model.

    A run that is stopped leaves OUT.refining; the same command goes on from there.

    Example: `bc-plugin refine ./compensated ./SmolLM2-135M ./refined --dataset text.txt`
    """
    from . import Compensation, RefinementConfig, enable, record_float_logits
    from . import refine as run

    enable("transformers")
    config = RefinementConfig(
        steps=steps,
        by=by,
        learning_rate=learning_rate,
        gradient_checkpointing=gradient_checkpointing,
        mixed_precision=mixed_precision,
    )
    started = out.with_name(f"{out.name}.refining")
    with new_folder(out) as part:
        tokenizer = _tokenizer(float_model)
        reference = _load(float_model, dtype, device_map)
        calibration = _calibration(dataset, tokenizer, length, samples, lambda: reference)
        if by == "model":  # what it predicts is all that is needed of it
            logits = started / "float_logits"
            reference = record_float_logits(reference, calibration, config, folder=logits)
        model = _load(str(compensated), dtype, device_map)
        if Compensation.attached_to(model) is None:
            raise BiasCompensationError(
                f"{compensated} is not compensated; start with `bc-plugin compensate`."
            )
        run(model, reference, calibration, config, folder=started)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    _print_sites(out, by_group=True)


@app.command()
def export(
    compensated: Annotated[Path, typer.Argument(metavar="COMPENSATED", help="With positions=0.")],
    out: Out,
    engine: Annotated[str, typer.Option("--for", help=", ".join(ENGINES))] = "transformers",
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Leave out what the engine cannot be given.")
    ] = False,
    as_llama: Annotated[
        bool, typer.Option("--as-llama", help="Rewrite a model that is exactly a Llama as one.")
    ] = False,
    device_map: DeviceMap = "cpu",
) -> None:
    """Merge the vectors into plain biases, which engines load without this plugin.

    Example: `bc-plugin export ./compensated ./plain --for vllm`
    """
    from . import export as run

    run(
        compensated,
        out,
        engine=engine,
        allow_partial=allow_partial,
        as_llama=as_llama,
        device_map=device_map,
    )
    Console().print(f"{out}: verified in a process without the plugin", highlight=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name.")],
    dataset: Dataset,
    reference: Annotated[str | None, typer.Option(help="The float model to compare with.")] = None,
    without_compensation: Annotated[
        bool, typer.Option("--without-compensation", help="Take the vectors out first.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="About how many tokens to evaluate.")] = 12288,
    length: Length = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = "auto",
) -> None:
    """Perplexity, and the mean KL divergence and top-1 agreement with the float model.

    Example: `bc-plugin evaluate ./out --reference ./SmolLM2-135M --dataset text.txt --tokens 8192`
    """
    from . import Compensation, enable
    from . import evaluate as run
    from .calibration.text import read_text, windows

    # Toolkits print to the standard output, which is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        enable("transformers")
        count = max(1, tokens // length)
        batches = windows(read_text(dataset), _tokenizer(reference or model), length, count)
        loaded = _load(model, dtype, device_map)
        if without_compensation:
            compensation = Compensation.attached_to(loaded)
            if compensation is None:
                raise BiasCompensationError(
                    f"{model} is not compensated; drop --without-compensation."
                )
            compensation.detach(loaded)
        float_model = _load(reference, dtype, device_map) if reference else None
        found = run(loaded, batches, float_model)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    table = Table("perplexity", "KL from the float model (nats)", "top-1 agreement", "tokens")
    kl = "-" if found.kl is None else f"{found.kl:.4f}"
    top1 = "-" if found.top1 is None else f"{found.top1:.1%}"
    table.add_row(f"{found.perplexity:.3f}", kl, top1, str(found.tokens))
    Console().print(table)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A compensated checkpoint.")],
    all_sites: Annotated[
        bool, typer.Option("--all", help="A row per site, not per group.")
    ] = False,
) -> None:
    """The sites of a compensated checkpoint, their sizes, and the error before and after.

    Example: `bc-plugin inspect ./out`
    """
    _print_sites(model, by_group=not all_sites)


def _print_sites(folder: Path, by_group: bool) -> None:
    from . import Compensation
    from .vectors.short_names import collapse

    compensation = Compensation.load(folder)
    rows = {row["site"]: row for row in compensation.describe()}
    groups = collapse(rows) if by_group else {name: [name] for name in rows}
    columns = ("before", "after", "held_out_before", "held_out_after")
    table = Table("site", "kind", "shape", "bytes", "error", "after", "held out", "after")
    for short, names in groups.items():
        members = [rows[name] for name in names]
        means = [_mean([member[column] for member in members]) for column in columns]
        shapes = dict.fromkeys(" x ".join(map(str, member["shape"])) for member in members)
        size = f"{sum(member['bytes'] for member in members):,}"
        table.add_row(short, members[0]["kind"], ", ".join(shapes), size, *means)
    console = Console()
    console.print(table)
    console.print(
        f"{len(rows)} sites, {compensation.nbytes:,} bytes, positions={compensation.positions}, "
        f"joint={compensation.joint}. "
        "Errors are mean squared differences from the float model's output, per value."
    )
    if compensation.refined is not None:
        console.print(
            "Refined by {by} in {steps} steps: loss on held-out sequences {before:.4g}, then "
            "{after:.4g}. The errors are those of the vectors it started from.".format(
                **compensation.refined
            )
        )


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3g}" if known else "-"
