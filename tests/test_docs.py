"""Check that every link, path, flag, API name and error message in the documents exists."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/GPU_TODO.md", "training/README.md")]
PAGES = [page for page in PAGES if page.exists()] + sorted((ROOT / "docs").glob("*.md"))
ELSEWHERE = {"--benchmark-only", "--nproc-per-node", "--no-build-isolation", "--no-deps"}  # flags of other programs
FOLDERS = "training|uniref_fast|kernels|csrc|bench|tests|docs|examples"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def source() -> str:
    """Return the text of all code and of the build files."""
    files = [path for name in ("training", "uniref_fast", "bench") for path in (ROOT / name).rglob("*.py")]
    return "\n".join(path.read_text() for path in [*files, ROOT / "Makefile", ROOT / "setup.py"])


@functools.cache
def messages() -> str:
    """Return all strings of the code, each on a line, with `...` in place of what is formatted into them."""
    found = []
    for folder in ("uniref_fast", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "..."
                                         for part in node.values))  # fmt: skip
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


@each_page
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        target = "".join(link).partition("#")[0]
        assert not target or target.startswith("http") or (page.parent / target).exists(), target


@each_page
def test_paths_exist(page):
    for path in re.findall(rf"(?<![\w/.])((?:{FOLDERS})/[\w/.-]*\w)", page.read_text()):
        assert (ROOT / path).exists() or "native" in path, path


@each_page
def test_flags_exist(page):
    for flag in set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9.-]*[a-z0-9])", page.read_text())) - ELSEWHERE:
        name = flag.rpartition(".")[2].lstrip("-")
        field = rf"\b{name.replace('-', '_').removeprefix('judge_')}: "
        assert f'"{flag}"' in source() or re.search(field, source()), flag


def test_targets_of_make_exist():
    text, makefile = "\n".join(page.read_text() for page in PAGES), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_api_reference_names_existing_objects():
    for name in re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), flags=re.M):
        module, _, attribute = name.rpartition(".")
        module = module if module.startswith("uniref_fast") else f"uniref_fast.{module}"
        owner = importlib.import_module(module)
        assert hasattr(owner, attribute) or importlib.import_module(f"{module}.{attribute}"), name


def test_troubleshooting_quotes_messages_of_the_code():
    cells = re.findall(r"^\| (.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.M)
    missing = []
    for message in (text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if " " in text):
        pattern = ".*".join(re.escape(part) for part in re.split(r"\s*\.\.\.\s*", message))
        missing += [message] * (re.search(pattern, messages()) is None)
    assert not missing


def test_the_tour_of_training_lists_every_file():
    text = (ROOT / "training/README.md").read_text()
    for folder in ("core", "batches", "supervised", "rl", "builtin"):
        (section,) = re.findall(rf"^`{folder}/`: .*?(?=^`\w+/`: |\Z)", text, flags=re.M | re.S)
        listed = re.findall(r"`(\w+\.py)`(?=[^|]*\|.*\|)", section)
        assert sorted(listed) == sorted(path.name for path in (ROOT / "training" / folder).glob("*.py")), folder


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert all(len(table.splitlines()) - 2 <= 8 for table in re.findall(r"(?:^\|.*\n)+", "\n".join(lines), flags=re.M))
