"""Keys and values of many requests in preallocated tensors, a row each, of lengths of their own.

transformers' caches grow by copying all they hold at every step, and their rows have one length. Here a step writes
where each row ends, in place. Rows in use are the first ones, so that attention reads them without a gather.

Shapes: L layers, M rows that are held, C tokens that a row can hold, N rows of a step, T tokens of a step, K key-value
heads, d width of a head, m blocks of b tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

# The fewest tokens of a row, and the fewest rows, that memory is taken for.
LEAST_TOKENS, LEAST_ROWS = 64, 2


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


class RowCache(Cache):
    """A cache for one model. Say which rows and positions a step is about (`at` or `at_ends`), then call the model."""

    def __init__(self, max_rows: int, max_row_tokens: int, max_tokens: int, dtype: torch.dtype | None = None) -> None:
        """Memory is taken as it is needed.

        Args:
            max_rows: rows in use at once.
            max_row_tokens: tokens of one row.
            max_tokens: rows held x tokens that each can hold.
            dtype: of what is held; None is the type in which the model makes it.
        """
        super().__init__(layers=[])
        self._max_rows, self._max_row_tokens, self._max_tokens = max_rows, max_row_tokens, max_tokens
        self._dtype = dtype
        self._rows, self._tokens = 0, 0
        self._keys: list[Tensor] = []
        """[M, K, C, d] of each layer."""
        self._values: list[Tensor] = []
        self._index: tuple[Any, ...] = ()
        """Where the coming step writes."""
        self._seen: tuple[slice, ...] = ()
        """What it attends to."""
        self._past = 0

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether so many rows of so many tokens each can be held."""
        return rows <= self._max_rows and tokens <= self._max_row_tokens and rows * tokens <= self._max_tokens

    @torch.inference_mode()
    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for rows of so many tokens each, which `fits`; what rows hold stays.

        Memory grows by doubling. When a few long rows gave way to many short ones, it is laid out anew.
        """
        if rows <= self._rows and tokens <= self._tokens:
            return
        wide = max(self._tokens, min(max(_power_of_two(tokens), LEAST_TOKENS), self._max_row_tokens))
        self._tokens = wide if rows * wide <= self._max_tokens else self._max_tokens // rows
        high = max(self._rows, min(max(_power_of_two(rows), LEAST_ROWS), self._max_rows))
        self._rows = high if high * self._tokens <= self._max_tokens else rows
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                held = old.new_zeros(self._rows, old.shape[1], self._tokens, old.shape[3])
                kept = min(len(old), self._rows), slice(None), min(old.shape[2], self._tokens)
                held[: kept[0], :, : kept[2]] = old[: kept[0], :, : kept[2]]
                store[layer] = held

    def at(self, row: int, start: int, tokens: int) -> None:
        """The coming step writes so many tokens of one row, from position `start` on, and reads that row up to them."""
        rows = slice(row, row + 1)
        self._index = rows, slice(None), slice(start, start + tokens)
        self._seen = rows, slice(None), slice(0, start + tokens)
        self._past = start

    def at_ends(self, positions: Sequence[int], device: torch.device) -> None:
        """The coming step writes one token a row, row i at `positions[i]`, and reads the first rows up to them."""
        rows = torch.arange(len(positions), device=device)[:, None]
        self._index = rows, slice(None), torch.tensor(positions, device=device)[:, None]
        self._seen = slice(0, len(positions)), slice(None), slice(0, max(positions) + 1)
        self._past = max(positions)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values [N, K, T, d] of a layer; give all that its queries may attend to."""
        if layer_idx == len(self._keys):
            for store, states in ((self._keys, key_states), (self._values, value_states)):
                # Zeros: attention multiplies what it does not attend to by zero, which leaves no number but a NaN.
                shape = self._rows, states.shape[1], self._tokens, states.shape[3]
                store.append(states.new_zeros(shape, dtype=self._dtype))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if not isinstance(self._index[0], slice):
            # Indexing by two tensors puts their axes first: [N, 1, K, d].
            key_states, value_states = key_states.transpose(1, 2), value_states.transpose(1, 2)
        keys[self._index] = key_states.to(keys.dtype)
        values[self._index] = value_states.to(values.dtype)
        return keys[self._seen], values[self._seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the longest row of the coming step holds; each row's own length is in its position ids."""
        return self._past

    @property
    def held(self) -> list[Tensor]:
        """Keys of all layers, then values of all layers, [M, K, C, d] each."""
        return self._keys + self._values

    @torch.inference_mode()
    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of a row to another row."""
        for held in self.held:
            held[target, :, :tokens] = held[source, :, :tokens]


class BlockPool:
    """Keys and values of blocks of tokens, outside the rows, as the prefix cache keeps them."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        """Memory for `blocks` blocks of `block_tokens` tokens, taken at the first `save`."""
        self._blocks, self._block_tokens = blocks, block_tokens
        self._stores: list[Tensor] = []
        """[blocks, K, b, d]: the keys of each layer, then the values."""

    @torch.inference_mode()
    def save(self, cache: RowCache, row: int, places: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy the row's tokens into blocks: those of its i-th place, counted in blocks, into `blocks[i]`."""
        held = cache.held
        if not self._stores:
            shape = self._blocks, self._block_tokens
            self._stores = [x.new_empty(shape[0], x.shape[1], shape[1], x.shape[3]) for x in held]
        device = held[0].device
        index, chosen = torch.tensor(blocks, device=device), torch.tensor(places, device=device)
        end = (max(places) + 1) * self._block_tokens
        for x, store in zip(held, self._stores, strict=True):
            row_Kmbd = x[row, :, :end].unflatten(1, (-1, self._block_tokens))
            store[index] = row_Kmbd[:, chosen].transpose(0, 1)

    @torch.inference_mode()
    def restore(self, cache: RowCache, row: int, blocks: Sequence[int]) -> None:
        """Copy blocks to the beginning of a row, one after another."""
        held = cache.held
        index = torch.tensor(blocks, device=held[0].device)
        tokens = len(blocks) * self._block_tokens
        for x, store in zip(held, self._stores, strict=True):
            x[row, :, :tokens] = store[index].transpose(0, 1).flatten(1, 2)
