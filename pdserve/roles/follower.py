"""A follower of a worker's engine: its rank of the model, with a transceiver of its own. Run with `python -m`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from pdserve.config import LlmArgs
from pdserve.engine.run.kv_pool import KvPool
from pdserve.engine.run.rank_model import RankModel
from pdserve.engine.run.ranks.messages import RankSpec
from pdserve.engine.run.ranks.rank_process import end_now, main
from pdserve.engine.run.step_executor import StepExecutor
from pdserve.handoff import HandoffEvent
from pdserve.process import allow_all_descriptors, freeze_startup_objects, share_interpreter_fairly
from pdserve.roles.kv_transfer import TransceiverSpec, attach_transceiver


def _attach(spec: RankSpec, rank: RankModel, pools: list[KvPool], executor: StepExecutor) -> Callable[[], None]:
    share_interpreter_fairly()
    allow_all_descriptors()
    worker = msgspec.json.decode(spec.attachment, type=TransceiverSpec)
    args, folder = LlmArgs.model_validate(spec.args), Path(spec.meeting_place).parent
    failed = partial(end_now, spec)
    attached = attach_transceiver(worker, args, rank, pools, executor, folder, _ignore, failed)
    executor.exporter = attached.exporter
    attached.transceiver.start()
    freeze_startup_objects()
    return attached.transceiver.close


def _ignore(_: HandoffEvent) -> None:
    """Endings go to rank 0."""


if __name__ == "__main__":
    main(_attach)
