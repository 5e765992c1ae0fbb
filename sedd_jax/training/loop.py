"""A training run from its config to its last checkpoint, which can be stopped and resumed at any moment."""

import contextlib
import json
import math
import os
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sedd_jax import config as configuration, likelihood, lock, sampling
from sedd_jax.data import dataset, tokenizers
from sedd_jax.data.dataset import Dataset
from sedd_jax.data.loader import Loader
from sedd_jax.data.packing import chunks, mean_length, tokens_per_byte
from sedd_jax.devices import processes, sharding
from sedd_jax.devices.stopping import Stopped, StopSignals
from sedd_jax.errors import InputError, TrainingError
from sedd_jax.training import flops, origin
from sedd_jax.training.checkpoint import Checkpoints
from sedd_jax.training.experiment import Experiment, make_experiment
from sedd_jax.training.report import Report
from sedd_jax.training.state import merged, split
from sedd_jax.training.trained import load_base
from sedd_jax.typing import as_batch


def train(config: ConfigDict, workdir: epath.Path, init: str | None = None, init_rows: str | None = None) -> dict:
    """Trains in workdir, or resumes there. Returns the figures of the final line. init, init_rows: what a new run
    begins from, see `origin.read`; by default random weights. Raises InputError before anything is written,
    TrainingError for a loss that is not finite or a stop signal."""
    config = origin.resumed(config, workdir, init)
    configuration.check_same_experiment(config, workdir)
    begun = configuration.has_checkpoint(workdir)  # a start without one leaves a tokenizer that does not count
    known = workdir if begun else epath.Path(init or workdir)
    directory = known if configuration.has_checkpoint(known) else None
    data = configuration.build(dataset.load, "data", config, directory=directory)
    experiment = make_experiment(config, data.tokenizer.vocab_size)
    data.tokenizer.padding = experiment.graph.vocab_size - data.tokenizer.vocab_size
    if data.num_classes > (known := experiment.model.num_classes):
        raise InputError(f"data.label_field has {data.num_classes} classes, and model.num_classes={known}")
    options = experiment.train
    options.check(experiment.mesh)
    configuration.check_same_data(data.fingerprint, workdir)
    params = None
    if init is not None and not begun:
        params, fingerprint = origin.read(init, init_rows, config, experiment, data.tokenizer)
        place = os.path.abspath(init) if os.path.exists(init) else init
        config = ConfigDict(config.to_dict() | {"init": {"source": place, "fingerprint": fingerprint}})
    elif experiment.model.lora_rank:
        if "init" not in config:
            raise InputError(f"model.lora_rank={experiment.model.lora_rank} needs --init, the model to adapt")
        params = load_base(config, workdir, log=processes.say, mesh=dict(experiment.mesh.shape)).params
    # Nobody writes before all processes have passed the checks; nobody continues before all is written.
    processes.require_same("config", json.dumps(config.to_dict(), sort_keys=True))
    processes.require_same("data", data.fingerprint)
    with contextlib.ExitStack() as stack:
        processes.from_leader("workdir", lambda: _write_record(config, workdir, data, stack))
        kept = {"keep_last": options.keep_last, "keep_period": options.keep_period}
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", **kept))
        stack.enter_context(jax.set_mesh(experiment.mesh))
        signals = stack.enter_context(StopSignals())
        loop = Loop(config, workdir, data, experiment, checkpoints, params)
        # Nothing waits once more for a bucket that does not answer.
        stack.push(lambda _, error, trace: None if isinstance(error, OSError) else loop.report.flush())
        return loop.run(signals)


def _write_record(config: ConfigDict, workdir: epath.Path, data: Dataset, stack: contextlib.ExitStack) -> bytes:
    """Makes the workdir ours until the stack ends."""
    stack.enter_context(lock.hold(workdir, "workdir"))
    configuration.check_same_experiment(config, workdir)  # again: another run may have ended here meanwhile
    configuration.check_same_data(data.fingerprint, workdir)
    if (workdir / "config.json").exists() and not configuration.has_checkpoint(workdir):
        processes.say(f"{workdir} is of a start that came to no checkpoint: this one begins afresh and replaces it")
    data.tokenizer.save(workdir)
    configuration.save(config, workdir, data.fingerprint, data.tokenizer.fingerprint)
    return b"written"


class Loop:
    """The state of a run, and the events between its steps. params: what a new run begins from, by default random."""

    def __init__(
        self, config: ConfigDict, workdir: epath.Path, data: Dataset, experiment: Experiment, checkpoints, params: Any
    ):
        self.config, self.workdir, self.data, self.experiment = config, workdir, data, experiment
        self.options, self.checkpoints, self.peak = experiment.train, checkpoints, flops.peak_flops()
        keys = jax.random.split(jax.random.key(self.options.seed), 4)
        init_key, self.train_key, self.eval_key, self.sample_key = keys
        restored = checkpoints.restore(experiment.abstract_state(), log=processes.say)
        if restored:
            processes.say(f"resuming after step {restored.step} in {workdir}")
        self.state = restored.state if restored else experiment.init_state(init_key)
        if params is not None and not restored:
            self.state = origin.begin(self.state, params)
        self.frozen = [split(params)[1]] if experiment.model.lora_rank else []
        self.step = int(self.state.step)
        size, position = self.options.batch_size, restored.position if restored else 0
        order = {"seed": self.options.seed, "shift": data.shift, "position": position}
        rows = sharding.local_sequences(size, experiment.mesh)
        self.loader = Loader(data.train, length=data.length, batch_size=size, rows=rows, **order)
        self.valid, _ = chunks(data.valid, data.length, limit=experiment.eval.num_sequences or None)
        self.tokens_per_byte = tokens_per_byte(self.valid, data.tokenizer, data.valid)
        together, measured = processes.compile_together, experiment.eval
        self.train_step = together("train step", experiment.train_step_fn())
        self.bound = together("bound", experiment.bound_fn(measured.num_times, measured.estimator))
        self.sample = together("sample", experiment.sample_fn(experiment.sampling))
        of_token = lambda share: flops.train_flops_per_token(experiment.model, data.length, share)  # noqa: E731
        self.flops_per_token, self.flops_per_token_full = of_token(experiment.head_share().mean()), of_token(1.0)
        self.report = Report(workdir, step=self.step if restored else -1)
        self.losses, self.results = list[float](), dict[str, float]()
        self.seconds, self.last = list[float](), math.inf  # without compilation, evaluation and checkpoints

    def run(self, signals: StopSignals) -> dict[str, Any]:
        """The remaining steps. Returns the figures of the last one; raises TrainingError as `train` does."""
        processes.say(self._summary())
        for line in filter(None, [*self.experiment.unsharded(), tokenizers.lossy_warning(self.data.tokenizer)]):
            processes.say(f"warning: {line}")
        if self.step or "init" in self.config:  # of what a run begins from, or was stopped before
            self._measure(*self.report.has(self.step))
        with self.report.bar(step=self.step, steps=self.options.steps) as self.bar:
            in_flight = None
            while self.step < self.options.steps:
                batch = sharding.place_batch(next(self.loader), self.experiment.mesh)
                self.state, values = self.train_step(self.state, self.train_key, batch, *self.frozen)
                self.step += 1
                # Reads the metrics of the step before while this one runs, so that the device never waits.
                if in_flight:
                    self._finish(*in_flight)
                in_flight = self.step, values
                if signals.after(self.step) or self.options.due(self.step):
                    self._finish(*in_flight)
                    in_flight = None
                    # A signal that comes during the pause waits for the next step, which is then saved.
                    number = signals.after(self.step)
                    self._pause(stopping=bool(number))
                    if number:
                        raise Stopped(number, f"after step {self.step}")
        self.checkpoints.wait()
        return self.report.final(self.step)

    def _finish(self, step: int, values: dict[str, jax.Array]) -> None:
        """Waits for a step and reads its metrics. Raises TrainingError if they are not finite."""
        loss, self.grad_norm = (float(values[name]) for name in ("loss", "grad_norm"))
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            last = [f"of step {number}" for number in self.checkpoints.steps()[-1:]] or ["none"]
            what = f"at step {step} the loss is {loss} and the gradient norm {self.grad_norm}; the last good checkpoint"
            raise TrainingError(f"{what} in {self.workdir} is {last[0]}; try a lower optim.lr in a new workdir")
        self.losses.append(loss)
        now = time.perf_counter()
        self.seconds += [now - self.last] if self.last < now else []
        self.last = now
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False, **self.results)

    def _pause(self, stopping: bool) -> None:
        """The events that are due after a step, with no step in flight."""
        due = self.options.due(self.step)
        if "log" in due:
            self._write_log()
        if "checkpoint" in due or stopping:
            self.report.flush()
            self.checkpoints.save(self.step, self.state, position=self.loader.position, config=self.config.to_dict())
        self._measure(evaluated=stopping, sampled=stopping)
        self.last = time.perf_counter()

    def _measure(self, evaluated: bool, sampled: bool) -> None:
        """The bound and the samples, where they are due and not there."""
        due = self.options.due(self.step)
        if "eval" in due and not evaluated:
            self._evaluate()
        if "sample" in due and not sampled:
            self._sample()

    def _write_log(self) -> None:
        rate = len(self.seconds) / (sum(self.seconds) or math.nan) * self.options.batch_size * self.data.length
        figures = {"train_loss": float(np.mean(self.losses)), "grad_norm": self.grad_norm, "tokens_per_second": rate}
        mfu = {"mfu": rate * self.flops_per_token / self.peak, "mfu_full": rate * self.flops_per_token_full / self.peak}
        self.report.entry(self.step, **figures, **mfu)
        self.losses.clear()
        self.seconds.clear()

    def _evaluate(self) -> None:
        params = merged(*self.frozen, self.state.ema)
        bound = lambda batch, first: self.bound(params, self.eval_key, batch.tokens, first, *batch[1:])  # noqa: E731
        valid, size = as_batch(self.valid), self.experiment.eval.batch_size
        bounds = self.experiment.map_batches(bound, valid, size, progress="evaluating")
        summary = likelihood.summarise(bounds, mean_length(self.valid), self.tokens_per_byte)
        self.report.entry(self.step, **{f"eval_{name}": value for name, value in summary.items()})
        self.results["bits_per_byte"] = round(summary["bits_per_byte"], 3)

    def _sample(self) -> None:
        options = self.experiment.sampling
        shape, params = (options.num, self.data.length), merged(*self.frozen, self.state.ema)
        key = jax.random.fold_in(self.sample_key, self.step)

        def draw(clamp: Any, first: int) -> jax.Array:
            sample = self.sample(params, key, clamp, options.steps, first)
            sampling.require_sound(sample.failed)
            return sample.tokens

        clamp = np.zeros(shape, bool), np.zeros(shape, np.int32)
        tokens = self.experiment.map_batches(draw, clamp, options.num)
        self.report.samples(self.step, [self.data.tokenizer.decode(sequence) for sequence in tokens.tolist()])

    def _summary(self) -> str:
        data, mesh, count = self.data, self.experiment.mesh, jax.process_count()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        left, dropped = len(data.train) - self.loader.num_chunks * data.length, len(data.valid) % data.length
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        chips = f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({axes}), {count} process{'es' * (count > 1)}"
        epochs = f"{self.loader.batches_per_epoch:.1f} batches per epoch ({left} tokens are left over in each)"
        valid = f"{len(data.valid):,} validation tokens ({dropped} at the end do not fill a sequence: dropped)"
        return f"{parameters:,} parameters on {chips}; {len(data.train):,} training tokens, {epochs}; {valid}"
