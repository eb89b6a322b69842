"""The walkthroughs: one notebook a stage, an overview and a comparison. `python -m notebooks` executes them."""

import common  # noqa: F401  # pyright: ignore[reportUnusedImport]  (first: it bounds spinning before torch is loaded)
