from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The embedded model, converted once in the user's own cache."""
    from common.models.sources.embedded import open_embedded

    return open_embedded().folder
