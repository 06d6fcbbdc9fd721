"""The families of models and what works for each of them, as data, as text, and as the tables of docs/families.md."""

from __future__ import annotations

import textwrap
from typing import Any

from uniref_fast.models.families import families
from uniref_fast.models.family import CAPABILITIES, Family

__all__ = ["facts", "markdown", "report"]


def facts() -> list[dict[str, Any]]:
    """Return the families as JSON data.

    "capabilities" maps what may work to None, or to the reason why it does not. "pipelines" maps a pipeline class of
    diffusers to the same for "patch", "edit" and "sft".
    """
    return [_facts(family) for family in families()]


def _facts(family: Family) -> dict[str, Any]:
    patch = family.reason_against("patch")
    pipelines = {}
    for name in family.pipelines:
        sft = family.untrained.get(name) or family.reason_against("sft")
        pipelines[name] = {"patch": patch, "edit": family.reason_against("edit"), "sft": sft}
    for name, reason in family.other_pipelines.items():
        pipelines[name] = {"patch": patch, "edit": reason, "sft": reason}
    return {
        "name": family.name,
        "models": list(family.models),
        "transformer": family.transformer,
        "installed": family.transformer_class() is not None,
        "capabilities": {name: family.reason_against(name) for name in CAPABILITIES},
        "exact_references": family.exact_references,
        "pipelines": pipelines,
    }


def report(found: list[dict[str, Any]]) -> str:
    """Return `facts` as text."""
    lines = []
    for family in found:
        if not family["installed"]:
            lines.append(
                f"{family['name']}: the installed diffusers has no {family['transformer']}; install a newer one"
            )
        lines += [family["name"], *_wrapped("models", ", ".join(family["models"]))]
        for name, reason in family["capabilities"].items():
            lines += _wrapped(name, "yes" if reason is None else f"no: {reason}")
        lines += _wrapped("exact references", family["exact_references"])
        for name, works in family["pipelines"].items():
            yes = [what for what, reason in works.items() if reason is None]
            reason = next((reason for reason in works.values() if reason is not None), None)
            lines.append(f"  {name}")
            lines += _wrapped("", f"{', '.join(yes) or 'nothing'}" + (f"; otherwise: {reason}" if reason else ""))
        lines.append("")
    return "\n".join(lines).rstrip()


def markdown(found: list[dict[str, Any]]) -> str:
    """Return `facts` as two Markdown tables: of families, and of pipeline classes."""
    names = [name for name in CAPABILITIES if name != "patch_keep_references"]
    lines = ["| family | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for family in found:
        works = family["capabilities"]
        lines.append(f"| {family['name']} | " + " | ".join("yes" if works[n] is None else "no" for n in names) + " |")
    lines += ["", "| pipeline | family | `patch` | `edit` | `sft` | reason |", "|---|---|---|---|---|---|"]
    for family in found:
        for name, works in family["pipelines"].items():
            cells = " | ".join("yes" if reason is None else "no" for reason in works.values())
            reasons = dict.fromkeys(reason for reason in works.values() if reason is not None)
            lines.append(f"| `{name}` | {family['name']} | {cells} | {'; '.join(reasons)} |")
    return "\n".join(lines)


def _wrapped(name: str, text: str) -> list[str]:
    """Return lines of a name and its text, which is broken to a width of 110 characters."""
    return textwrap.wrap(
        text, 110, initial_indent=f"  {name:<24}", subsequent_indent=" " * 26,
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
