import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.examples.rendering import prompt_view
from gradientspace_ray.router.classifier import LinearHead, Router, RouterSettings, decide
from gradientspace_ray.router.conversation import Turns, decide_together, fold, route_conversations, turn_prompts

LABELS = ("sums", "stories", "code")
MARGIN = 0.2


def settings_for(**changes):
    values = {"encoder": "e", "view": "last_user", "max_tokens": 64, "labels": LABELS, "temperature": 1.0}
    return RouterSettings(**{**values, "threshold": 0.4, "min_similarity": 0.5, **changes})


def decision(*probabilities, strange=False):
    """Of one turn by itself."""
    logits = np.log(np.array([probabilities]))
    return decide(logits, settings_for(), np.array([0.0 if strange else 1.0]))[0]


SUMS, STORY, CODE = decision(0.8, 0.1, 0.1), decision(0.1, 0.8, 0.1), decision(0.1, 0.1, 0.8)
UNSURE = decision(0.34, 0.33, 0.33)
STRANGE = decision(0.1, 0.8, 0.1, strange=True)
probabilities = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda row: [x / sum(row) for x in row])
turns = st.lists(
    st.builds(lambda row, strange: decision(*row, strange=strange), probabilities, st.booleans()), min_size=1
)


@given(turns, st.floats(0, 0.5))
def test_every_step_follows_from_what_the_turn_before_was_told(turns, margin):
    told = [fold(turns[: count + 1], margin) for count in range(len(turns))]
    assert told[0] == turns[0]
    for before, alone, after in zip(told, turns[1:], told[1:], strict=False):
        lead = 0.0
        if before.expert and alone.expert:
            lead = alone.probabilities[alone.expert] - alone.probabilities[before.expert]
        may_move = alone.expert is not None and (before.expert is None or lead > margin)
        assert after.expert == (alone.expert if may_move else before.expert)
        assert after.probabilities == alone.probabilities
        if after.expert is None:
            assert after == alone
        else:
            assert (after.reason, after.confidence) == ("routed", alone.probabilities[after.expert])
            others = {name: p for name, p in alone.probabilities.items() if name != after.expert}
            assert others[after.second_best] == max(others.values())


@given(st.lists(st.floats(-MARGIN, MARGIN), min_size=1, max_size=12))
def test_two_experts_within_the_margin_never_take_turns(leads):
    turns = [decision((1 + lead) / 2 - 0.001, (1 - lead) / 2 - 0.001, 0.002) for lead in leads]
    assert {fold(turns[: count + 1], MARGIN + 1e-9).expert for count in range(len(turns))} == {turns[0].expert}


@pytest.mark.parametrize(
    ("turns", "expert", "reason"),
    [
        ([SUMS, STORY], "stories", "routed"),
        ([SUMS, STORY, SUMS], "sums", "routed"),
        ([SUMS, decision(0.4, 0.5, 0.1)], "sums", "routed"),
        ([SUMS, decision(0.3, 0.6, 0.1)], "stories", "routed"),
        # An aside says nothing against the expert, be it unclear or unlike everything.
        ([SUMS, UNSURE], "sums", "routed"),
        ([SUMS, STRANGE, STRANGE], "sums", "routed"),
        ([SUMS, STRANGE, decision(0.4, 0.5, 0.1)], "sums", "routed"),
        ([UNSURE, CODE], "code", "routed"),
        ([STRANGE, UNSURE], None, "low_confidence"),
        ([UNSURE, STRANGE], None, "out_of_distribution"),
    ],
)
def test_a_conversation_keeps_its_expert_unless_another_is_clearly_better(turns, expert, reason):
    told = fold(turns, MARGIN)
    assert (told.expert, told.reason) == (expert, reason)


def test_who_answers_is_not_second_best():
    kept = fold([SUMS, decision(0.4, 0.5, 0.1)], MARGIN)
    assert (kept.confidence, kept.second_best) == (pytest.approx(0.4), "stories")
    assert (STRANGE.confidence, STRANGE.second_best) == (pytest.approx(0.8), "stories")


def said(*texts):
    """A conversation: `s:`, `u:` and `a:` say whose message it is."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[text[0]], "content": text[2:]} for text in texts]


def test_turns_are_what_came_before_each_answer():
    messages = said("s:be brief", "a:hello", "u:one", "u:more", "a:1", "a:and", "u:two", "a:2", "u:three")
    assert turn_prompts(messages, "last_user") == ["more", "two", "three"]
    assert turn_prompts([*messages, *said("a:3")], "last_user") == ["more", "two", "three"]
    assert turn_prompts(messages, "first_user") == ["one"] * 3
    assert turn_prompts(messages, "conversation") == [prompt_view(messages[:end], "conversation") for end in (4, 7, 9)]
    assert turn_prompts(said("u:one"), "conversation") == ["one"]
    assert turn_prompts(said("s:be brief"), "last_user") == turn_prompts([], "last_user") == [""]


@given(st.lists(st.sampled_from("sua"), max_size=40), st.sampled_from(["last_user", "first_user", "conversation"]))
def test_the_last_turn_is_the_prompt_that_the_router_was_trained_on(roles, view):
    messages = said(*(f"{role}:{index}" for index, role in enumerate(roles)))
    prompts = turn_prompts(messages, view)
    assert prompts[-1] == prompt_view(messages, view)
    assert 1 <= len(prompts) <= 8


def test_a_long_conversation_forgets_four_turns_at_a_time():
    messages = said(*(text for turn in range(20) for text in (f"u:{turn}", "a:yes")))
    read = [turn_prompts(messages[: 2 * count + 1], "last_user") for count in range(20)]
    for count, prompts in enumerate(read):
        first = max(0, (count - 4) // 4 * 4)
        assert prompts == [str(turn) for turn in range(first, count + 1)]
    grown = sum(after[:-1] == before for before, after in itertools.pairwise(read))
    assert grown == 16, "but for turns 9, 13 and 17, a turn goes on from the same beginning as the one before"


@dataclass(eq=False)
class Signpost:
    """An encoder that reads the probabilities out of the prompt, and counts its calls."""

    calls: list[list[str]] = field(default_factory=list)

    def encode(self, prompts):
        self.calls.append(list(prompts))
        return np.log(np.array([[float(word) for word in prompt.split()] for prompt in prompts], np.float32))


def signpost_router(encoder, **changes):
    head = LinearHead(np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    return Router(encoder, head, settings_for(min_similarity=None, **changes))


def test_conversations_are_decided_turn_by_turn_and_encoded_together():
    encoder = Signpost()
    router = signpost_router(encoder)
    conversations = [
        said("u:.8 .1 .1", "a:so", "u:.4 .5 .1"),
        said("u:.1 .8 .1"),
        said("u:.8 .1 .1", "a:so", "u:.1 .1 .8", "a:so", "u:.3 .3 .4"),
    ]
    decisions = route_conversations(router, conversations)
    assert [told.expert for told in decisions] == ["sums", "stories", "code"]
    assert [told.confidence for told in decisions] == pytest.approx([0.4, 0.8, 0.4])
    assert len(encoder.calls) == 1
    assert route_conversations(router, []) == []


def test_routers_that_share_an_encoder_share_its_call():
    one, two = Signpost(), Signpost()
    routers = [
        signpost_router(one),
        signpost_router(two, switch_margin=0.05),
        signpost_router(one, labels=("a", "b", "c"), switch_margin=0.05),
    ]
    prompts = [".8 .1 .1", ".4 .5 .1"]
    decisions = decide_together([Turns(router, prompts) for router in routers])
    assert [told.expert for told in decisions] == ["sums", "stories", "b"]
    assert (one.calls, two.calls) == ([prompts * 2], [prompts])
