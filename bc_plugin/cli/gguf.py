"""``compensate`` and ``refine`` of a GGUF file: llama.cpp's own quantized weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from ..config import BiasCompensationConfig
from ..errors import BiasCompensationError
from ..files import check_out, new_files
from ..gguf.file import GGUFFile, control_of, is_gguf
from ..gguf.places import BLOCKS, places_in
from ..refinement.config import RefinementConfig
from .arguments import check_float, check_loading, text_of
from .inputs import config_of, float_inputs, pass_settings
from .ranks import by_first
from .sites import print_sites
from .stopped import making


def settings_for_file(
    positions: str | None, sites: str, scales: bool, integers: bool, batch_tokens: int
) -> BiasCompensationConfig:
    """Raises: BiasCompensationError: a GGUF file cannot hold that."""
    if positions not in (None, "0"):
        raise BiasCompensationError(
            f"--positions {positions}: a GGUF file has one bias for all tokens; leave it out."
        )
    for name, wanted in (("scales", scales), ("integers", integers)):
        if wanted:
            raise BiasCompensationError(f"--{name}: the {name} of a GGUF file stay as they are.")
    return pass_settings("0", sites, dtype="float32", batch_tokens=batch_tokens)


def compensate_file(
    quantized: str,
    float_model: str,
    out: Path,
    dataset: str,
    settings: BiasCompensationConfig,
    samples: int,
    length: int,
    dtype: str,
    device_map: str,
) -> None:
    """Compute the vectors that llama.cpp can be given, and write them into a copy of the file."""
    source = _checked(quantized, float_model, out, dtype, device_map)
    places = places_in(source)
    text = text_of(dataset)
    with making(out), by_first(new_files(out)) as part:
        from .. import compensate as run
        from ..gguf.load import load_model
        from ..vectors.short_names import collapse

        _, calibration, reference = float_inputs(
            float_model, text, length, samples, dtype, device_map
        )
        model = load_model(source, device_map=device_map, config=config_of(float_model))
        only = places.__contains__
        compensation = run(model, reference, calibration, settings, only=only)
        if part is not None:
            by = _write(source, part / out.name, model, compensation)
        left = collapse(places.left(_linears(model)))
    if part is None:
        return
    _say(out, by)
    if left:
        typer.echo(
            f"llama.cpp has no place for vectors of {', '.join(left)}; blocks were measured "
            "without them."
        )


def refine_file(
    compensated: str,
    float_model: str,
    out: Path,
    dataset: str,
    config: RefinementConfig,
    samples: int,
    length: int,
    dtype: str,
    device_map: str,
    started: Path,
) -> None:
    """Train the vectors of a compensated file.

    Args:
        started: The folder for progress, from which the same command goes on.
    """
    if config.train == "auto":
        config = replace(config, train=("vectors",))
    if config.train != ("vectors",):
        raise BiasCompensationError(
            "--train: of a GGUF file only `vectors` are trained; its scales and norms stay."
        )
    source = _checked(compensated, float_model, out, dtype, device_map)
    text = text_of(dataset)
    again = f"the same command goes on from {started}"
    with making(out, again), by_first(new_files(out)) as part:
        from .. import record_float_logits
        from .. import refine as run
        from ..gguf.load import load_model
        from ..refinement.disk import writing
        from ..refinement.progress import about_to_place, delete_progress
        from .sites import load_compensation

        compensation = load_compensation(source.path)  # before anything is loaded
        _, calibration, reference = float_inputs(
            float_model, text, length, samples, dtype, device_map
        )
        if config.by == "model":  # what it predicts is all that is needed of it
            logits = started / "float_logits"
            reference = record_float_logits(reference, calibration, config, folder=logits)
        model = load_model(source, device_map=device_map, config=config_of(float_model))
        compensation.attach_unchecked(model)
        refined = run(model, reference, calibration, config, folder=started)
        refined.detach(model)
        if part is not None:
            with writing(out, f"The training is kept in {started}"):
                by = _write(source, part / out.name, model, refined)
            about_to_place(started, load_compensation(part / out.name).vectors)
    if part is not None:
        delete_progress(started)
        _say(out, by)


def _checked(model: str, float_model: str, out: Path, dtype: str, device_map: str) -> GGUFFile:
    if not is_gguf(out):
        raise BiasCompensationError(f"{out}: what is written is a GGUF file; name one, as x.gguf.")
    for path in (out, control_of(out)):
        check_out(path)
    file = GGUFFile(model)
    check_float(float_model)
    check_loading(dtype, device_map)
    return file


def _linears(model: Any) -> list[str]:
    from ..models.modules import linears_of

    return [f"{BLOCKS}.{name}" for name, _ in linears_of(model.get_submodule(BLOCKS))]


def _write(source: GGUFFile, out: Path, model: Any, compensation: Any) -> str:
    from ..gguf.verify import verify
    from ..gguf.write import write_compensated

    return verify(source, out, model, write_compensated(source, out, compensation))


def _say(out: Path, by: str) -> None:
    print_sites(out, by_group=True)
    typer.echo(f"{out}: loaded by {by}, with the logits that the plugin gives")
    control = control_of(out)
    if control.is_file():
        typer.echo(
            "llama.cpp has no bias for the blocks of this architecture; they are in a control "
            f"vector, without which the file is not whole:\n"
            f"  llama-server --model {out} --control-vector {control}"
        )
