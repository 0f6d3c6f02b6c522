import io
import json
import logging
import math
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.serving import request_log
from gradientspace_ray.serving.request_log import RequestRecord, write


@pytest.fixture
def lines():
    """What was logged so far, parsed."""
    before = request_log.logger.handlers[:], request_log.logger.level, request_log.logger.propagate
    stream = io.StringIO()
    request_log.configure(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    request_log.logger.handlers[:], request_log.logger.level, request_log.logger.propagate = before


RECORD = RequestRecord(
    request_id="r-1", path="/v1/chat/completions", key="alice", model="auto", expert="a@1", release="r1",
    reason="routed", confidence=0.83456789, status=200, stream=True, prompt_tokens=7, completion_tokens=5,
    cached_tokens=4, router_ms=4.0, queue_ms=1.23456, ttft_ms=300.0, total_ms=1500.0,
    prompt=[{"role": "user", "content": "my secret"}], answer="the secret",
)  # fmt: skip


def test_a_request_is_one_line(lines):
    write(RECORD)
    (line,) = lines()
    written = datetime.fromisoformat(line.pop("time"))
    assert abs((datetime.now(timezone.utc) - written).total_seconds()) < 60
    assert line == {
        "request_id": "r-1", "path": "/v1/chat/completions", "key": "alice", "model": "auto", "expert": "a@1",
        "release": "r1", "reason": "routed", "confidence": 0.8346, "status": 200, "error": None, "stream": True,
        "disconnected": False, "prompt_tokens": 7, "completion_tokens": 5, "cached_tokens": 4, "router_ms": 4.0,
        "queue_ms": 1.2346, "ttft_ms": 300.0, "total_ms": 1500.0,
    }  # fmt: skip


def test_texts_are_written_where_asked_for(lines):
    write(RECORD)
    write(RECORD, with_texts=True)
    without, with_texts = lines()
    assert "secret" not in json.dumps(without)
    assert "secret" not in repr(RECORD)
    assert with_texts["prompt"] == [{"role": "user", "content": "my secret"}]
    assert with_texts["answer"] == "the secret"


def test_a_refused_request_has_what_is_known(lines):
    write(RequestRecord("r-2", status=401, error="invalid_api_key"))
    (line,) = lines()
    assert {name: value for name, value in line.items() if value not in (None, "", False) and name != "time"} == {
        "request_id": "r-2", "status": 401, "error": "invalid_api_key",
    }  # fmt: skip


@given(model=st.text(), prompt=st.text() | st.binary() | st.floats(), confidence=st.floats())
def test_whatever_a_client_sends_stays_one_line_of_json(model, prompt, confidence):
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request_log.logger, "handlers", [])
        patch.setattr(request_log.logger, "propagate", True)
        request_log.configure(stream)
        write(RequestRecord("r", model=model, confidence=confidence, prompt=[prompt]), with_texts=True)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert text.isascii()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["model"] == model[:200]
    assert line["confidence"] is None or math.isclose(line["confidence"], confidence, abs_tol=1e-4)


def test_surrogates_and_line_separators(lines):
    write(RequestRecord("r", model="\ud800\u2028\r\n\0\x85"))
    assert lines()[0]["model"] == "\ud800\u2028\r\n\0\x85"


def test_a_log_that_cannot_be_written_does_not_disturb_the_request(lines, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    request_log.configure(Full())
    write(RECORD, with_texts=True)
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "secret" not in told


def test_what_is_no_json_is_written_as_text(lines):
    write(RequestRecord("r", prompt=[{1}, b"x"]), with_texts=True)
    assert lines()[0]["prompt"] == ["{1}", "b'x'"]


def test_nothing_is_written_before_it_is_configured(capsys, caplog):
    write(RECORD)
    assert capsys.readouterr() == ("", "")


def test_configuring_again_does_not_write_twice(lines, caplog):
    again = io.StringIO()
    request_log.configure(again)
    write(RECORD)
    assert len(again.getvalue().splitlines()) == 1
    assert lines() == []
    assert not caplog.records  # nor does the root logger
    assert logging.getLogger("gradientspace.requests") is request_log.logger
