"""Where the rows of a run go besides metrics.jsonl, if it is asked for: TensorBoard, Weights & Biases.

Both hold exactly the rows of metrics.jsonl, after a kill and a resumption too: what a session finds there that the run
does not keep is dropped, and what is missing is added from metrics.jsonl.
"""

import functools
import importlib.util
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxlm.config.train import Log
from jaxlm.data.reading import read_regular
from jaxlm.errors import UserError
from jaxlm.run.metrics import Row

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@runtime_checkable
class Sink(Protocol):
    """Takes the rows of a run."""

    def write(self, row: Row) -> None:
        """Adds a row, as metrics.jsonl has it."""

    def close(self, failed: bool) -> None:
        """Hands over what is not handed over yet."""


class TensorBoard:
    """The fields of each row as scalars, in out/tensorboard; `tensorboard --logdir runs` shows them.

    The folder is written anew by each session, from metrics.jsonl.
    """

    def __init__(self, out: Path, config: dict[str, Any], rows: Sequence[Row]) -> None:
        # Its SummaryWriter writes in a thread, which ends without a word at a full disk; the next calls then hang.
        from tensorboardX.event_file_writer import EventsWriter

        folder = out / "tensorboard"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        self._started = time.time() - (rows[-1]["elapsed_s"] if rows else 0.0)
        self._writer = EventsWriter(str(folder / "events"))
        for row in rows:
            self._add(row)
        self._writer.flush()

    def _add(self, row: Row) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        fields = {name: value for name, value in row.items() if name not in ("step", "elapsed_s")}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in fields.items()]
        time_of_row = self._started + row["elapsed_s"]
        self._writer.write_event(Event(step=row["step"], wall_time=time_of_row, summary=Summary(value=values)))

    def write(self, row: Row) -> None:
        """Adds a row; it is on disk when the call returns."""
        self._add(row)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """Each row as one entry of the history of a run of Weights & Biases; WANDB_MODE=offline keeps it in out/wandb.

    The id lies in out/wandb/id, so a resumed run goes on there. Offline each session writes a folder of its own, all
    rows of the run in it, and removes the one before.
    """

    def __init__(self, out: Path, config: dict[str, Any], rows: Sequence[Row]) -> None:
        import wandb

        folder = out / "wandb"
        folder.mkdir(exist_ok=True)
        if not (folder / "id").exists():
            (folder / "id").write_text(secrets.token_hex(4))
        try:
            number = read_regular(folder / "id", 100).decode(errors="replace").strip()
        except OSError as error:
            raise UserError(f"{folder / 'id'} cannot be read ({error.strerror}): delete it") from None
        if not re.fullmatch("[0-9a-f]{8}", number):  # it becomes part of a pattern of folders that are removed
            raise UserError(f"{folder / 'id'} holds {number!r}, which is no id of a run of wandb: delete it")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxlm"),
            name=out.name,
            id=number,
            resume="allow",
            dir=str(out),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
        for old in folder.glob(f"offline-run-*-{number}"):
            if old.resolve() != Path(self._run.dir).resolve().parent:
                shutil.rmtree(old)
        self._run.define_metric("*", step_metric="step")
        self._next = self._run.step
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        """Adds a row that is not there yet."""
        # The training row of a step comes before its evaluation row: so each has a number, the same in every session.
        number = 2 * row["step"] + ("val_loss" in row)
        if number >= self._next:
            self._run.log(row, step=number)

    def close(self, failed: bool) -> None:
        """Waits until the rows are handed over."""
        self._run.finish(exit_code=int(failed))


_SINKS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Sinks:
    """The sinks of a run, as a context. One that fails later is left out, with a line that says so."""

    def __init__(
        self,
        names: Sequence[Log],
        out: Path,
        config: dict[str, Any],
        rows: Sequence[Row],
        say: Callable[[str], None],
    ) -> None:
        """Opens them; `rows` are those that metrics.jsonl has already.

        Raises:
          UserError: one cannot start.
        """
        self._say = say
        self._open: dict[str, Sink] = {}
        for name in dict.fromkeys(names):
            try:
                self._open[name] = _SINKS[name](out, config, rows)
            except Exception as error:
                self.__exit__(type(error))
                offline = ", or set WANDB_MODE=offline" if name == "wandb" else ""
                raise UserError(f"--log {name} cannot start ({_one_line(error)}): leave it out{offline}") from None

    def write(self, row: Row) -> None:
        """Adds a row to each."""
        for name, sink in list(self._open.items()):
            self._try(name, functools.partial(sink.write, row))

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, sink in list(self._open.items()):
            self._try(name, functools.partial(sink.close, kind is not None))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever it is, it must not end the training
            self._open.pop(name)
            self._say(f"--log {name} has failed ({_one_line(error)}): it gets no more rows; metrics.jsonl has them all")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def check_sinks(names: Sequence[str]) -> None:
    """Refuses sinks that are not there.

    Raises:
      UserError: a name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"log = {name!r} is unknown: choose one of {', '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(f"--log {name} needs the package {PACKAGES[name]}: pip install 'jaxlm[{name}]'")
