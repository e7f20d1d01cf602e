"""One cluster for all tests that leave it as they found it, and what transformers answers to the same prompts: of the
demo model, and of a small random one where it is the cluster that matters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.model_store import resolve_model
from tests.cluster import MODEL, Cluster
from tests.e2e.reference import Reference
from tests.small_model import write_small_model


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return resolve_model(MODEL)


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> Reference:
    """Greedy answers in float32, each prompt alone, without padding."""
    return Reference(model_folder)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def small_reference(small_model: Path) -> Reference:
    return Reference(small_model)


@pytest.fixture(scope="session")
def small_cluster(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), {"model": str(small_model)}) as running:
        yield running
