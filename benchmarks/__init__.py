"""Workloads, the harness that runs every stage on them in a fresh process, tables, pictures, and peers."""

import common  # noqa: F401  # pyright: ignore[reportUnusedImport]  (first: it bounds spinning before torch is loaded)
