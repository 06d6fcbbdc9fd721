import pytest
import torch

from uniref_fast.guidance import EMPTY_PROMPT, guide, is_guided, negative_prompt_for, texts_of
from uniref_fast.request import EditRequest


@pytest.mark.parametrize("scale, guided", [(0.0, False), (1.0, False), (1.01, True), (4.0, True)])
def test_guidance_is_on_over_1(scale, guided):
    """The helpers and a request agree on when a second text is needed."""
    assert is_guided(scale) == guided
    assert negative_prompt_for(scale) == (EMPTY_PROMPT if guided else None)
    assert texts_of("a crown", scale) == (("a crown", EMPTY_PROMPT) if guided else ("a crown",))
    request = EditRequest("a crown", negative_prompt=EMPTY_PROMPT, true_cfg_scale=scale)
    assert tuple(text for text, *_ in request.texts) == texts_of("a crown", scale)


def test_guide_keeps_the_norm_of_each_token():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    result = guide(positive, negative, 3.0)
    torch.testing.assert_close(result.norm(dim=-1), positive.norm(dim=-1))
    direction = negative + 3.0 * (positive - negative)
    cosine = torch.nn.functional.cosine_similarity(result, direction, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(guide(positive, negative, 1.0), positive)
