"""The end of the gradients stage: coordinates and spectrum out of the merged sketch, and whether they are there."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradientspace_ray.recipe import Recipe
from gradientspace_ray.run import RunDirectory, RunError, Summary, digest_of
from gradientspace_ray.sketch.columns import SketchError, open_sketch
from gradientspace_ray.sketch.merging import coordinates_of, projections_of
from gradientspace_ray.sketch.spectrum import describe_spectrum
from gradientspace_ray.sketch.tree import BASIS, LEAVES, MERGED, QUARANTINE, ROOT, Node
from gradientspace_ray.stages.merge import quarantined
from gradientspace_ray.stages.progress import counted, counts_of

SPECTRUM, COORDINATES = "sketch/spectrum.json", "sketch/coordinates.parquet"
PROJECTION = "sketch/projection.parquet"
CHECKSUMS = {"coordinates_sha256": COORDINATES, "projection_sha256": PROJECTION}
"""Keys of the spectrum, and the files that they are of."""


def finish(recipe: Recipe, run: RunDirectory, board: Any, leaves: Sequence[str], root: Node) -> None:
    """Write the coordinates of all examples, their random projections if the recipe asks for them, and the spectrum.

    Args:
        recipe: the run's.
        run: the run directory.
        board: holds the times of the stage.
        leaves: names of all shards of the first pass.
        root: of the last tree, complete.

    Raises:
        RunError: there is nothing to keep.
    """
    with counted(board):
        record = open_sketch(run, root.folder).record
        if not record.energy_total:
            raise RunError(f"all gradients are zero; look at the answers in {run.path('examples')}")
        ids: list[str] = []
        coordinates_NK = np.empty((record.examples, record.rows), dtype=np.float32)
        row_energies_N = np.empty(record.examples)
        for shard in coordinates_of(run, root):
            rows = slice(len(ids), len(ids) + len(shard.ids))
            coordinates_NK[rows] = shard.coordinates_NK.numpy() * record.singular_values
            row_energies_N[rows] = shard.row_energies_N.numpy()
            ids.extend(shard.ids)
        run.write_table(COORDINATES, pa.table({"id": ids, "coordinates": _lists(coordinates_NK)}))
        if recipe.sketch.projection:
            projected = {"projection_sha256": _write_projection(run, root)}
        else:
            projected = {}
            # Another recipe may have left one.
            run.delete(PROJECTION)
        facts = {
            "plan": _plan_digest(recipe, leaves),
            "root": root.name,
            "coordinates_sha256": _checksum(run, COORDINATES),
            **projected,
            "rank": record.rank,
            "dimension": record.dimension,
            "examples": len(ids),
            "shards": len(leaves),
            "shards_skipped": len(leaves) - len(root.leaves),
        }
        spectrum = describe_spectrum(record.singular_values, record.energy_total, coordinates_NK, row_energies_N)
        run.write_json(SPECTRUM, facts | spectrum)


def _write_projection(run: RunDirectory, root: Node) -> str:
    """Write the projections of all examples, a shard at a time, for all may be more than the memory; its checksum."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "projection.parquet")
        schema = pa.schema({"id": pa.string(), "projection": pa.list_(pa.float32())})
        # Of numbers that are all different, a dictionary is no use.
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer:
            for ids, projection_NP in projections_of(run, root):
                columns = {"id": ids, "projection": _lists(projection_NP.numpy())}
                writer.write_table(pa.table(columns, schema=schema))
        data = pa.memory_map(str(file)).read_buffer()
        run.write_bytes(PROJECTION, data)
        return hashlib.sha256(data).hexdigest()


def _lists(matrix_NK: np.ndarray) -> pa.Array:
    """The rows of a float32 matrix, as a column of a table."""
    return pa.FixedSizeListArray.from_arrays(matrix_NK.ravel(), matrix_NK.shape[1]).cast(pa.list_(pa.float32()))


def is_finished(recipe: Recipe, run: RunDirectory, leaves: Sequence[str]) -> bool:
    """Whether `finish` was here last, with the same shards, and what it left is whole."""
    spectrum = _finished(run)
    skipped = spectrum.get("shards_skipped") and recipe.gradients.on_bad_shard == "stop"
    return spectrum.get("plan") == _plan_digest(recipe, leaves) and not skipped


def must_be_made_first(recipe: Recipe, run: RunDirectory, leaves: Sequence[str]) -> set[str]:
    """Shards that have failed and may not be left out any more; without them the result that is there is the best."""
    spectrum = _finished(run)
    same = spectrum.get("plan") == _plan_digest(recipe, leaves)
    return quarantined(run, leaves) if same and spectrum["shards_skipped"] else set()


def _finished(run: RunDirectory) -> dict[str, Any]:
    """The spectrum, if all else is there as it was written; what goes on after `finish` removes it first."""
    try:
        spectrum: dict[str, Any] = run.read_json(SPECTRUM)
        saved = open_sketch(run, ROOT)
        saved.check(saved.record.blocks)
        written = {key: name for key, name in CHECKSUMS.items() if key in spectrum}
        return spectrum if all(spectrum[key] == _checksum(run, name) for key, name in written.items()) else {}
    except (RunError, SketchError):
        return {}


def _checksum(run: RunDirectory, name: str) -> str:
    return hashlib.sha256(run.read_view(name)).hexdigest()


def clear(run: RunDirectory, board: Any) -> Summary:
    """Remove what led to the sketch, and sum up the stage."""
    for folder in (LEAVES, MERGED, BASIS):
        run.delete(folder)
    spectrum = run.read_json(SPECTRUM)
    if not spectrum["shards_skipped"]:
        run.delete(QUARANTINE)
    run.sweep("sketch")
    return _summary(counts_of(board), spectrum)


def _plan_digest(recipe: Recipe, leaves: Sequence[str]) -> str:
    return digest_of([list(leaves), recipe.sketch.refine])


def _summary(counts: dict[str, float], spectrum: dict[str, Any]) -> Summary:
    kept, share = len(spectrum["singular_values"]), spectrum["captured_share"]
    working_s = counts.get("working_s", 0.0)
    sketching_s = counts.get("sketching_s", 0.0) + counts.get("merging_s", 0.0)
    skipped = spectrum["shards_skipped"]
    made = [
        f"{spectrum['examples']} gradients of {spectrum['dimension']:,} numbers",
        f"{kept} directions hold {share:.0%} of their energy",
    ]
    if working_s:
        made.append(f"sketching took {sketching_s / working_s:.1%} of the work")
    if skipped:
        made.append(f"shards that failed and were skipped, see {QUARANTINE}: {skipped} of {spectrum['shards']}")
    damaged = int(counts.get("damaged", 0))
    if damaged:
        made.append(f"sketches that were damaged and made again: {damaged}")
    return Summary(
        made="; ".join(made),
        # It names the shards, and with them all that decides the result.
        output=spectrum["root"],
        counts={
            "sketch_examples": spectrum["examples"],
            "dimension": spectrum["dimension"],
            "sketch_rank": kept,
            "captured_share": round(share, 6),
            "shards": spectrum["shards"],
            "shards_made": int(counts.get("shards", 0)),
            "shards_skipped": skipped,
            "sketches_damaged": damaged,
            "merges": int(counts.get("merges", 0)),
            "tokens": int(counts.get("tokens", 0)),
            "working_s": round(working_s, 2),
            "sketching_s": round(sketching_s, 2),
        },
        outputs=(PROJECTION,) if "projection_sha256" in spectrum else (),
    )
