"""A Qwen2VLProcessor without its video part.

transformers builds `Qwen2VLProcessor` only together with a video processor, and that needs torchvision. Image editing
has no videos, so this one needs Pillow only; it writes and reads the files that the full processor reads.
"""

import json
from pathlib import Path

from transformers import (
    ProcessorMixin,  # noqa: F401  diffusers looks for the base class in the module of a component
    Qwen2Tokenizer,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

CHAT_TEMPLATE = "chat_template.jinja"
IMAGE_CONFIG = "preprocessor_config.json"
HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
VIDEO_CONFIG = "video_preprocessor_config.json"


class BuiltinProcessor(Qwen2VLProcessor):
    """`Qwen2VLImageProcessorPil` and `Qwen2Tokenizer`, called as QwenImageEditPlusPipeline calls its processor.

    `processor(text=[...], images=[...] or None, padding=True, return_tensors="pt")` returns a BatchFeature with
    `input_ids`, `attention_mask`, `mm_token_type_ids` [B, L] int64, and with images also `pixel_values`
    [patches, 3 * 2 * patch^2] float32 and `image_grid_thw` [images, 3] int64 (frames, patch rows, patch columns).
    Every `<|image_pad|>` of the texts takes the next image and becomes `rows * columns / merge_size^2` tokens;
    ValueError when their numbers differ.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<|image_pad|>"
        self.video_token = "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        # not Qwen2VLProcessor.__init__, which requires a video processor
        super(Qwen2VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs):
        places = sum(line.count(self.image_token) for line in ([text] if isinstance(text, str) else text or ()))
        given = 0 if images is None else len(images) if isinstance(images, (list, tuple)) else 1
        if places != given:  # transformers before 5.23 does not compare them
            raise ValueError(f"the number of {self.image_token} in the texts is {places}, the number of images {given}")
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a processor from a folder or hub id; of the keywords only those of the location are used."""
        where = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        return cls(
            image_processor=Qwen2VLImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **where),
            tokenizer=Qwen2Tokenizer.from_pretrained(pretrained_model_name_or_path, **where),
            chat_template=cls.get_processor_dict(pretrained_model_name_or_path, **where)[0].get("chat_template"),
        )

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Write the files of a full Qwen2VLProcessor, so that one with torchvision reads the folder as well."""
        if push_to_hub:
            raise ValueError("the built-in processor is saved to a folder only: push that folder")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        if isinstance(self.chat_template, str):
            (folder / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        config = self.image_processor.to_dict()
        # written under the names without a backend: transformers picks the backend that is installed
        config["image_processor_type"] = "Qwen2VLImageProcessor"
        config["processor_class"] = "Qwen2VLProcessor"
        video = {k: v for k, v in config.items() if k != "image_processor_type"}
        video["video_processor_type"] = "Qwen2VLVideoProcessor"
        for name, content in ((IMAGE_CONFIG, config), (VIDEO_CONFIG, video)):
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
