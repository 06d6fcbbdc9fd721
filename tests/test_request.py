import pytest

from uniref_fast.request import target_size


@pytest.mark.parametrize(
    "target, references, expected",
    [
        ((64, 32), [(500, 10)], (64, 32)),  # a target under the area keeps its size
        ((2000, 1000), [], (176, 80)),  # a larger one is made smaller
        (None, [(10, 10), (60, 30)], (176, 80)),  # the aspect ratio of the last reference, at the whole area
        (None, [], (128, 128)),
    ],
)
def test_target_size(target, references, expected):
    assert target_size(target, references, 128) == expected
