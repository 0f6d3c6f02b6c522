import asyncio
import gc
import hashlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.serving import keys as keys_module
from gradientspace_ray.serving.keys import Admission, Key, Keys, TooManyError, UnauthorisedError, is_loopback, sha256_of

ALICE = Key("alice", sha256_of("sk-alice"), requests_per_minute=3, concurrent_requests=2)
BOB = Key("bob", sha256_of("sk-bob"))
OPS = Key("ops", sha256_of("sk-ops"))
KEYS = Keys(clients=(ALICE, BOB), admins=(OPS,))


class Clock:
    def __init__(self):
        self.now_s = 1e6

    def __call__(self):
        return self.now_s


# --- whose key it is


@pytest.mark.parametrize("header", ["Bearer sk-alice", "bearer sk-alice", "BEARER   sk-alice ", " Bearer sk-alice"])
def test_a_key_is_found(header):
    assert KEYS.client(header) is ALICE
    assert Keys((BOB, ALICE), (OPS,)).client(header) is ALICE


@pytest.mark.parametrize("header", [None, "", "sk-alice", "Bearer", "Bearer ", "Basic sk-alice", "Bearersk-alice"])
def test_no_key_says_what_to_send(header):
    with pytest.raises(UnauthorisedError, match=r"no API key; send the header Authorization: Bearer KEY"):
        KEYS.client(header)


@pytest.mark.parametrize("token", ["sk-alic", "sk-alice2", "SK-ALICE", "sk-alice sk-alice", ALICE.sha256.hex(), "é"])
def test_another_key_is_refused_without_being_told(token):
    with pytest.raises(UnauthorisedError) as refusal:
        KEYS.client(f"Bearer {token}")
    assert "not valid" in str(refusal.value)
    assert token not in str(refusal.value)


def test_clients_and_admins_are_strangers_to_each_other():
    assert KEYS.admin("Bearer sk-ops") is OPS
    for ask, token in ((KEYS.client, "sk-ops"), (KEYS.admin, "sk-alice")):
        with pytest.raises(UnauthorisedError, match="not valid"):
            ask(f"Bearer {token}")


def test_without_client_keys_anyone_may_ask_but_admin_routes_stay_closed():
    nobody = Keys()
    assert not nobody.required
    assert nobody.client(None) is None
    assert nobody.client("Bearer anything") is None
    with pytest.raises(UnauthorisedError, match="no admin key"):
        nobody.admin("Bearer anything")
    assert KEYS.required
    assert not Keys(admins=(OPS,)).required


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(own, asked):
        compared.append(own)
        return own == asked

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    KEYS.client("Bearer sk-alice")
    with pytest.raises(UnauthorisedError):
        KEYS.client("Bearer x")
    assert compared == [ALICE.sha256, BOB.sha256] * 2


def test_keys_travel_without_their_text():
    content = pickle.dumps(KEYS)
    assert pickle.loads(content) == KEYS
    assert b"sk-" not in content
    assert ALICE.sha256 == hashlib.sha256(b"sk-alice").digest()


# --- how often


def enter(admission, key):
    """The ticket, or the refusal."""
    try:
        return admission.admit(key)
    except TooManyError as error:
        return error


def refused(admission, key):
    outcome = enter(admission, key)
    if isinstance(outcome, TooManyError):
        return outcome
    outcome.release()
    return None


def test_three_a_minute_by_hand():
    clock = Clock()
    admission = Admission(clock=clock)
    start_s = clock.now_s
    for at_s in (0, 10, 20):
        clock.now_s = start_s + at_s
        assert refused(admission, ALICE) is None
    clock.now_s = start_s + 25
    error = refused(admission, ALICE)
    assert (error.limit, error.retry_after_s) == ("rate", 35)
    assert "3 requests a minute" in str(error)
    assert refused(admission, BOB) is None
    clock.now_s = start_s + 60
    assert refused(admission, ALICE) is None  # the first has left the window; what was refused did not count
    assert refused(admission, ALICE).retry_after_s == 10


@given(
    limit=st.integers(1, 5),
    waits_s=st.lists(st.one_of(st.just(0.0), st.just(60.0), st.floats(0, 40)), max_size=60),
)
def test_no_minute_has_more_than_the_limit_and_nobody_is_refused_below_it(limit, waits_s):
    clock = Clock()
    admission = Admission(clock=clock)
    key = Key("k", b"", requests_per_minute=limit)
    admitted_s = []
    for wait_s in waits_s:
        clock.now_s += wait_s
        last_minute = [at_s for at_s in admitted_s if clock.now_s < at_s + 60.0]
        error = refused(admission, key)
        assert (error is not None) == (len(last_minute) == limit)
        if error is None:
            admitted_s.append(clock.now_s)
        else:
            assert error.retry_after_s == last_minute[0] + 60.0 - clock.now_s > 0
    for first, last in zip(admitted_s, admitted_s[limit:], strict=False):
        assert last >= first + 60.0


# --- how many at once


@given(
    limit=st.integers(1, 4),
    total=st.integers(1, 6),
    steps=st.lists(st.tuples(st.sampled_from(["admit", "release", "again", "drop"]), st.integers(0, 99)), max_size=80),
)
def test_concurrency_is_never_exceeded_and_every_place_comes_back(limit, total, steps):
    keys = [Key("a", b"a", concurrent_requests=limit), Key("b", b"b", concurrent_requests=limit), Key("c", b"c"), None]
    admission = Admission(total, Clock())
    inside = []
    for step, number in steps:
        if step == "admit":
            key = keys[number % len(keys)]
            own = sum(ticket.key is key for ticket in inside)
            full = len(inside) == total
            own_full = key is not None and key.concurrent_requests == own
            outcome = enter(admission, key)
            assert isinstance(outcome, TooManyError) == (full or own_full)
            if full or own_full:
                assert outcome.limit == ("overload" if full else "concurrency")
                assert outcome.retry_after_s >= 1
            else:
                inside.append(outcome)
            del outcome
        elif inside:
            ticket = inside.pop(number % len(inside))
            if step != "drop":
                ticket.release()
            if step == "again":
                ticket.release()
            del ticket
        assert admission.requests == len(inside) <= total
    for ticket in inside:
        ticket.release()
    assert admission.requests == 0
    for _ in range(min(limit, total)):
        inside.append(admission.admit(keys[0]))


def test_places_come_back_from_errors_cancellations_and_answers_that_never_began():
    admission = Admission()

    async def answer(ticket):
        with ticket:
            yield await asyncio.sleep(60)

    async def request():
        async for _ in answer(admission.admit(ALICE)):
            pass

    async def main():
        tasks = [asyncio.create_task(request()) for _ in range(2)]
        await asyncio.sleep(0)
        assert refused(admission, ALICE).limit == "concurrency"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert admission.requests == 0

    asyncio.run(main())

    def fail():
        with admission.admit(None):
            assert admission.requests == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert admission.requests == 0
    never_began = answer(admission.admit(BOB))
    assert admission.requests == 1
    del never_began
    gc.collect()
    assert admission.requests == 0


def test_a_refused_client_waits_about_as_long_as_a_place_takes_to_get_free():
    clock = Clock()
    admission = Admission(2, clock)
    first, second = admission.admit(None), admission.admit(None)
    assert refused(admission, None).retry_after_s == 1  # nothing is known yet
    clock.now_s += 100
    first.release()
    admission.admit(None).release()  # took no time: the mean is 0.9 * (0.1 * 100) = 9 s, over two places
    third = admission.admit(None)
    assert refused(admission, None).retry_after_s == pytest.approx(4.5)
    assert refused(admission, ALICE).limit == "overload"
    del second, third


# --- who hears it


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.0.7", "8.8.8.8", "example.org", "localhost.example.org"]
)
def test_everything_else_is_public(host):
    assert not is_loopback(host)
