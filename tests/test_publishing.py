"""Releases with their files: what may go live, and that later runs cannot take it away."""

import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import save
from small_runs import EXPERTS, adapter_files, digest_of_files, make_small_run, publish_run, router_files, write_files

from gradientspace_ray import lease
from gradientspace_ray.publishing import keep
from gradientspace_ray.registry import file_problems, read_registry, write_registry
from gradientspace_ray.releases import (
    ReleaseConflictError,
    ReleaseError,
    commit,
    load_or_begin,
    own_release,
    promote,
    release_id,
    roll_back,
)
from gradientspace_ray.run import RunDirectory


@pytest.fixture(params=["local", "s3"])
def new_place(request, tmp_path, monkeypatch):
    """Gives places for runs, all on this machine's disk or all on an object store."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)
    if request.param == "local":
        count = iter(range(100))
        return lambda: str(tmp_path / f"run-{next(count)}")
    return request.getfixturevalue("object_store")


def is_whole(run, release, tmp_path):
    """Whether a replica that starts now finds all files of a release; not through anything fetched before."""
    scratch = tmp_path / "seen-by-a-replica"
    shutil.rmtree(scratch, ignore_errors=True)
    registry = release.registry
    for folder in (registry.router, *(adapter.folder for adapter in registry.adapters)):
        for name in run.names(folder):
            (scratch / folder).mkdir(parents=True, exist_ok=True)
            (scratch / folder / name).write_bytes(run.read_bytes(f"{folder}/{name}"))
    return not file_problems(registry, scratch)


def test_a_run_is_read_anew_each_time(new_place, tmp_path):
    served, registry = make_small_run(tmp_path / "served", 0)
    run, first = make_small_run(new_place(), 1)
    state = publish_run(served, load_or_begin(served, registry), run.uri)
    assert (state.current.id, state.current.run_uri) == (release_id(first), run.uri)
    # The same place with other content, as after another run; nothing remembered may answer.
    run, second = make_small_run(run.uri, 2)
    assert publish_run(served, state, run.uri).current.id == release_id(second) != release_id(first)


def test_what_is_published_outlives_the_run_that_made_it_and_the_one_that_is_served(new_place, tmp_path):
    served, registry = make_small_run(new_place(), 0)
    other, _ = make_small_run(new_place(), 1)
    state = publish_run(served, load_or_begin(served, registry), other.uri)
    assert [release.run_uri for release in state.live] == [other.uri, served.uri]
    assert sorted(served.names("releases")) == sorted(
        [*(release.id for release in state.live), *(["lease.lock"] if served.is_local else [])]
    )
    other.delete("experts", "generalist", "router")
    make_small_run(served.uri, 7)
    restarted = load_or_begin(RunDirectory(served.uri), registry)
    assert restarted == state
    assert all(is_whole(served, release, tmp_path) for release in restarted.live)
    back = commit(served, restarted, roll_back(restarted))
    assert release_id(back.current.registry) == release_id(registry)
    assert is_whole(served, back.current, tmp_path)


def test_a_canary_goes_through_its_life(new_place, tmp_path):
    served, registry = make_small_run(new_place(), 0)
    place = new_place()
    make_small_run(place, 1)
    state = publish_run(served, load_or_begin(served, registry), RunDirectory(place).uri, 0.1)
    assert (state.canary_share, state.current.published_at) == (0.1, None)
    raised = publish_run(served, state, RunDirectory(place).uri, 0.5)
    assert (raised.canary.id, raised.canary_share, raised.revision) == (state.canary.id, 0.5, 2)
    promoted = commit(served, raised, promote(raised))
    assert promoted.current == raised.canary
    assert all(is_whole(served, release, tmp_path) for release in promoted.live)


def test_a_kept_release_is_a_run_directory_that_can_be_published_again(tmp_path):
    served, registry = make_small_run(tmp_path / "served", 0)
    other, _ = make_small_run(tmp_path / "other", 1)
    state = publish_run(served, load_or_begin(served, registry), other.uri)
    other.delete("experts", "generalist", "router", "registry.json")
    back = publish_run(served, state, served.uri_of(f"releases/{state.previous.id}"))
    assert (back.current.id, back.previous.id) == (state.previous.id, state.current.id)


def test_a_file_of_the_other_run_that_cannot_be_read_is_said_to_be_that_run_s(tmp_path, monkeypatch):
    served, registry = make_small_run(tmp_path / "served", 0)
    other, _ = make_small_run(tmp_path / "other", 1)
    read_view = RunDirectory.read_view

    def refuse(self, name):
        if self.uri == other.uri and name.startswith("router/"):
            raise PermissionError(13, "Permission denied")
        return read_view(self, name)

    monkeypatch.setattr(RunDirectory, "read_view", refuse)
    with pytest.raises(ReleaseError, match=rf"^{other.uri}: router/\S+ cannot be read \(.*Permission denied\)$"):
        publish_run(served, load_or_begin(served, registry), other.uri)
    assert not served.exists("releases.json")


def test_the_same_run_made_again_is_published_over_itself_when_what_is_served_was_kept_before(new_place, tmp_path):
    served, registry = make_small_run(new_place(), 0)
    own = keep(served, served, own_release(served, registry))
    assert own.id == release_id(registry)
    assert keep(served, served, own) == own
    make_small_run(served.uri, 1)
    state = publish_run(served, load_or_begin(served, own.registry), served.uri)
    assert (state.previous, state.began) == (own, own.id)
    assert all(is_whole(served, release, tmp_path) for release in state.live)


def test_what_is_served_is_not_given_up_for_what_took_its_place(tmp_path):
    served, registry = make_small_run(tmp_path, 0)
    state = load_or_begin(served, registry)
    make_small_run(tmp_path, 1)
    with pytest.raises(ReleaseError, match=r"is no longer there \(.*; start the endpoint again to serve the run as it"):
        publish_run(served, state, str(tmp_path))
    assert load_or_begin(served, registry) == state
    assert [name for name in served.names("releases") if name != "lease.lock"] == []


def test_of_two_publishers_the_second_hears_of_the_first(new_place):
    served, registry = make_small_run(new_place(), 0)
    one, _ = make_small_run(new_place(), 1)
    two, _ = make_small_run(new_place(), 2)
    seen = load_or_begin(served, registry)
    first = publish_run(served, seen, one.uri)
    with pytest.raises(ReleaseConflictError, match=r"revision 1, not 0.*--status"):
        publish_run(served, seen, two.uri)
    assert load_or_begin(served, registry) == first
    second = publish_run(served, first, two.uri)
    assert (second.previous, second.revision) == (first.current, 2)


def test_a_copy_that_was_damaged_is_made_again(tmp_path):
    served, registry = make_small_run(tmp_path / "served", 0)
    other, _ = make_small_run(tmp_path / "other", 1)
    state = publish_run(served, load_or_begin(served, registry), other.uri)
    state = commit(served, state, roll_back(state))
    served.write_bytes(f"{state.previous.registry.router}/head.safetensors", b"damaged")
    assert not is_whole(served, state.previous, tmp_path)
    state = publish_run(served, state, other.uri)
    assert is_whole(served, state.current, tmp_path)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def first_expert(run):
    return read_registry(run).experts[0].folder


def relist(run, **changes):
    """Change the registry's first expert."""
    registry = read_registry(run)
    first = registry.experts[0].model_copy(update=changes)
    write_registry(run, registry.model_copy(update={"experts": (first, *registry.experts[1:])}))


def replace_first_expert(run, **changes):
    """An expert with other files, under its right digest."""
    files = adapter_files(5) | changes
    folder = first_expert(run)
    write_files(run, folder, files)
    relist(run, digest=digest_of_files(files, (CONFIG, WEIGHTS)))


def add_pickle(run):
    run.write_bytes(f"{first_expert(run)}/adapter_model.bin", b"cos\nsystem\n(S'true'\ntR.")


TENSORS = {
    f"base_model.model.layers.0.q_proj.lora_{letter}.weight": np.zeros(shape, np.float32)
    for letter, shape in (("A", (2, 4)), ("B", (4, 2)))
}
A = next(iter(TENSORS))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (add_pickle, r"experts/count-sum@\w+/adapter_model\.bin: only safetensors are served"),
        (lambda run: run.delete(first_expert(run)), rf"experts/count-sum@\w+: {CONFIG} is missing"),
        (lambda run: run.delete("generalist", "router"), f"generalist: {CONFIG} is missing; and 1 more"),
        (lambda run: run.delete(f"generalist/{WEIGHTS}"), f"generalist: {WEIGHTS} is missing"),
        (
            lambda run: write_files(run, "generalist", adapter_files(9)),
            r"generalist: holds other content \(\w+\) than gen",
        ),
        (
            lambda run: write_files(run, "router", router_files(9)),
            r"router: holds another router \(\w+\) than the registry names",
        ),
        (lambda run: run.write_bytes("registry.json", b"{"), r"cannot be published \(.*registry\.json cannot be used"),
        (
            lambda run: run.delete("registry.json"),
            r"holds no registry\.json here; finish the run, and give its directory",
        ),
        (lambda run: relist(run, name="base"), "'base' is no name for an adapter"),
        (lambda run: relist(run, name="a@b"), "'a@b' is no name for an adapter"),
        (lambda run: relist(run, name=EXPERTS[1]), f"'{EXPERTS[1]}' is no name for an adapter: taken already"),
        (
            lambda run: relist(run, name="other"),
            "router: names count-sum, story-door for the experts other, story-door",
        ),
        (lambda run: relist(run, folder="/etc"), "'/etc' is no folder inside the run directory"),
        (lambda run: relist(run, folder="experts/../../x"), "is no folder inside the run directory"),
        (lambda run: relist(run, folder=""), "'' is no folder inside the run directory"),
        (lambda run: replace_first_expert(run, **{CONFIG: b"{"}), rf"{CONFIG} cannot be used \(Invalid JSON"),
        (lambda run: replace_first_expert(run, **adapter_files(1, r=0)), r"r: .*greater than or equal to 1"),
        (lambda run: replace_first_expert(run, **adapter_files(1, r=2048)), "r: .*less than or equal to 1024"),
        (lambda run: replace_first_expert(run, **adapter_files(1, r=4)), "has LoRA rank 2, but .* says 4"),
        (
            lambda run: replace_first_expert(run, **adapter_files(1, peft_type="IA3")),
            "peft_type: Input should be 'LORA'",
        ),
        (lambda run: replace_first_expert(run, **adapter_files(1, target_modules=[])), "target_modules: .*at least 1"),
        (
            lambda run: replace_first_expert(run, **adapter_files(1, target_modules=["k_proj"])),
            "not among the target_mod",
        ),
        (lambda run: replace_first_expert(run, **{WEIGHTS: b"PK\3\4"}), f"{WEIGHTS} is no safetensors file"),
        (lambda run: replace_first_expert(run, **{WEIGHTS: adapter_files(1)[WEIGHTS][:-3]}), "is no safetensors file"),
        (lambda run: replace_first_expert(run, **{WEIGHTS: save({})}), "holds no LoRA weights"),
        (lambda run: replace_first_expert(run, **{WEIGHTS: save(TENSORS | {"x": np.zeros(1)})}), "x cannot be served"),
        (lambda run: replace_first_expert(run, **{WEIGHTS: save({A: TENSORS[A]})}), "do not fit together"),
        (
            lambda run: replace_first_expert(run, **{WEIGHTS: save(TENSORS | {A: np.zeros((2, 4), np.int8)})}),
            "weights of type I8; save them as floating point",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line_and_changes_nothing(tmp_path, damage, reason):
    served, registry = make_small_run(tmp_path / "served", 0)
    state = load_or_begin(served, registry)
    run, _ = make_small_run(tmp_path / "new", 1)
    damage(run)
    with pytest.raises(ReleaseError, match=reason) as error:
        publish_run(served, state, run.uri)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(run.uri)
    assert load_or_begin(served, registry) == state
    assert set(served.names("releases")) <= {state.current.id}
    assert served.names(".staging") == []


def test_a_router_s_head_has_a_row_for_each_expert(tmp_path):
    run, registry = make_small_run(tmp_path, 1)
    files = router_files(1) | {"head.safetensors": router_files(1, labels=("one",))["head.safetensors"]}
    write_files(run, "router", files)
    digest = digest_of_files(files, ("head.safetensors", "router.json"))
    write_registry(run, registry.model_copy(update={"router_digest": digest}))
    served, own = make_small_run(tmp_path / "served", 0)
    with pytest.raises(ReleaseError, match=r"router: head\.safetensors has no row for each of 2 experts"):
        publish_run(served, load_or_begin(served, own), run.uri)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model": "other/model"}, "base_model other/model, the endpoint some/model"),
        ({"width": 6}, "made for another base model: .*q_proj is 6 -> 6, not 4 -> 4"),
        ({"lora_rank": 3}, "has LoRA rank 3, the endpoint's slots 2"),
    ],
)
def test_what_the_endpoint_cannot_hold_is_refused(tmp_path, changes, reason):
    served, registry = make_small_run(tmp_path / "served", 0)
    state = load_or_begin(served, registry)
    run, _ = make_small_run(tmp_path / "new", 1, **changes)
    with pytest.raises(ReleaseError, match=reason):
        publish_run(served, state, run.uri)
    copied = [name for name in served.names("releases") if name != "lease.lock"]
    assert copied == ([] if "base_model" in changes else [state.current.id])
    smaller, _ = make_small_run(tmp_path / "smaller", 2, lora_rank=1)
    state = publish_run(served, state, smaller.uri)
    # The slots are still those of the first release.
    same, _ = make_small_run(tmp_path / "same", 3)
    assert publish_run(served, state, same.uri).revision == 2


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("runs/a", "runs/a: give the run directory as an absolute path or a URI"),
        ("~/a", "give the run directory as an absolute path"),
        (
            "/nowhere/at/all",
            "/nowhere/at/all holds no registry.json here; finish the run, and give its directory so that",
        ),
        ("ftp://somewhere/a", r"ftp://somewhere/a cannot be published \("),
    ],
)
def test_a_place_without_a_run_is_told(tmp_path, place, reason):
    served, registry = make_small_run(tmp_path, 0)
    with pytest.raises(ReleaseError, match=reason):
        publish_run(served, load_or_begin(served, registry), place)


def test_credentials_stay_out_of_what_is_stored_and_said(object_store, tmp_path):
    served, registry = make_small_run(tmp_path, 0)
    place = object_store().replace("s3://", "s3://some-key:some-secret@")
    run, _ = make_small_run(place, 1)
    state = publish_run(served, load_or_begin(served, registry), run.uri)
    assert re.fullmatch(r"s3://runs/\w+\?endpoint_override=\S+", state.current.run_uri)
    assert "some-" not in served.read_bytes("releases.json").decode()
    run.write_bytes("registry.json", b"{")
    with pytest.raises(ReleaseError, match="cannot be used") as error:
        publish_run(served, state, run.uri)
    assert "some-" not in str(error.value)
