"""The structure of the package, read from its source: which module imports which."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = "rlora_trl"


def sources(root=ROOT / PACKAGE):
    """The modules of the package by name, with their syntax trees."""
    trees = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = (ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py")
    return trees


def imported(node, name, is_package, modules):
    """The modules of the package that an import statement reads from, wherever in the module it stands."""
    if isinstance(node, ast.Import):
        targets = [alias.name for alias in node.names]
    else:
        start = name.split(".")[: None if is_package else -1]
        base = ".".join(start[: len(start) - node.level + 1]) if node.level else ""
        source = ".".join(part for part in (base, node.module) if part)
        # `from package import name` reads the module `package.name` if there is one, else the package itself.
        targets = [f"{source}.{alias.name}" if f"{source}.{alias.name}" in modules else source for alias in node.names]
    return {target for target in targets if target in modules}


def import_graph(trees):
    """Edges from each module to those that it imports, at the top, in functions and under TYPE_CHECKING."""
    graph = {}
    for name, (tree, is_package) in trees.items():
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        edges = set().union(*(imported(node, name, is_package, trees) for node in statements))
        graph[name] = edges - {name}
    return graph


def folders(graph):
    """The same for the folders of the package, and the modules beside them."""
    graph_of_folders = {}
    for name, targets in graph.items():
        folder = ".".join(name.split(".")[:2])
        edges = {".".join(target.split(".")[:2]) for target in targets}
        graph_of_folders.setdefault(folder, set()).update(edges - {folder})
    return graph_of_folders


def reachable(graph, start):
    found, left = set(), [start]
    while left:
        for target in graph[left.pop()]:
            if target not in found:
                found.add(target)
                left.append(target)
    return found


def circles(graph):
    """Sets of two or more modules that import each other, directly or through others."""
    reached = {name: reachable(graph, name) for name in graph}
    together = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return [circle for circle in together if len(circle) > 1]


@pytest.mark.parametrize("of", [lambda graph: graph, folders], ids=["modules", "folders"])
def test_no_circles(of):
    assert not [sorted(circle) for circle in circles(of(import_graph(sources())))]


@pytest.mark.parametrize(
    "statement",
    ["from .b import x", "from . import b", "from package import b", "import package.b", "def f(): from .b import x"],
)
def test_a_circle_is_found(tmp_path, statement):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text(statement)
    (folder / "b.py").write_text("if TYPE_CHECKING:\n    from .c import x")
    (folder / "c.py").write_text("")
    assert not circles(import_graph(sources(folder)))
    (folder / "c.py").write_text("from .a import x")
    assert circles(import_graph(sources(folder))) == [{"package.a", "package.b", "package.c"}]


def test_operators_are_called_where_they_are_defined():
    """A call by name, `torch.ops.rlora_trl.<operator>`, would be a dependence that no import shows."""
    for name, (tree, _) in sources().items():
        names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        assert f"torch.ops.{PACKAGE}" not in names, name
