"""The errors nlray raises on purpose. `UserError` is a mistake the user can fix: one line, exit status 2."""


class NlrayError(Exception):
    """Base of every error that is not a mistake of the user: the run failed (exit status 1)."""


class UserError(NlrayError, ValueError):
    """A mistake of the user: the message is one line that names what came, where, and what is allowed (exit status 2)."""


class CheckpointError(UserError):
    """A checkpoint that is missing, torn or does not fit the configuration."""


class DataError(UserError):
    """A source that cannot be read, is empty, or lacks a column."""


class NonFiniteLossError(NlrayError):
    """The loss was not finite for too many steps in a row."""


class RemoteTimeoutError(NlrayError):
    """A remote wait reached its limit; the message says what was waited for."""


class HaltedError(NlrayError):
    """What was asked for has ended on purpose: the run begins again elsewhere, at its recovery point."""


class StorageOutageError(NlrayError):
    """A write failed for a reason that may pass: a full disk, a store that does not answer."""
