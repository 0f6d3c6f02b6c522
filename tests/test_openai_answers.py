"""Answers, whole and streamed; read with the client's own types."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion
from openai.types.model import Model

from gradientspace_ray.engine.contract import Piece, TokenLogprob
from gradientspace_ray.serving.api_errors import server_error
from gradientspace_ray.serving.openai_answers import (
    ChatAnswer,
    CompletionAnswer,
    TextOffsets,
    answer_to,
    as_json,
    join_pieces,
    model_list,
    model_object,
)
from gradientspace_ray.serving.openai_parsing import parse_chat_request, parse_completion_request
from gradientspace_ray.serving.openai_streams import AnswerStream, error_event, event


def chat(**fields):
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat_request(json.dumps(body).encode())


def complete(**fields):
    return parse_completion_request(json.dumps({"model": "auto", "prompt": "once", **fields}).encode())


def token(text, logprob=-1.0, top=()):
    return TokenLogprob(text, logprob, tuple(text.encode()), top)


def read_events(sent):
    """The JSON of each event. Lines end wherever Python thinks so, which is more often than the standard says."""
    lines = sent.decode().splitlines()
    assert all(line == "" for line in lines[1::2])
    assert all(line.startswith("data: ") for line in lines[::2])
    return [line.removeprefix("data: ") for line in lines[::2]]


def read_stream(sent, chunk_type=ChatCompletionChunk):
    *events, done = read_events(sent)
    assert done == "[DONE]"
    if chunk_type is Completion:
        return [read_completion_chunk(text) for text in events]
    return [chunk_type.model_validate_json(text, strict=True) for text in events]


def read_completion_chunk(text):
    """The client has one type for whole completions and their chunks, which says that all have a finish reason."""
    body = json.loads(text)
    reasons = [choice["finish_reason"] for choice in body["choices"]]
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    chunk = Completion.model_validate_json(json.dumps(body), strict=True)
    for choice, reason in zip(chunk.choices, reasons, strict=True):
        choice.finish_reason = reason
    return chunk


def test_a_whole_chat():
    answer = answer_to(chat(n=2, logprobs=True), "story@12", "fp_12", {"expert": "story"})
    a, b = token("a", -0.5), token("é", float("-inf"))
    pieces = [Piece("aé", "stop", 3, (TokenLogprob("a", -0.5, (97,), (a, b)), b), 2), Piece("", "length", 0, (), 0)]
    body = answer.whole(pieces, [7, 7])
    read = ChatCompletion.model_validate_json(as_json(body), strict=True)
    assert read.id.startswith("chatcmpl-")
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in read.choices] == [
        (0, "aé", "stop"),
        (1, "", "length"),
    ]
    first, second = read.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [97])
    assert [(other.token, other.logprob) for other in first.top_logprobs] == [("a", -0.5), ("é", -9999.0)]
    assert (second.logprob, second.bytes, second.top_logprobs) == (-9999.0, [0xC3, 0xA9], [])
    assert read.choices[1].logprobs.content == []
    usage = read.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 3, 10)
    assert usage.prompt_tokens_details.cached_tokens == 2
    assert read.gradientspace == {"expert": "story"}
    assert "gradientspace" not in answer_to(chat(), "m", "fp").whole(pieces[1:], [1])
    assert answer_to(chat(), "m", "fp").whole(pieces[:1], [1])["choices"][0]["logprobs"] is None


def test_a_whole_completion_of_two_prompts():
    answer = answer_to(complete(prompt=["x", "y"], n=2, logprobs=1), "base", "fp_0")
    a, b = token("a", -0.5), token(" b", -2.0)
    pieces = [
        Piece("a b", "length", 2, (TokenLogprob("a", -0.5, (97,), (a,)), TokenLogprob(" b", -2.0, (32, 98), (a,)))),
        Piece("a", "stop", 2, (a,), 4),
        Piece("", "stop", 1, (), 3),
        Piece("b", "stop", 2, (b,)),
    ]
    read = Completion.model_validate_json(as_json(answer.whole(pieces, [5, 5, 6, 6])), strict=True)
    assert read.id.startswith("cmpl-")
    assert [choice.text for choice in read.choices] == ["a b", "a", "", "b"]
    logprobs = read.choices[0].logprobs
    assert logprobs.tokens == ["a", " b"]
    assert logprobs.token_logprobs == [-0.5, -2.0]
    assert logprobs.top_logprobs == [{"a": -0.5}, {"a": -0.5, " b": -2.0}]
    assert logprobs.text_offset == [0, 1]
    assert (read.usage.prompt_tokens, read.usage.completion_tokens) == (11, 7)
    assert read.usage.prompt_tokens_details.cached_tokens == 3


def test_parts_of_a_character_keep_their_own_names():
    parts = (TokenLogprob("\ufffd", -1.0, (0xE2, 0x82)), TokenLogprob("\ufffd", -2.0, (0xAC,)))
    logprobs = CompletionAnswer("m", "fp").logprobs(parts, TextOffsets())
    assert logprobs["tokens"] == ["bytes:\\xe2\\x82", "bytes:\\xac"]
    assert logprobs["text_offset"] == [0, 0]


def test_a_streamed_chat_chunk_by_chunk():
    request = chat(stream=True, stream_options={"include_usage": True})
    stream = AnswerStream(answer_to(request, "story@12", "fp_12", {"expert": "story"}), request)
    sent = stream.start(0, 3) + stream.add(0, Piece("", None, 1)) + stream.add(0, Piece("hi", None, 2))
    sent += stream.add(0, Piece("!", "stop", 4, (), 1)) + stream.end()
    *events, done = read_events(sent)
    assert done == "[DONE]"
    *chunks, last = map(json.loads, events)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "hi"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert [chunk["usage"] for chunk in chunks] == [None] * 4
    assert [chunk.get("gradientspace") for chunk in chunks] == [{"expert": "story"}, None, None, None]
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in (*chunks, last)}) == 1


def test_usage_is_in_a_stream_only_when_asked_for_and_on_every_chunk_when_that_is_asked_for():
    for options, expected in (
        (None, ["absent"] * 3),
        ({"include_usage": False, "continuous_usage_stats": True}, ["absent"] * 3),
        ({"include_usage": True, "continuous_usage_stats": True}, [0, 2, 2, 2]),
    ):
        request = chat(stream=True, stream_options=options)
        stream = AnswerStream(answer_to(request, "m", "fp"), request)
        sent = stream.start(0, 3) + stream.add(0, Piece("hi", "stop", 2)) + stream.end()
        bodies = [json.loads(text) for text in read_events(sent)[:-1]]
        usages = [body.get("usage", "absent") for body in bodies]
        assert [usage if usage == "absent" else usage["completion_tokens"] for usage in usages] == expected


def test_log_probabilities_of_text_that_is_held_back_are_sent():
    request = chat(stream=True, logprobs=True)
    stream = AnswerStream(answer_to(request, "m", "fp"), request)
    sent = stream.start(0, 1) + stream.add(0, Piece("", None, 1, (token("E"),)))
    sent += stream.add(0, Piece("", "stop", 2, (token("ND"),))) + stream.end()
    chunks = read_stream(sent)
    said = [chunk.choices[0].logprobs.content for chunk in chunks if chunk.choices[0].logprobs]
    assert [tokens[0].token for tokens in said] == ["E", "ND"]


TEXTS = st.text(st.characters(exclude_categories=()), max_size=6)


@st.composite
def generations(draw):
    """Choices with their pieces, and an order in which they come."""
    choices = []
    for _ in range(draw(st.integers(1, 4))):
        texts = draw(st.lists(TEXTS.filter(_is_unicode), min_size=1, max_size=5))
        spoken = [tuple(token(part, -float(draw(st.integers(0, 9)))) for part in text) for text in texts]
        counts = [sum(map(len, spoken[: index + 1])) for index in range(len(texts))]
        cached = draw(st.integers(0, 3))
        reason = draw(st.sampled_from(["stop", "length"]))
        choices.append(
            [
                Piece(text, reason if index == len(texts) - 1 else None, counts[index], spoken[index], cached)
                for index, text in enumerate(texts)
            ]
        )
    turns = [index for index, pieces in enumerate(choices) for _ in pieces]
    return choices, draw(st.permutations(turns))


def _is_unicode(text):
    return not any("\ud800" <= character <= "\udfff" for character in text)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("with_logprobs", [False, True])
@settings(max_examples=60, deadline=None)
@given(generation=generations())
def test_a_stream_adds_up_to_the_whole_answer(endpoint, with_logprobs, generation):
    choices, turns = generation
    asked = {"n": len(choices), "stream": True, "stream_options": {"include_usage": True}}
    if endpoint == "chat":
        request, chunk_type, whole_type = chat(**asked, logprobs=with_logprobs), ChatCompletionChunk, ChatCompletion
    else:
        request = complete(**asked, logprobs=0 if with_logprobs else None)
        chunk_type = whole_type = Completion
    answer = answer_to(request, "m", "fp")
    stream = AnswerStream(answer, request)
    sent = b"".join(stream.start(index, 5) for index in range(len(choices)))
    waiting = [iter(pieces) for pieces in choices]
    sent += b"".join(stream.add(index, next(waiting[index])) for index in turns) + stream.end()
    whole = answer.whole([join_pieces(pieces) for pieces in choices], [5] * len(choices))
    whole = whole_type.model_validate_json(as_json(whole), strict=True)

    *chunks, last = read_stream(sent, chunk_type)
    assert last.usage == whole.usage
    assert whole.usage.completion_tokens == sum(pieces[-1].completion_tokens for pieces in choices)
    for index, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert [part.finish_reason for part in mine if part.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason
        logprobs = [part.logprobs for part in mine if part.logprobs]
        if endpoint == "chat":
            assert mine[0].delta.role == "assistant"
            assert "".join(part.delta.content or "" for part in mine) == choice.message.content
            assert (choice.logprobs is not None) == with_logprobs
            if with_logprobs:
                assert [entry for part in logprobs for entry in part.content] == choice.logprobs.content
        else:
            assert "".join(part.text for part in mine) == choice.text
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if with_logprobs else ():
                assert [entry for part in logprobs for entry in getattr(part, name)] == getattr(choice.logprobs, name)
            if with_logprobs:
                for offset, name in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
                    assert choice.text[offset : offset + len(name)] == name


@settings(max_examples=100, deadline=None)
@given(text=TEXTS.filter(_is_unicode), data=st.data())
def test_offsets_count_the_characters_that_are_whole_before_a_token(text, data):
    content = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(content)))) | {0, len(content)})
    tokens = [TokenLogprob("?", 0.0, tuple(content[a:b])) for a, b in pairwise(cuts)]
    expected = [len(content[:start].decode(errors="ignore")) for start in cuts[: len(tokens)]]
    offsets = TextOffsets()
    half = len(tokens) // 2
    assert offsets.take(tokens[:half]) + offsets.take(tokens[half:]) == expected


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_an_event_is_valid_utf_8_on_one_line_whatever_the_text(text):
    sent = event({"a": [text, {text: float("nan")}]})
    (line,) = read_events(sent)
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.loads(line) == {"a": [expected, {expected: None}]}


def test_line_ends_of_every_kind_stay_inside_their_event():
    text = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029 é 😀"
    assert json.loads(read_events(event({"a": text}))[0]) == {"a": text}


def test_a_failure_in_a_stream_is_an_event_of_its_own():
    (line,) = read_events(error_event(server_error()))
    assert json.loads(line) == server_error().body


def test_answers_have_ids_of_their_own():
    assert len({ChatAnswer("m", "fp").whole([Piece("", "stop", 0)], [1])["id"] for _ in range(50)}) == 50


def test_a_choice_without_pieces_is_an_error():
    with pytest.raises(ValueError, match="at least one piece"):
        join_pieces([])


def test_models_read_back_with_the_client_s_own_type():
    listed = model_list([model_object("auto", 0, root="base"), model_object("a/b@1", 5)])
    assert listed["object"] == "list"
    assert [Model.model_validate(model, strict=True).id for model in listed["data"]] == ["auto", "a/b@1"]
    assert listed["data"][0]["root"] == "base"
