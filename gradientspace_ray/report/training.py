"""How the finetunes went, from their records, `training.json`; what a record of an older run lacks is left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from gradientspace_ray.report.figures import Curve, colour, curves, smoothed
from gradientspace_ray.report.page import Figure, Section, Table, duration

Record = Mapping[str, Any]

ALL_EXAMPLES = "var(--muted)"
"""Colour of a finetune that is no cluster's."""
NOTHING = "·"


def how_it_went(generalist: Record | None, experts: Sequence[Record], single_lora: Record | None) -> Section | None:
    """Curves and costs of all finetunes; None where nothing was trained.

    Args:
        generalist: its record, if there is one.
        experts: theirs, in any order.
        single_lora: its record, if there is one.
    """
    of_clusters = sorted(experts, key=lambda record: record["cluster"])
    named = [
        *([("generalist", generalist)] if generalist else []),
        *((str(record["name"]), record) for record in of_clusters),
        *([("single LoRA", single_lora)] if single_lora else []),
    ]
    panels = [_curve(name, record) for name, record in named if record.get("losses")]
    if not panels:
        return None
    caption = (
        "Faint: each step. Strong: a moving average over a tenth of the steps; above it, its first and last value. "
        "All panels have one scale of losses, and each its own steps."
    )
    judged = any(panel.heldout for panel in panels)
    if judged:
        caption += " Thin line: the finetune's own held-out part. Ring: the weights that were kept."
    return Section(
        "training",
        "How the training went",
        "Loss of every optimizer step before its update, in nats per label token. Colours are those of the clusters; "
        "grey is trained on the examples of all.",
        (Figure("Training curves", curves(panels, "Training curves"), caption),),
        table=_table(named, of_clusters, judged),
    )


def _curve(name: str, record: Record) -> Curve:
    cluster = record.get("cluster")
    return Curve(
        name,
        ALL_EXAMPLES if cluster is None else colour(cluster),
        record["losses"],
        tuple((step, loss) for step, loss in record.get("heldout") or ()),
        record.get("best_step"),
    )


def _table(named: Sequence[tuple[str, Record]], of_clusters: Sequence[Record], judged: bool) -> Table:
    rows = [(name, *_cost(record), *_losses(record, judged)) for name, record in named]
    if len(of_clusters) > 1:
        keys = ("examples", "tokens", "steps", "seconds")
        together = {
            key: sum(record[key] for record in of_clusters)
            for key in keys
            if all(record.get(key) is not None for record in of_clusters)
        }
        last = max(index for index, (_, record) in enumerate(named) if record.get("cluster") is not None)
        rows.insert(last + 1, ("experts together", *_cost(together), *_losses({}, judged)))
    columns = ("finetune", "examples", "tokens", "steps", "time", "tokens/s", "loss, first → last")
    return Table(
        columns + (("held-out loss", "kept step") if judged else ()),
        tuple(rows),
        "Tokens seen in training, prompts included. Time from the first step to the last, without the start"
        + ("; of the experts together, one after the other." if len(of_clusters) > 1 else "."),
    )


def _cost(record: Record) -> tuple[str, ...]:
    tokens, seconds = record.get("tokens"), record.get("seconds")
    counts = (f"{record[key]:,}" if record.get(key) is not None else NOTHING for key in ("examples", "tokens", "steps"))
    speed = f"{tokens / seconds:,.0f}" if tokens and seconds else NOTHING
    return (*counts, NOTHING if seconds is None else duration(seconds), speed)


def _losses(record: Record, judged: bool) -> tuple[str, ...]:
    """Both ends of the moving average, and the held-out loss of the weights that were kept."""
    losses, heldout = record.get("losses"), record.get("heldout")
    mean_S = smoothed(losses or ())
    ends = f"{mean_S[0]:.3f} → {mean_S[-1]:.3f}" if losses else NOTHING
    if not judged:
        return (ends,)
    if not losses or not heldout:
        return ends, NOTHING, NOTHING
    kept = record.get("best_step")
    step, loss = next(((step, loss) for step, loss in heldout if step == kept), heldout[-1])
    return ends, f"{loss:.3f}", f"{step:,}"
