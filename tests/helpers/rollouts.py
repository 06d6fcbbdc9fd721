"""Stand-ins for the ranks and the rewards of a rollout generator, and rows of generated images."""

import io
from concurrent.futures import Future

import torch
from PIL import Image

from uniref_fast.data.images import ImageSource
from uniref_fast.rewards.types import Failure, Scores
from uniref_fast.training.core.memory import MemoryPlan

STEPS = 4
PLAN = MemoryPlan(400, 1, False, 0, "")


def source(i):
    content = io.BytesIO()
    Image.new("RGB", (32 + 8 * i, 48), (50 * i, 90, 0)).save(content, "PNG")
    return ImageSource(f"{i}.png", data=content.getvalue())


class FakeRanks:
    """Stand-in for one of several `Ranks`; `others` gives the answers of the others to `gather`."""

    def __init__(self, rank=0, size=1, sequence=1, others=None):
        self.rank, self.size, self.sequence, self.others = rank, size, sequence, others
        self.replica, self.replicas, self.device = rank // sequence, size // sequence, torch.device("cpu")

    def gather(self, value):
        return [value] if self.others is None else [value, *self.others(value)]


class FakeRewards:
    def __init__(self):
        self.asked = []
        self.shares = {}

    def submit(self, candidate, step):
        self.asked.append((candidate, step))
        future = Future()
        future.set_result(Scores({"quality": float(candidate.key[2])}))
        return {"mine": future}

    def combined(self, results):
        (result,) = results.values()
        return result if isinstance(result, Failure) else dict(result.axes)
