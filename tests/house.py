"""How large the package is, and how it hangs together: `python tests/house.py` prints it as a table."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parent.parent
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}  # public, in spite of their names


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by name, as a tree."""
    found = {}
    for file in sorted((ROOT / "pipeline").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def lines() -> int:
    """Lines of the package's code."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "pipeline").rglob("*.py"))


def options() -> dict[str, int]:
    """How many flags each command takes."""
    from pipeline.parsing import flags_of
    from pipeline.table import COMMANDS

    return {name: len(flags_of(name)) for name in COMMANDS}


@cache
def offers() -> dict[str, str]:
    """The names that packages offer lazily, such as pipeline.LLM, and the modules that these come from."""
    found = {}
    for package, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "offered":
                for home, names in ast.literal_eval(node.args[1]).items():
                    found |= {f"{package}.{name}": f"{package}.{home}" for name in names}
    return found


@cache
def imports() -> dict[str, dict[str, str]]:
    """By module, the modules that it takes names from, wherever in it that stands, each with the last such name.

    A name that a package offers lazily is taken from the package, and from where it stands as well.
    """
    return {
        module: {home: name for node in _run(tree) for home, name in _taken(node) if home != module}
        for module, tree in modules().items()
    }


def _run(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a module, but those that only a type checker reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            waiting += ast.iter_child_nodes(node)


def _taken(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from ((one.name, "") for one in node.names if one.name in modules())
    if isinstance(node, ast.ImportFrom) and node.module in modules():
        for one in node.names:
            whole = f"{node.module}.{one.name}"
            if whole in modules():
                yield whole, ""
            else:
                yield from ((home, one.name) for home in [node.module, offers().get(whole)] if home)


def circles() -> list[list[str]]:
    """Groups of modules that import each other, over however many between."""
    edges = imports()
    reached = {name: _reached(edges, name) for name in edges}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in edges}
    return sorted(sorted(group) for group in groups if group)


def _reached(edges: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """What a module imports, at however many hands; itself only where a circle leads back."""
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += edges[name]
    return seen


def chain() -> list[str]:
    """The longest chain of imports, from the module that imports first; a circle counts with all its modules."""
    edges = imports()
    ring = {name: tuple(circle) for circle in circles() for name in circle}

    @cache
    def longest(group: tuple[str, ...]) -> tuple[str, ...]:
        outside = {ring.get(to, (to,)) for name in group for to in edges[name]} - {group}
        return group + max((longest(one) for one in sorted(outside)), key=len, default=())

    return list(max((longest(ring.get(name, (name,))) for name in edges), key=len))


def reaching() -> list[str]:
    """Places that use a private name of what is neither their own class's nor their own file's."""
    found = []
    for name, tree in modules().items():
        own = {name for node in ast.walk(tree) for name in _defined(node)} | OF_NAMED_TUPLES
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                of = ast.unparse(node.value)
                if of not in ("self", "cls", "os") and node.attr not in own:  # os._exit is public
                    found.append(f"{name}:{node.lineno}: {of}.{node.attr}")
    return found


def _defined(node: ast.AST) -> Iterator[str]:
    """Names that a statement defines, in a module, in a class or on `self`."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
        yield node.attr


def functions() -> list[int]:
    """Lines of every function, the shortest first."""
    return sorted(
        (node.end_lineno or node.lineno) - node.lineno + 1
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def p90(values: list[int]) -> float:
    """What nine of ten values do not exceed."""
    return quantiles(values, n=10)[-1]


def main() -> None:
    """Print the table."""
    flags, sizes, longest = options(), functions(), chain()
    print(f"lines of pipeline/           {lines()}")
    print(f"options of run               {flags['run']}")
    print(f"options of all commands      {sum(flags.values())}: {flags}")
    print(f"longest chain of imports     {len(longest)}: {' > '.join(longest)}")
    print(f"circles of imports           {len(circles())}: {circles()}")
    print(f"lines of a function          median {median(sizes):g}, p90 {p90(sizes):g}")
    print(f"reaching for private names   {len(reaching())}")
    for place in reaching():
        print(f"  {place}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
