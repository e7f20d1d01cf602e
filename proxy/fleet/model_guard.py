"""Keeps requests from workers of another model than this proxy's.

Owns the fingerprint that workers must have: this proxy's own, where it has the weights, else that of the worker that
came first and is still there, so that a cluster may be taken to another model. A worker that tells none, being of an
older version, is taken as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pdserve.cluster_api import WorkerInfo
from pdserve.protocol import is_another_model

log = logging.getLogger(__name__)


class ModelGuard:
    """Which workers serve this cluster's model.

    Args:
        own: the fingerprint of this proxy's model folder; None if that holds no weights.
    """

    def __init__(self, own: str | None) -> None:
        self._own = own
        self._expected = own or ""
        self._told: dict[str, str] = {}

    def admits(self, info: WorkerInfo) -> bool:
        """Whether a worker is of the right model, as far as it tells."""
        return not is_another_model(self._expected, info.model_fingerprint)

    def review(self, infos: Sequence[WorkerInfo]) -> None:
        """Look at all workers that are there, oldest first; each one of another model is logged once."""
        told = [info.model_fingerprint for info in infos if info.model_fingerprint]
        is_gone = all(is_another_model(self._expected, each) for each in told) or not self._expected
        if self._own is None and told and is_gone:
            self._expected = told[0]
        self._told = {info.worker_id: self._told.get(info.worker_id, "") for info in infos}
        for info in infos:
            if not self.admits(info) and self._told[info.worker_id] != info.model_fingerprint:
                log.error(
                    "%s gets no requests: it serves the model with fingerprint %s, and %s has %s",
                    info.worker_id,
                    info.model_fingerprint,
                    "this cluster" if self._own is None else "this proxy",
                    self._expected,
                )
            self._told[info.worker_id] = info.model_fingerprint
