"""Read the imports of the sources: which module and which folder points at which."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("solvers", "problems")
"""Top-level folders that symbolic links make subpackages of `bilevel`."""


def sources() -> dict[str, str]:
    """Return the sources of the product by dotted name; a package has the name of its folder."""
    return {
        dotted(file.relative_to(ROOT)): file.read_text()
        for top in ("bilevel", *PARTS)
        for file in _files(ROOT / top)
    }


def dotted(path: Path) -> str:
    """Return the import name of a source file.

    >>> dotted(Path("solvers/base/descent.py"))
    'bilevel.solvers.base.descent'
    """
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "bilevel" else ("bilevel", *parts))


def part(name: str) -> str:
    """Return which of the three parts a dotted name lies in; other packages are their own part.

    >>> part("bilevel.solvers.base.descent"), part("bilevel.run.loop"), part("torch.nn")
    ('bilevel.solvers', 'bilevel', 'torch')
    """
    first, second = (*name.split("."), "")[:2]
    return f"{first}.{second}" if first == "bilevel" and second in PARTS else first


def folder(name: str, modules: dict[str, set[str]]) -> str:
    """Return the package that a module lies in: itself for a package."""
    is_package = any(other.startswith(f"{name}.") for other in modules)
    return name if is_package else name.rpartition(".")[0]


def imported(source: str, name: str, known: set[str], *, lazily: bool = True) -> set[str]:
    """Return the dotted names that the module `name` imports.

    A name that is imported from a package is resolved to its module where `known` has it. Imports
    for type checkers alone do not count; those inside functions do if `lazily`.
    """
    found: set[str] = set()
    for node in _nodes(ast.parse(source), lazily):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if _is_package(name, known) else name.split(".")[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            found |= {str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def arrows(known: dict[str, str], *, lazily: bool = True) -> dict[str, set[str]]:
    """Return for each module the modules of the product that it imports."""
    return {
        name: (imported(source, name, set(known), lazily=lazily) & known.keys()) - {name}
        for name, source in known.items()
    }


def folders(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return for each folder the folders that its modules import from.

    A file directly in `bilevel`, `bilevel.solvers` or `bilevel.problems` counts as a folder.
    """
    tops = {"bilevel", *(f"bilevel.{top}" for top in PARTS)}

    def place(name: str) -> str:
        home = folder(name, modules)
        return name if home in tops else home

    graph: dict[str, set[str]] = {}
    for name, targets in modules.items():
        found = graph.setdefault(place(name), set())
        found |= {place(target) for target in targets} - {place(name)}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the circles of a graph: its strongly connected components of two nodes or more."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def levels(graph: dict[str, set[str]]) -> int:
    """Return the length of the longest chain of imports of a graph without circles."""
    depth: dict[str, int] = {}

    def of(node: str) -> int:
        if node not in depth:
            depth[node] = 1 + max(map(of, graph.get(node, ())), default=0)
        return depth[node]

    return max(map(of, graph))


def _files(top: Path) -> Iterator[Path]:
    """Yield the sources below a folder, without those that a symbolic link brings in."""
    for entry in sorted(top.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            yield from _files(entry)
        elif entry.suffix == ".py":
            yield entry


def _nodes(tree: ast.AST, lazily: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if lazily or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _nodes(node, lazily)


def _is_package(name: str, known: set[str]) -> bool:
    return any(other.startswith(f"{name}.") for other in known)


def _called(node: ast.Call) -> str:
    return str(getattr(node.func, "attr", getattr(node.func, "id", "")))
