import contextlib
from types import SimpleNamespace

import pytest
from rollouts import STEPS, FakeRanks, FakeRewards, source

from uniref_fast.data.dataset import Row
from uniref_fast.models import PackedQwenImage
from uniref_fast.scenes.dataset import write_dataset
from uniref_fast.scenes.make import MakeConfig, artworks, sample
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.rl.generator import RolloutGenerator
from uniref_fast.training.rl.recipes import MSGRPO, RLStage


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder with 16 rows to train on and 3 held-out rows, with one or two references each."""
    folder = tmp_path_factory.mktemp("data") / "generated"
    config = MakeConfig(artworks("shipped"), size=64, references=(1, 2))
    rows = {"train": 16, "heldout_objects": 3, "heldout_combinations": 0}
    write_dataset(folder, config, rows, 1, force=False, generate=sample)
    return folder


@pytest.fixture
def make_generator(builtin_pipe):
    def build(ranks=None, signalled=lambda: False, **fields):
        fields = {"packs": 2, "group": 2, "dtype": "float32", "rollout_num_inference_steps": STEPS,
                  "sample_num_inference_steps": STEPS, "rewards": ("scene",), **fields}  # fmt: skip
        config = MSGRPO((RLStage(64, 1, 1e-3),), model="builtin", **fields)
        packed = PackedQwenImage(builtin_pipe.transformer, visibility=config.visibility or "full", for_training=True)
        encoders = SimpleNamespace(present=lambda *names: contextlib.nullcontext())
        model = SimpleNamespace(
            pipe=builtin_pipe, packed=packed, config=config, ranks=ranks or FakeRanks(), encoders=encoders
        )
        model.idle_forward = lambda: TrainedModel.idle_forward(model)
        encoder = Encoder(builtin_pipe, TensorCache(None))
        return RolloutGenerator(config, model.ranks, model, encoder, FakeRewards(), signalled)

    return build


@pytest.fixture
def prepared_rows(builtin_pipe):
    """Build prepared rows, one for each given number of references."""
    encoder = Encoder(builtin_pipe, TensorCache(None))

    def build(*counts):
        rows = []
        for i, count in enumerate(counts):
            sources = tuple(source(j) for j in range(count))
            row = Row("word " * (1 + i), sources, source(i % 3), None, f"rows.jsonl:{i + 1}")
            rows.append(((2, 10 + i), encoder.prepare(row, (2, 10 + i), 48, 32, rollout=True)))
        return rows

    return build
