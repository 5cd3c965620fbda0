"""The house's own rules: budgets, width, imports, words, and a README that is in step with the
code."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common import HERE

BUDGETS = {"losses": 260, "model": 360, "discriminator": 110, "sample": 240, "data": 420,
           "train": 560}
ROOMS = {  # a room -> the rooms that it may import; utils reads only the two that know nothing else
    "model": set(), "losses": set(), "utils": {"model", "losses"}, "data": {"utils"},
    "discriminator": {"model"}, "sample": {"data", "model", "losses", "utils", "scale"},
    "scale": {"data", "discriminator", "losses", "model", "sample", "utils"},
    "train": {"sample", "discriminator", "data", "model", "losses", "utils", "scale",
              "experiments"},
    "experiments": {"train", "sample", "discriminator", "data", "model", "losses", "utils",
                    "scale"},
}
FILES = [p for room in (".", "scale", "utils", "experiments")
         for p in sorted((HERE / room).glob("*.py")) if p.name != "test_all.py"]


def room_of(path):
    """The room that a file belongs to."""
    parts = path.relative_to(HERE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports_of(path, everywhere):
    """The rooms that a file imports: at its top level, or also inside functions."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & ROOMS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HERE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    assert imports_of(path, everywhere=True) - {room} <= ROOMS[room]


def test_no_room_is_in_a_circle():
    """At import time. (train asks experiments for its last table, and sample asks scale for Wan's
    VAE, inside a function.)"""
    edges = {room: set() for room in ROOMS}
    for path in FILES:
        edges[room_of(path)] |= imports_of(path, everywhere=False) - {room_of(path)}
    while edges:
        free = [room for room, to in edges.items() if not to & edges.keys()]
        assert free, f"a circle among {sorted(edges)}"
        for room in free:
            del edges[room]


def test_the_method_fits_its_budget():
    lines = {name: len((HERE / f"{name}.py").read_text().splitlines()) for name in BUDGETS}
    assert all(lines[name] <= most for name, most in BUDGETS.items()), lines
    assert sum(lines.values()) <= 1860, lines
    assert len((HERE / "test_all.py").read_text().splitlines()) <= 700


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HERE)))
def test_no_function_is_longer_than_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "loop":
            assert node.end_lineno - node.lineno < 50, node.name


def test_top_level_has_the_eight_names():
    tracked = {p.name for p in HERE.glob("*.py")}
    assert tracked == {"model.py", "discriminator.py", "losses.py", "train.py", "sample.py",
                       "data.py", "test_all.py"}


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_readme_is_short_and_shows_the_real_code():
    text = (HERE / "README.md").read_text()
    assert len(text.split()) <= 2200
    sources = "\n".join(path.read_text() for path in FILES)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 4
    for block in blocks:
        for piece in block.strip("\n").split("\n    ...\n"):
            assert piece in sources, piece


def test_every_name_in_readme_and_docs_exists():
    """`file.name` of the method's files, pictures and links."""
    for page in (HERE / "README.md", *(HERE / "docs").glob("*.md")):
        if page.stem == "results-straight-world":
            continue
        text = page.read_text()
        for link in re.findall(r"\]\(((?:assets|docs)?[^)#:\s]+\.(?:png|gif|md))\)", text):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"
        modules = "losses|train|sample|model|discriminator|data"
        for module, name in re.findall(rf"`({modules})\.([A-Za-z_]+)", text):
            source = (HERE / f"{module}.py").read_text()
            known = rf"^(?:def|class) {name}\b|^{name} = |import .*\b{name}\b"
            assert name == "py" or re.search(known, source, re.M), f"{page.name}: {module}.{name}"


def test_the_repository_is_about_the_project():
    """No absolute paths of a machine in any tracked text."""
    for path in [*FILES, HERE / "README.md", *(HERE / "docs").glob("*.md")]:
        assert not re.search(r"/(?:work|tmp|home|root)/\w", Path(path).read_text()), path
