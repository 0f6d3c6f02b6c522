"""The releases as one replica knows them, and the places of what they name."""

import threading

from gradientspace_ray.registry import Adapter, Registry
from gradientspace_ray.releases import Release, Releases, load_or_begin
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.serving.messages import Place


class ReleaseBoard:
    """What a replica reads at its start, and again when it is told that the releases have changed."""

    def __init__(self, run_uri: str, registry: Registry) -> None:
        """Read the releases.

        Args:
            run_uri: the run directory that is served.
            registry: what it held when the endpoint was started.

        Raises:
            ReleaseError: `releases.json` is damaged.
        """
        self.run = RunDirectory(run_uri)
        self._registry = registry
        self._reading = threading.Lock()
        self.releases: Releases = load_or_begin(self.run, registry)

    def refresh(self) -> Releases:
        """Read the releases again. Requests under way keep what they were routed to."""
        with self._reading:
            latest = load_or_begin(self.run, self._registry)
            if latest.revision > self.releases.revision:
                self.releases = latest
            return self.releases

    @property
    def current(self) -> Release:
        """The release that answers, a canary's share aside."""
        return self.releases.current

    def place(self, adapter: Adapter | None) -> Place | None:
        """Where an adapter's files are; None for the base model."""
        return None if adapter is None else Place(adapter.id, self.run.uri, adapter.folder)

    def places(self, release: Release) -> list[Place]:
        """Where the files of all of a release's adapters are."""
        return [Place(adapter.id, self.run.uri, adapter.folder) for adapter in release.registry.adapters]

    def router(self, release: Release) -> Place:
        """Where a release's router is."""
        return Place(release.registry.router_digest, self.run.uri, release.registry.router)
