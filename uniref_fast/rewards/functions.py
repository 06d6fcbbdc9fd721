"""Reward functions by name: the reward for synthetic scenes, and functions of your own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from uniref_fast.rewards.scene import scene_reward
from uniref_fast.rewards.types import Candidate, Failure, Scores, UnscoredError

__all__ = ["Reward", "reward_function"]

Reward = Callable[[Candidate], "Scores | Failure"]
EXAMPLE = '{"quality": 7.5}'


def reward_function(name: str) -> Reward:
    """Return a reward by its name.

    Args:
        name: "scene", or "package.module:function" for a function of your own, which takes a `Candidate` and returns
            its scores by axis.

    Raises:
        ValueError: If there is no such reward, or it does not take one argument.
    """
    if name == "scene":
        return scene_reward
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f'unknown reward {name!r}; possible: scene, judge, or "package.module:function"')
    if os.getcwd() not in sys.path:  # torchrun puts only the folder of its script there
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    except Exception as error:  # the code of the module
        raise ValueError(f"the module of reward {name!r} {_raised(error)}") from error
    if not callable(function):
        raise ValueError(f"reward {name!r} is not a function but {function!r:.80}")
    _check_signature(function, name)
    return lambda candidate: _own(function, name, candidate)


def _check_signature(function: Callable[..., Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions of C have none
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"reward {name!r} cannot be called with a candidate ({error}); a reward is a function with one argument, a "
            f"uniref_fast.rewards.Candidate, that returns scores from 0 to 10 by axis, such as {EXAMPLE}"
        ) from error


def _own(function: Callable[[Candidate], Any], name: str, candidate: Candidate) -> Scores | Failure:
    try:
        axes = function(candidate)
    except UnscoredError as error:
        return Failure("refused", str(error))
    except (Exception, SystemExit) as error:
        file = getattr(inspect.getmodule(function), "__file__", None)
        raise ValueError(
            f"reward {name!r} {_raised(error, file)}; correct the function, or let it raise UnscoredError for an image "
            "that it cannot score"
        ) from error
    if not isinstance(axes, Mapping) or not axes or not all(_is_score(value) for value in axes.values()):
        raise ValueError(
            f"reward {name!r} must return scores from 0 to 10 by axis, such as {EXAMPLE}; got {axes!r:.200}"
        )
    return Scores({str(axis): float(value) for axis, value in axes.items()})


def _raised(error: BaseException, file: str | None = None) -> str:
    """Describe an error of code of the user on one line: its class, its message and the line that raised it.

    Args:
        error: The error.
        file: File whose innermost line is named, as the error may come from a library; None names the innermost of all.
    """
    kind, message = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, SyntaxError):  # the message has the file and the line
        return f"raised {kind}: {message}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
    return f"raised {kind}{f': {message}' if message else ''} at {frame.filename}:{frame.lineno}"


def _is_score(value: Any) -> bool:
    if isinstance(value, (str, bytes)):  # float() takes them
        return False
    try:
        return 0 <= float(value) <= 10
    except (TypeError, ValueError):
        return False
