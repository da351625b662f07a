"""What can be checked of a Markdown page: headings, links, code in the text and blocks of code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        place: Page and heading, as a link would name them.
    """

    language: str
    text: str
    place: str


class Page:
    """A page, read.

    Attributes:
        sections: Text without blocks of code, by the anchor of its heading.
        blocks: In order.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.sections: dict[str, str] = {}
        self.blocks: list[Block] = []
        anchor, language, code = "", None, ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("```"):
                if language is None:
                    language, code = line[3:], ""
                else:
                    self.blocks.append(Block(language, code, f"{name}#{anchor}"))
                    language = None
            elif language is not None:
                code += line + "\n"
            elif line.startswith("#"):
                anchor = _anchor(line.lstrip("# "))
                assert anchor not in self.sections, f"{name} has two headings {line!r}"
                self.sections[anchor] = ""
            else:
                self.sections[anchor] += line + "\n"
        assert language is None, f"{name}: the last block of code has no end"

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return re.findall(r"\[[^\]]*\]\(([^)]+)\)", "".join(self.sections.values()))

    @property
    def spans(self) -> list[str]:
        """Code within the text."""
        return code_in("".join(self.sections.values()))


def code_in(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def first_columns(table: str, count: int) -> list[tuple[str, ...]]:
    """The first cells of every row but the header's two."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return [tuple(row[:count]) for row in rows[2:]]


def _anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
