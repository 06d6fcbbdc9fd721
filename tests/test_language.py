"""Check the wording of docstrings, comments, messages and documents, as far as regular expressions can see it.

- A docstring begins with a verb or a noun phrase, not with a word such as "What", "Of" or "By".
- An entry of `Args`, `Attributes`, `Returns`, `Raises` or `Yields` is a complete description: it begins with a capital
  letter or a literal, not with a preposition, and ends with a full stop. Help texts of flags follow the same rule for
  their first word.
- Phrases that readers did not understand (`UNCLEAR`) are not used.

    python tests/test_language.py FILE ...    # print the violations in some files
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PREPOSITIONS = (
    "about above across after against along among around as at before below beside between by during for from in into "
    "like of off on onto out over per since through to toward under until up upon via with within without"
)
FRAGMENT = re.compile(rf"(?:{PREPOSITIONS} what that where which who whose".replace(" ", "|") + r")\b(?!-)", re.I)
OPENING = re.compile(r"(?:whether|how|also|not|else|it|its|there|and|or|but|so|than)\b(?!-)", re.I)  # of a docstring
SECTION = re.compile(r"^( *)(Args|Attributes|Returns|Raises|Yields):(?: [\w, ]+)?\n((?:\1 +.*\n|\s*\n)+)", re.M)
UNCLEAR = re.compile(
    r"(?<![\"'])\b(?:told|whoever|anew|as ever|at hand|from nothing|gone on|go(?:es)? on|went on|looked at|made[- ]up|"
    r"came to|what (?:there is|is there)|unlike (?:sizes|samples|requests)|"
    r"(?<!all )(?<!half )(?<!most )(?<!part )of it)\b(?![\"'])"
)


def prose(line: int, text: str) -> list[tuple[int, str]]:
    """Return the violations of one docstring: its first word, then the entries of its sections."""
    found = []
    if FRAGMENT.match(text) or OPENING.match(text):
        found.append((line, f"a docstring begins with a verb or a noun phrase: {text.splitlines()[0][:60]!r}"))
    for _, title, body in SECTION.findall(text + "\n"):
        inner = min(len(row) - len(row.lstrip()) for row in body.splitlines() if row.strip())
        starts = rf"^ {{{inner}}}(?=\S)" if title in ("Args", "Attributes", "Raises") else r"\A"
        for entry in filter(str.strip, re.split(starts, body, flags=re.M)):
            name, _, description = entry.partition(":") if title not in ("Returns", "Yields") else ("", "", entry)
            description, where = description.strip(), line + text[: text.find(entry.strip())].count("\n")
            if FRAGMENT.match(description) or description[:1].islower() or not description.endswith((".", "```")):
                found.append((where, f"{title}: {name.strip()}: {description[:60]!r} is not a complete description"))
    return found


def violations(path: Path) -> list[tuple[int, str]]:
    """Return line number and text of everything in a file that breaks a rule."""
    text, found = path.read_text(), []
    if path.suffix == ".md":  # without blocks of code
        text = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    for number, row in enumerate(text.splitlines(), 1):
        words = row if path.suffix == ".md" else re.sub(r"\b\w+ ?=(?!=)", "", row)  # names of arguments are no prose
        found += [(number, f"unclear: {match[0]!r}") for match in UNCLEAR.finditer(words) if " " in words.strip()]
    if path.suffix != ".py":
        return found
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
            found += prose(node.body[0].lineno, doc)
        if isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            text = str(node.value.value)
            found += [(node.value.lineno, f"help begins with a preposition: {text!r}")] * bool(FRAGMENT.match(text))
    return sorted(found)


def documents() -> list[Path]:
    """Return all files that the rules are for."""
    folders = ["uniref_fast", "training", "kernels", "csrc", "bench", "examples", "docs", "tests"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if "assets" not in path.parts]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "setup.py"]
    return sorted(path for path in files if path.suffix in (".py", ".md", ".cpp", ".h") and path != Path(__file__))


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_wording(path):
    found = [f"{path.relative_to(ROOT)}:{line}: {text}" for line, text in violations(path)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*(f"{name}:{line}: {text}\n" for line, text in violations(Path(name))), sep="", end="")
