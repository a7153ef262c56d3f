"""The DMA part of ``micemu bench``."""

from __future__ import annotations

from mic_emu.bench import dma


def test_bench_dma_rows() -> None:
    """Every figure has its limit from the same run; long chains reach a fair part of memcpy."""
    rows = dma.rows(scale=0.1)
    assert [set(r) for r in rows] == [{"name", "value", "unit", "limit", "ratio"}] * len(rows)
    assert all(r["value"] > 0 and r["limit"] > 0 for r in rows)
    # The bar is 0.9; a loaded test machine gets half of that.
    assert max(r["ratio"] for r in rows if r["name"].startswith("dma copy, chains")) > 0.45
