"""The losses' tables: time, memory, rate and error of each way, and its time over ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.cases import CONTRASTIVE_SETS, SIGMOID_SETS, Case
from benchmarks.rows import Row, matches, on_gpu, stamp

NOT_RUN = "The losses' and similarity's kernels: not yet run on a GPU."
OURS = "fastclip"
HEADER = (
    "| case | | ms | over ours | extra memory | TFLOP/s | of matmul | gradient error |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|"
)


def section(contrastive: Sequence[Row], sigmoid: Sequence[Row]) -> str:
    """Both losses' tables, from rows of GPUs; where there are none, that it is so."""
    parts = (
        _table("Softmax loss, TFLOP/s counted in 4u", contrastive, CONTRASTIVE_SETS["headline"]),
        _table("Sigmoid loss, TFLOP/s counted in 3u", sigmoid, SIGMOID_SETS["headline"]),
    )
    return "\n\n".join(part for part in parts if part) or NOT_RUN


def _table(title: str, rows: Sequence[Row], cases: Sequence[Case]) -> str:
    """A loss's newest row per case, provider and GPU; "" without any."""
    lines = []
    stamps: dict[str, None] = {}
    for case in cases:
        wanted = asdict(case)
        newest = {
            (row["device"], row["provider"]): row
            for row in sorted(rows, key=lambda row: row["date"])
            if on_gpu(row) and matches(row, wanted)
        }
        for row in newest.values():
            cells = _cells(row, newest.get((row["device"], OURS)))
            lines.append(f"| {case} | {row['provider']} {row['version']} | {cells} |")
            stamps[stamp(row)] = None
    if not lines:
        return ""
    return "\n".join([f"{title}. {'; '.join(stamps)}.", "", HEADER, *lines])


def _cells(row: Row, ours: Row | None) -> str:
    if row["error"]:
        return f"{row['error'].split(':')[0]} | | | | | "
    peak = f"{float(row['peak_bytes']) / 1e6:,.0f} MB" if row["peak_bytes"] else "–"
    share = f"{float(row['matmul_share']):.0%}" if row["matmul_share"] else "–"
    error = f"{float(row['gradient_error']):.1e}" if row["gradient_error"] else "–"
    median, tflops = float(row["median_ms"]), float(row["tflops"])
    over = f"{ratio:.3g}×" if (ratio := _over(row, ours)) else "–"
    return f"{median:.3g} | {over} | {peak} | {tflops:.0f} | {share} | {error}"


def _over(row: Row, ours: Row | None) -> float | None:
    """Its time over ours, if both are of one commit."""
    if ours is None or not ours["median_ms"] or row["commit"] != ours["commit"]:
        return None
    return float(row["median_ms"]) / float(ours["median_ms"])
