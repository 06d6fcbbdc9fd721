"""Columns with names of the user's own: pairs such as "references=refs" that give a column its role."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from uniref_fast.data.formats import FORMATS, Format, likely_roles, matches, recognise_format

__all__ = ["ROLES", "Columns"]

ROLES = ("instruction", "references", "target", "mask", "task_type", "key", "language", "ignore")
SEVERAL = ("references", "ignore")  # may be given for more than one column


@dataclass(frozen=True)
class Columns:
    """Roles that a user gave to columns.

    Attributes:
        roles: Pairs (role, column); several references are read in this order.
    """

    roles: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, pairs: Iterable[str]) -> Columns:
        """Parse "role=column" texts.

        Raises:
            ValueError: A text is not such a pair, a role is unknown, or a role or a column is given twice.
        """
        roles: list[tuple[str, str]] = []
        for pair in pairs:
            role, sign, column = pair.partition("=")
            if not sign or not column:
                raise ValueError(f"columns are pairs such as references=refs, got {pair!r}; roles: {', '.join(ROLES)}")
            if role not in ROLES:
                near = get_close_matches(role, ROLES, n=1)
                hint = f"; did you mean {near[0]}={column}?" if near else ""
                raise ValueError(f"columns: {role!r} in {pair!r} is not a role; roles: {', '.join(ROLES)}{hint}")
            if role not in SEVERAL and any(role == other for other, _ in roles):
                raise ValueError(
                    f"columns: {role} is given twice; only {' and '.join(SEVERAL)} may have several columns"
                )
            before = [other for other, name in roles if name == column]
            last = sorted((*before, role)) == ["references", "target"]  # one list, whose last image is the target
            if before and not last:
                raise ValueError(f"columns: {column!r} is given two roles, {before[0]} and {role}")
            roles.append((role, column))
        return cls(tuple(roles))

    def __bool__(self) -> bool:
        return bool(self.roles)

    def __str__(self) -> str:
        return ",".join(f"{role}={column}" for role, column in self.roles)

    def format(self, keys: Collection[str]) -> Format:
        """Return the format of rows with these keys: a known format with the given columns in place of its own keys.

        Raises:
            ValueError: No format matches the keys, or, if no column applies, more than one.
        """
        if not any(column in keys for _, column in self.roles):  # a file that the columns are not meant for
            try:
                return recognise_format(keys)
            except ValueError:
                likely = [",".join(pairs) for pairs in likely_roles(keys) if _fit(pairs, keys)]
                if not likely:
                    raise
            raise ValueError(
                f"these keys match no known format: {sorted(keys)}; give their roles, most probably these: --columns "
                f"{' or --columns '.join(likely)} (or rename the keys to instruction, input_images and output_image)"
            )
        possible = [applied for form in FORMATS if (applied := self._applied(form)) is not None]
        for form in possible:
            if matches(form, keys):
                return form
        first = possible[0]  # images under keys of other formats are refused row by row
        if first.text not in keys:
            raise ValueError(
                f"no column {first.text!r} for the instruction; columns found: {sorted(keys)}; name it with "
                "columns such as instruction=prompt (--columns)"
            )
        return first

    def _applied(self, form: Format) -> Format | None:
        """Return a format with the columns in place of its own keys; None if they do not fit together."""
        named = {role: [column for other, column in self.roles if other == role] for role in ROLES}
        references, target = named["references"], named["target"]
        if (form.target == form.references) != (bool(target) and references == target):
            return None
        taken = {form.text: named["instruction"], form.references.removesuffix("#"): references, form.target: target}
        first = {key: columns[0] for key, columns in taken.items() if columns and key is not None}
        replaced = {key for key, column in first.items() if key != column}
        applied = replace(
            form,
            text=first.get(form.text, form.text),
            references=first.get(form.references.removesuffix("#"), form.references),
            more=tuple(references[1:]),
            target=target[0] if target else form.target,
            required=tuple(first.get(key, key) for key in form.required),
            preferred_text=None if form.text in replaced else form.preferred_text,
            task=next(iter(named["task_type"]), form.task),
            language=next(iter(named["language"]), form.language),
            key=next(iter(named["key"]), None),
            mask=next(iter(named["mask"]), form.mask),
            unread=(*form.unread, *named["ignore"]),
            ambiguous=False,
        )
        keys = [applied.text, applied.references.removesuffix("#"), *applied.more, applied.target]
        distinct = len(set(keys)) == len(keys) - (form.target == form.references)
        return applied if distinct else None


def _fit(pairs: Iterable[str], keys: Collection[str]) -> bool:
    """Return True if rows with these keys can be read with the pairs."""
    columns = Columns.of(pairs)
    try:
        form = columns.format(keys)
    except ValueError:
        return False
    return matches(form, keys)
