"""Load pipelines by name: "builtin", a diffusers folder, or a hub id; weights in safetensors files only."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniref_fast.hub import local_or_hub
from uniref_fast.model_kind import (
    check_configuration,
    check_pipeline,
    check_processor,
    check_transformer,
    supported_family,
    transformer_class,
)
from uniref_fast.progress import launcher_rank, running

if TYPE_CHECKING:  # commands import this module, and start without torch
    from uniref_fast.models.family import Family

__all__ = [
    "configuration",
    "defaults",
    "inference_mode",
    "load_adapter",
    "load_encoders",
    "load_part",
    "load_pipeline",
    "load_run",
    "load_transformer",
    "local_index",
    "model_errors",
    "model_family",
    "offload",
]  # fmt: skip


INDEX = "model_index.json"


def defaults(name: str, index: Mapping[str, Any] | None = None) -> tuple[int, float]:
    """Return the denoising steps and the true CFG scale that commands use by default.

    A scale of 1 turns guidance off: the built-in model makes better images without it.

    Args:
        name: "builtin", a diffusers folder, or a hub id.
        index: Content of the model's `model_index.json`; None reads it, from the hub if it is not in the cache.

    Raises:
        ValueError: If the name is not a model, its file cannot be read, or it is a model of another kind.
    """
    from uniref_fast.builtin import is_builtin_folder

    if name == "builtin" or is_builtin_folder(name):
        return 8, 1.0
    index = _index(name) if index is None else index
    return supported_family(f"--model {name}", index).defaults(index)


def model_family(name: str) -> Family:
    """Return the family of a model; the argument and the errors are those of `defaults`."""
    index = {"_class_name": "QwenImageEditPlusPipeline"} if name == "builtin" else _index(name)
    return supported_family(f"--model {name}", index)


def _index(name: str) -> dict[str, Any]:
    """Return the content of the `model_index.json` of a folder or a hub id."""
    from huggingface_hub import hf_hub_download

    # The cache comes first: commands ask for this after they have loaded the model.
    if (found := local_index(name)) is not None:
        return found
    with model_errors(name) as place:
        path = Path(place) / INDEX if Path(place).is_dir() else Path(hf_hub_download(place, INDEX))
        return json.loads(path.read_text(encoding="utf-8"))


def local_index(name: str) -> dict[str, Any] | None:
    """Return the content of the `model_index.json` of a folder, or of a hub id in the local cache; else None."""
    path: Any = Path(name) / INDEX
    if not Path(name).is_dir():
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(name, INDEX) if name.count("/") == 1 else None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if isinstance(path, str | Path) else None
    except (OSError, ValueError):
        return None


def load_pipeline(name: str, dtype: Any, device: str, quantisation: str | None = None) -> Any:
    """Load a pipeline onto a device.

    Args:
        name: "builtin", a diffusers folder, or a hub id.
        dtype: Dtype of the weights.
        device: Device of the pipeline.
        quantisation: Format in which text encoder and transformer are stored (`uniref_fast.quantisation.NAMES`), or
            None for `dtype`.

    Raises:
        ValueError: If the name is not a model, cannot be loaded, or is a model of another kind; the message has one
            line.
    """
    from uniref_fast import builtin

    options = {}
    if quantisation is not None:
        from uniref_fast.quantisation import pipeline_config

        options["quantization_config"] = pipeline_config(quantisation, dtype, device)
    with running(f"loading the model {name}", shown=not launcher_rank()):
        if name == "builtin":
            return builtin.load(dtype, device, **options)
        return _load(name, dtype, **options).to(device)


def load_encoders(name: str, dtype: Any, device: str) -> Any:
    """Load a pipeline to encode with: its transformer has a configuration and no weights.

    Arguments and errors are those of `load_pipeline`.
    """
    import torch

    if name == "builtin":
        return load_pipeline(name, dtype, device)
    index, config = configuration(name)
    with torch.device("meta"):
        transformer = transformer_class(index).from_config(config)
    with running(f"loading the encoders of the model {name}", shown=not launcher_rank()):
        pipe = _load(name, dtype, transformer=transformer)
        for part in (pipe.vae, pipe.text_encoder):
            part.to(device)
        return pipe


def _load(name: str, dtype: Any, **more: Any) -> Any:
    """Load a pipeline from a folder or the hub, and check its kind; `more` as for `_from_pretrained`."""
    with model_errors(name) as place:
        from diffusers import DiffusionPipeline

        pipe = _from_pretrained(DiffusionPipeline, place, dtype, f"--model {name}", **more)
    check_pipeline(pipe, f"--model {name}")  # before it is moved to a device
    return pipe


def offload(pipe: Any, how: str, device: Any) -> None:
    """Keep the weights of a pipeline where they are, and bring them to a device while they are used.

    Args:
        pipe: A `QwenImageEditPlusPipeline` in host memory.
        how: "model" brings one of text encoder, transformer and VAE at a time; "block" brings single blocks of the
            transformer and single layers of the others, on a GPU each while the one before computes.
        device: The device.
    """
    import torch
    from diffusers.hooks import apply_group_offloading

    from uniref_fast.models.families import family_of

    device = torch.device(device)
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
        return
    stream = device.type == "cuda"
    pipe.transformer.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=stream)
    for part in (*family_of(pipe).text_encoders(pipe), pipe.vae):
        if part is not None:
            apply_group_offloading(part, device, offload_type="leaf_level", use_stream=stream)


def load_part(name: str, part: str, kind: Any, dtype: Any) -> Any:
    """Load one component of a pipeline into host memory.

    Args:
        name: "builtin", a diffusers folder, or a hub id.
        part: Name of the component, such as "vae".
        kind: Class of the component, of diffusers or of transformers.
        dtype: Dtype of the weights.

    Raises:
        ValueError: If the component cannot be loaded; the message has one line.
    """
    from diffusers import ModelMixin

    from uniref_fast.builtin.store import model_folder, no_progress_bars

    with model_errors(name) as place, no_progress_bars():
        folder = model_folder() if name == "builtin" else place
        options = {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype}
        return kind.from_pretrained(folder, subfolder=part, use_safetensors=True, **options).eval()


def configuration(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of `model_index.json` and `transformer/config.json` of a model.

    Args:
        name: "builtin", a diffusers folder, or a hub id, of which only these two files are downloaded.

    Raises:
        ValueError: If the name is not a model, its files cannot be read, or it is a model of another kind.
    """
    from uniref_fast.builtin.store import model_folder

    files = ("model_index.json", "transformer/config.json")
    with model_errors(name) as place:
        folder = model_folder() if name == "builtin" else Path(place)
        if folder.is_dir():
            paths = [folder / file for file in files]
        else:
            from huggingface_hub import hf_hub_download

            paths = [Path(hf_hub_download(place, file)) for file in files]
        index, transformer = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    check_configuration(f"--model {name}", index, transformer)
    return index, transformer


@contextlib.contextmanager
def model_errors(name: str) -> Iterator[str]:
    """Raise ValueError with one line for a name that cannot be a model, and for a model that cannot be loaded.

    Yields:
        The place to load the model from: the name, or a folder of the hub's cache if the hub cannot be reached.
    """
    folder = Path(name)
    if name != "builtin":
        if not folder.is_dir() and (folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~"))):
            raise ValueError(f"--model {name}: no such folder, and not a hub id like Qwen/Qwen-Image-Edit-2511")
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            if (folder / "modular_model_index.json").is_file():
                raise ValueError(
                    f"--model {name} is a modular pipeline of diffusers, which the commands do not load; edit, "
                    "estimate and patch take those of FLUX.3 in Python (docs/families.md)"
                )
            raise ValueError(f"--model {name} has no model_index.json: it must be a whole diffusers pipeline folder")
    place = local_or_hub(name, f"--model {name}")
    from safetensors import SafetensorError

    try:
        yield place
    except (OSError, SafetensorError, json.JSONDecodeError) as error:  # the latter two of damaged files
        if folder.is_dir() or name == "builtin":
            raise ValueError(f"--model {name} could not be loaded: {error}") from None
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"--model {name} could not be loaded from the hub: {first}") from None


def load_run(
    pipe: Any, run: Path, dtype: Any, *, base: Path | None, adapter: str, given: str, model: str = "the model"
) -> bool:
    """Load the export of a training run into a pipeline: a whole transformer, then the run's own adapter.

    The adapter is not fused: in 16 bits, fusing would round away what was trained.

    Args:
        pipe: Pipeline that is changed in place.
        run: Folder of the run, with `transformer/` or `lora/`.
        dtype: Dtype of the loaded transformer.
        base: Folder whose `transformer/` replaces the pipeline's, the run's own or that of the run that its adapter was
            trained on; None keeps the pipeline's.
        adapter: Name of the adapter on the pipeline.
        given: Name of the run in messages, such as "initial = PATH".
        model: Name of the pipeline in messages.

    Returns:
        True if the run has an adapter.

    Raises:
        ValueError: A file cannot be read, or does not fit the pipeline.
    """
    if base is not None:
        load_transformer(pipe, base, dtype, given=given, model=model)
    if not (run / "lora").is_dir():
        return False
    with _named(given, model):
        load_adapter(pipe, str(run / "lora"), adapter, _is_lokr(run / "lora"), use_safetensors=True)
    return True


def load_adapter(pipe: Any, source: str | Mapping[str, Any], name: str, lokr: bool, **options: Any) -> None:
    """Add an adapter in the format of diffusers to a pipeline; its layers are not in training mode.

    Args:
        pipe: Pipeline that is changed in place.
        source: Folder of the adapter, or its tensors by their keys.
        name: Name of the adapter on the pipeline.
        lokr: True if it has tensors of a LoKr and the pipeline's own method knows LoRA only (`Family.loads_lokr`).
        options: Further options of diffusers' method, such as `weight_name`.
    """
    load = pipe.transformer.load_lora_adapter if lokr else pipe.load_lora_weights
    load(source, adapter_name=name, **options)
    inference_mode(pipe.transformer)


def inference_mode(transformer: Any) -> None:
    """Take the layers of new adapters out of training mode, in which a LoKr draws a random number in each call."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.eval()  # type: ignore[attr-defined]  # a module too


def _is_lokr(folder: Path) -> bool:
    """Return True if the file of an adapter in a folder has tensors of a LoKr."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            return any(".lokr_" in key for key in opened.keys())  # noqa: SIM118
    return False


def load_transformer(pipe: Any, folder: Path, dtype: Any, *, given: str, model: str = "the model") -> None:
    """Replace a pipeline's transformer by the one in `folder/transformer`; arguments and errors as for `load_run`.

    It is quantised in the same way as the transformer that it replaces.
    """
    from uniref_fast.models.families import family_of

    kind, device = type(pipe.transformer), pipe.transformer.device
    quantised = getattr(pipe.transformer.config, "quantization_config", None)
    options = {} if quantised is None else {"quantization_config": quantised}
    with _named(given, model):
        config = kind.load_config(folder / "transformer")
    family = family_of(pipe)
    check_transformer(f"{given}, put on {model},", config, family)  # before any weights are read
    with _named(given, model):
        loaded = kind.from_pretrained(folder / "transformer", torch_dtype=dtype, use_safetensors=True, **options)
    pipe.transformer = family.adopted(pipe, loaded).to(device)
    check_pipeline(pipe, f"{given}, put on {model},")


@contextlib.contextmanager
def _named(given: str, model: str) -> Iterator[None]:
    """Raise ValueError with one line that names the files and the model that they could not be loaded into."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:  # damaged, or of another model
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{given} could not be loaded into the model {model}: {first}") from error


def _from_pretrained(pipeline_class: Any, name: str, dtype: Any, given: str, **more: Any) -> Any:
    """Load a pipeline from safetensors files only: pickled weights of other people could run code.

    Args:
        pipeline_class: Class of the pipeline.
        name: Folder or hub id.
        dtype: Dtype of the weights.
        given: Name of the pipeline in messages.
        **more: Further arguments of `from_pretrained`, such as components that are not loaded, by name.
    """
    from uniref_fast.builtin import BuiltinProcessor, SmallQwenImageEditPlusPipeline, recorded_areas

    # first, so that the error for a name that cannot be loaded is about the whole model
    index = pipeline_class.load_config(name)
    check_configuration(given, index)  # before anything else is read
    config = transformer_class(index).load_config(name, subfolder="transformer")
    check_configuration(given, index, config)
    check_processor(given, index)
    if "quantization_config" in more:
        from uniref_fast.quantisation import check_unquantised

        check_unquantised(given, config)
    if recorded_areas(index, config):  # a built-in model, saved by any pipeline class
        pipeline_class = SmallQwenImageEditPlusPipeline
    options, kind = {"dtype": dtype, "use_safetensors": True, **more}, (index.get("processor") or [None, None])[1]
    # transformers' own processor needs torchvision, for its videos
    without_torchvision = importlib.util.find_spec("torchvision") is None
    if kind is not None and (without_torchvision or kind == BuiltinProcessor.__name__):
        processor = BuiltinProcessor.from_pretrained(name, subfolder="processor")
        # diffusers checks the class of a given processor against the recorded one, which may need torchvision
        passed = processor if kind == BuiltinProcessor.__name__ else None
        pipe = pipeline_class.from_pretrained(name, processor=passed, **options)
        pipe.register_modules(processor=processor)
    else:
        pipe = pipeline_class.from_pretrained(name, **options)
    for part, module in pipe.components.items():
        missing = [] if part in more else missing_weights(module)
        if missing:
            raise ValueError(
                f"{given}: {part} has no file for {len(missing)} of its weights ({missing[0]}, ...); it may "
                "have been saved with LoRA adapters in place, which have to be fused and unloaded first"
            )
    return pipe


def missing_weights(module: Any) -> list[str]:
    """Return the names of the parameters of a loaded component that were in no file."""
    from uniref_fast.quantised import stored_tensors

    named: Any = getattr(module, "named_parameters", list)()
    # a quantised weight may itself stay on the meta device, around tensors that are not
    return [name for name, value in named if any(part.is_meta for part in stored_tensors(value))]
