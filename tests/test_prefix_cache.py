import torch
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.engine.cache import BlockPool, RowCache
from gradientspace_ray.engine.prefix import PrefixCache, PrefixIndex

BLOCK = 2
SEQUENCES = st.tuples(st.sampled_from([None, "a@1", "b@2"]), st.lists(st.integers(0, 1), max_size=9))


def beginnings(tokens):
    return [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]


@given(st.integers(0, 6), st.lists(st.tuples(st.booleans(), SEQUENCES), max_size=40))
def test_a_block_holds_what_was_put_there_for_the_same_adapter_and_beginning(capacity, steps):
    index = PrefixIndex(capacity, BLOCK)
    filled = {}
    """Block -> the adapter and the tokens that its contents depend on, as they were written last."""
    for inserts, (adapter, tokens) in steps:
        if inserts:
            new = index.insert(adapter, tokens)
            for place, block in zip(new.places, new.blocks, strict=True):
                filled[block] = adapter, beginnings(tokens)[place]
        found = index.match(adapter, tokens)
        assert [filled[block] for block in found] == [(adapter, part) for part in beginnings(tokens)[: len(found)]]
        if inserts:  # all of it, or as much as there is room for
            assert len(found) == min(capacity, len(beginnings(tokens)))
        assert len(index) <= capacity


def test_what_was_used_last_stays_and_the_ends_of_sequences_go_first():
    index = PrefixIndex(4, BLOCK)
    index.insert("a", [1, 1, 2, 2])
    index.insert("a", [1, 1, 3, 3, 4, 4])
    index.match("a", [1, 1, 2, 2])
    index.insert("a", [9, 9])
    assert len(index.match("a", [1, 1, 3, 3, 4, 4])) == 2
    assert len(index.match("a", [1, 1, 2, 2])) == 2
    assert len(index.match("a", [9, 9])) == 1


def filled_cache(rows, tokens, seed=0):
    cache = RowCache(rows, tokens, rows * tokens)
    cache.reserve(rows, tokens)
    generator = torch.Generator().manual_seed(seed)
    for row in range(rows):
        cache.at(row, 0, tokens)
        for layer in range(2):
            cache.update(*torch.randn(2, 1, 3, tokens, 4, generator=generator), layer)
    return cache


@torch.inference_mode()
def test_copies_come_back_as_they_were():
    cache, prefix = filled_cache(3, 10), PrefixCache(16, block_tokens=2)
    tokens = [5, 6, 7, 8, 9, 10, 11]
    prefix.save(cache, 1, "a", tokens[:4])
    prefix.save(cache, 1, "a", tokens)
    before = [held.clone() for held in cache.held]
    assert prefix.restore(cache, 2, "a", tokens) == 6
    for held, old in zip(cache.held, before, strict=True):
        torch.testing.assert_close(held[2, :, :6], old[1, :, :6], atol=0, rtol=0)
        torch.testing.assert_close(held[2, :, 6:], old[2, :, 6:], atol=0, rtol=0)
        torch.testing.assert_close(held[:2], old[:2], atol=0, rtol=0)
    assert prefix.restore(cache, 0, "b", tokens) == 0
    assert prefix.restore(cache, 0, "a", tokens[:6]) == 4, "the last token of a prompt is computed"
    assert (prefix.looked_up, prefix.hit) == (20, 10)


@torch.inference_mode()
def test_without_memory_for_copies_answers_go_on_without(monkeypatch):
    cache, prefix = filled_cache(1, 10), PrefixCache(16, block_tokens=2)

    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(BlockPool, "save", no_memory)
    prefix.save(cache, 0, "a", [1, 2, 3, 4])
    assert prefix.restore(cache, 0, "a", [1, 2, 3, 4, 5]) == 0
    monkeypatch.undo()
    prefix.save(cache, 0, "a", [1, 2, 3, 4])
    assert prefix.restore(cache, 0, "a", [1, 2, 3, 4, 5]) == 0


ROWS, TOKENS, LIMIT = 4, 40, 96


@given(st.lists(st.tuples(st.integers(1, ROWS), st.integers(1, TOKENS)), min_size=1, max_size=6))
@torch.inference_mode()
def test_rows_keep_what_they_hold_while_memory_grows_and_is_laid_out_anew(needs):
    cache = RowCache(ROWS, TOKENS, LIMIT)
    kept = {}
    for rows, tokens in needs:
        if not cache.fits(rows, tokens):
            assert rows * tokens > LIMIT
            continue
        cache.reserve(rows, tokens)
        if cache.held:
            allocated, _, length, _ = cache.held[0].shape
            assert allocated >= rows
            assert length >= tokens
            assert allocated * length <= LIMIT
        for row, value in kept.items():
            if row < rows:
                held = cache.held[0][row, 0, : min(len(value), tokens), 0]
                assert held.tolist() == value[: len(held)].tolist()
        kept = {}
        for row in range(rows):
            value = torch.rand(tokens)
            cache.at(row, 0, tokens)
            cache.update(*value.expand(2, 1, 1, 1, -1).transpose(-1, -2).contiguous(), 0)
            kept[row] = value
