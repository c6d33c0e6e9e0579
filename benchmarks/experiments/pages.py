"""Read and write pages of `docs/`, whose generated blocks stand between two comments."""

import re
from pathlib import Path

from bilevel import BilevelError

BLOCK = re.compile(
    r"(<!-- made by: python -m benchmarks\.experiments (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL
)


class Page:
    """A page, and the folder `out` for its generated copy, which may be the page's own folder.

    Args:
        name: The page below `docs`, such as `experiments/ablation.md`.
        docs: The folder of the prose.
        out: The folder to write to; other blocks of a page that is already there stay.
    """

    def __init__(self, name: str, docs: Path, out: Path) -> None:
        self.source = docs / name
        self.path = out / name
        self.folder = self.path.parent
        self.folder.mkdir(parents=True, exist_ok=True)

    def check(self, block: str) -> None:
        """Require that the page has the block; this is called before anything runs.

        Raises:
            BilevelError: the page or its block is missing.
        """
        if not self.source.exists() or block not in blocks(self.source.read_text(encoding="utf-8")):
            line = f"<!-- made by: python -m benchmarks.experiments {block} -->"
            raise BilevelError(
                f"{self.source} has no block for {block}; "
                f"write `{line}` and `<!-- end -->` on lines of their own"
            )

    def write(self, block: str, content: str) -> None:
        """Write the page with `content` in the block and the prose of the source around it."""
        made = blocks(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        made[block] = content.strip() + "\n"
        text = self.source.read_text(encoding="utf-8")
        self.path.write_text(
            BLOCK.sub(lambda m: m[1] + made.get(m[2], m[3]) + m[4], text), encoding="utf-8"
        )


def blocks(text: str) -> dict[str, str]:
    r"""Return the content of each block of a page, by the experiment's name.

    Example:
        >>> blocks("a <!-- made by: python -m benchmarks.experiments x -->\n| 1 |\n<!-- end --> b")
        {'x': '| 1 |\n'}
    """
    return {name: content for _, name, content, _ in BLOCK.findall(text)}
