from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.engine.fairness import FairQueue


def drain(queue, admissible=lambda _: True):
    return list(iter(lambda: queue.admit(admissible), None))


def test_lines_take_turns_and_each_is_first_come_first_served():
    queue = FairQueue()
    for request in ("a1", "a2", "a3", "b1", "c1", "c2"):
        queue.push(request[0], request)
    assert (len(queue), queue.waiting()) == (6, {"a": 3, "b": 1, "c": 2})
    assert drain(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert (len(queue), queue.waiting()) == (0, {})


def test_a_blocked_request_keeps_its_turn_and_is_overtaken_a_few_times_only():
    queue = FairQueue(max_overtakes=2)
    for request in ("a1", "b1", "b2", "b3"):
        queue.push(request[0], request)
    assert drain(queue, lambda request: request != "a1") == ["b1", "b2"]
    queue.push("c", "c1")
    assert queue.admit(lambda request: request != "a1") is None
    assert drain(queue) == ["a1", "b3", "c1"]


def test_removed_requests_are_not_admitted():
    queue = FairQueue(max_overtakes=0)
    for request in ("a1", "a2", "b1"):
        queue.push(request[0], request)
    assert queue.remove("a", "a1")
    assert not queue.remove("a", "a1")
    assert not queue.remove("d", "d1")
    assert queue.admit(lambda request: request != "a2") is None
    assert queue.remove("a", "a2")
    assert drain(queue) == ["b1"]


LINES, OVERTAKES = 4, 3
EVENTS = st.one_of(
    st.tuples(st.just("push"), st.integers(0, LINES - 1)),
    st.tuples(st.just("remove"), st.integers(0, 30)),
    st.tuples(st.just("admit"), st.sets(st.integers(0, LINES - 1))),  # the lines that have room
)


@given(st.lists(EVENTS, max_size=120))
def test_waiting_is_bounded_whatever_comes_goes_and_blocks(events):
    """The class's own bound, counted from every push; and nobody is forgotten."""
    queue = FairQueue(OVERTAKES)
    waiting = []
    """(line, request, others before it in its line when it came), in the order of arrival."""
    admitted, since = 0, {}
    for number, (kind, value) in enumerate([*events, *[("admit", set(range(LINES)))] * len(events)]):
        if kind == "push":
            waiting.append((value, number, sum(line == value for line, *_ in waiting)))
            since[number] = admitted
            queue.push(value, number)
        elif kind == "remove" and waiting:
            line, request, _ = waiting.pop(value % len(waiting))
            assert queue.remove(line, request)
        elif kind == "admit":
            of = {request: line for line, request, _ in waiting}
            request = queue.admit(lambda request, of=of, value=value: of[request] in value)
            if request is None:
                continue
            assert of[request] in value
            assert request == next(other for line, other, _ in waiting if line == of[request]), "not first come"
            before = next(before for _, other, before in waiting if other == request)
            assert admitted - since[request] <= before + (before + 1) * (LINES - 1 + OVERTAKES)
            waiting = [entry for entry in waiting if entry[1] != request]
            admitted += 1
    assert not waiting
    assert len(queue) == 0


@given(st.integers(0, 5), st.integers(2, LINES))
def test_the_bound_is_met_by_a_request_that_blocks_and_then_waits_for_all_others(overtakes, lines):
    """Others: each once ahead of it in turn, and `overtakes` while it is blocked."""
    queue = FairQueue(overtakes)
    for line in range(1, lines):
        queue.push(line, (line, 0))
    queue.push(0, "last")
    for line in range(1, lines):
        for number in range(1, 10):
            queue.push(line, (line, number))
    admitted = drain(queue, lambda request: request != "last")
    assert len(admitted) == lines - 1 + overtakes
