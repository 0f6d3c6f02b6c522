"""Publishing: what keeps a run from going live, and the copies that an endpoint serves.

The files of a release are copied into `releases/<id>/` of the run directory that the endpoint was started with, a run
directory in itself: what later runs do in the places that they came from changes nothing for the endpoint, for its
replicas that start again, or for the way back.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from gradientspace_ray.registry import (
    ADAPTER_FILES,
    PICKLED,
    REGISTRY,
    ROUTER_FILES,
    Adapter,
    LayerShape,
    Registry,
    adapter_layers,
    file_problems,
    misfits,
    name_problems,
    read_registry,
)
from gradientspace_ray.releases import FOLDER, Release, ReleaseError, Releases, publish, release_id, shown
from gradientspace_ray.run import MissingFileError, RunDirectory, RunError


def stage_run(served: RunDirectory, state: Releases, run_uri: str, canary_share: float | None = None) -> Releases:
    """Check and copy what a run made, beside what is served; `releases.commit` makes it known.

    Args:
        served: the run directory that the endpoint was started with.
        state: its releases, as read last.
        run_uri: the run to publish; an absolute path on this machine, or a URI.
        canary_share: see `publish`.

    Returns:
        The releases with the run's among them, not committed.

    Raises:
        ReleaseError: see `publish`; or there is no finished run, a file is missing, is not what the registry says, or
            cannot be served or held by the endpoint's slots: the first problem is named, and how many more there are.
        OSError: the run directory cannot be written.
    """
    if "://" not in run_uri and not Path(run_uri).is_absolute():
        raise ReleaseError(f"{run_uri}: give the run directory as an absolute path or a URI")
    source, release = _read(run_uri)
    publish(state, release, canary_share)  # refuses before anything is copied
    try:
        current = keep(served, served, state.current)
    except ReleaseError as error:
        mend = "start the endpoint again to serve the run as it is"
        lost = f"what is served, release {state.current.id}, is no longer there ({error})"
        raise ReleaseError(f"{lost}; {mend}") from error
    kept = keep(served, source, release, _slots(served, state.began))
    return publish(state.model_copy(update={"current": current}), kept, canary_share)


def keep(
    served: RunDirectory, source: RunDirectory, release: Release, slots: Mapping[str, LayerShape] | None = None
) -> Release:
    """Copy a release's files, checked, into `releases/<id>/` of the run directory that is served.

    Nothing is copied when they are there already, whole.

    Args:
        served: the run directory that the endpoint was started with.
        source: what the release's folders are relative to.
        release: what to copy.
        slots: layers that the endpoint's slots were made for; None takes any.

    Returns:
        The release with its folders there.

    Raises:
        ReleaseError: a file is missing, is not what the registry says, or cannot be served or held by the slots; the
            first problem is named, and how many more there are.
        OSError: the run directory cannot be written.
    """
    folder = f"{FOLDER}/{release.id}"
    if release.registry.router.startswith(f"{folder}/"):
        return release
    registry = release.registry
    if _is_whole(served, folder, registry):
        _refuse(source, misfits(registry, served.fetch(folder), slots) if slots else [])
    else:
        with served.staged(folder, last=REGISTRY) as staged:
            problems = _gather(source, registry, staged)
            _refuse(source, problems or (misfits(registry, staged, slots) if slots else []))
            (staged / REGISTRY).write_text(registry.model_dump_json(indent=2) + "\n")
    return release.model_copy(update={"registry": _moved(registry, folder)})


def _moved(registry: Registry, folder: str) -> Registry:
    def moved(adapter: Adapter) -> Adapter:
        return adapter.model_copy(update={"folder": f"{folder}/{adapter.folder}"})

    changes = {
        "generalist": moved(registry.generalist),
        "experts": tuple(moved(expert) for expert in registry.experts),
        "router": f"{folder}/{registry.router}",
    }
    return registry.model_copy(update=changes)


def _read(run_uri: str) -> tuple[RunDirectory, Release]:
    try:
        source = RunDirectory(run_uri)
        registry = read_registry(source)
    except MissingFileError as error:
        mend = "finish the run, and give its directory so that the endpoint's machines can read it"
        raise ReleaseError(f"{shown(run_uri)} holds no {REGISTRY} here; {mend}") from error
    except (RunError, OSError, ValueError) as error:
        reason = shown(str(error).splitlines()[0])
        raise ReleaseError(f"{shown(run_uri)} cannot be published ({reason})") from error
    _refuse(source, name_problems(registry))
    id_, place = release_id(registry), shown(source.uri)
    return source, Release(id=id_, run_uri=place, registry=registry, published_at=time.time())


def _refuse(source: RunDirectory, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 1} more" if problems[1:] else ""
        raise ReleaseError(f"{shown(source.uri)}: {problems[0]}{more}")


def _folders(registry: Registry) -> dict[str, tuple[str, ...]]:
    """Folder -> the files in it that serving reads."""
    adapters: dict[str, tuple[str, ...]] = {adapter.folder: ADAPTER_FILES for adapter in registry.adapters}
    return adapters | {registry.router: ROUTER_FILES}


def _gather(source: RunDirectory, registry: Registry, target: Path) -> list[str]:
    """Copy a registry's files into a local folder, and say what is wrong with them.

    Raises:
        ReleaseError: a file is there and cannot be read.
        OSError: the local folder cannot be written.
    """
    problems = []
    for folder, names in _folders(registry).items():
        with _blaming(source, folder):
            found = source.sizes(folder)
        pickled = [name for name in found if PurePosixPath(name).suffix in PICKLED]
        problems += [f"{folder}/{name}: only safetensors are served; remove it, it can run code" for name in pickled]
        (target / folder).mkdir(parents=True, exist_ok=True)
        for name in found.keys() & set(names):
            with _blaming(source, f"{folder}/{name}"):
                content = source.read_view(f"{folder}/{name}")
            (target / folder / name).write_bytes(content)
    return problems + file_problems(registry, target)


@contextmanager
def _blaming(source: RunDirectory, place: str) -> Iterator[None]:
    try:
        yield
    except (RunError, OSError) as error:
        reason = shown(str(error).splitlines()[0])
        raise ReleaseError(f"{shown(source.uri)}: {place} cannot be read ({reason})") from error


def _is_whole(served: RunDirectory, folder: str, registry: Registry) -> bool:
    if not served.exists(f"{folder}/{REGISTRY}"):
        return False
    with tempfile.TemporaryDirectory(prefix="gradientspace-") as scratch:
        return not _gather(served, _moved(registry, folder), Path(scratch))


def _slots(served: RunDirectory, began: str) -> dict[str, LayerShape]:
    """Layers of the generalist that the endpoint was started with, which its slots are made for."""
    folder = f"{FOLDER}/{began}"
    try:
        registry = served.read_model(f"{folder}/{REGISTRY}", Registry)
        return adapter_layers(served.fetch(f"{folder}/{registry.generalist.folder}"))
    except (RunError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ReleaseError(f"{served.path(folder)} is damaged ({reason}); start the endpoint again") from error
