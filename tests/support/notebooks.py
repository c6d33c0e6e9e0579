"""Run the code cells of a notebook without Jupyter, and store what they print and draw.

python -m tests.support.notebooks docs/notebooks/scikit_learn.ipynb
"""

import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook: dict[str, Any]) -> None:
    """Run the code cells in order in one namespace, and replace their outputs."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.close("all")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        text = printed.getvalue().splitlines(keepends=True)
        outputs = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
        outputs += [_picture(pyplot.figure(figure)) for figure in pyplot.get_fignums()]
        pyplot.close("all")
        cell.update(execution_count=number, outputs=outputs)


def kinds(notebook: dict[str, Any]) -> list[list[str]]:
    """Return what each code cell has printed, with `#` for numbers, and `picture` for pictures."""
    return [
        [
            " ".join(NUMBER.sub("#", "".join(output["text"])).split())
            if output["output_type"] == "stream"
            else "picture"
            for output in cell["outputs"]
        ]
        for cell in code_cells(notebook)
    ]


def _picture(figure: Any) -> dict[str, Any]:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=70, bbox_inches="tight")
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


if __name__ == "__main__":
    path = Path(sys.argv[1]).absolute()
    content = json.loads(path.read_text())
    execute(content)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
