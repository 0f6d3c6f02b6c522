"""Requests and answers in vLLM's terms: `Sampling` to its parameters, its outputs to pieces."""

import re
from collections.abc import Mapping
from typing import Any, cast, get_args

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from gradientspace_ray.engine.contract import FinishReason, Piece, Sampling, TokenLogprob

MIN_TEMPERATURE = 1e-5
"""Less is greedy, as for the other engine; vLLM would raise it to 0.01 and draw."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    as_they_are = [character for character in alphabet if ord(character) < 256]
    others = sorted(set(range(256)) - {ord(character) for character in as_they_are})
    return {character: ord(character) for character in as_they_are} | dict(
        zip(alphabet[len(as_they_are) :], others, strict=True)
    )


BYTE_CHARACTERS = _byte_characters()


def sampling_fields(sampling: Sampling, room: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`, but for the kind of output.

    Args:
        sampling: what the request asks for, `max_tokens` resolved.
        room: tokens that the model's context has left.
    """
    return {
        "max_tokens": min(sampling.max_tokens, room),
        "temperature": 0.0 if sampling.temperature < MIN_TEMPERATURE else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # vLLM draws a fresh one for -1.
        "seed": None if sampling.seed is None else sampling.seed % 2**63,
        "stop": list(sampling.stop),
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "logprobs": sampling.top_logprobs,
        "ignore_eos": sampling.ignore_eos,
    }


class Answer:
    """One answer's pieces, made from vLLM's outputs (`RequestOutput`, kind DELTA) in their order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, top_logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._top_logprobs = top_logprobs
        self._tokens = 0
        self._begun = False

    def piece(self, output: Any) -> Piece | None:
        """The output's piece; None where it has nothing to say yet.

        Raises:
            RuntimeError: vLLM gave the request up.
        """
        completion = output.outputs[0]
        self._tokens += len(completion.token_ids)
        finish_reason = _finish_reason(completion.finish_reason)
        logprobs = list(completion.logprobs or ()) if self._top_logprobs is not None else []
        # A token that ended the answer, which a stop text does not name, is no part of it.
        if finish_reason == "stop" and not isinstance(completion.stop_reason, str):
            logprobs = logprobs[:-1]
        tokens = completion.token_ids[: len(logprobs)]
        if not (completion.text or finish_reason or logprobs):
            return None
        queued_s = None if self._begun else _queued_s(output.metrics)
        self._begun = True
        return Piece(
            text=completion.text,
            finish_reason=finish_reason,
            completion_tokens=self._tokens,
            logprobs=tuple(self._logprob(token, found) for token, found in zip(tokens, logprobs, strict=True)),
            cached_tokens=output.num_cached_tokens or 0,
            queued_s=queued_s,
        )

    def _logprob(self, token: int, found: Mapping[int, Any]) -> TokenLogprob:
        """A position's entries: the chosen token, and the most likely ones by their ranks, which begin at 1."""
        ranked = sorted(found.items(), key=lambda entry: entry[1].rank)
        top = [entry for entry in ranked if entry[1].rank <= (self._top_logprobs or 0)]
        return self._entry(token, found[token].logprob, tuple(self._entry(id_, it.logprob) for id_, it in top))

    def _entry(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        content = token_bytes(self._tokenizer, token)
        return TokenLogprob(content.decode(errors="replace"), logprob, tuple(content), top)


def _finish_reason(reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    if reason in get_args(FinishReason):
        return cast(FinishReason, reason)
    raise RuntimeError(f"vLLM ended the answer early ({reason})")


def _queued_s(metrics: Any) -> float | None:
    """Between the request's arrival in the engine and its first step, by the engine's clock."""
    return metrics.scheduled_ts - metrics.queued_ts if metrics is not None and metrics.scheduled_ts else None


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a token adds to a text, in UTF-8. It may begin or end inside of a character."""
    # Behind another token, because some tokenizers drop a space in front of the first.
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    text = str(tokenizer.decode([*before, token]))[len(tokenizer.decode(before)) :]
    if REPLACEMENT not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token))
    if byte := BYTE_TOKEN.fullmatch(name):
        return bytes([int(byte[1], 16)])
    if all(character in BYTE_CHARACTERS for character in name):
        return bytes(BYTE_CHARACTERS[character] for character in name)
    return text.encode()
