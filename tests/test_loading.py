"""Pipelines by name, and names that are none: an error in one line."""

import shutil

import pytest
import torch

from uniref_fast import builtin
from uniref_fast.loading import load_pipeline, missing_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builtin.build(tmp_path_factory.mktemp("model") / "built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_loads_as_what_was_written(folder, dtype):
    pipe = load_pipeline(str(folder), dtype, "cpu")
    assert type(pipe).__name__ == "SmallQwenImageEditPlusPipeline"
    for name in ("transformer", "vae", "text_encoder"):
        assert getattr(pipe, name).dtype == dtype


@pytest.mark.parametrize(
    "file",
    [
        "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_model(folder, tmp_path, file):
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"--model .*copy could not be loaded: "):
        load_pipeline(str(copy), torch.float32, "cpu")


class Quantised(torch.Tensor):
    """A weight of 8 bits as optimum-quanto loads it: on the meta device, around a tensor that is not."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32, device="meta")

    def __init__(self, data):
        self.data8 = data

    def __tensor_flatten__(self):
        return ["data8"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls(args[0].data8)  # what nn.Parameter asks for: detach


def test_quantised_weights_are_there_where_their_data_is():
    linear = torch.nn.Linear(2, 2, device="meta")
    assert missing_weights(linear) == ["weight", "bias"] and missing_weights(object()) == []
    linear.weight = torch.nn.Parameter(Quantised(torch.zeros(2, 2, dtype=torch.int8)), requires_grad=False)
    assert linear.weight.is_meta and missing_weights(linear) == ["bias"]
    linear.weight = torch.nn.Parameter(
        Quantised(torch.zeros(2, 2, dtype=torch.int8, device="meta")), requires_grad=False
    )
    assert missing_weights(linear) == ["weight", "bias"]


def test_what_can_be_no_model(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    for name in (str(tmp_path / "gone"), "./gone", "~/gone", "one", "a/b/c", str(tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match="no such folder, and not a hub id like"):
            load_pipeline(name, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"has no model_index.json: it must be a whole diffusers pipeline folder"):
        load_pipeline(str(tmp_path), torch.float32, "cpu")
    (tmp_path / "modular_model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is a modular pipeline of diffusers, which the commands do not load"):
        load_pipeline(str(tmp_path), torch.float32, "cpu")
