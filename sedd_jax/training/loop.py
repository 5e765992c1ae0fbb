"""A training run from its config to its last checkpoint, which can be stopped and taken up again at any moment."""

import contextlib
import functools
import json
import math
import sys
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from sedd_jax import config as configuration
from sedd_jax import likelihood
from sedd_jax.config import build
from sedd_jax.data import dataset, tokenizers
from sedd_jax.data.dataset import Dataset
from sedd_jax.data.loader import Loader
from sedd_jax.data.packing import chunks
from sedd_jax.devices import processes, sharding
from sedd_jax.devices.processes import say
from sedd_jax.devices.stopping import Stopped, StopSignals, stop_signals
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.training import flops
from sedd_jax.training.checkpoint import Checkpoints
from sedd_jax.training.experiment import Experiment, make_experiment
from sedd_jax.training.report import Report, Stopwatch
from sedd_jax.training.state import TrainState


def train(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Trains, or goes on training, in workdir. Returns the figures of the final line.

    Raises InputError before anything is written, TrainingError for a loss that is not finite or a stop signal.
    """
    configuration.check_same_experiment(config, workdir)
    on_leader = functools.partial(processes.from_leader, "tokenizer")
    data = build(dataset.load, "data", config, directory=workdir, on_leader=on_leader)
    experiment = make_experiment(config, data.tokenizer.vocab_size)
    options = experiment.train
    options.check(experiment.mesh)
    configuration.check_same_data(data.fingerprint, workdir)
    # Nobody writes before everybody has come through the checks; nobody goes on before all is written.
    processes.require_same("config", json.dumps(config.to_dict(), sort_keys=True))
    processes.require_same("data", data.fingerprint)
    processes.from_leader("workdir", lambda: _write_record(config, workdir, data))
    checkpoints = Checkpoints(
        workdir / "checkpoints", keep_last=options.keep_last, keep_period=options.keep_period or None
    )
    peak = flops.peak_flops()
    with jax.set_mesh(experiment.mesh), checkpoints, stop_signals() as signals:
        run = Run(config, workdir, data, experiment, checkpoints, peak)
        with contextlib.closing(run.report):
            return run.run(signals)


def _write_record(config: ConfigDict, workdir: epath.Path, data: Dataset) -> bytes:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be made a directory: {error.strerror}") from error
    data.tokenizer.save(workdir)
    configuration.save(config, workdir, data.fingerprint, data.tokenizer.fingerprint)
    return b"written"


class Run:
    """The state of the loop, and what it does every so many steps."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        data: Dataset,
        experiment: Experiment,
        checkpoints: Checkpoints,
        peak: float,
    ):
        self.config, self.workdir, self.options = config, workdir, experiment.train
        options = self.options
        self.data, self.experiment, self.checkpoints = data, experiment, checkpoints
        keys = jax.random.split(jax.random.key(options.seed), 4)
        self.init_key, self.train_key, self.eval_key, self.sample_key = keys
        self.state, position = self._restore_or_init()
        self.loader = Loader(
            data.train,
            length=data.length,
            batch_size=options.batch_size,
            seed=options.seed,
            rows=sharding.local_rows(options.batch_size, experiment.mesh),
            position=position,
            shift=data.shift,
        )
        self.step = int(self.state.step)
        self.report = Report(workdir, step=self.step)
        draw = experiment.sample_fn(experiment.sampling)
        self.train_step = processes.compile_together("train step", experiment.train_step_fn())
        self.bound = processes.compile_together("bound", experiment.bound_fn(experiment.eval.num_times))
        self.draw = processes.compile_together("draw", draw)
        self.valid, _ = chunks(data.valid, data.length, limit=experiment.eval.num_sequences or None)
        self.watch = Stopwatch()
        self.flops_per_token = flops.train_flops_per_token(experiment.model, data.length)
        self.peak = peak
        self.losses: list[float] = []
        self.results: dict[str, float] = {}

    def _restore_or_init(self) -> tuple[TrainState, int]:
        restored = self.checkpoints.restore(self.experiment.abstract_state(), log=say)
        if restored is not None:
            say(f"resuming after step {restored.step} in {self.workdir}")
            return restored.state, restored.position
        return self.experiment.init_state(self.init_key), 0

    def run(self, signals: StopSignals) -> dict[str, Any]:
        say(self._summary())
        for line in [*self.experiment.unsharded(), tokenizers.lossy_warning(self.data.tokenizer)]:
            if line:
                say(f"warning: {line}")
        self._make_up()
        steps = self.options.steps
        with self.report.bar(step=self.step, steps=steps) as bar:
            in_flight: tuple[int, dict] | None = None
            while self.step < steps:
                tokens = sharding.place_batch(next(self.loader), self.experiment.mesh)
                self.state, values = self.train_step(self.state, self.train_key, tokens)
                self.step += 1
                # One step stays in flight while the one before is looked at, so that the device never waits for us.
                self._finish(in_flight, bar)
                in_flight = self.step, values
                if self._is_due(signals.after(self.step)):
                    self._finish(in_flight, bar)
                    in_flight = None
                    # A signal that comes during the pause waits for the next step, which then is saved.
                    number = signals.after(self.step)
                    self._pause(stopping=bool(number))
                    if number:
                        raise Stopped(number, f"after step {self.step}")
        self.checkpoints.wait()
        return self.report.final(self.step)

    def _is_due(self, signal: int) -> bool:
        every = [getattr(self.options, f"{name}_every") for name in ("log", "eval", "sample", "checkpoint")]
        return bool(signal) or self.step == self.options.steps or any(n and self.step % n == 0 for n in every)

    def _finish(self, in_flight: tuple[int, dict] | None, bar: tqdm) -> None:
        """Waits for a step and takes in its metrics. The first one of a process is compilation: its time is left out.

        Raises TrainingError if they are not finite.
        """
        if in_flight is None:
            return
        step, values = in_flight
        loss, norm = (float(values[name]) for name in ("loss", "grad_norm"))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            saved = self.checkpoints.steps()
            raise TrainingError(
                f"at step {step} the loss is {loss} and the gradient norm {norm}; the last good checkpoint in "
                f"{self.workdir} is {f'of step {saved[-1]}' if saved else 'none'}; "
                "try a lower optim.lr in a new workdir"
            )
        self.losses.append(loss)
        self.grad_norm = norm
        self.watch.tick()
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False, **self.results)

    def _pause(self, stopping: bool) -> None:
        """What is due between two steps, with no step in flight."""
        options, step = self.options, self.step
        due = self._is_time
        if due(options.log_every):
            self._write_log()
        if due(options.checkpoint_every) or stopping:
            self.checkpoints.save(step, self.state, position=self.loader.position, config=self.config.to_dict())
        if due(options.eval_every) and not stopping:
            self._evaluate()
        if due(options.sample_every) and not stopping:
            self._sample()
        self.watch.skip()

    def _is_time(self, every: int) -> bool:
        return bool(every) and (self.step == self.options.steps or self.step % every == 0)

    def _make_up(self) -> None:
        """What was due at the step that we resume after, if the run was stopped before it was done."""
        if self.step == 0:
            return
        evaluated, sampled = self.report.has(self.step)
        if self._is_time(self.options.eval_every) and not evaluated:
            self._evaluate()
        if self._is_time(self.options.sample_every) and not sampled:
            self._sample()

    def _write_log(self) -> None:
        rate = self.watch.steps_per_second() * self.options.batch_size * self.data.length
        self.speed = {"tokens_per_second": rate, "mfu": rate * self.flops_per_token / self.peak}
        self.train_loss = float(np.mean(self.losses))
        self.losses.clear()
        self.report.entry(self.step, train_loss=self.train_loss, grad_norm=self.grad_norm, **self.speed)

    def _evaluate(self) -> None:
        place = self.experiment.place
        bounds = sharding.map_batches(
            lambda rows, first: self.bound(self.state.ema, self.eval_key, place(rows), first),
            self.valid,
            self.experiment.eval.batch_size,
            progress=lambda batches: tqdm(
                batches, desc="evaluating", leave=False, delay=1, file=sys.stderr, disable=not processes.is_leader()
            ),
        )
        summary = likelihood.summarise(bounds, self.data.length, self.data.valid.tokens_per_byte)
        self.report.entry(self.step, **{f"eval_{name}": value for name, value in summary.items()})
        self.results["bits_per_byte"] = round(summary["bits_per_byte"], 3)

    def _sample(self) -> None:
        shape = (self.experiment.sampling.num, self.data.length)
        free = tuple(map(self.experiment.place, (np.zeros(shape, bool), np.zeros(shape, np.int32))))
        key = jax.random.fold_in(self.sample_key, self.step)
        drawn = np.asarray(self.draw(self.state.ema, key, free, self.experiment.sampling.steps, 0).tokens)
        self.report.samples(self.step, [self.data.tokenizer.decode(tokens) for tokens in drawn.tolist()])

    def _summary(self) -> str:
        data, mesh = self.data, self.experiment.mesh
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        dropped = len(data.valid) % data.length
        return (
            f"{parameters:,} parameters on {mesh.size} x {mesh.devices.flat[0].device_kind} "
            f"({', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}), "
            f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}; "
            f"{len(data.train):,} training tokens, {self.loader.batches_per_epoch:.1f} batches per epoch "
            f"({len(data.train) - self.loader.num_chunks * data.length} tokens are left over in each); "
            f"{len(data.valid):,} validation tokens ({dropped} at the end do not fill a sequence: dropped)"
        )
