"""What may be asked of `/v1/chat/completions` and `/v1/completions`, and what that asks of an engine.

Follows https://platform.openai.com/docs/api-reference and what the `openai` client and load generators send. A
parameter that is known to change the answer and is not served (`openai_unserved`) is refused by name; one that changes
nothing is accepted, whatever it holds. Other names are ignored, as clients send their own, unless they look like a
known one that is misspelt (`openai_parsing`). Types are strict: "5" is no number, and neither is true.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic_core import PydanticKnownError

from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.serving.api_errors import bad_request
from gradientspace_ray.serving.messages import Message, Prompt
from gradientspace_ray.serving.openai_unserved import (
    Accepted,
    Neutral,
    Strict,
    Unserved,
    UnservedFlag,
    UnservedList,
    UnservedParameters,
)

MAX_MESSAGES = 512
MAX_KEYS = 1024


def _shape(value: Any) -> str | None:
    """Which member of a union a value is meant for: a text, a list of texts (also an empty one), of numbers, ..."""
    if not isinstance(value, list):
        return "str" if isinstance(value, str) else None
    first = type(value[0]).__name__ if value else "str"
    return f"list[{first}]"


def _union(expected: str) -> Discriminator:
    return Discriminator(_shape, custom_error_type="invalid_type", custom_error_message=f"should be {expected}")


def _limit_keys(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        context = {"field_type": "Dictionary", "max_length": MAX_KEYS, "actual_length": len(value)}
        raise PydanticKnownError("too_long", context)
    return value


# Lists fail at their first error and objects are limited before they are read: pydantic lists every error there is,
# which for a body of a megabyte takes it seconds.
OfFewKeys = BeforeValidator(_limit_keys)
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
SomeText = Annotated[Text, Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenLimit = Annotated[int, Field(ge=1, le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
# Held back from a stream until it is known whether they come, so they are short.
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"additionalProperties": False, "maxProperties": MAX_KEYS}),
    OfFewKeys,
]


class TextPart(Strict):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One message; what is not declared, such as `name`, is accepted and not used."""

    role: Literal["system", "developer", "user", "assistant"]
    audio: Unserved = None
    function_call: Unserved = None
    tool_calls: UnservedList = None
    content: Annotated[
        Annotated[Text, Tag("str")] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("list[dict]")],
        _union("a text or a list of text parts"),
    ]

    @property
    def text(self) -> str:
        """The content, whatever its parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Strict):
    """How to stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool | None = None
    """End with a chunk of token counts."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: token counts so far on every chunk."""
    include_obfuscation: bool | None = None
    """Accepted; there is no obfuscation."""


class Extension(Strict):
    """What this server takes beyond OpenAI's parameters."""

    model_config = ConfigDict(extra="forbid")
    explain: bool = False
    """Answer with the router's probabilities."""


class SamplingParameters(UnservedParameters):
    """What both endpoints take."""

    prompt_field: ClassVar[str]

    model: Annotated[Text, Field(max_length=256)]
    """`auto` (routed), `base`, `generalist`, an expert's name, or `name@digest`."""
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    """The same as `max_tokens`, and preferred to it."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """-1 and 0 are all tokens."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: (
        Annotated[
            Annotated[Stop, Tag("str")] | Annotated[list[Stop], Field(max_length=4), Tag("list[str]")],
            _union("a text or a list of up to 4 texts"),
        ]
        | None
    ) = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    """Token id -> -100 to 100."""
    ignore_eos: bool | None = None
    """Go on at an end-of-text token, up to the limit."""
    stream: bool | None = None
    stream_options: Annotated[StreamOptions, OfFewKeys] | None = None
    gradientspace: Annotated[Extension, OfFewKeys] | None = None

    # Of no effect on the answer.
    metadata: Accepted = None
    parallel_tool_calls: Accepted = None
    prediction: Accepted = None
    prompt_cache_key: Accepted = None
    prompt_cache_options: Accepted = None
    prompt_cache_retention: Accepted = None
    safety_identifier: Accepted = None
    service_tier: Accepted = None
    store: Accepted = None
    user: Accepted = None

    @property
    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """What is to be answered; each prompt gets `choices_per_prompt` answers."""

    @property
    @abstractmethod
    def top_alternatives(self) -> int | None:
        """How many alternatives come with each token's log-probability; None is no log-probability."""

    @property
    def choices_per_prompt(self) -> int:
        """`n`."""
        return 1 if self.n is None else self.n

    @property
    def choices(self) -> int:
        """Answers in all: choice `i` answers `prompts[i // choices_per_prompt]`."""
        return len(self.prompts) * self.choices_per_prompt

    @property
    def streams(self) -> bool:
        """Whether the answer comes as server-sent events."""
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_continuously(self) -> bool:
        """Whether every chunk of a stream has the token counts so far."""
        return (
            self.includes_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    @property
    def explains(self) -> bool:
        """Whether the answer is to come with the router's probabilities."""
        return self.gradientspace is not None and self.gradientspace.explain

    def token_limit(self, most_tokens: int) -> int:
        """Most tokens of each answer: what the request says, or `most_tokens`, of which 0 leaves it to the engine.

        Raises:
            ApiError: 400, the request asks for more than `most_tokens`.
        """
        field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if limit is not None and 0 < most_tokens < limit:
            message = f"{field} should be at most {most_tokens} on this server"
            raise bad_request(message, param=field, code="integer_above_max_value")
        return most_tokens if limit is None else limit

    def sampling(self, most_tokens: int, choice: int = 0) -> Sampling:
        """How one choice is generated.

        Args:
            most_tokens: most tokens of an answer on this server; 0 leaves it to the engine.
            choice: index of the choice. The choices of a prompt have seeds in a row, so that they differ and repeat;
                a prompt's choices do not depend on the prompts that are sent along.

        Raises:
            ApiError: 400, the request asks for more than `most_tokens`.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.token_limit(most_tokens),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=None if self.seed is None else _as_int64(self.seed + choice % self.choices_per_prompt),
            stop=tuple(stops),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
            top_logprobs=self.top_alternatives,
            ignore_eos=bool(self.ignore_eos),
        )


class ChatRequest(SamplingParameters):
    """Body of POST /v1/chat/completions."""

    prompt_field = "messages"

    add_special_tokens: UnservedFlag = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def conversation(self) -> list[Message]:
        """The messages as training examples have them: a developer's message is a system message."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in self.messages
        ]

    @property
    def prompts(self) -> list[Prompt]:
        """The conversation."""
        return [self.conversation]

    @property
    def top_alternatives(self) -> int | None:
        """`top_logprobs`, if there are to be log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingParameters):
    """Body of POST /v1/completions."""

    prompt_field = "prompt"

    prompt: Annotated[
        Annotated[SomeText, Tag("str")]
        | Annotated[list[SomeText], Field(min_length=1, fail_fast=True), Tag("list[str]")]
        | Annotated[TokenIds, Tag("list[int]")]
        | Annotated[list[TokenIds], Field(fail_fast=True), Tag("list[list]")],
        _union("a text, a list of texts, a list of token ids, or a list of such lists"),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    add_special_tokens: Annotated[Any, Neutral(True)] = None
    top_logprobs: Annotated[Any, Neutral(0)] = None

    @property
    def prompts(self) -> list[Prompt]:
        """The texts or lists of token ids, one or many."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [cast(Prompt, self.prompt)]
        return list(cast(list[Prompt], self.prompt))

    @property
    def top_alternatives(self) -> int | None:
        """`logprobs`."""
        return self.logprobs


def _as_int64(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
