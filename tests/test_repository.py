"""The repository as a reader and a newcomer find it."""
import ast
import re
from pathlib import Path

import pytest

import prepare
import train
from nanomaml import config

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("*.py")}
PLUMBING = {f"nanomaml.{path.stem}": ast.parse(path.read_text(encoding="utf-8"))
            for path in ROOT.glob("nanomaml/*.py") if path.stem != "__init__"}
MODULES = COMMANDS | PLUMBING
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("recipes/*.md")),
             *sorted(ROOT.glob("results/*.md"))]


def imports(tree):
    """Names of this repository's modules that a module imports, at its top level or later."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


def test_imports_form_no_circle():
    left = {name: imports(tree) for name, tree in MODULES.items()}
    while left:
        free = [name for name, needed in left.items() if not needed & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_what_it_knows(name):
    """A docstring, with a command or a call at the top level; a script hands its main to config.run."""
    tree = MODULES[name]
    doc = ast.get_docstring(tree, clean=False)
    last = tree.body[-1]
    if name in PLUMBING:
        known = {module for module in imports(tree) if module in COMMANDS}
        assert all(f"{module}.py" in doc for module in known), f"{name} imports {known}"
        return
    assert re.search(r"^    \S", doc, re.M), "a command or a call"
    if isinstance(last, ast.If):
        assert ast.unparse(last) == "if __name__ == '__main__':\n    config.run(main)"
        assert f"python {name}.py" in doc


def test_the_house_keeps_its_size():
    """A newcomer met 7,540 lines, and a loop of 164 with 66 local names."""
    length = {path: len(path.read_text(encoding="utf-8").splitlines())
              for path in [*ROOT.glob("*.py"), *ROOT.glob("nanomaml/*.py"), *ROOT.glob("configs/*.py")]}
    reading = [ROOT / f"{name}.py" for name in ("train", "meta", "data", "model", "schedule")]
    assert len(COMMANDS) <= 14 and sum(length[path] for path in reading) <= 1600
    assert length[ROOT / "train.py"] <= 480 and sum(length.values()) <= 7160
    loop = next(node for node in MODULES["train"].body if getattr(node, "name", "") == "train")
    assert loop.end_lineno - loop.lineno < 100 and train.train.__code__.co_nlocals <= 45


def test_the_readme_is_short_and_names_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    for name in COMMANDS:
        assert f"`{name}.py`" in text, name
    assert "`nanomaml/`" in text
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
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = path.parent / link if link else path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M) if anchor else []
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in slugs, f"{link}#{anchor}"
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
