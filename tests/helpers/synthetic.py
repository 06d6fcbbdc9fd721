"""Small synthetic samples for tests that need references, an instruction and a target."""

from uniref_fast.scenes.make import MakeConfig, SyntheticSample, artworks, sample


def synthetic_sample(index: int, references: int = 3, size: int = 128) -> SyntheticSample:
    """Return a training sample with the given number of references; `size` is the longer side of its target."""
    return sample("train", index, MakeConfig(artworks("shipped"), size=size, references=(references,)))
