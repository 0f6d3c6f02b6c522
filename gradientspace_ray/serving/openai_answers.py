"""What `/v1/chat/completions`, `/v1/completions` and `/v1/models` answer; openai_streams.py has the streams.

Follows https://platform.openai.com/docs/api-reference: a choice of a whole answer is one `Piece`, all of them joined.
"""

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

from pydantic_core import PydanticSerializationError, to_json

from gradientspace_ray.engine.contract import Piece, TokenLogprob
from gradientspace_ray.serving.openai_requests import ChatRequest, SamplingParameters

# OpenAI's word for "very unlikely"; JSON has no infinity.
_LEAST_LOGPROB = -9999.0


def as_json(payload: Any) -> bytes:
    """JSON in valid UTF-8, whatever the texts: a lone surrogate becomes U+FFFD, a number that is none null."""
    try:
        return to_json(payload, inf_nan_mode="null")
    except PydanticSerializationError:
        return to_json(_without_surrogates(payload), inf_nan_mode="null")


def _without_surrogates(payload: Any) -> Any:
    if isinstance(payload, str):
        return payload.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(payload, Mapping):
        return {_without_surrogates(key): _without_surrogates(value) for key, value in payload.items()}
    if isinstance(payload, list | tuple):
        return [_without_surrogates(value) for value in payload]
    return payload


def model_object(model_id: str, created: int, **details: Any) -> dict[str, Any]:
    """One entry of the list of models."""
    return {"id": model_id, "object": "model", "created": created, "owned_by": "gradientspace", **details}


def model_list(models: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": list(models)}


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """A choice's pieces as one.

    Raises:
        ValueError: there are none.
    """
    if not pieces:
        raise ValueError("a choice has at least one piece")
    return Piece(
        text="".join(piece.text for piece in pieces),
        finish_reason=pieces[-1].finish_reason,
        completion_tokens=pieces[-1].completion_tokens,
        logprobs=tuple(token for piece in pieces for token in piece.logprobs),
        cached_tokens=max(piece.cached_tokens for piece in pieces),
        queued_s=pieces[0].queued_s,
    )


@dataclass
class Counts:
    """Token counts of an answer. A prompt counts once, however many choices it has."""

    choices_per_prompt: int = 1
    prompt: dict[int, int] = field(default_factory=dict)
    """Choice -> tokens of its prompt."""
    completion: dict[int, int] = field(default_factory=dict)
    """Choice -> tokens generated so far."""
    cached: dict[int, int] = field(default_factory=dict)
    """Choice -> tokens of its prompt that came out of the prefix cache."""

    def add(self, choice: int, piece: Piece) -> None:
        """Count a piece."""
        self.completion[choice] = piece.completion_tokens
        self.cached[choice] = max(piece.cached_tokens, self.cached.get(choice, 0))

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        prompt, cached = self._of_prompts(self.prompt), self._of_prompts(self.cached)
        completion = sum(self.completion.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _of_prompts(self, tokens: Mapping[int, int]) -> int:
        return sum(count for choice, count in tokens.items() if choice % self.choices_per_prompt == 0)


class TextOffsets:
    """Where tokens begin in the text of a choice, in characters; a token within a character begins with it."""

    def __init__(self) -> None:
        """Start at the text's first character."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(self, tokens: Iterable[TokenLogprob]) -> list[int]:
        """The offsets of the tokens that come next."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(token.bytes)))
        return offsets


@dataclass(frozen=True)
class Answer(ABC):
    """What stays the same through one answer; the two endpoints word it differently."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    opening: ClassVar[dict[str, Any] | None]
    """What the first chunk of a choice says before there is any text."""
    nothing: ClassVar[dict[str, Any]]
    """What the last chunk of a choice says."""

    model: str
    """The model that answers, which is not always the one that was asked for."""
    fingerprint: str
    """Changes when the model's weights do."""
    _: KW_ONLY
    choices_per_prompt: int = 1
    with_logprobs: bool = False
    extension: Mapping[str, Any] | None = None
    """The `gradientspace` object: on the whole answer, or on the first chunk of a stream."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time."""
    unique: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The id's own part."""

    @abstractmethod
    def message(self, text: str) -> dict[str, Any]:
        """The text of a choice of a whole answer."""

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """The next part of a choice's text."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: TextOffsets) -> dict[str, Any]:
        """Log-probabilities of a choice's next tokens."""

    def whole(self, choices: Sequence[Piece], prompt_tokens: Sequence[int]) -> dict[str, Any]:
        """The answer at once.

        Args:
            choices: of each choice, its pieces joined.
            prompt_tokens: of each choice, the tokens of its prompt.
        """
        counts = Counts(self.choices_per_prompt, dict(enumerate(prompt_tokens)))
        bodies = []
        for index, piece in enumerate(choices):
            counts.add(index, piece)
            logprobs = self.logprobs(piece.logprobs, TextOffsets()) if self.with_logprobs else None
            reason = {"finish_reason": piece.finish_reason, "logprobs": logprobs}
            bodies.append({"index": index, **self.message(piece.text), **reason})
        return self.frame(self.whole_object, bodies) | {"usage": counts.body} | self.extra

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What every body and every chunk has."""
        return {
            "id": self.id_prefix + self.unique,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    @property
    def extra(self) -> dict[str, Any]:
        """The extension as a part of a body."""
        return {} if self.extension is None else {"gradientspace": dict(self.extension)}


class ChatAnswer(Answer):
    """An answer of /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    opening: ClassVar[dict[str, Any] | None] = {"delta": {"role": "assistant", "content": ""}}
    nothing: ClassVar[dict[str, Any]] = {"delta": {}}

    def message(self, text: str) -> dict[str, Any]:
        """A message of the assistant."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        """A message's next part."""
        return {"delta": {"content": text}}

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: TextOffsets) -> dict[str, Any]:
        """One object per token, with its alternatives, most likely first."""
        content = [
            {**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]} for token in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    """An answer of /v1/completions."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    opening: ClassVar[dict[str, Any] | None] = None
    nothing: ClassVar[dict[str, Any]] = {"text": ""}

    def message(self, text: str) -> dict[str, Any]:
        """The text."""
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        """The next part of the text."""
        return {"text": text}

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: TextOffsets) -> dict[str, Any]:
        """Parallel lists; the alternatives of a token include itself."""
        return {
            "tokens": [_token_name(token) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                {_token_name(other): _finite(other.logprob) for other in (*token.top, token)} for token in tokens
            ],
            "text_offset": offsets.take(tokens),
        }


def answer_to(
    request: SamplingParameters, model: str, fingerprint: str, extension: Mapping[str, Any] | None = None
) -> Answer:
    """The answer that a request asks for; see `Answer` for the arguments."""
    kind = ChatAnswer if isinstance(request, ChatRequest) else CompletionAnswer
    return kind(
        model,
        fingerprint,
        choices_per_prompt=request.choices_per_prompt,
        with_logprobs=request.top_alternatives is not None,
        extension=extension,
    )


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": _finite(token.logprob), "bytes": list(token.bytes)}


def _token_name(token: TokenLogprob) -> str:
    r"""The token, or `bytes:\xe2\x82` for a part of a character: OpenAI's way to keep such tokens apart."""
    content = bytes(token.bytes)
    try:
        content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
    return token.token


def _finite(logprob: float) -> float:
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
