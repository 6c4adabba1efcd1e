"""What an experiment is made of: rows that are trained or measured, each with published numbers and targets."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import ExperimentConfig
from jaxlm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxlm.run.folder import Run

Numbers = dict[str, Any]
"""Results by name, as JSON types."""

FolderOf = Callable[[str], Path]
"""The run folder of another row of the same experiment, under the same seed."""

THREE_SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of an experiment."""

    name: str
    """What --row calls it; also the name of its folder."""
    label: str
    """What the table calls it."""
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Published results by quantity."""
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What each quantity should be at most, as the mean over the seeds."""
    below: tuple[str, float] | None = None
    """Another row and a margin: the target of val_loss is at most that row's mean plus the margin."""
    shown: tuple[str, ...] = ()
    """Quantities with a line in the table although nothing is published or asked for."""
    seeds: tuple[int, ...] = (0,)
    note: str = ""
    """What differs from the published set-up."""

    @property
    def quantities(self) -> tuple[str, ...]:
        """The quantities that have a line in the table."""
        compared = ["val_loss"] if self.below else []
        names = dict.fromkeys([*compared, *self.targets, *self.published, *self.shown])
        return tuple(names) or ("val_loss",)

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows that must be done before this one."""
        return ()

    def settings(self, seed: int) -> dict[str, Any]:
        """What decides the numbers, by name."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Row):
    """A row that is a training run, one for each seed."""

    config: ExperimentConfig
    init_from: str | None = None
    """The row whose trained weights this one begins with."""
    extend_positions: bool = False
    """Give a learned position table new rows, where the context is longer than that of `init_from`."""
    prompts: tuple[str, ...] = ()
    """What the samples of the report continue."""
    measure: "Callable[[Run, FolderOf], Numbers] | None" = None
    """Further quantities of the trained model."""
    measure_needs: tuple[str, ...] = ()
    """The rows that `measure` looks at."""
    accelerator: bool = False
    """Too long for a CPU."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The rows whose weights this one begins with, or whose runs `measure` looks at."""
        return (*([self.init_from] if self.init_from else []), *self.measure_needs)

    def seeded(self, seed: int) -> ExperimentConfig:
        """The training under one seed."""
        return dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, seed=seed))

    def settings(self, seed: int) -> dict[str, Any]:
        """The fields of the config that are not at their defaults and decide the numbers, by dotted name."""
        chosen = changed_fields(self.seeded(seed))
        free = ("preset", "sample.", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep")
        return {name: value for name, value in chosen.items() if not name.startswith(free)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement(Row):
    """A row that is measured in one go: times, memory, tokens."""

    measure: Callable[[bool], Numbers]
    """Takes whether a quick version will do. Its entry "markdown" holds the lines of a table."""
    measured: Mapping[str, Any]
    """What is measured: sizes, lengths, models."""

    def settings(self, seed: int) -> dict[str, Any]:
        """What is measured."""
        return dict(self.measured)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """All rows of one source."""

    name: str
    title: str
    """The source, and what was published."""
    rows: tuple[Row, ...]
    side_by_side: bool
    """Whether its trainings are so small that two of one core each take less time than one after the other."""
    draw: "Callable[[dict[str, list[Numbers]]], Figure | None]"
    """The picture, from the records of each row (one a seed); None while there is too little to draw."""

    def row(self, name: str) -> Row:
        """The row called `name`.

        Raises:
          UserError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = ", ".join(row.name for row in self.rows)
        raise UserError(f"row {name!r} is unknown in {self.name}: choose one of {names}")


def changed_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a config that are not at their defaults, by dotted name, as JSON types."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            changed |= changed_fields(value, f"{name}.")
        elif field.default is dataclasses.MISSING or value != field.default:
            changed[name] = list(value) if isinstance(value, tuple) else value
    return changed
