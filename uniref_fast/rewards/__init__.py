"""Rewards for edited images: a reward for synthetic scenes, a judge behind an endpoint, and functions of your own.

A reward of your own needs only the names below; they are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniref_fast.rewards.types import AXES, Candidate, Failure, Scores, UnscoredError

__all__ = ["AXES", "Candidate", "Failure", "Scores", "UnscoredError"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("uniref_fast.rewards.types"), name)
    raise AttributeError(f"module 'uniref_fast.rewards' has no attribute {name!r}")
