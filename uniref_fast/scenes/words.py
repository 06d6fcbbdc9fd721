"""Words of the instructions: articles, plurals, places and noun phrases; and the random choices of a sample.

Every function depends only on its arguments, such as a `SeededRandom`: a sample's seed determines its instruction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

__all__ = ["NUMBERS", "PLACES", "SeededRandom", "a", "described", "listed", "place", "plural"]

T = TypeVar("T")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Centres of the places, as fractions of width and height.
PLACES: dict[str, tuple[float, float]] = {
    "at the top left": (0.22, 0.22),
    "at the top": (0.5, 0.22),
    "at the top right": (0.78, 0.22),
    "on the left": (0.22, 0.5),
    "in the centre": (0.5, 0.5),
    "on the right": (0.78, 0.5),
    "at the bottom left": (0.22, 0.78),
    "at the bottom": (0.5, 0.78),
    "at the bottom right": (0.78, 0.78),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet", "tooth": "teeth",
    "goose": "geese", "mouse": "mice", "ox": "oxen", "wolf": "wolves", "leaf": "leaves", "knife": "knives",
    "scarf": "scarves", "elf": "elves", "cactus": "cacti", "die": "dice",
    "snowman": "snowmen", "guardsman": "guardsmen",
}  # fmt: skip
# The first of these words ends the part of a name that takes the plural: "face with tears of joy".
JOINTS = re.compile(r" (?:with|without|of|in|on|for|from|at|behind|over|the|savouring|throwing|screaming|holding) ")
# Words that take neither an article nor a plural: food, materials, signs of the zodiac, names of places and of events.
UNCOUNTED = _words(
    """bread butter bacon sushi spaghetti broccoli garlic popcorn rice food meat milk salad honey wood coral fog foggy
    fire hair luggage money oden cooking camping bowling soap paper customs fuji compression aries taurus cancer leo
    virgo libra scorpius sagittarius capricorn aquarius pisces ophiuchus wireless falafel jeans horse-racing juggling
    hugging breast-feeding handball polo americas asia-australia europe-africa curry"""
)
# Words that take an article, but have no plural that differs or reads well.
SAME_IN_PLURAL = _words(
    """fish sheep deer shrimp squid bison moose maracas rhinoceros fleur-de-lis christmas off deeply cartwheel frowning
    place dancing climbing racing ice drink dash control viewer laughing fluttering arriving departure"""
)


class SeededRandom:
    """Random choices of one sample; equal seeds give equal choices."""

    def __init__(self, *seeds: int) -> None:
        self.generator = np.random.default_rng(seeds)

    def integer(self, low: int, high: int) -> int:
        """Return a uniform integer from low to high, both included."""
        return int(self.generator.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return bool(self.generator.random() < probability)

    def uniform(self, low: float, high: float) -> float:
        """Return a uniform number from low to high."""
        return low + (high - low) * float(self.generator.random())

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[int(self.generator.integers(len(options)))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Return `count` different options, in random order."""
        rest = list(options)
        return [rest.pop(int(self.generator.integers(len(rest)))) for _ in range(count)]


def a(phrase: str) -> str:
    """Return the phrase with its indefinite article; a plural or an uncounted noun takes none."""
    head = JOINTS.split(phrase)[0]
    if _is_plural(head) or head.split()[-1] in UNCOUNTED:
        return phrase
    first = phrase.split()[0]
    # pronounced with a consonant: european, unicorn, one; with a vowel: x-ray, hourglass
    consonant = re.match(r"(?:eu|uni|ut|one|u[sr]e)", first)
    vowel = re.match(r"(?:[aeiou]|hour|honest|x-)", first)
    return f"an {phrase}" if vowel and not consonant else f"a {phrase}"


def _is_plural(head: str) -> bool:
    last = head.split()[-1]
    singular = last.endswith(("ss", "us", "is", "as", "ros"))
    return " and " in head or (last.endswith("s") and not singular) or last in IRREGULAR.values()


def plural(name: str) -> str | None:
    """Return the plural of an object's name, or None if a number before it would read wrong ("two cooked rices")."""
    joint = JOINTS.search(name)
    head, tail = (name[: joint.start()], name[joint.start() :]) if joint else (name, "")
    *before, last = head.split()
    if _is_plural(head) or last in UNCOUNTED | SAME_IN_PLURAL or not re.fullmatch(r"[a-z][a-z-]*", last):
        return None
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif re.search(r"(?:s|x|z|ch|sh)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    elif last in ("potato", "tomato", "mango", "volcano", "mosquito"):
        last += "es"
    else:
        last += "s"
    return " ".join([*before, last]) + tail


def described(rng: SeededRandom, name: str, picture: int | None, size: str = "", count: int = 1) -> str:
    """Return a noun phrase: "the owl of picture 1", "two small owls from picture 1", or "a large owl"."""
    noun = name if count == 1 else str(plural(name))
    phrase = f"{size} {noun}".strip()
    if count > 1:
        phrase = f"{NUMBERS[count]} {phrase}"
    elif picture is None or size:
        phrase = a(phrase)
    else:
        phrase = f"the {phrase}"
    return phrase if picture is None else f"{phrase} {rng.choice(('of', 'from'))} picture {picture}"


def place(rng: SeededRandom, key: str, movement: bool = False) -> str:
    """Return one of the phrases for a place, or, with `movement`, for a movement to it ("to the top left")."""
    side = key.split(" the ")[1]
    corner = " " in side
    if movement:
        return f"to the {side} corner" if corner and rng.chance(0.5) else f"to the {side}"
    if corner and rng.chance(0.4):
        return f"in the {side} corner"
    if side == "centre" and rng.chance(0.4):
        return "in the middle"
    return key


def listed(parts: Sequence[str]) -> str:
    """Return "x", "x and y" or "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
