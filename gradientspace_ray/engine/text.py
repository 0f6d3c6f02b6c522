"""From tokens to text: decoding them piece by piece, stopping, and the bytes of one token."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gradientspace_ray.engine.contract import TokenLogprob

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
"""A space, in the vocabularies of SentencePiece."""
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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


class AnswerText:
    """The text of one answer, as its tokens come, and which log-probabilities belong to which part of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._decoder = TextDecoder(tokenizer)
        self._stops = StopMatcher(stop)
        self._decoded = 0
        """Characters decoded so far."""
        self._shown = 0
        self._held: list[tuple[int, TokenLogprob]] = []
        """Log-probabilities that did not come out yet, each with where its token's text begins."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self._stops.found

    def push(self, token: int, logprob: TokenLogprob | None) -> tuple[str, tuple[TokenLogprob, ...]]:
        """What can be shown after this token, maybe nothing."""
        if logprob is not None:
            self._held.append((self._decoded, logprob))
        text = self._decoder.push(token)
        self._decoded += len(text)
        return self._show(self._stops.push(text))

    def flush(self) -> tuple[str, tuple[TokenLogprob, ...]]:
        """What is left when no more tokens come. Tokens that lie wholly in a stop text are no part of the answer."""
        text = ""
        if not self._stops.found:
            text = self._stops.push(self._decoder.flush())
            text += self._stops.flush()
        shown, logprobs = self._show(text)
        if not self._stops.found:
            logprobs += tuple(logprob for _, logprob in self._held)
        self._held = []
        return shown, logprobs

    def _show(self, text: str) -> tuple[str, tuple[TokenLogprob, ...]]:
        self._shown += len(text)
        ready = sum(start < self._shown for start, _ in self._held)  # starts never decrease
        logprobs = tuple(logprob for _, logprob in self._held[:ready])
        del self._held[:ready]
        return text, logprobs


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes]:
    """A function from a token to its bytes, which may hold a part of a character.

    Byte-level vocabularies spell each byte as a character (GPT-2's table), those of SentencePiece fall back to pieces
    like `<0xE2>`; of any other, a token's bytes are what it decodes to. Special tokens are spelled as they are.
    """
    added = {token: text.content for token, text in tokenizer.added_tokens_decoder.items()}
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    kinds = json.dumps(json.loads(decoder.__getstate__())) if decoder is not None else ""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def of_token(token: int) -> bytes:
        if token in added:
            return added[token].encode()
        piece: Any = tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # models have more tokens than their tokenizers, to make the number round
            return b""
        if '"ByteLevel"' in kinds:
            return bytes(byte_of[character] for character in piece)
        if '"ByteFallback"' in kinds:
            match = BYTE_PIECE.fullmatch(piece)
            return bytes([int(match[1], 16)]) if match else piece.replace(WORD_MARK, " ").encode()
        return str(tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()

    return of_token
