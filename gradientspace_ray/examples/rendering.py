"""Conversations as tokens: the one rendering that training, router and server share.

A conversation is rendered by the tokenizer's chat template and tokenised piece by piece: prompt, response, next prompt,
next response. A prompt's tokens are therefore the same whether or not a response follows, which tokenising the whole
text would not promise (a token may span the border).
"""

import datetime
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jinja2

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""
View = Literal["last_user", "first_user", "conversation"]
ASSISTANT, USER = "assistant", "user"
IGNORED = -100
"""Label of a token without loss."""
# For tokenizers without a chat template. The answer begins on its own line, so that it has no leading space.
FALLBACK_TEMPLATE = (
    "{{ beginning }}{% for message in messages %}{{ message['role'].capitalize() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


def _fixed_clock(day: datetime.datetime) -> str:
    """A template's `strftime_now` that always gives the same day.

    Some templates (Llama 3.2, SmolLM3) write the date into the text; ids, digests and prompts would change overnight.
    transformers turns a function among the template's arguments into text, so the clock is set in the template itself.
    The line break at the end keeps the white space that follows as it would be at the beginning.
    """
    directives = ("%-d", "%-m", *(f"%{letter}" for letter in "AaBbdmYyjHIMSpfzZ"))
    replaced = "".join(f".replace({directive!r}, {day.strftime(directive)!r})" for directive in directives)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


# The date that Llama's own templates fall back on.
FIXED_CLOCK = _fixed_clock(datetime.datetime(2024, 7, 26))


class Tokenizer(Protocol):
    """What rendering needs of a transformers tokenizer."""

    chat_template: Any
    eos_token: Any
    bos_token: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The conversation as text."""
        ...

    def encode(self, text: Any, **options: Any) -> Any:
        """The text as ids."""
        ...


class RenderingError(ValueError):
    """A conversation that cannot be rendered; the message says why in one line."""


@dataclass(frozen=True)
class Rendered:
    """One example, ready to be trained on."""

    text: str
    """From the first token to the end of the last answer."""
    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`; the token itself inside of an answer and its end of turn, else -100."""


class Renderer:
    """Conversations -> tokens, by a tokenizer's chat template.

    A tokenizer without one gets a plain template: `User:`, `Assistant:` and `System:` on lines of their own, and the
    end of sequence after each answer. A template that asks for the date always gets the same one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {"tokenize": False}
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template and "strftime_now" in template:
            self._options["chat_template"] = FIXED_CLOCK + template
        if not template:
            starts_with_bos = tokenizer.bos_token and tokenizer.encode("")[:1] == tokenizer.encode(
                tokenizer.bos_token, add_special_tokens=False
            )
            beginning = tokenizer.bos_token if starts_with_bos else ""
            self._options |= {"chat_template": FALLBACK_TEMPLATE, "beginning": beginning}

    def example(self, messages: Sequence[Message]) -> Rendered:
        """A conversation with labels on every answer: its content and the end of turn after it.

        Messages after the last answer are left out.

        Args:
            messages: at least one of the assistant's.

        Raises:
            RenderingError: there is no answer, or the conversation begins with one, or the template does not allow this
                conversation, or the text of an answered prompt does not begin with the text of the prompt.
        """
        text = ""
        input_ids: list[int] = []
        labels: list[int] = []
        for piece, is_response in self._pieces(until_last_answer(messages)):
            piece_ids = self._tokenizer.encode(piece, add_special_tokens=False)
            text += piece
            input_ids += piece_ids
            labels += piece_ids if is_response else [IGNORED] * len(piece_ids)
        return Rendered(text, input_ids, labels)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the assistant is about to answer.

        For any conversation that ends with an answer, `prompt(messages[:-1])` is where `example(messages).input_ids`
        begins.

        Raises:
            RenderingError: see `example`.
        """
        pieces = [*self._pieces(messages, awaits_answer=True)]
        return [id_ for piece, _ in pieces for id_ in self._tokenizer.encode(piece, add_special_tokens=False)]

    def _pieces(self, messages: Sequence[Message], awaits_answer: bool = False) -> Iterator[tuple[str, bool]]:
        """(text, whether it is a response) from the beginning of the conversation to its end, in turns."""
        if messages and messages[0]["role"] == ASSISTANT:
            raise RenderingError("a conversation begins with a system or user message")
        end = ""
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = self._text(messages[:index], add_generation_prompt=True)
            answered = self._text(messages[: index + 1])
            yield _after(end, prompt), False
            response = self._until_end_of_turn(_after(prompt, answered))
            yield response, True
            end = prompt + response
        if awaits_answer:
            yield _after(end, self._text(messages, add_generation_prompt=True)), False

    def _until_end_of_turn(self, response: str) -> str:
        """Without the white space that templates put behind the end of turn: a model stops before it."""
        eos = self._tokenizer.eos_token
        head, found, tail = response.rpartition(eos) if eos else ("", "", response)
        return head + found if found and not tail.strip() else response

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **self._options
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RenderingError(f"the chat template does not allow the roles {roles} ({error})") from error


def until_last_answer(messages: Sequence[Message]) -> list[Message]:
    """The messages up to the last one of the assistant.

    Raises:
        RenderingError: the assistant says nothing.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not answers:
        raise RenderingError("no message of the assistant to learn from")
    return list(messages[: answers[-1] + 1])


def prompt_view(messages: Sequence[Message], view: View) -> str:
    """The part of a conversation that the router reads; a final answer is never part of it.

    Training conversations (which end with the answer) and requests (which end before it) give the same text.

    Args:
        messages: the conversation.
        view: `last_user` or `first_user` message, or the whole `conversation`; a conversation of one user message
            and no other is that message's text, a longer one has the role in front of each message.
    """
    if messages and messages[-1]["role"] == ASSISTANT:
        messages = messages[:-1]
    user_texts = [message["content"] for message in messages if message["role"] == USER]
    if view == "conversation" and len(messages) != len(user_texts[:1]):
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    if not user_texts:
        return ""
    return user_texts[-1] if view == "last_user" else user_texts[0]


def example_id(text: str) -> str:
    """Sixteen hex digits of the SHA-256 of a rendered text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _after(prefix: str, text: str) -> str:
    if not text.startswith(prefix):
        raise RenderingError(
            "the chat template writes a prompt differently once it is answered, so its tokens cannot be told apart "
            "from the answer's; use a model whose template keeps earlier text as it is"
        )
    return text[len(prefix) :]
