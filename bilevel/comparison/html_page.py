"""A report as one HTML file with embedded pictures and no script, for screen and print."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from bilevel.comparison.table import Rows

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1a1a1a; --paper: #fff; --pale: #666; --rule: #ccc; --band: #0000000b;
  --shade: #0004;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --pale: #a0a0a0; --rule: #44484e; --band: #ffffff0d;
    --shade: #fff4; }
}
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem;
}
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 {
  font-size: 1.25rem; margin-top: 2.5rem;
  border-bottom: 1px solid var(--rule); padding-bottom: 0.2rem;
}
h3 { font-size: 1rem; margin: 1.8rem 0 0.4rem; }
p, figcaption, li { max-width: 60rem; }
.pale, figcaption { color: var(--pale); font-size: 0.9rem; }
/* a shade at an edge is the sign of columns beyond it; the covers scroll with the table */
.scroll {
  overflow-x: auto;
  background:
    linear-gradient(to right, var(--paper) 50%, transparent) left / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 50%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 0.7rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 0.7rem 100% no-repeat scroll;
}
table {
  border-collapse: collapse; font-variant-numeric: tabular-nums;
  border-top: 1.5px solid; border-bottom: 1.5px solid;
}
th { border-bottom: 1px solid; font-weight: 600; vertical-align: bottom; }
th, td { text-align: right; padding: 0.3rem 0.7rem; white-space: nowrap; }
th, .left { white-space: normal; }
.left { text-align: left; overflow-wrap: anywhere; min-width: 7rem; max-width: 24rem; }
tbody tr:nth-child(even) { background: var(--band); }
td.trouble { color: #c2410c; font-weight: 600; }
@media (prefers-color-scheme: dark) { td.trouble { color: #fdba74; } }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
@media (prefers-color-scheme: dark) { img { padding: 0.5rem; box-sizing: border-box; } }
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --paper: #fff; --pale: #333; --rule: #999; --band: #0000000d;
  }
  @page { margin: 15mm; }
  body { font-size: 9.5pt; margin: 0; padding: 0; max-width: none; }
  h2, h3 { break-after: avoid; }
  figure, table, tr { break-inside: avoid; }
  th, td { padding: 0.15rem 0.35rem; font-size: 7.5pt; }
  .scroll { overflow: visible; background: none; }
  .left { max-width: 14rem; }
  td.trouble { color: #9a3412; }
}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Return the whole document."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, pale: bool = False) -> str:
    """Return a paragraph; a pale one explains how to read a part."""
    return f"<p{_class('pale' if pale else '')}>{escape(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """Return a list; empty without texts."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>" if texts else ""


def table(content: Rows, words: Sequence[int] = (0,)) -> str:
    """Return a table.

    Columns in `words` are left-aligned, and an unnamed last one shows failures. Marked cells are
    bold.
    """

    def cell(tag: str, index: int, text: str) -> str:
        last = index == len(content.titles) - 1 and index not in words
        unnamed = last and not content.titles[index]
        kind = "left trouble" if unnamed else "left" if index in words else ""
        return f"<{tag}{_class(kind)}>{text}</{tag}>"

    def content_of(row: int, index: int) -> str:
        text = escape(content.text(row, index))
        return f"<strong>{text}</strong>" if (row, index) in content.marks else text

    head = "".join(cell("th", index, escape(title)) for index, title in enumerate(content.titles))
    body = "".join(
        "<tr>" + "".join(cell("td", i, content_of(row, i)) for i in range(len(cells))) + "</tr>\n"
        for row, cells in enumerate(content.cells)
    )
    head = f"<thead><tr>{head}</tr></thead>\n" if any(content.titles) else ""
    rows = f"{head}<tbody>\n{body}</tbody>"
    return f'<div class="scroll"><table>\n{rows}\n</table></div>'


def picture(png: bytes, caption: str) -> str:
    """Return an embedded picture with its caption."""
    data = base64.b64encode(png).decode("ascii")
    text = escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
