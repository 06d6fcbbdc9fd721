"""Articles, plurals and phrases of the instructions."""

import re

from uniref_fast.scenes.words import SeededRandom, a, described, place, plural


def test_articles_and_plurals():
    for phrase in (
        "an owl", "a unicorn face", "an hourglass", "a european castle", "a rocket", "an umbrella", "an x-ray",
        "cherries", "fork and knife", "an octopus", "cooked rice", "a bus", "a face with tears of joy", "a fish",
    ):  # fmt: skip
        assert a(re.sub("^an? ", "", phrase)) == phrase
    wanted = {
        "owl": "owls", "cactus": "cacti", "cherry blossom": "cherry blossoms", "strawberry": "strawberries",
        "monkey": "monkeys", "face with tears of joy": "faces with tears of joy", "snowman": "snowmen", "bus": "buses",
        "peach": "peaches", "mouse trap": "mouse traps", "fork and knife": None, "cherries": None, "sheep": None,
        "cooked rice": None, "game die": "game dice", "baby": "babies", "ear of maize": "ears of maize",
    }  # fmt: skip
    assert {name: plural(name) for name in wanted} == wanted


def test_phrases():
    rng = SeededRandom(0)
    assert described(rng, "owl", None) == "an owl" and described(rng, "owl", None, "large") == "a large owl"
    assert re.fullmatch("the owl (of|from) picture 2", described(rng, "owl", 2))
    assert re.fullmatch("three small owls (of|from) picture 1", described(rng, "owl", 1, "small", 3))
    phrases = {place(rng, "at the top left", movement=True) for _ in range(40)}
    assert phrases == {"to the top left", "to the top left corner"}
    assert {place(rng, "in the centre") for _ in range(40)} == {"in the centre", "in the middle"}
    assert rng.sample(range(5), 5) != rng.sample(range(5), 5) and sorted(rng.sample(range(5), 5)) == list(range(5))
