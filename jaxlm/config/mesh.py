"""MeshConfig: over which devices and processes a run is spread."""

import dataclasses

from jaxlm.config.base import Validated
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Validated):
    """Over how many devices training is spread, and which processes take part. All defaults: one device, one process.

    The three axes decide how the work is cut, never what is computed. `jaxlm.sharding` has what each axis does.
    """

    data: int = 1
    """Copies of the model, each of which trains on its part of the batch; -1 = the rest of the devices."""
    fsdp: int = 1
    """Devices that cut the parameters, the optimizer's state and the batch among them; -1 = the rest of the devices."""
    tensor: int = 1
    """Devices that cut heads, MLP and vocabulary among them; -1 = the rest of the devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for training by several processes; auto = what Slurm, Kubernetes, TPU or Open MPI say of
    this job; None = this process alone."""
    processes: int | None = None
    """How many processes there are, with a coordinator of HOST:PORT."""
    process_id: int | None = None
    """Which of them this is, from 0, with a coordinator of HOST:PORT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in axes.items():
            if size < 1 and size != -1:
                raise UserError(
                    f"mesh.{name} = {size} is out of range: give at least 1, or -1 for the rest of the devices"
                )
        rest = [name for name, size in axes.items() if size == -1]
        if len(rest) > 1:
            raise UserError(
                f"mesh.{rest[0]} = -1 and mesh.{rest[1]} = -1: only one axis can be the rest of the devices; "
                "give a number for the other"
            )
        self._check_processes()

    def _check_processes(self) -> None:
        numbers = {"mesh.processes": self.processes, "mesh.process_id": self.process_id}
        if self.coordinator in (None, "auto"):
            for name, value in numbers.items():
                if value is not None:
                    fix = "leave it out" if self.coordinator else "give mesh.coordinator too, HOST:PORT of process 0"
                    raise UserError(f"{name} = {value} with mesh.coordinator = {self.coordinator}: {fix}")
            return
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(
                f"mesh.coordinator = {self.coordinator!r} is not an address: give HOST:PORT of process 0, or auto"
            )
        for name, value in numbers.items():
            if value is None:
                raise UserError(f"mesh.coordinator = {self.coordinator} needs {name} too: give it")
        if self.processes < 1 or not 0 <= self.process_id < self.processes:  # type: ignore[operator]
            raise UserError(
                f"mesh.process_id = {self.process_id} of mesh.processes = {self.processes} is out of range: "
                "give 0 <= process_id < processes"
            )

    def without_processes(self) -> "MeshConfig":
        """The axes alone: the processes that take part are a matter of each session, not of the run."""
        return dataclasses.replace(self, coordinator=None, processes=None, process_id=None)
