"""Do the pages for newcomers name files, functions and public names that exist?"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("extract", "features", "finetune", "probe")
ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
FILE = re.compile(r"`((?:extract|features|finetune|probe)/[\w/]+\.py)`")


def section(title: str) -> str:
    return ARCHITECTURE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_table_of_questions_has_every_file_once():
    listed = re.findall(r"^\| `([^`]+)` \|", section("Which file answers which question"), re.MULTILINE)
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    names = {str(path.relative_to(REPOSITORY)) for path in files if path.name not in ("__init__.py", "cli.py")}
    assert sorted(listed) == sorted(names)


ANSWERS = [line for line in section("Questions a newcomer asks").splitlines() if FILE.search(line)]


@pytest.mark.parametrize("line", ANSWERS, ids=lambda line: line.split("|")[1].strip())
def test_an_answer_names_functions_that_its_files_have(line):
    sources = [(REPOSITORY / name).read_text(encoding="utf-8") for name in FILE.findall(line)]
    names = re.findall(r"`(\w+(?:\.\w+)?)`", line)
    for name in names:
        for part in name.split("."):
            assert any(re.search(rf"(?:def|class) {part}\b", source) for source in sources), name


def test_how_to_add_something_names_what_exists():
    text = section("How do I add ...")
    sources = "\n".join(
        path.read_text(encoding="utf-8") for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")
    )
    assert all((REPOSITORY / name).is_file() for name in FILE.findall(text))
    names = re.findall(r"`([A-Za-z_.]+)(?:\(\.\.\.\))?`", text)
    assert len(names) > 20
    for part in {part for name in names if not name.endswith((".py", ".json")) for part in name.split(".")}:
        assert re.search(rf"\b{part}\b", sources), part


@pytest.mark.parametrize("page", ["README.md"])
def test_imports_shown_are_of_public_names(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    imports = re.findall(r"^from (\w+) import (.+)$", blocks, re.MULTILINE)
    shown = [(package, name) for package, names in imports if package in PACKAGES for name in names.split(", ")]
    assert len({package for package, _ in shown}) == 4
    for package, name in shown:
        assert name in importlib.import_module(package).__all__
