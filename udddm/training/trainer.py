"""The training loop. `Trainer.train_step` is one step, from its inputs to the state that is written back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from udddm import ema, image_grid, networks, objectives, store
from udddm.backends import engines
from udddm.backends.distributed.listener import Listener
from udddm.backends.distributed.ranks import Ranks, Vote
from udddm.backends.distributed.signals import StopRequest, handled
from udddm.config import RunConfig
from udddm.data import ImageDataset
from udddm.diffusion import schedule
from udddm.ema import PowerEMA
from udddm.errors import CheckpointError, ConfigError, Diverged, Interrupted, StoreError
from udddm.evaluation.background import RunEvaluation
from udddm.files import write_array, write_json
from udddm.log import Dispensable, log
from udddm.objectives.loss import visit_loss
from udddm.order import Order
from udddm.runs import posthoc_ema, weights
from udddm.runs.checkpoint import load_step, step_of
from udddm.runs.pretrained import begin_from
from udddm.runs.run import PICTURES, Run, run_id
from udddm.store import Encoding, Snapshot, StateLayout
from udddm.store.base import finite_rows
from udddm.training import spikes
from udddm.training.best import Best
from udddm.training.callbacks import Callbacks, Given, RunInfo
from udddm.training.dropout import Dropout
from udddm.training.inputs import InputBuilder, Prefetch, StepInput
from udddm.training.phases import Phases
from udddm.training.profile import Profile, region
from udddm.training.progress import Progress
from udddm.training.reports import LossBySigma, Reports, Sources, diverged
from udddm.training.samples import Drawing
from udddm.training.spikes import LossSpike, SteppedBack, Watch
from udddm.training.state_use import StateUse


class Trainer:
    """Trains a run on one rank. `train` resumes from the newest valid checkpoint, if there is one."""

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        run: Run,
        ranks: Ranks,
        listener: Listener | None = None,
        callbacks: Sequence[Given] = (),
    ):
        self.config, self.dataset, self.run, self.ranks, self.listener = config, dataset, run, ranks, listener
        self._given_callbacks, self._callbacks = callbacks, Callbacks()
        train, shape = config.train, dataset.shape
        self.order = Order.build(config.order, config.seed, len(dataset), train.batch_size, shape)
        self.lanes = self.order.lanes_of(ranks.rank, ranks.world_size)
        self.total_steps = train.steps or max(1, round((train.epochs or 0) * self.order.steps_per_epoch))
        self.schedule = schedule.build(config.schedule)
        self.objective = objectives.build(config, self.schedule, self.total_steps / self.order.steps_per_epoch, shape)
        self.engine = engines.build(networks.for_run(config, shape), config, ranks, self.total_steps)
        self.teacher = objectives.teacher_of(config, self.engine)
        self._dropout = Dropout(config, self.objective, self.engine.module)
        self.emas = ema.build(train, self.engine.weights())
        self.powers = [average for average in self.emas if isinstance(average, PowerEMA)]
        layout = StateLayout(self.order, self.lanes, shape, Encoding(config.store.dtype), ranks.device)
        self.store = store.build(
            run.store_context(layout, store.for_objective(config.store, self.objective.reads_state))
        )
        self.checkpoints = run.checkpoints()
        self.evaluation = RunEvaluation(config, dataset, ranks, run.path) if config.evaluate.every_steps else None
        keeps = config.checkpoint.best and ranks.is_rank_zero
        self._best = Best(run.path, config, dataset.shape) if keeps else None
        self.step = 0
        self._watch = Watch(config.train.spike_factor)
        self._kept_rows = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._state_use = StateUse(config, self.objective, ranks)
        self._loss_by_sigma = LossBySigma(ranks.device)
        self._drawing = Drawing(config, dataset, self.schedule, self.engine, self.emas)
        self._newest: Path | None = None
        """The newest checkpoint that this process wrote or resumed from."""
        self._stop = StopRequest(once=ranks.launched)
        self._pictures = Dispensable("the pictures of samples")

    # One step.

    def train_step(self, inputs: Prefetch) -> torch.Tensor:
        """Train on the samples of the next step and write their new x0-states.

        Returns this rank's part of the loss as a scalar on the device; the sum over ranks is the loss of the step.
        """
        with region("inputs"):
            parts = inputs.next()
        with region("x0-state: read"):
            states = self.store.read().chunk(len(parts))
        self._start_dropout()
        total, new_states = torch.zeros((), device=self.ranks.device), []
        for part, state in zip(parts, states, strict=True):
            part.visits = self._state_use.decided(part, state)
            with self.engine.micro_batch(last=part is parts[-1]):
                with region("forward"), self.engine.autocast():
                    losses, new = visit_loss(
                        self.engine.module, part.images, state, part.visits, part.labels, self.teacher
                    )
                with region("backward"):
                    loss = (losses * part.weights).sum()
                    self.engine.backward(loss)
            total += loss.detach()
            new_states.append(self._measured(part, state, new, losses))
        with region("optimizer"):
            self.engine.step(self.step)
        self.step += 1
        with region("averages of the weights"):
            for average in self.emas:
                average.update(self.step)
        with region("x0-state: write"):
            self.store.write(new_states[0] if len(new_states) == 1 else torch.cat(new_states))
        return total

    def _measured(self, part: StepInput, state: torch.Tensor, new: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """The new x0-states of a micro-batch, where they are finite, after it is counted in the metrics."""
        with region("metrics"):
            self._loss_by_sigma.add(part, losses)
            if self._state_use.wants_age(part, self.step) and not self.engine.equal_forward_calls:
                self._start_dropout()
                with self.engine.autocast():
                    self._state_use.measure_age(self.engine.module, part, state, new)
            new, kept = finite_rows(new, state)
            self._kept_rows += kept
        return new

    def _start_dropout(self) -> None:
        self._dropout.start(self.step, self.step // self.order.steps_per_epoch, self.ranks.rank)

    # The run.

    def train(self) -> dict[str, Any]:
        """Train to the end and return the contents of `result.json`.

        Raises Interrupted after SIGTERM, SIGINT or SIGHUP, Diverged, StoreError, CheckpointError or DataError.
        Checkpoints are intact in every case.
        """
        try:
            with ExitStack() as stack:
                stack.enter_context(handled(self._stop))
                stack.callback(self.store.close)
                inputs = self.begin()
                stack.callback(inputs.close)
                if self.evaluation is not None:
                    stack.callback(self.evaluation.cancel)
                progress = None
                if self.ranks.is_rank_zero:
                    on_metrics = self.listener.on_metrics if self.listener else None
                    progress = Progress(self.run.path, self.step, self.total_steps, on_metrics)
                    stack.callback(progress.close)
                self._callbacks = self._start_callbacks()
                self._profile = stack.enter_context(Profile(self.run.path, self.config.profile_steps, self.ranks))
                self._loop(inputs, progress)
                if self.evaluation is not None and (stop := self.evaluation.finish(self._stop_signal)):
                    raise Interrupted(stop, self.step)
                self._pass_on_scores()
                state = self.ranks.gather(self.store.sha256())
                reinitialized = self.ranks.gather(self.store.counters.reinitialized)
            result = self._result(state)
            result["store_reinitialized"] = sum(reinitialized)
            images = self._drawing.draw(self.config.sample.final) if self.config.sample.final else None
            self.ranks.run_on_rank_zero(lambda: self._finish(result, images), (OSError, StoreError))
            return result
        finally:
            self._callbacks.end(None)

    def _start_callbacks(self) -> Callbacks:
        path, done = self.run.path, (self.step, self.total_steps)
        info = RunInfo(run_id(path), str(self.run), path, self.config, self.dataset.shape, *done)
        own = [self._best] if self._best is not None else []
        return Callbacks.start(info, [*own, *self._given_callbacks], self.ranks)

    def _pass_on_scores(self) -> None:
        """Pass on the scores of the evaluations that are done."""
        for scores in self.evaluation.take() if self.evaluation is not None else ():
            self._callbacks.scores(scores["step"], scores)

    def begin(self) -> Prefetch:
        """Resume or start the run, and start prefetching the inputs of the coming steps."""
        self._resume()
        trained = self.order, self.lanes, self.dataset, self.objective
        builder = InputBuilder.of(trained, self.config, self.ranks.device)
        depth, processes = self.config.store.prefetch or 4, self.config.data.workers
        self._inputs = Prefetch(builder, step=self.step, depth=depth, processes=processes)
        return self._inputs

    def _loop(self, inputs: Prefetch, progress: Progress | None) -> None:
        config = self.config
        every = config.log_every_steps
        reports = self._reports = self._start_reports()
        vote, phases = Vote(self.ranks), Phases(self.objective, self.order.steps_per_epoch)
        while self.step < self.total_steps:
            if self.ranks.is_rank_zero:
                phases.reach(self.step)
            self._await_inputs(inputs)
            reports.loss += self.train_step(inputs)
            self._profile.after_step()
            if progress is not None:
                progress.advance()
            last = self.step == self.total_steps
            if self.step % every == 0 or last:
                self._report(progress, reports)
            stop = vote.cast(self._stop_signal())
            saves = self.step % config.checkpoint.every_steps == 0 or last or bool(stop)
            averages = bool(self.powers) and (self.step % config.train.power_ema_every_steps == 0 or last)
            if saves or averages:
                self._check_finite(reports.loss)
            if averages:  # before the checkpoint, so that a run that resumes from it has them
                posthoc_ema.write(self.run.path, self.step, self.powers, self.engine)
            if saves:
                self.save()
            if config.sample.every_steps and self.step % config.sample.every_steps == 0:
                self._sample_grid()
            if stop and not last:
                raise Interrupted(stop, self.step)
            if self.evaluation is not None:
                keep = partial(self._best.offer, self.step) if self._best is not None else None
                draw = partial(self._drawing.draw, stop_signal=self._stop_signal, keep=keep)
                self.evaluation.after_step(self.step, draw, last=last)
                self._pass_on_scores()
        vote.outcome()

    def _stop_signal(self) -> int:
        """The signal that asks this rank to stop, or 0."""
        return self._stop.signum or (self.listener.stop_signal() if self.listener else 0)

    def _await_inputs(self, inputs: Prefetch) -> None:
        """Wait for the inputs of the next step. Stops if a signal arrives while the data set does not answer.

        With several ranks, the others may have begun the step, so that no checkpoint is possible.
        """
        while self.ranks.world_size == 1 and not inputs.wait(1.0):
            if stop := self._stop_signal():
                if self.step and (self._newest is None or step_of(self._newest) != self.step):
                    self._check_finite(torch.zeros((), device=self.ranks.device))
                    self.save()
                raise Interrupted(stop, self.step)

    def _check_finite(self, losses: torch.Tensor) -> None:
        """Raise Diverged unless losses, weights, moments and averages are finite; losses do not show the last update"""
        if not math.isfinite(self.ranks.sum(losses + weights.not_finite(self.engine, self.emas))):
            self._step_back(math.nan, math.nan)
            raise Diverged(self._diverged("the loss, a weight, one of Adam's moments or an average"))

    def _start_reports(self) -> Reports:
        wait = self._inputs.wait_fraction
        sources = Sources(self.ranks, self.engine, self.store, self.order, self._state_use, wait)
        return Reports(sources, self.step, self.total_steps)

    def _report(self, progress: Progress | None, reports: Reports) -> None:
        loss = reports.mean_loss(self.step)  # waits for the device, once per log_every_steps
        usual = self._watch.see(loss, self.objective.phase((self.step - 1) // self.order.steps_per_epoch))
        if usual is not None:
            self._step_back(loss, usual)
        if not math.isfinite(loss):
            raise Diverged(self._diverged("the loss"))
        self.store.counters.kept = int(self._kept_rows)
        learning_rate = self.engine.learning_rate(self.step - 1)
        metrics = reports.write(self.step, loss, self._loss_by_sigma, learning_rate)
        if progress is not None:
            progress.write(self.step, metrics)
        self._callbacks.metrics(self.step, metrics)

    def stepped_back(self, events: Sequence[SteppedBack]) -> None:
        """Set the restarts after spikes of the loss that the run has had. Call this before `train`."""
        self._watch = Watch(self.config.train.spike_factor if len(events) < spikes.MOST else None)
        self.engine.lr_factor = lambda step: math.prod(each.factor(step) for each in events)

    def _step_back(self, loss: float, usual: float) -> None:
        """End this attempt on every rank, if `train.spike_factor` asks for that and there is a checkpoint."""
        if self._watch.active and self._newest is not None:
            raise LossSpike(spikes.event(self.step, step_of(self._newest), loss, usual))

    def _diverged(self, what: str) -> str:
        newest = None if self._newest is None else (self.checkpoints.name(self._newest), step_of(self._newest))
        return diverged(what, self.step, newest)

    # Checkpoints.

    def save(self) -> Path:
        """Write a checkpoint of this position and remove those beyond `checkpoint.keep`."""
        errors = (StoreError, CheckpointError, OSError)
        self.ranks.run_on_rank_zero(self.run.persist, errors)  # first: a run that resumes from it has its metrics
        path = self._newest = self.checkpoints.write(self.step, self.ranks, self._fill)

        def kept() -> list[int]:
            self.checkpoints.prune(self.config.checkpoint.keep)
            return self._kept()

        self._retain(self.ranks.run_on_rank_zero(kept, errors))
        return path

    def _kept(self) -> list[int]:
        """The steps of the existing checkpoints, as seen by rank zero.

        Another machine's listing of a shared directory may be a minute old; the store would then delete generations
        that the newest checkpoint refers to.
        """
        assert self.ranks.is_rank_zero
        return [step_of(p) for p in self.checkpoints.all()]

    def _retain(self, steps: list[int]) -> None:
        epochs = {step // self.order.steps_per_epoch for step in steps}
        self.store.retain(epochs | {e + 1 for e in epochs})

    def _fill(self, directory: Path) -> None:
        self.store.snapshot(directory / "state")
        weights.save(directory, self.engine, self.emas)
        if not self.ranks.is_rank_zero:
            return
        config = {"config": self.config.model_dump(mode="json"), "shape": list(self.dataset.shape)}
        write_json(directory / "config.json", config)
        write_json(directory / "position.json", {"step": self.step})

    def _resume(self) -> None:
        """Load the newest valid checkpoint, or start the run."""

        def newest() -> tuple[str | None, list[int]]:
            found = self.checkpoints.newest_valid()
            return found.name if found else None, self._kept()

        errors = (CheckpointError, StoreError)
        self.store.hold(self.ranks)
        name, kept = self.ranks.run_on_rank_zero(newest, errors)
        self._retain(kept)
        if name is None:
            if initial := self.config.train.init_from:
                begin = partial(begin_from, initial, self.config, self.dataset.shape, self.engine, self.emas)
                begun = self.ranks.run_on_all(begin, (ConfigError, CheckpointError, StoreError))
                if len(seen := set(self.ranks.gather(begun))) > 1:
                    raise CheckpointError(
                        f"the ranks see different checkpoints as the newest of {initial} ({', '.join(sorted(seen))}): "
                        "name one of them in train.init_from"
                    )
                if self.ranks.is_rank_zero:
                    log.info(f"starting from the weights in {initial}")
            self.store.start(0, 0, None)
            return
        path = self._newest = self.checkpoints.directory / name
        self.ranks.run_on_all(
            lambda: self.checkpoints.ensure_local(path) if self.ranks.is_local_rank_zero else None, errors
        )
        self.step = load_step(path)
        weights.load(path, self.engine, self.emas)
        snapshot = Snapshot(path / "state", self.run.state, self.store.repair)
        if snapshot.order.fingerprint() != self.order.fingerprint() or snapshot.shape != self.dataset.shape:
            raise StoreError(f"the x0-state in {path} was written with a different order or image shape")
        self.store.start(*divmod(self.step, self.order.steps_per_epoch), snapshot)
        if self.ranks.is_rank_zero:
            for line in self.checkpoints.discard_after(self.step):
                log.info(line)
            log.info(f"resuming from {path.name}")

    # Samples and the result.

    def _sample_grid(self) -> None:
        directory = self.run.path / PICTURES
        images = self._drawing.draw(64)
        if self.ranks.is_rank_zero:
            with self._pictures.attempt():
                directory.mkdir(exist_ok=True)
                self._drawing.write_conditions(directory, 64)
                image_grid.save_image_grid(images, directory / f"step-{self.step:08d}.png")
            self._callbacks.images(self.step, images)

    def _result(self, state: list[str]) -> dict[str, Any]:
        return {
            **self._reports.result(self.step),
            "weights_sha256": weights.digest(self.engine, {"": self.engine.weights()}),
            "ema_sha256": weights.digest(self.engine, {f"{e.name}/": e.weights for e in self.emas}),
            "state_sha256": hashlib.sha256("".join(state).encode()).hexdigest(),
        }

    def _finish(self, result: dict[str, Any], images: torch.Tensor | None) -> None:
        if images is not None:
            write_array(self.run.path / "samples.npy", images.numpy())
            image_grid.save_image_grid(images[:100], self.run.path / "samples.png")
        self.run.persist()  # before the result, which says that the run is complete
        write_json(self.run.path / "result.json", result)
        self._callbacks.end(result)
        self.run.persist()
