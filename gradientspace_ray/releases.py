"""Releases: which experts and which router answer, and how that changes while an endpoint runs.

A release is one run's registry under one id. The endpoint answers from the current one; a canary gets a share of the
conversations; the previous one is there to go back to. `releases.json`, in the run directory that the endpoint was
started with, says which release is what: to every replica of the ingress, and to those that start again.
"""

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random

from gradientspace_ray.lease import Lease
from gradientspace_ray.registry import Adapter, Registry, UnknownModelError
from gradientspace_ray.run import MissingFileError, RunDirectory, RunError, digest_of

RELEASES, FOLDER = "releases.json", "releases"
LEASE_PATIENCE_S = 20.0
KEPT_AFTER_S = 3600.0
"""How long files outlive the time in which their release could be asked for: requests from then still need them."""


class ReleaseError(RuntimeError):
    """A release that cannot go live, or a change of releases that makes no sense; the message is one line."""


class ReleaseConflictError(ReleaseError):
    """Another change of the releases was committed first."""


class Release(BaseModel):
    """What one run made, as an endpoint serves it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    id: str
    """Twelve hex digits; equal ids are equal content under equal names."""
    run_uri: str
    """The run that made it, for people: serving reads the run directory that it was started with."""
    registry: Registry
    """Its folders are relative to the run directory that is served."""
    published_at: float | None
    """Unix time; None is the release that an endpoint was started with."""

    @model_validator(mode="after")
    def _check(self) -> "Release":
        if self.id != release_id(self.registry):
            raise ValueError(f"release {self.id} lists what makes {release_id(self.registry)}")
        return self


class Releases(BaseModel):
    """Which release is what. It changes only by `publish`, `promote` and `roll_back`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: int = 1
    revision: Annotated[int, Field(ge=0)]
    """Grows with every change."""
    began: str
    """Id of the release that the endpoint was started with."""
    current: Release
    previous: Release | None = None
    """What `roll_back` goes back to when there is no canary."""
    canary: Release | None = None
    canary_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the conversations that the canary answers."""
    retired: dict[str, float] = {}
    """Ids whose files are to be removed, and the unix time since which nobody can ask for them."""

    @model_validator(mode="after")
    def _check(self) -> "Releases":
        others = [release.id for release in (self.previous, self.canary) if release]
        if self.current.id in others:
            raise ValueError(f"release {self.current.id} is current and something else")
        if (self.canary is not None) != (self.canary_share > 0):
            raise ValueError(f"canary_share {self.canary_share} without a canary, or a canary without a share")
        return self

    @property
    def live(self) -> tuple[Release, ...]:
        """Releases that requests may name, without repetition: current, canary, previous."""
        releases = (self.current, self.canary, self.previous)
        return tuple({release.id: release for release in releases if release}.values())


@dataclass(frozen=True)
class Listed:
    """One model that a client may ask for by name."""

    id: str
    adapter: Adapter | None
    """None for `auto` and `base`."""
    release: Release


def release_id(registry: Registry) -> str:
    """Twelve hex digits of the digest of what answers: base model, adapters by name and digest in order, router."""
    content = [registry.base_model, registry.dtype, [adapter.id for adapter in registry.adapters]]
    return digest_of([*content, registry.router_digest])[:12]


def shown(text: str) -> str:
    """A URI, or a text with URIs, without the credentials that object stores take in them."""
    return re.sub(r"(?<=://)[^/?\s]*@", "", text)


def publish(state: Releases, release: Release, canary_share: float | None = None) -> Releases:
    """Make a release current, or, with a share, the canary; again with another share changes the canary's.

    Args:
        state: as it is.
        release: its files can be served.
        canary_share: share of the conversations, above 0 and at most 1; None is all of them, for good.

    Raises:
        ReleaseError: it is current already, is made for another base model, another canary is under way, or the share
            is out of range.
    """
    if canary_share is not None and not 0 < canary_share <= 1:
        raise ReleaseError(f"a canary's share is above 0 and at most 1, not {canary_share:g}")
    if release.id == state.current.id:
        raise ReleaseError(f"release {release.id} is current already; there is nothing to publish")
    if state.canary and release.id != state.canary.id:
        raise ReleaseError(f"release {state.canary.id} is a canary; promote it or roll it back first")
    for key in ("base_model", "dtype"):
        ours, theirs = getattr(state.current.registry, key), getattr(release.registry, key)
        if ours != theirs:
            mend = "start an endpoint of its own for it"
            raise ReleaseError(f"the release has {key} {theirs}, the endpoint {ours}; {mend}")
    if canary_share is None:
        return _changed(state, current=release, previous=state.current, canary=None, canary_share=0.0)
    return _changed(state, canary=release, canary_share=float(canary_share))


def promote(state: Releases) -> Releases:
    """Make the canary current.

    Raises:
        ReleaseError: there is no canary.
    """
    if state.canary is None:
        raise ReleaseError("there is no canary to promote; publish a release with a share first")
    return _changed(state, current=state.canary, previous=state.current, canary=None, canary_share=0.0)


def roll_back(state: Releases) -> Releases:
    """Withdraw the canary; without one, make the previous release current, and the current one previous.

    Raises:
        ReleaseError: there is neither.
    """
    if state.canary:
        return _changed(state, canary=None, canary_share=0.0)
    if state.previous is None:
        raise ReleaseError(f"there is nothing to roll back to: {state.current.id} is the endpoint's first release")
    return _changed(state, current=state.previous, previous=state.current)


def _changed(state: Releases, **changes: Any) -> Releases:
    # Not model_copy, which checks nothing.
    return Releases.model_validate(dict(state) | changes | {"revision": state.revision + 1})


def pick(state: Releases, key: str) -> Release:
    """The release that answers a conversation.

    The same key gives the same release for as long as the canary and its share stay; a larger share only adds
    conversations to the canary's. Another canary gets other conversations.

    Args:
        state: as it is.
        key: stays the same for a conversation, as its first message does. Any text, also one that is no valid Unicode.
    """
    if state.canary is None:
        return state.current
    content = f"{state.canary.id}\n{key}".encode(errors="surrogatepass")
    place = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return state.canary if place < state.canary_share * 2**64 else state.current


def resolve(state: Releases, picked: Release, model_id: str) -> Adapter | None:
    """The adapter behind a model id; None for `base`.

    Args:
        state: as it is.
        picked: where names are looked up; see `pick`.
        model_id: a name, or the `name@digest` of any live release.

    Raises:
        UnknownModelError: nothing live is called so.
    """
    if "@" not in model_id:
        return picked.registry.resolve(model_id)
    for release in (picked, *state.live):
        for adapter in release.registry.adapters:
            if model_id == adapter.id:
                return adapter
    raise UnknownModelError(model_id)


def listed(state: Releases) -> list[Listed]:
    """What a client may ask for: the current release's names, then `name@digest` of all that is live, each once."""
    found = {}
    for model_id in state.current.registry.model_ids():
        adapters = [adapter for adapter in state.current.registry.adapters if adapter.name == model_id]
        found[model_id] = Listed(model_id, adapters[0] if adapters else None, state.current)
    for release in state.live:
        for adapter in release.registry.adapters:
            found.setdefault(adapter.id, Listed(adapter.id, adapter, release))
    return list(found.values())


def own_release(run: RunDirectory, registry: Registry) -> Release:
    """The release that an endpoint is started with."""
    return Release(id=release_id(registry), run_uri=shown(run.uri), registry=registry, published_at=None)


def load_or_begin(run: RunDirectory, registry: Registry) -> Releases:
    """The releases as they are by now, or those that an endpoint begins with.

    Args:
        run: the run directory that is served.
        registry: what the endpoint was started with. Releases that began from another one, as before the run was run
            again, count no more.

    Raises:
        ReleaseError: `releases.json` is damaged.
    """
    own = own_release(run, registry)
    stored = _stored(run)
    if stored and stored.began == own.id:
        return stored
    return Releases(revision=_revision(stored, own.id), began=own.id, current=own)


def _stored(run: RunDirectory) -> Releases | None:
    try:
        return run.read_model(RELEASES, Releases)
    except MissingFileError:
        return None
    except RunError as error:
        cause = error.__cause__
        reason = cause.errors(include_url=False)[0]["msg"] if isinstance(cause, ValidationError) else str(error)
        mend = "delete it and start the endpoint again, with the release that its run directory holds"
        raise ReleaseError(f"{run.path(RELEASES)} is damaged ({reason}); {mend}") from error


def _revision(stored: Releases | None, began: str) -> int:
    """The revision that an endpoint which began from `began` has seen when it has seen `stored`."""
    if stored is None:
        return 0
    return stored.revision if stored.began == began else stored.revision + 1


def commit(run: RunDirectory, before: Releases, after: Releases) -> Releases:
    """Make a change known to all replicas, if nobody else made one since `before` was read.

    Also removes what was retired an hour ago.

    Args:
        run: the run directory that is served.
        before: what the change was made from.
        after: the result.

    Returns:
        `after`, as it is committed.

    Raises:
        ReleaseConflictError: `before` is no longer what is committed.
        ReleaseError: `releases.json` is damaged.
        OSError: the run directory cannot be written.
    """
    with _alone(run) as lease:
        stored = _stored(run)
        revision = _revision(stored, before.began)
        if revision != before.revision:
            raise ReleaseConflictError(
                f"the releases were changed meanwhile (revision {revision}, not {before.revision}); "
                "look at --status, then try again"
            )
        now, live = time.time(), {release.id for release in after.live}
        since = {release.id: now for release in before.live} | before.retired
        doomed = {id_ for id_, left in before.retired.items() if id_ not in live and now - left > KEPT_AFTER_S}
        retired = {id_: left for id_, left in since.items() if id_ not in live | doomed | {before.began}}
        after = after.model_copy(update={"retired": retired})
        run.delete(*(f"{FOLDER}/{id_}" for id_ in doomed))
        lease.check()
        run.write_json(RELEASES, after.model_dump(mode="json"))
        return after


@contextmanager
def _alone(run: RunDirectory) -> Iterator[Lease]:
    """Keep other replicas from committing meanwhile. A run that makes new experts in the same place goes on."""
    folder = RunDirectory(run.uri_of(FOLDER))
    with ExitStack() as stack:
        tries = Retrying(
            retry=retry_if_exception_type(RunError),
            stop=stop_after_delay(LEASE_PATIENCE_S),
            wait=wait_random(0.05, 0.5),
            reraise=True,
        )
        try:
            yield tries(lambda: stack.enter_context(Lease(folder)))
        except RunError as error:
            raise ReleaseConflictError("another change of the releases is under way; try again") from error
