"""Early stopping: a run ends after some evaluations in a row without a new best."""

from collections.abc import Sequence

from jaxlm.run.metrics import Row
from jaxlm.training.loop import Hook


class StopWithoutBest(Hook):
    """Ends training when so many evaluations in a row (train.patience) have brought no new best val_loss.

    It reads the rows that are written, those of earlier sessions included, so a resumed run stops where one that was
    never stopped does. Estimates (train.eval_batches) are compared with those from as many batches alone.
    """

    def __init__(self, patience: int | None, eval_batches: int | None, earlier: Sequence[Row]) -> None:
        """Args: eval_batches: of this session's evaluations; None = they are exact. earlier: former rows."""
        self._patience, self._eval_batches = patience, eval_batches
        self._best: tuple[float, int] | None = None
        self._since = 0
        for row in earlier:
            self.note(row)

    def note(self, row: Row) -> None:
        """Counts a row, if it is of an evaluation of the same kind."""
        if "val_loss" not in row or row.get("eval_batches") != self._eval_batches:
            return
        if self._best is None or row["val_loss"] < self._best[0]:
            self._best, self._since = (row["val_loss"], row["step"]), 0
        else:
            self._since += 1

    def should_stop(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self._since >= self._patience

    @property
    def reason(self) -> str:
        """Why it stops, for people."""
        loss, step = self._best or (float("nan"), 0)
        return f"{self._since} evaluations without a new best (val_loss {loss:.4f} at step {step}; train.patience)"
