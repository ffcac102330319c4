"""Refusals as answers: vLLM's error format, whatever went wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kv_agent.errors import ConfigError, KVAgentError, StorageError, UnstorableError

logger = logging.getLogger(__name__)

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    503: "ServiceUnavailableError",
    507: "InsufficientStorageError",
}
_MAX_REPORTED = 5
_STORE_TROUBLE = "the store cannot be used at the moment, the server's log says why; try again later"


class ErrorInfo(BaseModel):
    """What went wrong; ``param`` is the field it is about, ``code`` the HTTP status."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorInfo


class RequestError(KVAgentError):
    """A request that is answered with this status; ``message`` goes to the client."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = dict(headers or {})


def not_found() -> RequestError:
    """The one answer for ids that do not exist and for those of others."""
    return RequestError(404, "there is no such memory")


def answer_to(err: RequestValidationError | HTTPException | KVAgentError) -> JSONResponse:
    """The answer that an error means."""
    match err:
        case RequestValidationError():
            return _body(400, _sentence(err), param=_place(err.errors()[0]) if err.errors() else None)
        case HTTPException():
            return _body(err.status_code, str(err.detail), headers=err.headers)
        case RequestError():
            return _body(err.status, str(err), param=err.param, headers=err.headers)
        case ConfigError():
            return _body(400, str(err))
        case UnstorableError():
            about = {"event": "request_refused", "reason": "unstorable"}
            logger.warning("a request could not be stored: %s", err, extra=about)
            return _body(400, "this cannot be stored, the server's log says why")
        case StorageError():
            logger.warning("a request failed: %s", err, extra={"event": "store_trouble"})
            return _body(503, _STORE_TROUBLE)
    return _body(503, str(err))


def _body(
    status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = _TYPES.get(status) or HTTPStatus(status).phrase
    body = ErrorBody(error=ErrorInfo(message=message, type=kind, param=param, code=status))
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def _sentence(err: RequestValidationError) -> str:
    """What is wrong where; never the value, which may be anything."""
    problems = [
        f"{_place(one) or 'body'}: {one['msg'].removeprefix('Value error, ')}" for one in err.errors()
    ]
    more = f"; and {len(problems) - _MAX_REPORTED} more" if len(problems) > _MAX_REPORTED else ""
    return "; ".join(problems[:_MAX_REPORTED]) + more


def _place(problem: Mapping[str, Any]) -> str | None:
    """Dotted path of a field, without the part of the request that it came in."""
    return ".".join(str(part)[:100] for part in problem["loc"][1:]) or None
