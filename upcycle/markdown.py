"""Text and tables as Markdown that no name can break out of."""

import re
from collections.abc import Sequence

from upcycle.report_tables import Table
from upcycle.run_records import shorten

_CODE = re.compile(r"[\w.+/@:-]{1,200}")


def plain(text: object) -> str:
    """Text that is shown as it is, whatever is in it: one line, no markup."""
    line = "".join(char if char.isprintable() else " " for char in str(text)).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return re.sub(r"^(#+|[+=-]+|\d+[.)])(?=\s|$)", _escape_last, line)


def _escape_last(found: re.Match[str]) -> str:
    return f"{found[0][:-1]}\\{found[0][-1]}"


def code(text: object) -> str:
    """A name or a hash as code, where nothing in it could end that."""
    return f"`{text}`" if _CODE.fullmatch(str(text)) else plain(text)


def link(text: str, address: str) -> str:
    """A link; the address is one that the caller has checked."""
    return f"[{plain(text)}]({address})"


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    """A table of cells that are Markdown already; those after `text_columns` are numbers, aligned to the right."""
    marks = ["---" if index < text_columns else "---:" for index in range(len(columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, marks, *rows))


def table(content: Table) -> str:
    """A table of a report, with its title and its note."""
    rows = []
    for row in content.rows:
        cells = []
        for cell in row:
            detail = f"{' ' if cell.detail.startswith('±') else ', '}{plain(cell.detail)}" if cell.detail else ""
            cells.append(f"{plain(shorten(cell.text))}{detail}{' ★' if cell.best else ''}")
        rows.append(cells)
    title = f"**{plain(content.title)}**\n\n" if content.title else ""
    note = f"\n\n{plain(content.note)}" if content.note else ""
    return title + grid([plain(shorten(name)) for name in content.columns], rows, content.text_columns) + note
