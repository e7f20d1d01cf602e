"""Two fine-tunes of one base, one on each side: no text rather than wrong text, and a line that names both."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pdserve.model_fingerprint import model_fingerprint
from tests.cluster import Cluster

REFUSED = "not registered, trying again"


class Started(Cluster):
    """Not to become ready: entered when a worker has been refused."""

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while REFUSED not in self.log.read_text():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)


def test_a_context_worker_of_another_fine_tune_serves_nobody(tmp_path: Path, small_model: Path) -> None:
    tuned = Path(shutil.copytree(small_model, tmp_path / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.5
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    with Started(tmp_path, {"model": str(small_model), "context_servers": {"model": str(tuned)}}) as cluster:
        body = json.dumps({"model": small_model.name, "prompt": "the", "max_tokens": 4}).encode()
        headers = {"Content-Type": "application/json"}
        with pytest.raises(urllib.error.HTTPError) as answered:
            urllib.request.urlopen(urllib.request.Request(f"{cluster.url}/v1/completions", body, headers), timeout=30)
        assert answered.value.code == 503
        (refused,) = [line for line in cluster.log.read_text().splitlines() if REFUSED in line]
    for folder in (small_model, tuned):
        assert re.search(rf"{model_fingerprint(folder)} \({folder}\)", refused), refused
