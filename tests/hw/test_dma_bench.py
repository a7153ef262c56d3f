"""The DMA part of ``micemu bench``."""

from __future__ import annotations

from mic_emu.bench import dma


def test_bench_dma_rows() -> None:
    """Every figure has its limit from the same run (the bars themselves are for `micemu bench`)."""
    rows = dma.rows(scale=0.1)
    assert [set(r) for r in rows] == [{"name", "value", "unit", "limit", "ratio"}] * len(rows)
    assert all(r["value"] > 0 and r["limit"] > 0 for r in rows)
