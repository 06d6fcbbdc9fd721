"""Which column of a data set holds what, where its names are not those of a known format: "references=refs"."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from uniref_fast.data.formats import FORMATS, Format, explains, recognise

__all__ = ["ROLES", "Columns"]

ROLES = ("instruction", "references", "target", "task_type", "key", "language", "ignore")
SEVERAL = ("references", "ignore")  # may be given for more than one column


@dataclass(frozen=True)
class Columns:
    """The roles that a user gave to columns.

    Attributes:
        own: pairs (role, column); several references are read in this order.
    """

    own: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, pairs: Iterable[str]) -> Columns:
        """Parse "role=column" texts.

        Raises:
            ValueError: for a text that is not such a pair, an unknown role, or a role or column given twice.
        """
        own: list[tuple[str, str]] = []
        for pair in pairs:
            role, sign, column = pair.partition("=")
            if not sign or not column:
                raise ValueError(f"columns are pairs such as references=refs, got {pair!r}; roles: {', '.join(ROLES)}")
            if role not in ROLES:
                near = get_close_matches(role, ROLES, n=1)
                hint = f"; did you mean {near[0]}={column}?" if near else ""
                raise ValueError(f"columns: {role!r} in {pair!r} is no role; roles: {', '.join(ROLES)}{hint}")
            if role not in SEVERAL and any(role == other for other, _ in own):
                raise ValueError(
                    f"columns: {role} is given twice; only {' and '.join(SEVERAL)} may have several columns"
                )
            before = [other for other, name in own if name == column]
            last = sorted((*before, role)) == ["references", "target"]  # one list, whose last picture is the target
            if before and not last:
                raise ValueError(f"columns: {column!r} is given two roles, {before[0]} and {role}")
            own.append((role, column))
        return cls(tuple(own))

    def __bool__(self) -> bool:
        return bool(self.own)

    def __str__(self) -> str:
        return ",".join(f"{role}={column}" for role, column in self.own)

    def format(self, keys: Collection[str]) -> Format:
        """The format of rows with these keys: a known one in which the columns stand for the keys of their roles.

        Raises:
            ValueError: when no format explains the keys, or, without columns, more than one.
        """
        if not any(column in keys for _, column in self.own):  # a file of another kind beside those that need it
            return recognise(keys)
        possible = [mine for form in FORMATS if (mine := self._applied(form)) is not None]
        for mine in possible:
            if explains(mine, keys):
                return mine
        mine = possible[0]  # pictures under keys of other formats are refused row by row, by name
        if mine.text not in keys:
            raise ValueError(
                f"no column {mine.text!r} holds the instruction; columns found: {sorted(keys)}; say which does with "
                "columns such as instruction=prompt (--columns)"
            )
        return mine

    def _applied(self, form: Format) -> Format | None:
        """A format with the columns in place of its own keys; None where they do not go together."""
        named = {role: [column for other, column in self.own if other == role] for role in ROLES}
        references, target = named["references"], named["target"]
        if (form.target == form.references) != (bool(target) and references == target):
            return None
        taken = {form.text: named["instruction"], form.references.removesuffix("#"): references, form.target: target}
        first = {key: columns[0] for key, columns in taken.items() if columns and key is not None}
        replaced = {key for key, column in first.items() if key != column}
        mine = replace(
            form,
            text=first.get(form.text, form.text),
            references=first.get(form.references.removesuffix("#"), form.references),
            more=tuple(references[1:]),
            target=target[0] if target else form.target,
            needs=tuple(first.get(key, key) for key in form.needs),
            finer=None if form.text in replaced else form.finer,
            task=next(iter(named["task_type"]), form.task),
            language=next(iter(named["language"]), form.language),
            key=next(iter(named["key"]), None),
            unread=(*form.unread, *named["ignore"]),
            common=False,
        )
        roles = [mine.text, mine.references.removesuffix("#"), *mine.more, mine.target]
        apart = len(set(roles)) == len(roles) - (form.target == form.references)
        return mine if apart else None
