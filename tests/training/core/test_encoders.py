"""Encoders that are freed while a model trains: no bytes of them live, and what they compute later is the same."""

import dataclasses
import json
import re
import shutil

import pytest
import small_pipeline
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from synthetic import synthetic_sample
from torch.multiprocessing.reductions import StorageWeakRef

from uniref_fast.data.dataset import Dataset
from uniref_fast.loading import load_pipeline
from uniref_fast.training.batches.encoding import EncodingPass, heldout_rows
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder, Form
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.encoders import PARTS, EncoderError, Encoders
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.core.sampling import PromptSamples
from uniref_fast.training.supervised.recipes import SFT
from uniref_fast.training.supervised.validation import Validation

pytestmark = pytest.mark.usefixtures("threads")
CONFIG = SFT(
    (BudgetStage(48, 1, 1e-3, target_side=32),), model=str(small_pipeline.folder()), dtype="bfloat16", eval_samples=3,
    sample_count=2, sample_num_inference_steps=2, sample_true_cfg_scale=2.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    yield Ranks.start()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of three held-out rows."""
    folder, lines = tmp_path_factory.mktemp("heldout"), []
    for i in range(3):
        scene = synthetic_sample(i, size=64, references=1 + i % 2)
        names = [f"{i}-{j}.png" for j in range(len(scene.references) + 1)]
        for name, image in zip(names, [*scene.references, scene.target], strict=True):
            image.save(folder / name)
        row = {"input_images": names[:-1], "output_image": names[-1], "instruction": scene.instruction}
        lines.append(json.dumps(row) + "\n")
    (folder / "objects.jsonl").write_text("".join(lines))
    return folder / "objects.jsonl"


class Storages:
    """The memory of the parameters of encoders, by name of the encoder; does not keep them."""

    def __init__(self, pipe):
        self.found = {
            name: [(StorageWeakRef(p.untyped_storage()), p.untyped_storage().nbytes())
                   for p in getattr(pipe, name).parameters()]
            for name in PARTS
        }  # fmt: skip

    def live(self, *names):
        """Return the bytes that are not freed."""
        return sum(size for name in names or PARTS for storage, size in self.found[name] if not storage.expired())


def validated(config, ranks, rows, cache):
    """Return a model, its held-out losses and its samples; the encoders are freed if the configuration says so."""
    opened = {}

    def encode(model):
        encoder = Encoder(model.pipe, TensorCache(cache), encoders=model.encoders)
        opened["heldout"] = Validation([rows], config, model, encoder, ranks)
        opened["prompts"] = PromptSamples(Dataset([rows]), config, model)
        opened["storages"] = Storages(model.pipe)
        if config.encoders == "free":
            wanted = heldout_rows(opened["heldout"].datasets, config, target=True, guided=config.sample_count)
            opened["report"] = EncodingPass(encoder, ranks, 2, shown=False).run(wanted)
            opened["prompts"].encode_texts()

    model = TrainedModel(config, ranks, encode)
    model.packed.eval()
    return model, opened


@pytest.fixture(scope="module")
def freed(ranks, rows, tmp_path_factory):
    """A model whose encoders are freed, what was opened before, and the folder of the cache."""
    cache = tmp_path_factory.mktemp("freed") / "cache"
    return *validated(dataclasses.replace(CONFIG, encoders="free"), ranks, rows, cache), cache


def test_no_byte_of_the_encoders_is_left_and_validations_have_the_same_bits(ranks, rows, freed, monkeypatch):
    """The weights that are trained are float32 here, and the computation is in bfloat16."""
    kept, of_kept = validated(dataclasses.replace(CONFIG, encoders="resident"), ranks, rows, None)
    losses, samples = of_kept["heldout"].losses(512), of_kept["heldout"].samples(512)
    prompts = of_kept["prompts"].grid(512)
    assert of_kept["storages"].live() == kept.encoders.bytes > 10**6 and kept.fixed_bytes() == kept.encoders.bytes

    model, opened, _ = freed
    assert opened["storages"].live() == 0 == model.fixed_bytes(), "freed before the transformer is placed"
    assert model.pipe.vae is None and model.pipe.text_encoder is None and model.encoders.freed
    loaded = []
    original = model.encoders._loaded

    def watched(name):
        loaded.append(name)
        return original(name)

    monkeypatch.setattr(model.encoders, "_loaded", watched)
    assert opened["heldout"].losses(512) == losses and loaded == [], "nothing is decoded for losses"
    again = opened["heldout"].samples(512)
    assert loaded == ["vae"], "text encoder and transformer are never there together"
    assert [(one.psnr, one.image.tobytes()) for one in again] == [(one.psnr, one.image.tobytes()) for one in samples]
    assert opened["prompts"].grid(512).tobytes() == prompts.tobytes() and loaded == ["vae", "vae"]
    assert model.pipe.vae is None and kept.frozen == model.frozen


def test_an_encoder_is_there_for_a_block_only(freed):
    model, *_ = freed
    with model.encoders.present("vae"):
        first = Storages(_Pipe(model.pipe.vae))
        assert first.live("vae") > 0 and model.pipe.text_encoder is None
        with model.encoders.present("vae", "text_encoder"):
            second = Storages(model.pipe)
            assert second.live() == model.encoders.bytes
        assert second.live("text_encoder") == 0 and second.live("vae") == first.live("vae") > 0, "the outer block's"
    assert first.live("vae") == second.live() == 0
    with pytest.raises(KeyError), model.encoders.present("vae"):
        first = Storages(_Pipe(model.pipe.vae))
        raise KeyError
    assert first.live("vae") == 0, "also after an error"


@dataclasses.dataclass
class _Pipe:
    """A pipeline with a VAE alone."""

    vae: torch.nn.Module
    text_encoder: torch.nn.Module = dataclasses.field(default_factory=torch.nn.Module)


def test_a_tensor_that_the_cache_has_lost_is_encoded_again_with_the_same_bits(freed):
    model, opened, cache = freed
    encoder, dataset = opened["heldout"].encoder, opened["heldout"].datasets["objects"]
    prepared = encoder.prepare_form(dataset[0], Form(48, 32))
    before = encoder.encode(prepared, prepared.load())
    shutil.rmtree(cache)
    after = encoder.encode(prepared, prepared.load())
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in ("target", "references", "text"))
    assert model.pipe.vae is None and model.pipe.text_encoder is None


def test_a_model_that_has_changed_meanwhile_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_pipeline.folder(), folder)
    pipe = load_pipeline(str(folder), torch.float32, "cpu")
    encoders = Encoders(pipe, str(folder), torch.float32, torch.device("cpu"))
    encoders.free()
    with encoders.present("vae"):
        assert pipe.vae is not None
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    message = f"the vae of model = {folder} has changed since the run was started"
    with pytest.raises(EncoderError, match=re.escape(message)), encoders.present("vae"):
        pytest.fail("another VAE is used")
    assert pipe.vae is None


@pytest.mark.parametrize("name", PARTS)
def test_an_encoder_that_is_gone_is_no_broken_row(tmp_path, rows, name):
    """The handlers of broken rows let the error pass, so that it ends the run."""
    folder = tmp_path / "model"
    shutil.copytree(small_pipeline.folder(), folder)
    pipe = load_pipeline(str(folder), torch.float32, "cpu")
    encoders = Encoders(pipe, str(folder), torch.float32, torch.device("cpu"))
    encoder = Encoder(pipe, TensorCache(tmp_path / "cache"), encoders=encoders)
    encoders.free()
    shutil.rmtree(folder / name)
    prepared = encoder.prepare_form(Dataset(rows)[0], Form(48, 32))
    message = f"the {name} of model = {folder} cannot be loaded again"
    with pytest.raises(EncoderError, match=re.escape(message)) as error:
        encoder.encode(prepared, prepared.load())
    assert not isinstance(error.value, (ValueError, OSError)), "which are those of a broken row"


def test_encoders_are_freed_by_default_if_there_is_a_cache(tmp_path):
    assert CONFIG.resolve_encoders() == "resident"
    cached = dataclasses.replace(CONFIG, cache=tmp_path)
    assert cached.resolve_encoders() == "free"
    assert dataclasses.replace(cached, encoders="resident").resolve_encoders() == "resident"
    assert dataclasses.replace(CONFIG, encoders="free").resolve_encoders() == "free"
