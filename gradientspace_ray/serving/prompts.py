"""From what a request asks to the tokens that an engine reads: the same for every engine."""

from typing import cast

from transformers import PreTrainedTokenizerBase

from gradientspace_ray.examples.rendering import Renderer
from gradientspace_ray.serving.messages import Prompt, is_conversation


class PromptReader:
    """Tokens of prompts. Conversations are rendered as training rendered them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The tokens; it blocks for as long as a long prompt takes.

        Raises:
            RenderingError: the chat template does not allow the conversation.
        """
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
            return ids
        return self._renderer.prompt(prompt) if is_conversation(prompt) else cast(list[int], prompt)


def parameter_of(prompt: Prompt) -> str:
    """What the request calls the prompt."""
    return "messages" if is_conversation(prompt) else "prompt"
