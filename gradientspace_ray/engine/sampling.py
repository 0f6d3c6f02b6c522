"""From logits to text: choosing tokens, decoding them piece by piece, and stopping.

Shapes: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Below this a temperature is greedy: logits divided by less leave float32's range.
MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How one answer is generated."""

    max_tokens: int
    temperature: float = 1.0
    """0, or less than `MIN_TEMPERATURE`, is greedy."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv 1904.09751): the fewest most likely tokens that hold this much probability."""
    seed: int | None = None
    """Equal seeds give equal answers; None draws a fresh one."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""


class Sampler:
    """Chooses the tokens of one answer, with a random state of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next token. Draws happen on the CPU in float32, so that a seed means the same on every device."""
        if self._sampling.temperature < MIN_TEMPERATURE:
            return int(logits_V.argmax())
        probabilities_V = torch.softmax(logits_V.float().cpu() / self._sampling.temperature, dim=-1)
        if self._sampling.top_p >= 1:
            return int(torch.multinomial(probabilities_V, 1, generator=self._generator))
        sorted_V, tokens_V = probabilities_V.sort(descending=True, stable=True)
        beyond_V = sorted_V.cumsum(0) - sorted_V >= self._sampling.top_p
        beyond_V[0] = False
        sorted_V[beyond_V] = 0
        return int(tokens_V[torch.multinomial(sorted_V, 1, generator=self._generator)])


class TextDecoder:
    """Decodes tokens one by one; text comes out only when later tokens can no longer change it.

    A character may span several tokens, and some tokenizers strip or join at the start of a text. So each new token is
    decoded behind the last complete piece, and what that piece alone gives is cut off. (`tokenizers.DecodeStream` does
    the same, but cannot be flushed.) The pieces joined are the decoding of all tokens at once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        """Tokens of the last piece that came out."""
        self._pending: list[int] = []
        """Tokens since then."""

    def push(self, token: int) -> str:
        """The text that this token completes, maybe none."""
        self._pending.append(token)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character are replaced."""
        text = self._new_text()
        self._context, self._pending = self._pending, []
        return text

    def _new_text(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopMatcher:
    """Finds stop texts in a stream of text, across the borders of its pieces.

    Text that may be the beginning of a stop text is held back until it is known to be none.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False
        """Whether a stop text came; nothing comes out after it."""

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown now."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        kept = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
