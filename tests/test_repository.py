"""The repository agrees with itself: one list of dependencies, targets that exist, nothing that should not be in git."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distribution -> module, where the names differ.
MODULES = {
    "pyyaml": "yaml", "scikit-learn": "sklearn", "pillow": "PIL", "jupyter-book": "jupyter_book", "ipython": "IPython",
    "sphinx-book-theme": "sphinx_book_theme", "sphinx-exercise": "sphinx_exercise", "sphinx-proof": "sphinx_proof",
    "pytest-xdist": "xdist", "pydata-sphinx-theme": "pydata_sphinx_theme", "sphinx-mathjax-offline": "sphinx_mathjax_offline",
    "bayesian-optimization": "bayes_opt",
}  # fmt: skip


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks; those of the folder where it is no checkout."""
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "--", *patterns], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / line for line in found.stdout.splitlines() if (ROOT / line).is_file()]


def requirement_names(lines: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0].lower() for line in lines}


def test_environment_yml_is_the_book_extra_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    pip = next(d for d in environment["dependencies"] if isinstance(d, dict))["pip"]
    assert pip == ["-e .[book,rl]"]
    assert "book" in PROJECT["optional-dependencies"]
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    assert python.removeprefix("python=") == re.search(r"3\.\d+", PROJECT["requires-python"]).group()


def test_every_requirement_has_a_range_and_a_locked_version_inside_it():
    from packaging.requirements import Requirement

    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    locked = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    for line in [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]:
        requirement = Requirement(line)
        assert requirement.specifier, f"{line} has no range"
        assert locked[requirement.name.lower()] in requirement.specifier, line


def test_every_requirement_is_used_and_every_import_is_required():
    text = "\n".join(
        p.read_text()
        for p in tracked("lib", "tests", "chapters", "book", "Makefile", "_config.yml", ".ci", "pyproject.toml")
        if p.suffix in {".py", ".md", ".yml", ".toml", ""}
    )
    required = requirement_names([*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)])
    body = re.sub(r"^\s*\"[a-zA-Z0-9_-]+[<>=].*$", "", text, flags=re.M)  # the requirement lines themselves are no use
    for name in required:
        module = MODULES.get(name, name.replace("-", "_"))
        assert re.search(rf"\b({re.escape(module)}|{re.escape(name)})\b", body), f"{name} is required but not used"
    modules = {MODULES.get(n, n.replace("-", "_")) for n in required}
    for path in tracked("lib"):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for name in names:
                top = name.split(".")[0]
                assert top in modules | set(sys.stdlib_module_names) | {
                    "dlatlas",
                    "IPython",
                    "traitlets",
                    "nbclient",
                    "docutils",
                    "sphinx",
                }, f"{path.relative_to(ROOT)} imports {top}"


def test_import_arrows_point_one_way():
    """Parts import the shared modules, never the other way round, and nothing imports the machinery of the book."""
    parts = {row["part"] for row in yaml.safe_load((ROOT / "lib/dlatlas/catalog.yml").read_text().split("papers:")[0])["parts"]}
    for path in tracked("lib/dlatlas"):
        if path.suffix != ".py":
            continue
        owner = path.relative_to(ROOT / "lib/dlatlas").parts[0]
        imported = set(re.findall(r"^\s*(?:from|import) dlatlas\.(\w+)", path.read_text(), re.M))
        if owner not in parts | {"book", "__main__.py"}:
            assert not imported & (parts | {"book"}), f"{path.relative_to(ROOT)} imports {imported & (parts | {'book'})}"
        if owner in parts:
            assert "book" not in imported, path


def test_no_cycle_between_method_modules():
    graph = {}
    for path in tracked("lib/dlatlas"):
        if path.suffix == ".py":
            name = ".".join(path.relative_to(ROOT / "lib").with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text()
            graph[name] = set(re.findall(r"^(?:from|import) (dlatlas[\w.]*)", text, re.M))
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_git_holds_sources_only():
    for path in tracked():
        assert path.suffix != ".ipynb", path
        assert path.stat().st_size <= 1_000_000, path


def test_every_make_target_that_the_texts_name_exists_and_help_is_one_line_each():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    helped = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[1] for line in helped} == set(re.findall(r"^([a-z]+):.*##", makefile, re.M))
    for name in ("book", "test", "lab", "chapter", "serve", "seeds", "full", "bench", "lint", "clean"):
        assert name in {line.split()[1] for line in helped}
    for path in tracked("*.md", ".ci/run", ".github"):
        for name in re.findall(r"(?:`|run: )make ([a-z]+)", path.read_text()):
            assert name in targets, f"{path.relative_to(ROOT)} names make {name}"


@pytest.mark.parametrize("path", [p for p in tracked("lib") if p.suffix == ".py"], ids=lambda p: str(p.relative_to(ROOT / "lib")))
def test_public_objects_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or node.name in {"setup"}, f"{path.name}: {node.name} has no docstring"
