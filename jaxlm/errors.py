"""The two errors that the command reports: a user's mistake (exit code 2) and a failed check (exit code 1)."""


class UserError(ValueError):
    """Bad usage or bad input. The message is one line that names the value and the fix."""


class CheckError(RuntimeError):
    """A check failed, such as a loss that is not finite or a damaged file. The message says where."""
