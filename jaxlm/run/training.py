"""Training a run on disk: the only place that connects data, model, optimizer, checkpoints and logging."""

import contextlib
import dataclasses
import math
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.analysis.expected import check_compiled, is_close, speed_fields
from jaxlm.config import ExperimentConfig
from jaxlm.config.base import to_dict
from jaxlm.config.train import Log
from jaxlm.data.corpus import document_end
from jaxlm.errors import UserError
from jaxlm.ops.canary import warn_of_known_fault
from jaxlm.ops.matmul import matmul_precision
from jaxlm.ops.partition import mesh_shape
from jaxlm.optim import skipped_steps
from jaxlm.run import checkpoint, hooks, lock, nonfinite
from jaxlm.run.failed_start import freed_if_refused, named_out_of_memory
from jaxlm.run.folder import Run, read_record
from jaxlm.run.metrics import MetricsFile, NoMetricsFile, Row, read_rows
from jaxlm.run.patience import StopWithoutBest
from jaxlm.run.plots import plot_loss
from jaxlm.run.printing import outlived
from jaxlm.run.progress import Progress
from jaxlm.run.saving import Saver
from jaxlm.run.session import Session, new_session, resumed_session
from jaxlm.run.sinks import Sinks, check_sinks
from jaxlm.run.start_line import start_line
from jaxlm.run.stopping import collected
from jaxlm.sharding import processes
from jaxlm.sharding.layout import micro_batch_rows, put
from jaxlm.sharding.mesh import make_mesh, use_mesh
from jaxlm.training.evaluate import Evaluation
from jaxlm.training.loop import block_steps, loop, make_chunk


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training run ended."""

    path: Path
    """The run's folder, for `jaxlm.load_run`."""
    step: int
    """Steps the run has taken, those before a resumption included; its latest checkpoint is of this step."""
    val_loss: float | None
    """Nats per token, of the last evaluation in this session; None if there was none."""
    signum: int | None
    """The signal that stopped the run before its last step; None if no signal did."""


def train(
    config: ExperimentConfig,
    out: str | Path,
    resume: bool = False,
    keep_warmup: bool = False,
    *,
    keep_schedule: bool = False,
    init_from: str | Path | Run | None = None,
    extend_positions: bool = False,
    log: Sequence[Log] = (),
) -> Outcome:
    """Trains a model and writes the run folder `out`; with `resume`, continues from its latest sound checkpoint.

    Everything is checked before anything is written. SIGINT, SIGTERM and SIGHUP end the run after the steps under way,
    with a checkpoint; a second signal acts at once. Progress goes to stderr, as long as somebody reads it, and rows to
    out/metrics.jsonl, whose fields `jaxlm.run.metrics` lists.

    With config.mesh.coordinator, all processes of the training call this alike, before they compute anything. Process 0
    writes and shows; a signal to one stops all; one that dies or fails ends all.

    Args:
      keep_warmup: use optim.warmup_steps as it is. Otherwise the warm-up of a preset shrinks with train.steps.
      keep_schedule: with resume and other train.steps, the learning rate goes on as if the run ended where it would
        have. Otherwise the schedule is that of a run with the new train.steps. optim.schedule_steps holds it.
      init_from: a run whose weights (of the checkpoint that `jaxlm.load_run` opens) and tokenizer the new run begins
        with, or a Hugging Face folder; optimizer and step are new, and its stop tokens stay. Its parameters must have
        the names, shapes and types of `config.model`, and `config.data` is read with its tokenizer. Checkpoint 0 holds
        what the run began with, and config.json names the source.
      extend_positions: with init_from, a `config.model.max_seq_len` beyond its learned position table adds rows of
        zeros. Otherwise that is refused. A shorter max_seq_len keeps the first rows.
      log: sinks that get the rows, too: "tensorboard", "wandb".

    Returns:
      An Outcome: `path` is the run's folder, for `jaxlm.load_run`; `step` is how many steps it has taken; `val_loss`
      is the last validation loss in nats per token, or None if this session evaluated nothing; `signum` is the signal
      that stopped it early, or None.

    Raises:
      UserError: bad input, too little memory, an `out` that is not empty (without resume) or not a run (with it); an
        `init_from` that is not a run, or whose weights or vocabulary do not fit.
      CheckError: the loss or gradient is not finite (optim.max_nonfinite skips some such steps), or every checkpoint is
        damaged, or memory has run out after a checkpoint.
    """
    if not isinstance(config, ExperimentConfig):
        raise UserError(f"config = {config!r} is not an ExperimentConfig: give one, such as jaxlm.preset('tiny')")
    out = Path(out)
    if resume and (init_from is not None or extend_positions):
        path = init_from.path if isinstance(init_from, Run) else init_from
        option = "--model.extend-positions" if init_from is None else f"--init-from {path}"
        raise UserError(f"{option} is for a new run, and --resume goes on with an old one: leave one out")
    check_sinks(log)
    if keep_schedule and not resume:
        raise UserError("--optim.keep-schedule is for a run that goes on: add --resume, or leave it out")
    if init_from is None and extend_positions:
        raise UserError("--model.extend-positions is for the weights of another run: add --init-from, or leave it out")
    with outlived(), processes.joined(config.mesh):
        warn_of_known_fault()
        source = str(init_from.path if isinstance(init_from, Run) else init_from)
        options = {"resume": resume, "keep_warmup": keep_warmup, "keep_schedule": keep_schedule}
        options |= {"extend_positions": extend_positions}
        processes.check_same({**_shared(config), "out": str(out), "init_from": source, **options})
        mesh = make_mesh(config.mesh)
        with use_mesh(mesh):
            if mesh is not None:
                micro_batch_rows(config.train, dict(mesh.shape))  # which refuses what does not divide
            with contextlib.ExitStack() as alone:
                existed = out.exists()
                with named_out_of_memory(out, not resume):
                    if resume:
                        read_record(out)  # which refuses what is not a run, and cannot be locked
                        alone.enter_context(lock.for_training(out))
                        session = resumed_session(config, out, keep_schedule, keep_warmup)
                    else:
                        session = new_session(config, out, keep_warmup, init_from, extend_positions)
                        alone.enter_context(lock.for_training(out))
                        alone.enter_context(freed_if_refused(out, existed))
                with named_out_of_memory(out, not resume), matmul_precision(session.config.train.matmul_precision):
                    return _run(session, log)


def _run(session: Session, log: Sequence[Log]) -> Outcome:
    """Trains to the last step, or until a signal or the time limit."""
    out, cfg, train_split = session.out, session.config.train, session.corpus.train
    done, first = session.saved_step or 0, processes.first()
    processes.advise(lambda: _how_to_go_on(out))
    with (
        contextlib.closing(Progress(cfg, done, shown=first)) as progress,
        collected(progress.say) as received,
        contextlib.ExitStack() as stack,
        contextlib.closing(MetricsFile(out / "metrics.jsonl", done) if first else NoMetricsFile()) as rows,
        Saver(out / "checkpoints", cfg.keep, rows.entry) as saver,
    ):
        evaluation = Evaluation(session.model, session.corpus, session.config, cfg.eval_batches)
        earlier = read_rows(out / "metrics.jsonl") if first else []
        patience = StopWithoutBest(cfg.patience, evaluation.eval_batches, earlier)

        progress.say(start_line(session))
        sinks = stack.enter_context(Sinks(log if first else (), out, to_dict(session.config), earlier, progress.say))

        def write(row: Row) -> None:
            sinks.write(rows.write(row))
            progress.show(row)
            patience.note(row)

        save = hooks.SaveCheckpoints(saver, cfg, session.saved_step, checkpoint.best_loss(out / "checkpoints"))
        evaluate = hooks.Evaluate(evaluation, cfg, progress, write, save, received)
        speed = speed_fields(session.config, session.cost.flops, math.prod(mesh_shape().values()))
        # The order matters: a diverged step gets no row, and what is evaluated is saved before.
        in_order = (
            hooks.StopOnRequest(cfg, received),
            patience,
            hooks.ShowProgress(progress, skipped=int(skipped_steps(session.state.opt_state))),
            hooks.CheckDivergence(out, saver),
            hooks.WriteMetrics(session.config, cfg.batch_size * train_split.targets_per_window, write, speed),
            save,
            evaluate,
        )
        # A chunk ends where a row is due, so the windows of `log_every` steps are all that it can read.
        source = train_split.feed(cfg.seed, cfg.batch_size, block_steps(cfg), put)
        end = document_end(session.config.data, train_split)
        chunk = make_chunk(session.model, session.tx, cfg, session.state, end)
        if is_close(session.cost):
            check_compiled(chunk, session.state, source(done), done + 1)
        evaluate.catch_up(session.state, done, earlier)
        try:
            state = loop(chunk, session.state, source, cfg, in_order)
        except nonfinite.DivergedError as error:
            traceback.clear_frames(error.__traceback__)  # which hold arrays
            place = nonfinite.find(session, chunk, source, end, error.step, progress.say, lambda: bool(received))
            raise error.at(place, out) from None
        if first and (logged := read_rows(out / "metrics.jsonl")):
            plot_loss(logged, out / "loss.png", out.name)
        step = int(state.step)
        stopped_early = step < cfg.steps or evaluate.is_owed
        signum = int(processes.agree(received[0] if received else 0).max())
        if stopped_early:
            without_best = not signum and bool(processes.agree(patience.should_stop()).any())
            why = signal.Signals(signum).name if signum else patience.reason if without_best else "max_minutes"
            more = " --train.patience N, a larger one" if without_best else ""
            progress.say(f"stopped by {why} at step {step}; saved; continue with --resume --out {out}{more}")
    return Outcome(out, step, evaluate.val_loss, signum if signum and stopped_early else None)


def _how_to_go_on(out: Path) -> str:
    """What the user does when one of several processes has died."""
    saved = checkpoint.steps(out / "checkpoints")
    kept = f"keeps its checkpoint of step {saved[-1]}" if saved else "has no checkpoint yet"
    return f"{out} {kept}: start all again with --resume --out {out}"


def _shared(config: ExperimentConfig) -> dict[str, Any]:
    """What must be the same in all processes: not who they are, nor where their data lie, whose sha256 counts."""
    data = dataclasses.replace(config.data, path=None, val_path=None)
    return to_dict(dataclasses.replace(config, data=data, mesh=config.mesh.without_processes()))
