"""Small pieces of HTML: text that is escaped, tables, bars, tiles."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

__all__ = ["bar", "change", "percent", "picture", "section", "size", "table", "text", "tile", "value"]


def text(given: object) -> str:
    """Anything as text that HTML shows as it is."""
    return html.escape(str(given))


def percent(given: float | None) -> str:
    """12.3 %, or a dash for None."""
    return "–" if given is None else f"{given:.1f} %"


def change(before: float, after: float, digits: int = 1) -> str:
    """The difference in points, in green or red."""
    gap = after - before
    kind = "soft" if round(gap, digits) == 0 else "good" if gap > 0 else "bad"
    sign = "±" if round(gap, digits) == 0 else "+" if gap > 0 else "−"
    return f'<span class="{kind}">{sign}{abs(gap):.{digits}f}</span>'


def size(given: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{given / 2**30:.2f} GiB" if given >= 2**30 else f"{given / 2**20:.0f} MiB"


def value(given: Any) -> str:
    """A setting as people write it."""
    if isinstance(given, list | tuple):
        return ", ".join(value(v) for v in given) or "–"
    if isinstance(given, dict):
        return ", ".join(f"{k}: {value(v)}" for k, v in given.items()) or "–"
    return "–" if given is None else str(given)


def section(name: str, title: str, lead: str, body: str) -> str:
    """A heading that can be linked to, a sentence that says how to read what follows, and that."""
    said = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<h2 id="{name}">{text(title)}</h2>{said}{body}'


def tile(number: str, what: str) -> str:
    """One number and what it is; `number` is HTML."""
    return f'<div class="tile"><b>{number}</b><span>{text(what)}</span></div>'


def bar(kind: str, given: float | None) -> str:
    """A bar of that many percent, of class "before" or "after"."""
    return "" if given is None else f'<div class="{kind}" style="width:{given:.1f}%"></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML; the columns `numbers` are set to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f'<{tag} class="n">{c}</{tag}>' if i in numbers else f"<{tag}>{c}</{tag}>" for i, c in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def picture(image: Image.Image, name: str, caption: str) -> str:
    """A figure with the image inside the page; `caption` is HTML."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    said = text(name)
    return f'<figure><img src="{source}" alt="{said}" title="{said}"><figcaption>{caption}</figcaption></figure>'
