"""The errors that the command reports, a mistake of the user (exit code 2) and a failed check (1), and warnings."""


class UserError(ValueError):
    """Bad usage or bad input. The message is one line that names the value and the fix."""


class CheckError(RuntimeError):
    """A check failed, such as a loss that is not finite or a damaged file. The message says where."""


class ContextWarning(UserWarning):
    """Text goes on past the context that a model was trained with: from there it sees the latest tokens only."""


class PositionTableWarning(ContextWarning):
    """Text goes on past a learned position table: from there each new token costs a pass over the whole context."""
