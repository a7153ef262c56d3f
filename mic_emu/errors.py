"""Errors that a person or a script sees."""

from __future__ import annotations

import errno as _errno


class MicemuError(Exception):
    """A failure with one clear sentence that names the object and the fix.

    ``code`` is the process's exit status (documented in docs/cli.md), ``errno`` the kernel-style
    number where the real stack has one.
    """

    code = 1

    def __init__(self, message: str, errno: int = _errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = errno


class UsageError(MicemuError):
    """The command line or the configuration is wrong."""

    code = 2


class NotRunning(MicemuError):
    """No emulator runs for this instance."""

    code = 3

    def __init__(self, message: str) -> None:
        super().__init__(message, _errno.ENOENT)


class StateError(MicemuError):
    """The card is in a state that does not allow it."""

    code = 4


class WaitTimeout(MicemuError):
    """Something did not happen in time."""

    code = 5

    def __init__(self, message: str) -> None:
        super().__init__(message, _errno.ETIMEDOUT)


class NoSuchCard(MicemuError):
    """An unknown card name."""

    code = 6

    def __init__(self, message: str) -> None:
        super().__init__(message, _errno.ENODEV)


BY_NAME = {c.__name__: c for c in (MicemuError, UsageError, NotRunning, StateError, WaitTimeout, NoSuchCard)}
