import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.examples.packing import pack, pad, plan_batches

LENGTHS = st.lists(st.integers(1, 50), max_size=40)
LABELLED = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12), min_size=1)


@given(LENGTHS, st.integers(1, 80), st.booleans())
def test_every_example_is_in_one_batch_and_batches_keep_the_budget(lengths, budget, padded):
    batches = plan_batches(lengths, budget, padded)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        assert len(batch) == 1 or (len(sizes) * max(sizes) if padded else sum(sizes)) <= budget
    assert batches == plan_batches(lengths, budget, padded)


@given(LABELLED)
def test_a_packed_row_against_its_examples_one_by_one(drawn):
    examples = [([token for token, _ in row], [token if keep else -100 for token, keep in row]) for row in drawn]
    packed = pack(examples)
    borders = packed.cu_seqlens.tolist()
    assert borders[0] == 0
    assert borders[-1] == packed.input_ids.shape[1]
    expected = []
    for number, (ids, labels) in enumerate(examples):
        start, end = borders[number], borders[number + 1]
        assert packed.input_ids[0, start:end].tolist() == ids
        assert packed.position_ids[0, start:end].tolist() == list(range(len(ids)))
        expected += [(start + t - 1, labels[t], number) for t in range(1, len(ids)) if labels[t] != -100]
    assert packed.lengths == [len(ids) for ids, _ in examples]
    longest = max(packed.lengths)
    assert pad(packed).tolist() == [ids + [0] * (longest - len(ids)) for ids, _ in examples]
    found = zip(packed.label_positions.tolist(), packed.label_ids.tolist(), packed.label_examples.tolist(), strict=True)
    assert list(found) == expected


def test_what_cannot_be_packed_is_named():
    with pytest.raises(ValueError, match="no examples"):
        pack([])
    with pytest.raises(ValueError, match="example 1 has 2 tokens and 1 labels"):
        pack([([1], [1]), ([1, 2], [1])])
