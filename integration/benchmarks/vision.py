"""Quantized activations, with and without compensation: an image classifier and an encoder.

    make benchmark-vision

prints one table each. What a model gives on its test data is kept, so what an interrupted run has
measured is not measured again; ``--again`` starts anew, but for the training of the classifier, and
``--only`` takes one of the two.
"""

from __future__ import annotations

import argparse
import shutil

from rich.console import Console
from rich.table import Table
from vision_subjects import FOLDER, VARIANTS, Classifier, Encoder, Subject

SUBJECTS = {"vit": Classifier, "minilm": Encoder}


def print_table(subject: Subject) -> None:
    columns = ["without", *(f"BC, positions={positions}" for positions in (1, "all"))]
    shift = "of a linear's error, shift"
    table = Table("", *columns, shift, title=subject.title)
    table.add_row("float32", subject.cell("float", "none"))
    for setting in subject.settings():
        shifts = [subject.shift(setting, variant) for variant in VARIANTS if variant != "none"]
        cells = [subject.cell(setting, variant) for variant in VARIANTS]
        table.add_row(setting, *cells, " / ".join(shifts))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", choices=SUBJECTS)
    given = parser.parse_args()
    names = [given.only] if given.only else list(SUBJECTS)
    if given.again:
        for name in names:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
    subjects = [SUBJECTS[name]() for name in names]
    for subject in subjects:
        subject.run()
    for subject in subjects:
        print_table(subject)


if __name__ == "__main__":
    main()
