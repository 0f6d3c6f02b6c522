"""The results as tables, and the bars."""

from typing import Any

from rich.console import Console
from rich.table import Table

HEADINGS = {
    "decode_tokens_per_second": ("tokens/s", "0f"),
    "decoding_at_once": ("at once", "d"),
    "burst_tokens_per_second": ("with prompts", "0f"),
    "ttft_p50_ms": ("first p50 ms", "0f"),
    "ttft_p99_ms": ("p99", "0f"),
    "itl_p50_ms": ("next p50 ms", "0f"),
    "itl_p99_ms": ("p99", "0f"),
    "requests": ("requests", "d"),
    "errors": ("errors", "d"),
}
"""Key of a contender's numbers -> its column, and how many decimals it has."""


def show(report: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    where = f"{report['model']}, {report['dtype']}, {report['machine']['threads']} threads"
    for workload, contenders in report.get("workloads", {}).items():
        console.print(_workload_table(f"{workload}: {where}", contenders))
    if "rate_per_second" in report:
        rate = report["rate_per_second"]
        console.print(f"tokens/s while the batch is full; times to the first and the next token at {rate} requests/s")
    for name, reason in report.get("skipped", {}).items():
        console.print(f"{name} left out: {reason}")
    for source, found in report.get("slot_load_ms", {}).items():
        console.print(
            f"slot load from {source}: {found['p50']:.1f} ms, at most {found['max']:.1f} ms, {found['loads']} loads"
        )
    for name, found in report.get("routed_ttft", {}).items():
        if isinstance(found, dict):
            console.print(
                f"first token, {name}: routed {found['routed_ttft_p50_ms']:.0f} ms, router "
                f"{found['router_p50_ms']:.0f} ms, base {found['base_ttft_p50_ms']:.0f} ms"
            )
    if report["ratios"]:
        console.print(_bars_table(report))


def _workload_table(title: str, contenders: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title)
    table.add_column("contender")
    for heading, _ in HEADINGS.values():
        table.add_column(heading, justify="right")
    for name, numbers in contenders.items():
        table.add_row(name, *(_cell(numbers[key], kind) for key, (_, kind) in HEADINGS.items()))
    return table


def _cell(value: float | None, kind: str) -> str:
    if value is None:
        return ""
    return str(value) if kind == "d" else f"{value:.{kind}}"


def _bars_table(report: dict[str, Any]) -> Table:
    table = Table(title="bars")
    table.add_column("what")
    for heading in ("value", "bar", ""):
        table.add_column(heading, justify="right")
    for row in report["ratios"]:
        held = {True: "ok", False: "NOT OK", None: "for reference"}[row["ok"]]
        table.add_row(row["what"], f"{row['value']:.3g}", row["bar"], held)
    return table
