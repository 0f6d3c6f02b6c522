"""What the answers of a replica on vLLM add up to, in the terms of the package's own engine."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gradientspace_ray.engine.rounds import EngineStatistics


class AnswerCounts:
    """Answers under way, and tokens since the replica's start."""

    def __init__(self) -> None:
        self._rows = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generated_tokens: Counter[str | None] = Counter()

    @contextmanager
    def answer(self, adapter: str | None, prompt_tokens: int) -> Iterator[Callable[[Any], None]]:
        """One answer, for the length of the block.

        Args:
            adapter: its id; None is the base model.
            prompt_tokens: counted with the first output, when they have been read.

        Yields:
            What takes each of vLLM's outputs (`RequestOutput`, kind DELTA).
        """
        begun = False

        def count(output: Any) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self._prompt_tokens += prompt_tokens
                self._cached_tokens += output.num_cached_tokens or 0
            self._generated_tokens[adapter] += len(output.outputs[0].token_ids)

        self._rows += 1
        try:
            yield count
        finally:
            self._rows -= 1

    def statistics(self, leases: Mapping[str, int], *, loads: int, load_s: float, evictions: int) -> EngineStatistics:
        """The state as of now; vLLM does not say which requests wait.

        Args:
            leases: adapter -> how many use it.
            loads: total.
            load_s: total, seconds.
            evictions: total.
        """
        return EngineStatistics(
            rows=self._rows,
            leases=dict(leases),
            loads=loads,
            load_s=load_s,
            evictions=evictions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=dict(self._generated_tokens),
        )
