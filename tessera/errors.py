"""What tessera says when it cannot do what was asked: one sentence with the values, then a hint."""

from __future__ import annotations


class TesseraError(Exception):
    """A refusal that a user can act on; `hint` names the flag or the step that mends it."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


class ConfigError(TesseraError):
    """A flag, an environment name or a combination of settings that cannot be honoured."""


class ModelError(TesseraError):
    """A model that is missing, damaged, or of a kind that is not supported."""


class CapacityError(TesseraError):
    """Not enough memory for the model or for one page of its cache."""


class BackendError(TesseraError):
    """A named attention backend that cannot serve; the message holds every reason."""


class EngineDeadError(TesseraError):
    """The engine process ended or stopped answering; no request can be served any more."""


class RequestError(TesseraError, ValueError):
    """One request that cannot be served; `param` names the field at fault. Other requests go on."""

    def __init__(self, message: str, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message, hint)
        self.param = param
