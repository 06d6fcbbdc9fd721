from hypothesis import given
from hypothesis import strategies as st

from uniref_fast.packing import next_fit


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 100))
def test_packs_are_consecutive_and_full(lengths, limit):
    packs = next_fit(lengths, limit)
    assert [i for pack in packs for i in pack] == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in pack) for pack in packs]
    assert all(total <= limit or len(pack) == 1 for total, pack in zip(sums, packs, strict=True))
    for total, after in zip(sums, packs[1:], strict=False):  # the next sample did not fit
        assert total + lengths[after[0]] > limit


def test_without_a_limit_there_is_one_pack():
    assert next_fit([3, 5, 9], None) == [[0, 1, 2]]
    assert next_fit([], None) == next_fit([], 5) == []
