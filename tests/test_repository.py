"""The repository as a reader and a newcomer find it."""

import ast
import re
from pathlib import Path

import pytest

import config
import prepare
import train

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")}
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("recipes/*.md")),
             ROOT / "results" / "README.md"]


def imports(tree):
    """Names of this repository's modules that a module imports at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & MODULES.keys()


def test_imports_form_no_circle():
    left = {name: imports(tree) for name, tree in MODULES.items()}
    while left:
        free = [name for name, needed in left.items() if not needed & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_how_to_run_or_call_it(name):
    """A docstring with an indented example; a script hands its main to config.run, and does nothing else."""
    doc = ast.get_docstring(MODULES[name], clean=False)
    assert doc and re.search(r"^    \S", doc, re.M), "what it is, and a command or a call"
    last = MODULES[name].body[-1]
    if isinstance(last, ast.If):
        assert ast.unparse(last) == "if __name__ == '__main__':\n    config.run(main)"
        assert f"python {name}.py" in doc


def test_the_readme_is_short_and_names_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    for name in MODULES:
        assert f"`{name}.py`" in text, name
    for lines, name in re.findall(r"(\d+) lines\]\(recipes/([\w-]+)\.patch\)", text):
        patch = (ROOT / "recipes" / f"{name}.patch").read_text()
        assert int(lines) == len(re.findall(r"^\+(?!\+\+)", patch, re.M)), name
    code = (ROOT / "meta.py").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        assert all(line.strip() in code for line in block.splitlines()), "as in meta.py"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(path):
    """Links, scripts, config files, and the flags of train.py and prepare.py."""
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(((?!https?:)[^)#]+)", text):
        assert (path.parent / link).exists(), link
    for script in re.findall(r"(?:python|nproc_per_node=\S+) ([\w/]+\.py)", text):
        assert (ROOT / script).exists() or path.parent.name == "recipes", script
    for name in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / name).exists(), name
    fields = {"train": train.Config, "prepare": prepare.Config}
    for script, rest in re.findall(r"\b(train|prepare)\.py((?:[^\n`]|\\\n)*)", text):
        for key in re.findall(r"--(\w+)", rest.split(" # ")[0]):
            assert key in fields[script].__dataclass_fields__ or key in ("help", "nproc_per_node"), key


def test_comments_of_fields_fit_the_help():
    for cls in (train.Config, prepare.Config):
        assert config.comments(cls).keys() == cls.__dataclass_fields__.keys()
