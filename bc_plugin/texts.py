"""The text of a data set: a file's, or that of a data set known by name."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import BiasCompensationError

NAMED = {
    # The data sets GPTQ toolkits know by name; (repository, configuration, split, column).
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
}
FIELD = "text"
SUFFIXES = (".txt", ".jsonl")


def read_text(source: str) -> str:
    """The text of a data set: a ``.txt`` or ``.jsonl`` file (field "text"), or a name.

    Raises:
        BiasCompensationError: there is neither such a file nor such a name; the file is of another
            kind, empty, not in UTF-8, or has a line without that field; the hub does not answer.
    """
    path = Path(source)
    if source in NAMED and not path.exists():
        return _from_hub(source)
    if not path.is_file():
        raise BiasCompensationError(
            f"dataset {source!r} is neither a file nor one of {sorted(NAMED)}; "
            "pass the path of a .txt or .jsonl file. (Calibration data, though not what a model is "
            'evaluated on, may also be "self".)'
        )
    if path.suffix.lower() not in SUFFIXES:
        raise BiasCompensationError(
            f"dataset {source!r} is a {path.suffix or 'file without a suffix'}; expected .txt "
            f'(text as it is) or .jsonl (an object a line, its text in the field "{FIELD}").'
        )
    text = _decoded(path)
    if path.suffix.lower() == ".jsonl":
        lines = text.split("\n")  # no other ends a line of JSON
        text = "\n\n".join(_field(path, n, line) for n, line in enumerate(lines, 1) if line.strip())
    if not text.strip():
        raise BiasCompensationError(f"dataset {source!r} has no text; give a file that has some.")
    return text


def _decoded(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
        where = text.find("\0")  # UTF-16 without a mark at its start
        fault = f"character {where} is a zero" if where >= 0 else None
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is 0x{error.object[error.start]:02x}"
    except OSError as error:
        raise BiasCompensationError(
            f"dataset {str(path)!r} cannot be read: {error.strerror}; name a file that can."
        ) from error
    if fault is not None:
        raise BiasCompensationError(
            f"dataset {str(path)!r} is not text in UTF-8 ({fault}); save it in UTF-8, e.g. with "
            f"`iconv -f ENCODING -t UTF-8`, where `file {path}` tells its ENCODING."
        )
    return text


def _field(path: Path, number: int, line: str) -> str:
    """The text of a line of a .jsonl file."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise BiasCompensationError(
            f"dataset {str(path)!r}, line {number} is not JSON ({error}); expected one object a "
            f'line, such as {{"{FIELD}": "..."}}.'
        ) from error
    if isinstance(entry, dict) and isinstance(entry.get(FIELD), str):
        return entry[FIELD]
    found = f"fields {sorted(entry)}" if isinstance(entry, dict) else type(entry).__name__
    raise BiasCompensationError(
        f'dataset {str(path)!r}, line {number} has no text in a field "{FIELD}" ({found}); rename '
        "the field that has the text."
    )


def _from_hub(name: str) -> str:
    repository, configuration, split, column = NAMED[name]
    try:
        from datasets import load_dataset

        rows = load_dataset(repository, configuration, split=split, streaming=True)
        return "\n\n".join(row[column] for row in rows.take(20_000))
    except ImportError as error:
        raise BiasCompensationError(
            f"dataset {name!r} is read by the package `datasets`, which cannot be imported "
            f"({error}); `pip install datasets`, or pass a .txt or .jsonl file."
        ) from error
    except Exception as error:  # no network fails in many ways
        raise BiasCompensationError(
            f"dataset {name!r} ({repository}) cannot be read from the hub "
            f"({type(error).__name__}: {error}); pass a .txt or .jsonl file."
        ) from error
