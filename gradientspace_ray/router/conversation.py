"""The expert of a conversation: it keeps the one it has unless another is clearly better.

Nothing is stored. A conversation is sent whole with every request, so what its earlier turns were told is decided again
from their prompts, and every replica decides alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradientspace_ray.examples.rendering import ASSISTANT, USER, Message, View, prompt_view
from gradientspace_ray.router.classifier import Decision, Encoder, Router

TURNS_READ = 8
TURNS_FORGOTTEN = 4
"""At once, so that the turns between two such steps are decided from the same beginning."""


@dataclass(frozen=True)
class Turns:
    """A conversation as a router reads it."""

    router: Router
    prompts: list[str]
    """Of `turn_prompts`."""


def turn_prompts(messages: Sequence[Message], view: View) -> list[str]:
    """What the router read, or would have read, at each turn of a conversation: the last one is the request's own.

    A turn is all that came before an answer; it needs a message of the user. Of a long conversation the last 5 to 8
    turns are read: from the ninth turn on, and then at every fourth, the four oldest are forgotten, and the
    conversation begins, as far as the router is concerned, with the turn after them.

    Args:
        messages: the conversation, with or without the answer to its last turn.
        view: the router's; with `first_user` all turns are the same.
    """
    end = len(messages) - 1 if messages and messages[-1]["role"] == ASSISTANT else len(messages)
    earlier = [
        index
        for index in range(1, end)
        if messages[index]["role"] == ASSISTANT
        and messages[index - 1]["role"] != ASSISTANT
        and any(message["role"] == USER for message in messages[:index])
    ]
    steps = max(0, -(-(len(earlier) + 1 - TURNS_READ) // TURNS_FORGOTTEN))
    read = [messages[:index] for index in earlier[steps * TURNS_FORGOTTEN :]]
    return [prompt_view(part, view) for part in (*read, messages)]


def route_conversations(router: Router, conversations: Sequence[Sequence[Message]]) -> list[Decision]:
    """Who answers each conversation, as an endpoint decides it."""
    return decide_together([Turns(router, turn_prompts(messages, router.view)) for messages in conversations])


def decide_together(conversations: Sequence[Turns]) -> list[Decision]:
    """Who answers each conversation. Prompts of all turns are encoded in one call for each encoder."""
    ends = np.cumsum([0, *(len(turns.prompts) for turns in conversations)]).tolist()
    prompts = [prompt for turns in conversations for prompt in turns.prompts]
    encoders: dict[Encoder, list[int]] = {}
    for index, turns in enumerate(conversations):
        encoders.setdefault(turns.router.encoder, []).extend(range(ends[index], ends[index + 1]))
    encodings: dict[int, np.ndarray] = {}
    for encoder, places in encoders.items():
        encodings |= dict(zip(places, encoder.encode([prompts[place] for place in places]), strict=True))
    decisions = []
    for turns, start, stop in zip(conversations, ends, ends[1:], strict=False):
        encodings_TH = np.stack([encodings[place] for place in range(start, stop)])
        decisions.append(fold(turns.router.decide(encodings_TH), turns.router.settings.switch_margin))
    return decisions


def fold(turns: Sequence[Decision], margin: float) -> Decision:
    """The decision at the last of these turns, each of which was decided by itself.

    The first turn's decision stands at the first turn. At every further one:

    * Where the turn is sent to another expert whose probability is higher than the kept one's by more than `margin`,
      that expert answers from there on. Otherwise the conversation keeps its expert.
    * Where the turn abstains, for either reason, it keeps its expert as well. "Thanks!" or "explain that" are unlike
      any training prompt if they are read alone, and say nothing against the expert that they are about; and experts
      go on from the generalist, so that one which is asked something foreign answers little worse. A conversation that
      wanders off for good goes to the generalist when the turns that spoke for the expert are forgotten.
    * A conversation that the generalist has answered so far goes to the first expert that a turn is sent to.

    An expert that is kept has its own probability at the last turn as its confidence, and the reason `routed`.
    """
    expert = None
    for turn in turns:
        expert = _next_expert(expert, turn, margin)
    last = turns[-1]
    if expert is None or expert == last.expert:
        return last
    return replace(last, expert=expert, confidence=last.probabilities[expert], reason="routed")


def _next_expert(kept: str | None, turn: Decision, margin: float) -> str | None:
    if kept is None or turn.expert is None:
        return kept or turn.expert
    lead = turn.probabilities[turn.expert] - turn.probabilities[kept]
    return turn.expert if lead > margin else kept
