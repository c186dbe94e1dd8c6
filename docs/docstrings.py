"""Docstrings as they are written here, for Sphinx.

They are Google's sections around Markdown: single backticks are code, what is indented behind an
empty line is a formula, and tables have bars. In reStructuredText these have to be said otherwise.
"""

import re

from sphinx.application import Sphinx

#: Code spans, which stay; and what reStructuredText would take for markup of its own elsewhere.
INLINE = re.compile(r"`[^`]*`|[*|\\]|_(?!\w)|(?:(?<=^)|(?<=: ))[A-Z](?=\. )")


def escaped(line: str) -> str:
    """The line with everything but its code spans taken literally."""

    def escape(match: re.Match[str]) -> str:
        text = match.group()
        return text if text.startswith("`") else "\\" + text

    # Arguments such as `**options: ...` are escaped by napoleon.
    head = re.match(r"\s*\*{1,2}\w+(?=[ :])", line)
    start = head.end() if head else 0
    return line[:start] + INLINE.sub(escape, line[start:])


def table(rows: list[str], indent: str) -> list[str]:
    """A table with bars, whose second row is the rule below its head, as a list of lists."""
    out = [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
    for row in rows[:1] + rows[2:]:
        for place, cell in enumerate(row.strip().strip("|").split("|")):
            out.append(f"{indent}   {'  -' if place else '* -'} {escaped(cell.strip())}")
    return [*out, ""]


def converted(lines: list[str]) -> list[str]:
    """Lines of a docstring in reStructuredText."""
    out: list[str] = []
    rows: list[str] = []  # of a table that has begun
    margin, before, blank = "", 0, False
    formula: int | None = None  # the indent of the text around a formula, while in one
    session = False  # in a session of the interpreter, which lasts to the next empty line
    for line in [*lines, ""]:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if rows and text and not text.startswith("|"):
            rows[-1] += " " + text
            continue
        if text.startswith("|") and formula is None and not session:
            margin = margin if rows else line[:indent]
            rows.append(text)
            continue
        if rows:
            out += table(rows, margin)
            rows = []
        if not text:
            out.append(line)
            blank, session = True, False
            continue
        if formula is not None and indent <= formula:
            formula = None
        if formula is None and blank and indent > before and not text.startswith(">>>"):
            formula = before
            out += [" " * before + "::", ""]
        session = session or text.startswith(">>>")
        out.append(line if session or formula is not None else escaped(line))
        before = before if formula is not None else indent
        blank = False
    return out[:-1]


def to_rst(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Sphinx's hook: the lines are changed in place."""
    lines[:] = converted(lines)
