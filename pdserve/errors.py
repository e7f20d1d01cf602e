"""Every error that crosses a process, and how a client sees it.

The tree; each class fixes its HTTP status, its OpenAI error type and whether another worker may be tried::

    PdserveError                      500  server_error
    ├── ConfigError                   500  a key of the configuration; fatal at start
    ├── HostError                     503  the host lacks memory, descriptors, disk space, …; another start may succeed
    ├── ListenError                   503  an address is another process's, or not this host's
    ├── RequestError                  400  invalid_request_error: the client's mistake, never retried
    │   ├── LimitExceeded             400  a limit, by name
    │   │   └── ContextLengthExceeded 400  prompt, or prompt and output, are longer than the model's context
    │   ├── ModelNotFound             404
    │   ├── RouteNotFound             404
    │   │   └── NotServed             404  a part of OpenAI's API that this server does not have, by name
    │   ├── UnknownWorker             404  no live worker has this id
    │   ├── UnknownLease              404  the lease lapsed or was replaced: the worker registers again
    │   ├── MethodNotAllowed          405
    │   ├── ModelMismatch             409  a worker of another model than the cluster's; it registers again later
    │   ├── Superseded                409  a newer registration of the same worker stands
    │   ├── RequestTimeout            408  the client did not finish sending its body
    │   ├── BodyTooLarge              413
    │   └── UnsupportedMediaType      415
    ├── Overloaded                    429  overloaded_error, Retry-After
    ├── NotReady                      503  not_ready_error, Retry-After
    │   └── Draining                  503
    ├── DeadlineExceeded              504  timeout_error
    ├── Aborted                       499  the client, or a newer attempt, withdrew the request
    ├── WorkerLost                    502  retryable: the worker's socket or process ended
    ├── MalformedMessage              502  retryable: a peer sent what is no message; its connection ends
    ├── EngineError                   500  retryable: a step of the engine failed
    ├── TransferError                 502  retryable: the KV transfer did not complete; `reason` says how
    │   └── LayoutMismatch            502  the two pools can't be joined; `param` names the field that differs
    └── StoreError                    503  the cluster store did not answer

Errors travel between processes as `ErrorInfo`; `to_info` and `from_info` convert.
"""

from __future__ import annotations

import errno

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """An error on the wire. `code` is the class's stable name; `param` the field or limit at fault."""

    code: str
    message: str
    param: str | None = None
    status: int = 500
    retryable: bool = False


class PdserveError(Exception):
    """Root of the tree.

    Args:
        message: one sentence that a client may read.
        param: the request field, configuration key or limit at fault, if there is one.
    """

    code: str = "internal_error"
    type: str = "server_error"
    status: int = 500
    retryable: bool = False
    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def to_info(self) -> ErrorInfo:
        """This error as it travels between processes."""
        return ErrorInfo(self.code, self.message, self.param, self.status, self.retryable)

    def to_openai(self) -> dict[str, dict[str, str | None]]:
        """The body OpenAI clients expect (API reference, "Error codes")."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ConfigError(PdserveError):
    """A key of the configuration is unknown, or its value is not allowed. `param` is the key's full path."""

    code = "config_error"


class HostError(PdserveError):
    """The operating system could not give what was needed. Nothing that was configured is at fault for certain."""

    code = "host_error"
    status = 503
    retryable = True


class ListenError(PdserveError):
    """A server can't have its address."""

    code = "listen_error"
    status = 503


# What a path that was configured can be at fault for.
_ERRNOS_OF_PATHS = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS}
)


def path_error(error: Exception, message: str, param: str | None = None) -> ConfigError | HostError:
    """The error to raise where a path that was configured could not be used: `HostError` if the system lacks
    something (descriptors, memory, disk space), `ConfigError` if the path or what it holds is at fault."""
    lacking = isinstance(error, OSError) and error.errno is not None and error.errno not in _ERRNOS_OF_PATHS
    return HostError(message, param) if lacking else ConfigError(message, param)


class RequestError(PdserveError):
    code = "invalid_request"
    type = "invalid_request_error"
    status = 400


class LimitExceeded(RequestError):
    code = "limit_exceeded"


class ContextLengthExceeded(LimitExceeded):
    """The code is OpenAI's: clients cut their history when they see it."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    code = "model_not_found"
    status = 404


class RouteNotFound(RequestError):
    code = "not_found"
    status = 404


class NotServed(RouteNotFound):
    code = "not_served"


class UnknownWorker(RequestError):
    code = "unknown_worker"
    status = 404


class UnknownLease(RequestError):
    code = "unknown_lease"
    status = 404


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    status = 405


class ModelMismatch(RequestError):
    code = "model_mismatch"
    status = 409


class Superseded(RequestError):
    code = "superseded"
    status = 409


class RequestTimeout(RequestError):
    code = "request_timeout"
    status = 408


class BodyTooLarge(RequestError):
    code = "body_too_large"
    status = 413


class UnsupportedMediaType(RequestError):
    code = "unsupported_media_type"
    status = 415


class Overloaded(PdserveError):
    code = "overloaded"
    type = "overloaded_error"
    status = 429
    retryable = True
    retry_after_s = 1


class NotReady(PdserveError):
    code = "not_ready"
    type = "not_ready_error"
    status = 503
    retryable = True
    retry_after_s = 2


class Draining(NotReady):
    code = "draining"


class DeadlineExceeded(PdserveError):
    code = "deadline_exceeded"
    type = "timeout_error"
    status = 504


class Aborted(PdserveError):
    code = "aborted"
    status = 499


class WorkerLost(PdserveError):
    code = "worker_lost"
    status = 502
    retryable = True


class MalformedMessage(PdserveError):
    """A frame that is no message of the protocol. The connection that it came over is closed; others are not
    affected."""

    code = "malformed_message"
    status = 502
    retryable = True


class EngineError(PdserveError):
    code = "engine_error"
    retryable = True


class TransferError(PdserveError):
    """A KV transfer ended early.

    `reason` is one of `TRANSFER_REASONS` and labels the failure counter.
    """

    code = "transfer_error"
    status = 502
    retryable = True

    def __init__(self, message: str, reason: str, param: str | None = None) -> None:
        super().__init__(message, param)
        if reason not in TRANSFER_REASONS:
            raise ValueError(f"unknown transfer failure reason: {reason}")
        self.reason = reason

    def to_info(self) -> ErrorInfo:
        return ErrorInfo(f"{self.code}.{self.reason}", self.message, self.param, self.status, self.retryable)


TRANSFER_REASONS = frozenset({"timeout", "peer_lost", "aborted", "layout", "protocol", "checksum", "refused"})


class LayoutMismatch(TransferError):
    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, "layout", param)


class StoreError(PdserveError):
    code = "store_error"
    type = "not_ready_error"
    status = 503
    retry_after_s = 2


def _tree(cls: type[PdserveError]) -> list[type[PdserveError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]


def from_info(info: ErrorInfo) -> PdserveError:
    """The error that `info` describes; a code of a newer peer keeps its status and message."""
    code, _, reason = info.code.partition(".")
    for cls in _tree(PdserveError):
        if cls.code != code:
            continue
        if issubclass(cls, TransferError):
            if reason == "layout":
                return LayoutMismatch(info.message, info.param or "")
            return TransferError(info.message, reason if reason in TRANSFER_REASONS else "protocol", info.param)
        return cls(info.message, info.param)
    unknown = PdserveError(info.message, info.param)
    unknown.code, unknown.status, unknown.retryable = info.code, info.status, info.retryable
    if 400 <= info.status < 500:
        unknown.type = RequestError.type
    return unknown
