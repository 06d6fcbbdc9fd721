"""Reward functions by name: the reward for synthetic scenes, and functions of the user."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from uniref_fast.rewards.scene import scene_reward
from uniref_fast.rewards.types import Candidate, Failure, Scores

__all__ = ["UnscoredError", "reward_function"]


Reward = Callable[[Candidate], "Scores | Failure"]


class UnscoredError(Exception):
    """A candidate that a reward of your own cannot score."""


def reward_function(name: str) -> Reward:
    """The reward of that name: "scene", or a function of your own as "package.module:function".

    Raises:
        ValueError: for one that is not there.
    """
    if name == "scene":
        return scene_reward
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f'unknown reward {name!r}; possible: scene, judge, or "package.module:function"')
    if os.getcwd() not in sys.path:  # torchrun puts the folder of its script there alone
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"reward {name!r} is not a function but {function!r:.80}")
    return lambda candidate: _own(function, name, candidate)


def _own(function: Callable[[Candidate], Any], name: str, candidate: Candidate) -> Scores | Failure:
    try:
        axes = function(candidate)
    except UnscoredError as error:
        return Failure("refused", str(error))
    if not isinstance(axes, Mapping) or not axes or not all(_is_score(value) for value in axes.values()):
        raise ValueError(f"reward {name!r} must return axis -> score from 0 to 10, got {axes!r}")
    return Scores({str(axis): float(value) for axis, value in axes.items()})


def _is_score(value: Any) -> bool:
    if isinstance(value, (str, bytes)):  # float() takes them
        return False
    try:
        return 0 <= float(value) <= 10
    except (TypeError, ValueError):
        return False
