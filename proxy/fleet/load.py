"""What one worker has to do, as far as this proxy knows: this proxy's requests exactly, other proxies' by its reports.

Owns the counts that routing policies compare. A `WorkerLink` makes a new, empty one for each connection: a worker
aborts all requests of a proxy whose socket closes.
"""

from __future__ import annotations

from pdserve.protocol import GenerateRequest, Key, LoadReport, Role

_REQUEST_OF_OTHERS_TOKENS = 1024
"""What a request that another proxy submitted counts in prompt tokens; its length is not known here."""


class Load:
    """The load of one worker. `prefilling` has, by key, the prompt tokens of this proxy's requests whose first token
    has not come yet."""

    def __init__(self, role: Role) -> None:
        self.prefilling: dict[Key, int] = {}
        self._role: Role = role
        self._prefill_tokens = 0
        self._own = 0
        self._report: LoadReport | None = None
        self._own_at_report = 0

    @property
    def takes_requests(self) -> bool:
        """Whether the worker takes new requests, as far as it has told."""
        return self._report is None or self._report.state == "ready"

    @property
    def open_requests(self) -> int:
        return self._own + self._requests_of_others

    @property
    def pending_prefill_tokens(self) -> int:
        """Prompt tokens of the requests whose first token is still to come."""
        return self._prefill_tokens + self._prompts_of_others * _REQUEST_OF_OTHERS_TOKENS

    def begin(self, request: GenerateRequest) -> None:
        """`request` was submitted there."""
        self._own += 1
        if request.phase != "generation":
            self.prefilling[request.key] = len(request.token_ids)
            self._prefill_tokens += len(request.token_ids)

    def prefilled(self, key: Key) -> None:
        """A token of `key` has come."""
        self._prefill_tokens -= self.prefilling.pop(key, 0)

    def end(self, key: Key) -> None:
        """`key`, which was begun, has ended."""
        self._own -= 1
        self.prefilled(key)

    def take(self, report: LoadReport) -> None:
        """Take over the worker's report, which counts the requests of all proxies."""
        self._report = report
        self._own_at_report = self._own

    @property
    def _requests_of_others(self) -> int:
        if self._report is None:
            return 0
        reported = self._report.running + self._report.waiting + self._report.awaiting_kv
        return max(0, reported - self._own_at_report)

    @property
    def _prompts_of_others(self) -> int:
        """Those of `_requests_of_others` whose prompt may still have to be computed.

        A generation worker's requests decode, or wait for KV, unless they are among its waiting ones.
        """
        if self._report is None or self._role == "context":
            return self._requests_of_others
        return min(self._requests_of_others, max(0, self._report.waiting - len(self.prefilling)))
