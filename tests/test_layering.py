"""Imports go one way: no module imports from a layer above its own."""

import ast
import subprocess
import sys
from pathlib import Path

import fastntxent

ROOT = Path(fastntxent.__file__).parent

# From the bottom up. A module may import from its own layer and from the layers below.
LAYERS = [
    ["options"],
    ["validation", "saved_state", "trees", "sides", "files", "_cpu", "_cuda"],
    ["verification", "algebra"],
    ["backends.base", "backends.rows", "backends.ranges", "backends.tiling"],
    ["backends.softplus"],
    ["backends.towers"],
    ["backends.composed"],
    ["backends.native"],
    ["backends.cuda", "backends.triton", "backends.blocked", "backends.cpu", "backends.reference"],
    ["backends"],
    ["ops"],
    ["scale", "watching"],
    ["batch"],
    ["distributed"],
    ["opening"],
    ["primitives", "losses"],
    ["chunked_view", "two_passes"],
    ["modules", "matryoshka", "metrics", "retrieval", "two_views", "caching", "error_budget"],
    ["verification.problems", "verification.timing"],
    ["verification.checks"],
    ["verification.child", "devices"],
    ["compat"],
    [""],  # fastntxent itself
    ["commands"],
    ["__main__"],
    ["simclr"],
]


def layer_of(module: str) -> int:
    """Return the level of the layer that lists the module or, if none does, the nearest package that contains it."""
    name = module
    while True:
        for level, names in enumerate(LAYERS):
            if name in names:
                return level
        assert "." in name, f"fastntxent.{module} belongs to no layer: add it to LAYERS"
        name = name.rpartition(".")[0]


def imports_of(path: Path) -> set[str]:
    """Return the modules of this package that a file imports, without the leading fastntxent."""
    package = ["fastntxent", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {resolve(name) for name in names if name.split(".")[0] == "fastntxent"}
    return found


def resolve(name: str) -> str:
    """Return the module that contains a dotted name."""
    parts = name.split(".")[1:]
    while (
        parts
        and parts not in (["_cpu"], ["_cuda"])
        and not (ROOT.joinpath(*parts).with_suffix(".py").exists() or ROOT.joinpath(*parts).is_dir())
    ):
        parts.pop()
    return ".".join(parts)


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def test_no_module_imports_from_a_higher_layer():
    upward = [
        f"fastntxent.{module} imports fastntxent.{target}"
        for module, path in modules().items()
        for target in imports_of(path)
        if layer_of(target) > layer_of(module)
    ]
    assert not upward


def test_imports_of_finds_known_imports():
    assert "opening" in imports_of(ROOT / "primitives.py")
    assert "backends.composed" in imports_of(ROOT / "backends" / "blocked.py")
    assert "losses" in imports_of(ROOT / "__init__.py")


def test_drop_ins_import_only_torch_and_the_standard_library():
    imported = set()
    for path in (ROOT / "compat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_the_package_does_not_import_its_drop_ins():
    command = "import sys, fastntxent; print([name for name in sys.modules if name.startswith('fastntxent.compat')])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
