"""Releases without files: who is current, who gets which request, and what is remembered."""

import json
import threading
from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from gradientspace_ray import lease, releases
from gradientspace_ray.registry import Adapter, Registry, UnknownModelError
from gradientspace_ray.releases import (
    Release,
    ReleaseConflictError,
    ReleaseError,
    Releases,
    commit,
    listed,
    load_or_begin,
    own_release,
    pick,
    promote,
    publish,
    release_id,
    resolve,
    roll_back,
    shown,
)
from gradientspace_ray.run import RunDirectory


def make_registry(seed, **changes):
    """Release `seed` has an expert of its own, one whose digest changes with it, and one that never changes."""

    def adapter(name, digest):
        return Adapter(name=name, digest=digest, folder=f"experts/{name}@{digest}")

    fields = {
        "base_model": "some/model",
        "max_tokens": 512,
        "generalist": adapter("generalist", f"g{seed}"),
        "experts": (adapter("same", "s0"), adapter("sum", f"t{seed}"), adapter(f"own-{seed}", "o")),
        "router_digest": f"r{seed}",
    }
    return Registry(**fields | changes)


def make_release(seed, **changes):
    registry = make_registry(seed, **changes)
    return Release(id=release_id(registry), run_uri=f"/runs/{seed}", registry=registry, published_at=float(seed))


def first_state(seed=0):
    release = make_release(seed)
    return Releases(revision=0, began=release.id, current=release)


@dataclass(frozen=True)
class Model:
    """What releases should be, in the plainest way: numbers in place of releases."""

    current: int = 0
    previous: int | None = None
    canary: int | None = None
    share: float = 0.0

    def publish(self, number, share):
        if number == self.current or self.canary not in (None, number):
            return None
        if share is None:
            return Model(number, self.current)
        return replace(self, canary=number, share=share)

    def promote(self):
        return None if self.canary is None else Model(self.canary, self.current)

    def roll_back(self):
        if self.canary is not None:
            return replace(self, canary=None, share=0.0)
        return None if self.previous is None else Model(self.previous, self.current)


shares = st.one_of(st.none(), st.floats(min_value=0.0, max_value=1.0, exclude_min=True))
actions = st.one_of(
    st.tuples(st.just("publish"), st.integers(0, 3), shares), st.just(("promote",)), st.just(("roll_back",))
)


@given(st.lists(actions, max_size=12))
def test_any_sequence_of_changes_ends_as_the_plain_model_says(sequence):
    state, model = first_state(), Model()
    for name, *arguments in sequence:
        expected = getattr(model, name)(*arguments)
        act = {"publish": publish, "promote": promote, "roll_back": roll_back}[name]
        if arguments:
            arguments[0] = make_release(arguments[0])
        if expected is None:
            with pytest.raises(ReleaseError) as error:
                act(state, *arguments)
            assert "\n" not in str(error.value)
            continue
        changed = act(state, *arguments)
        assert changed.revision == state.revision + 1
        assert changed.began == state.began
        state, model = changed, expected
        for role in ("current", "previous", "canary"):
            number, release = getattr(model, role), getattr(state, role)
            assert release == (None if number is None else make_release(number))
        assert state.canary_share == model.share
        assert state.current not in (state.previous, state.canary)
        assert Releases.model_validate_json(state.model_dump_json()) == state


@given(st.lists(actions, max_size=6), shares)
def test_a_rollback_takes_the_last_publication_back(sequence, share):
    state, model = first_state(), Model()
    for name, *arguments in sequence:
        if (expected := getattr(model, name)(*arguments)) is not None:
            arguments = [make_release(arguments[0]), arguments[1]] if arguments else []
            state = {"publish": publish, "promote": promote, "roll_back": roll_back}[name](state, *arguments)
            model = expected
    assume(state.canary is None)
    back = roll_back(publish(state, make_release(9), share))
    assert back.current == state.current
    assert back.canary is None
    assert back.previous == (make_release(9) if share is None else state.previous)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda state: publish(state, make_release(0)), "is current already"),
        (
            lambda state: publish(state, make_release(1, base_model="other/model")),
            "base_model other/model, the endpoint",
        ),
        (lambda state: publish(state, make_release(1, dtype="bfloat16")), "dtype bfloat16, the endpoint float32"),
        (lambda state: publish(state, make_release(1), 0.0), "above 0 and at most 1, not 0"),
        (lambda state: publish(state, make_release(1), 1.01), "above 0 and at most 1, not 1.01"),
        (lambda state: publish(state, make_release(1), float("nan")), "above 0 and at most 1, not nan"),
        (lambda state: publish(publish(state, make_release(1), 0.1), make_release(2)), "is a canary; promote it or"),
        (promote, "no canary to promote"),
        (roll_back, "nothing to roll back to: .* is the endpoint's first release"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(act, reason):
    with pytest.raises(ReleaseError, match=reason):
        act(first_state())


def test_the_id_of_a_release_is_its_content():
    ids = {
        release_id(make_registry(1)),
        release_id(make_registry(2)),
        release_id(make_registry(1, base_model="other/model")),
        release_id(make_registry(1, dtype="bfloat16")),
        release_id(make_registry(1, router_digest="other")),
        release_id(make_registry(1, experts=make_registry(1).experts[::-1])),
    }
    assert len(ids) == 6
    moved = make_registry(1).generalist.model_copy(update={"folder": "elsewhere", "title": "other"})
    assert release_id(make_registry(1, generalist=moved, router="elsewhere")) in ids
    with pytest.raises(ValidationError, match="lists what makes"):
        Release(id="0" * 12, run_uri="/runs/1", registry=make_registry(1), published_at=1.0)


KEYS = [f"conversation {index}" for index in range(4000)]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_canary_gets_its_share(share):
    state = publish(first_state(), make_release(1), share)
    found = sum(pick(state, key) == state.canary for key in KEYS) / len(KEYS)
    assert abs(found - share) < 4 * (share * (1 - share) / len(KEYS)) ** 0.5


def test_everyone_gets_the_current_release_without_a_canary_and_the_canary_at_a_share_of_one():
    state = first_state()
    assert {pick(state, key).id for key in KEYS[:100]} == {state.current.id}
    state = publish(state, make_release(1), 1.0)
    assert {pick(state, key).id for key in KEYS[:100]} == {state.canary.id}
    promoted = promote(state)
    assert {pick(promoted, key).id for key in KEYS[:100]} == {make_release(1).id}


@given(st.text(st.characters(codec=None)), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_a_larger_share_takes_no_conversation_back(key, one, other):
    low, high = sorted((one, other))
    state = publish(first_state(), make_release(1), low)
    raised = publish(state, make_release(1), high)
    assert pick(state, key) == pick(state, key)
    if pick(state, key) == state.canary:
        assert pick(raised, key) == raised.canary


def test_another_canary_is_tried_on_other_conversations():
    def chosen(seed):
        state = publish(first_state(), make_release(seed), 0.2)
        return {key for key in KEYS if pick(state, key) == state.canary}

    # Of independent choices of 800 among 4000, 160 are the same, give or take 10.
    assert abs(len(chosen(1) & chosen(2)) - 160) < 45


def test_a_key_that_is_no_valid_unicode_is_a_key():
    state = publish(first_state(), make_release(1), 0.5)
    assert pick(state, "\ud800") in (state.current, state.canary)


def three_releases():
    return publish(publish(first_state(), make_release(1)), make_release(2), 0.5)


def test_names_mean_the_picked_release_and_digests_any_that_is_live():
    state = three_releases()
    assert [release.run_uri for release in state.live] == ["/runs/1", "/runs/2", "/runs/0"]
    for picked, digest in ((state.current, "t1"), (state.canary, "t2")):
        assert resolve(state, picked, "base") is None
        assert resolve(state, picked, "sum").digest == digest
        for seed in range(3):
            assert resolve(state, picked, f"sum@t{seed}").digest == f"t{seed}"
            assert resolve(state, picked, f"generalist@g{seed}").name == "generalist"
        for unknown in ("own-0", "sum@t3", "auto", "", "@", "base@1", "sum@"):
            with pytest.raises(UnknownModelError):
                resolve(state, picked, unknown)
    assert resolve(state, state.canary, "own-2").name == "own-2"
    with pytest.raises(UnknownModelError):
        resolve(state, state.current, "own-2")
    with pytest.raises(UnknownModelError):
        resolve(roll_back(state), state.current, "sum@t2")


def test_everything_that_is_listed_resolves_and_is_listed_once():
    state = three_releases()
    models = listed(state)
    ids = [model.id for model in models]
    assert ids[:6] == ["auto", "base", "generalist", "same", "sum", "own-1"]
    assert len(ids) == len(set(ids)) == 6 + 3 + 3 + 3 + 1
    for model in models[1:]:
        assert resolve(state, state.current, model.id) == model.adapter
    assert models[0].adapter is None
    releases_of = {model.id: model.release.run_uri for model in models}
    assert (releases_of["sum@t2"], releases_of["sum@t0"], releases_of["same@s0"]) == ("/runs/2", "/runs/0", "/runs/1")


@pytest.fixture(params=["local", "s3"])
def run(request, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)
    return RunDirectory(tmp_path / "run" if request.param == "local" else request.getfixturevalue("object_store")())


def test_a_replica_that_starts_again_goes_on_with_the_same_releases(run):
    state = load_or_begin(run, make_registry(0))
    assert (state.revision, state.current.published_at, state.live) == (0, None, (own_release(run, make_registry(0)),))
    assert not run.exists("releases.json")
    for change in (lambda state: publish(state, make_release(1), 0.25), promote, roll_back):
        state = commit(run, state, change(state))
        assert load_or_begin(RunDirectory(run.uri), make_registry(0)) == state
    assert state.revision == 3
    assert state.previous == make_release(1)
    assert run.names("releases") in ([], ["lease.lock"])


def test_an_endpoint_of_a_run_that_was_run_again_begins_afresh(run):
    before = load_or_begin(run, make_registry(0))
    state = commit(run, before, publish(before, make_release(1)))
    afresh = load_or_begin(run, make_registry(5))
    assert (afresh.began, afresh.current.registry) == (release_id(make_registry(5)), make_registry(5))
    assert (afresh.previous, afresh.canary, afresh.revision) == (None, None, state.revision + 1)
    # What still runs with the first registry goes on, until the other one publishes.
    assert load_or_begin(run, make_registry(0)) == state
    committed = commit(run, afresh, publish(afresh, make_release(6)))
    assert load_or_begin(run, make_registry(5)) == committed
    with pytest.raises(ReleaseConflictError, match="changed meanwhile"):
        commit(run, state, roll_back(state))
    assert load_or_begin(run, make_registry(0)).revision > committed.revision


@pytest.mark.parametrize("retries", [False, True])
def test_of_changes_at_the_same_time_none_is_lost_unseen(run, retries):
    count = 5 if run.is_local else 3
    start, outcomes = threading.Barrier(count), []

    def act(seed):
        state, mine = load_or_begin(run, make_registry(0)), RunDirectory(run.uri)
        start.wait(30)
        while True:
            try:
                commit(mine, state, publish(state, make_release(seed)))
            except ReleaseConflictError as error:
                outcomes.append(str(error))
                if not retries:
                    return
                state = load_or_begin(run, make_registry(0))
            else:
                outcomes.append("committed")
                return

    threads = [threading.Thread(target=act, args=(seed,)) for seed in range(1, count + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    state = load_or_begin(run, make_registry(0))
    assert outcomes.count("committed") == state.revision == (count if retries else 1)
    assert all("changed meanwhile" in outcome for outcome in outcomes if outcome != "committed")
    if not retries:
        assert len(outcomes) == count


def test_a_lease_that_is_held_for_long_is_told(run, monkeypatch):
    monkeypatch.setattr(releases, "LEASE_PATIENCE_S", 0.2)
    state = load_or_begin(run, make_registry(0))
    with (
        lease.Lease(RunDirectory(run.uri_of("releases"))),
        pytest.raises(ReleaseConflictError, match="another change of the releases is under way; try again"),
    ):
        commit(run, state, publish(state, make_release(1)))
    # The lease of a driver that makes new experts here is another one.
    with lease.Lease(run):
        assert commit(run, state, publish(state, make_release(1))).revision == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:40], "Invalid JSON: EOF"),
        (lambda text: "", "Invalid JSON: EOF"),
        (lambda text: text.replace('"revision": 1', '"revision": "1"'), "valid integer"),
        (lambda text: text.replace('"r1"', '"r7"'), "release .* lists what makes"),
        (lambda text: json.dumps(json.loads(text) | {"canary_share": 0.5}), "canary_share 0.5 without a canary"),
        (lambda text: json.dumps(json.loads(text) | {"canary_share": 2.0}), "less than or equal to 1"),
        (lambda text: json.dumps(json.loads(text) | {"later": 1}), "Extra inputs"),
        (
            lambda text: json.dumps(json.loads(text) | {"previous": json.loads(text)["current"]}),
            "is current and something else",
        ),
    ],
)
def test_damaged_releases_are_told_in_one_line(tmp_path, damage, reason):
    run = RunDirectory(tmp_path)
    state = load_or_begin(run, make_registry(0))
    commit(run, state, publish(state, make_release(1)))
    text = run.read_bytes("releases.json").decode()
    run.write_bytes("releases.json", damage(text).encode())
    with pytest.raises(ReleaseError, match=reason) as error:
        load_or_begin(run, make_registry(0))
    assert str(error.value).startswith(f"{tmp_path}/releases.json is damaged (")
    assert str(error.value).endswith(
        "delete it and start the endpoint again, with the release that its run directory holds"
    )
    assert "\n" not in str(error.value)


def test_files_of_retired_releases_go_when_no_request_can_need_them(tmp_path, monkeypatch):
    run, clock = RunDirectory(tmp_path), [0.0]
    monkeypatch.setattr(releases.time, "time", lambda: clock[0])
    state = load_or_begin(run, make_registry(0))

    def step(change, hours=0.0):
        clock[0] += 3600 * hours
        return commit(run, state, change(state))

    def left():
        kept = set(run.names("releases")) - {"lease.lock"}
        return {seed for seed in range(9) if make_release(seed).id in kept}

    for seed in range(5):
        run.write_bytes(f"releases/{make_release(seed).id}/registry.json", b"")
    state = step(lambda state: publish(state, make_release(1)))
    state = step(lambda state: publish(state, make_release(2)), hours=2)
    assert (left(), state.retired) == ({0, 1, 2, 3, 4}, {}), "the endpoint's first release stays"
    state = step(lambda state: publish(state, make_release(3)))
    assert state.retired == {make_release(1).id: 7200.0}
    state = step(roll_back, hours=0.9)
    assert left() == {0, 1, 2, 3, 4}
    state = step(roll_back, hours=0.2)
    assert (left(), state.retired) == ({0, 2, 3, 4}, {})
    state = step(lambda state: publish(state, make_release(4), 0.5))
    state = step(roll_back)
    assert list(state.retired) == [make_release(4).id]
    state = step(lambda state: publish(state, make_release(4)), hours=5)
    assert left() == {0, 2, 3, 4}, "what is published again stays"
    assert list(state.retired) == [make_release(2).id]


def test_credentials_are_not_shown():
    assert shown("s3://key:secret@runs/a?b=x@y and gs://anonymous@b") == "s3://runs/a?b=x@y and gs://b"
    assert shown("/runs/a@b") == "/runs/a@b"
