"""Train the small byte-level BPE tokenizer of the built-in pipeline.

    python -m uniref_fast.training.builtin.make_tokenizer [folder]

Writes `tokenizer/vocab.json` and `tokenizer/merges.txt`, the two files of a `Qwen2Tokenizer`. The corpus is the text
below and Python's own `unicodedata`, so anyone can reproduce it. The system prompt of QwenImageEditPlusPipeline
dominates it on purpose: the pipeline drops the first 64 hidden states, so each word of the prompt must be one token.
"""

import itertools
import sys
import unicodedata
from pathlib import Path

from uniref_fast.builtin.components import ASSETS, TOKENS

# diffusers, QwenImageEditPlusPipeline.prompt_template_encode, without the special tokens
SYSTEM_PROMPT = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then"
    " explain how the user's text instruction should alter or modify the image. Generate a new image that meets the"
    " user's requirements while maintaining consistency with the original input where appropriate."
)
TURNS = ("user\n", "\n", "assistant\n", "Picture 1: ", "Picture 2: ", "Picture 3: ")

RELATIONS = [
    *("left of", "right of", "above", "below", "next to", "in front of", "behind", "on top of", "inside", "between"),
    *("in the centre of", "at the top of", "at the bottom of", "on the left of", "on the right of", "under", "over"),
]
VERBS = "put place move add remove replace swap turn make draw paint copy keep change resize combine blend fill"
WORDS = """
top left right bottom upper lower middle corner edge side
red orange yellow green blue purple pink brown black white gray grey golden silver dark light bright
gradient checker checkerboard stripes dots bricks wood wooden clouds sky grass sand water paper
one two three four five six seven eight nine ten first second third last both all
photo style sketch watercolor cartoon pixel art realistic lighting shadow smaller larger bigger twice
it is are be was has have and not but for from into with without of in on at to as by an the this that these those
person man woman child hand face hair shirt dress hat scene room street house tree flower mountain night day
same different only also very more less please high low quality blurry distorted deformed ugly bad good best
"""


def emoji_names() -> list[str]:
    """Return the lower-case Unicode names of the pictographs, from the blocks that hold emoji."""
    blocks = ((0x2600, 0x27C0), (0x1F300, 0x1F650), (0x1F680, 0x1F700), (0x1F900, 0x1FB00))
    names = (unicodedata.name(chr(c), "") for c in itertools.chain.from_iterable(range(*block) for block in blocks))
    return [name.lower() for name in names if name]


def corpus() -> list[str]:
    """Return all lines whose merges are counted; a line that is repeated weighs more."""
    lines = [SYSTEM_PROMPT, *TURNS] * 2000
    verbs = VERBS.split()
    words = verbs + WORDS.split()
    lines += [f" {word}" for word in words] * 150 + words * 20 + [verb.capitalize() for verb in verbs] * 50
    names = emoji_names()
    for i, name in enumerate(names):
        relation, verb = RELATIONS[i % len(RELATIONS)], verbs[i % len(verbs)]
        other = names[(i * 7919 + 13) % len(names)]
        lines.append(
            f"{verb} the {name} of picture 1 {relation} the {other} of picture 2 on the background of picture 3"
        )
    lines += [f" {name}" for name in names] * 4
    return lines


def train(folder: Path) -> None:
    """Train the tokenizer and write `vocab.json` and `merges.txt` into a folder."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS / "tokenizer")
