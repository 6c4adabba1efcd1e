"""What the command tells apart: a user's mistake (exit code 2), a check that failed (exit code 1), and a warning."""


class UserError(ValueError):
    """Bad usage or bad input. The message is one line that names the value and the fix."""


class CheckError(RuntimeError):
    """A check of ours failed (a loss that is no number, a damaged file); the message says where."""


class PositionTableWarning(UserWarning):
    """Text goes on past a learned position table: from there each new token costs a pass over the whole context."""
