"""Which tokens' keys and values are kept for later requests: an index of blocks, by adapter and all tokens before.

A token's keys and values depend on the adapter and on every token before it. So a block is found under its own tokens
and the block before it, and the first one under the adapter, whose id names one content for ever: nothing kept is ever
stale, and no adapter sees what another computed.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from gradientspace_ray.engine.cache import BlockPool, RowCache

BLOCK_TOKENS = 32
log = logging.getLogger(__name__)
Key = tuple["int | str | None", tuple[int, ...]]
"""What comes before a block (the block before it, or the adapter's id), and its tokens."""


@dataclass(frozen=True)
class NewBlocks:
    """Blocks to be filled: `blocks[i]` with the tokens of the sequence's `places[i]`-th block."""

    places: list[int]
    blocks: list[int]


class PrefixIndex:
    """Blocks of tokens that begin a sequence; the least recently used go first, and never before what follows them."""

    def __init__(self, blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """Hold at most so many blocks of `block_tokens` tokens each."""
        self._free = list(range(blocks))
        self._block_tokens = block_tokens
        self._held: OrderedDict[Key, int] = OrderedDict()
        """The least recently used first. A block is used after those that follow it, so that they go before it does."""

    def __len__(self) -> int:
        return len(self._held)

    def match(self, adapter_id: str | None, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the beginning of a sequence, as much of it as there is."""
        found: list[tuple[Key, int]] = []
        before: int | str | None = adapter_id
        for block_tokens in self._split(tokens):
            key = (before, block_tokens)
            if key not in self._held:
                break
            before = self._held[key]
            found.append((key, before))
        for key, _ in reversed(found):
            self._held.move_to_end(key)
        return [block for _, block in found]

    def insert(self, adapter_id: str | None, tokens: Sequence[int]) -> NewBlocks:
        """Keep a sequence's whole blocks, as many as there is room for, and tell which are not filled yet."""
        known = self.match(adapter_id, tokens)
        chain: list[Key] = []
        added = NewBlocks([], [])
        before: int | str | None = adapter_id
        for place, block_tokens in enumerate(self._split(tokens)):
            key = (before, block_tokens)
            if place < len(known):
                before = known[place]
            else:
                block = self._take(len(chain))
                if block is None:
                    break
                self._held[key] = before = block
                added.places.append(place)
                added.blocks.append(block)
            chain.append(key)
        for key in reversed(chain):
            self._held.move_to_end(key)
        return added

    def _split(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        size = self._block_tokens
        return [tuple(tokens[end - size : end]) for end in range(size, len(tokens) + 1, size)]

    def _take(self, in_use: int) -> int | None:
        """A free block, evicting if needed, but none of the `in_use` most recently used."""
        if self._free:
            return self._free.pop()
        if len(self._held) <= in_use:
            return None
        return self._held.popitem(last=False)[1]


class PrefixCache:
    """Keys and values that requests left, for those that begin alike under the same adapter."""

    def __init__(self, tokens: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """Keep at most so many tokens; 0 keeps none."""
        self._blocks, self._block_tokens = tokens // block_tokens, block_tokens
        self.clear()
        self.looked_up, self.hit = 0, 0
        """Prompt tokens looked up, and those of them that were there."""

    def clear(self) -> None:
        """Forget everything."""
        self._index = PrefixIndex(self._blocks, self._block_tokens)
        self._pool = BlockPool(self._blocks, self._block_tokens)

    def restore(self, cache: RowCache, row: int, adapter_id: str | None, prompt: Sequence[int]) -> int:
        """Fill the beginning of a row with what is kept of a prompt. The last token is always left to compute.

        Returns:
            Number of tokens that need not be computed.
        """
        blocks = self._index.match(adapter_id, prompt[:-1])
        if blocks:
            self._pool.restore(cache, row, blocks)
        self.looked_up += len(prompt)
        self.hit += len(blocks) * self._block_tokens
        return len(blocks) * self._block_tokens

    def save(self, cache: RowCache, row: int, adapter_id: str | None, tokens: Sequence[int]) -> None:
        """Keep what a row holds of these tokens, from its beginning on."""
        new = self._index.insert(adapter_id, tokens)
        if not new.blocks:
            return
        try:
            self._pool.save(cache, row, new.places, new.blocks)
        except RuntimeError:
            # Most likely there is no memory; the index names blocks that were not filled.
            log.exception("no keys and values are kept for later requests any more")
            self._blocks = 0
            self.clear()
