"""What stands of a tree of sketches."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from gradientspace_ray.sketch.columns import (
    CONNECTIONS,
    COORDINATES,
    RECORD,
    TURN,
    SketchError,
    SketchRecord,
    Store,
    has_files,
    open_sketch,
)
from gradientspace_ray.sketch.tree import Node


class SavedSketches:
    """What stands in the run directory, by one listing and one small read for each sketch."""

    def __init__(self, store: Store) -> None:
        files: dict[str, dict[str, int]] = {}
        for path, size in store.sizes("sketch").items():
            folder, _, name = f"sketch/{path}".rpartition("/")
            files.setdefault(folder, {})[name] = size
        folders = [folder for folder, names in files.items() if RECORD in names]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            records = list(pool.map(lambda folder: record_or_none(store, folder), folders))
        self._files = files
        self._records = {folder: record for folder, record in zip(folders, records, strict=True) if record}

    def has_record(self, node: Node) -> bool:
        """Whether all of it but the rows is there."""
        record = self._records.get(node.folder)
        return record is not None and record.name == node.name and self._has(node, small_files(record))

    def has_rows(self, node: Node) -> bool:
        """Whether its blocks are there; it has a record."""
        return self._has(node, self._records[node.folder].blocks)

    def is_committed(self, node: Node) -> bool:
        """Whether a record stands at its place, of whatever sketch and in whatever state."""
        return RECORD in self._files.get(node.folder, {})

    def is_torn(self, node: Node) -> bool:
        """Whether it was committed, and has files that are missing or of other sizes; rows may be gone as a whole."""
        record = self._records.get(node.folder)
        if record is None:
            return self.is_committed(node)
        blocks = [name for name in record.blocks if name in self._files[node.folder]]
        return record.name == node.name and not (self.has_record(node) and (not blocks or self.has_rows(node)))

    def of(self, root: Node) -> list[Node]:
        """The nodes of a tree that have a record."""
        below = [node for child in root.children for node in self.of(child)]
        return [*below, root] if self.has_record(root) else below

    def record(self, node: Node) -> SketchRecord:
        """The record of a node that has one."""
        return self._records[node.folder]

    def _has(self, node: Node, names: Collection[str]) -> bool:
        return has_files(self._records[node.folder], names, self._files[node.folder])


def record_or_none(store: Store, folder: str) -> SketchRecord | None:
    """The record of a saved sketch, if it is there and readable."""
    try:
        return open_sketch(store, folder).record
    except SketchError:
        return None


def small_files(record: SketchRecord) -> list[str]:
    """The files that a sketch keeps when its rows have been merged."""
    return [name for name in record.files if name in (COORDINATES, TURN)]
