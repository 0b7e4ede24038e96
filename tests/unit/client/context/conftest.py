"""The recorded verdicts of the Go libraries; `tests/data/ignore/generate` makes them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

CORPUS = Path(__file__).parents[3] / "data" / "ignore" / "corpus.json.gz"


@pytest.fixture(scope="session")
def corpus() -> dict[str, Any]:
    with gzip.open(CORPUS, "rt", encoding="utf-8") as file:
        return json.load(file)
