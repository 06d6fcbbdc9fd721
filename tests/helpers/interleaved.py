"""Layouts of text and images in one causal sequence, as of Qwen-Image-2.1, and its mask as diffusers states it."""

import torch

from uniref_fast.layout import Kind, Segment, SelfLayout


def interleaved(*samples):
    """Return the layout of samples such as "t5 r3x4 t1 x8x8": text, a reference and the target in joint order.

    `p2` is padding of the text. Positions are all 0: attention does not use them.
    """
    segments, joint, stream = [], 0, {True: 0, False: 0}
    kinds = {"t": Kind.TEXT, "p": Kind.PADDING, "r": Kind.REFERENCE, "x": Kind.TARGET}
    for number, sample in enumerate(samples):
        count = dict.fromkeys(kinds, 0)
        for part in sample.split():
            kind, sides = kinds[part[0]], [int(side) for side in part[1:].split("x")]
            grid = (sides[0], 1, 1) if kind.is_text else (1, *sides)
            count[part[0]] += 1
            index = count[part[0]] - (kind is not Kind.REFERENCE)
            new = Segment(kind, number, number, index, grid, stream[kind.is_text], joint, number, (0, 0, 0))
            segments.append(new)
            joint += new.length
            stream[kind.is_text] += new.length
    return SelfLayout(tuple(segments), len(samples), False)


def diffusers_mask(layout):
    """Return `build_qwenimage21_block_causal_mask` of the samples of a layout, one by one, bool [N, N]."""
    from diffusers.models.transformers.transformer_qwenimage21 import build_qwenimage21_block_causal_mask as build

    blocks = []
    for sample in range(layout.num_samples):
        own = [segment for segment in layout.segments if segment.sample == sample]
        ids = torch.cat([torch.full((s.length,), -1 if s.kind.is_text else n) for n, s in enumerate(own)])
        valid = torch.cat([torch.full((s.length,), s.kind is not Kind.PADDING) for s in own])[None]
        row = torch.arange(len(ids))
        blocks.append(build(ids, valid, 1, "cpu").mask_mod(0, 0, row[:, None], row[None]))
    return torch.block_diag(*blocks).bool()
