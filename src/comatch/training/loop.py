"""The training loop: every stage of a recipe in order, on Hugging Face Accelerate."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.compiled import compiled_layers
from comatch.config import OptimConfig, RunConfig, StageRun
from comatch.core.fingerprint import Fingerprint
from comatch.data.mixture import Mixture
from comatch.encoder import Encoder
from comatch.errors import ComatchError, ConfigError, Stopped, TrainingError
from comatch.recipe import Recipe, Stage
from comatch.training.beside import Beside
from comatch.training.checkpoint import WEIGHTS, Tensors, atomic_folder
from comatch.training.faults import explained
from comatch.training.fit import cost_of, fit_layers, useful_flops
from comatch.training.guide import Guide
from comatch.training.loader import Quarantine, Sample, StageData, batches
from comatch.training.origin import Origin
from comatch.training.plan import Plan, open_encoder, open_parameters, save_stage, survey
from comatch.training.progress import Reporter
from comatch.training.run import RunFolder
from comatch.training.signals import Signals
from comatch.training.state import Live, load_weights, seed_step
from comatch.training.step import check_finite, take_step

Evaluate = Callable[[Encoder], Mapping[str, float]]


def train(
    config: RunConfig,
    *,
    overwrite: bool = False,
    new_run: bool = False,
    from_step: str | None = None,
    inexact: bool = False,
    evaluate: Evaluate | None = None,
    quiet: bool = False,
) -> Path:
    """Run every stage that the config names and return the run folder; a run that was ended there goes on from its newest checkpoint.

    overwrite: delete what the folder holds. new_run: take the folder FOLDER-2, -3 ... instead. from_step: go on from that checkpoint.
    inexact: go on although dropout will be drawn otherwise. evaluate: scores of an encoder by name, asked for as `config.evaluate` says.
    Each finished stage is saved under its name in the run folder; `Encoder.load(folder)` loads the last. Where the config evaluates, `best`
    is the model of the best checkpoint. Raises Stopped after a signal, TrainingError where the folder holds a complete or another run, or
    a loss is not finite.
    """
    recipe, stages = survey(config)
    check_evaluation(config, recipe, evaluate)
    # Accelerate keeps the precision of the first run in a process for all later ones; each of ours has its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        # Without a GPU as with device=cpu: else each of several processes would take itself for the only one.
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        log_with=list(config.tracking) or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=config.timeout_minutes))],
    )
    folder = RunFolder(config.folder, Origin.of(config, accelerator.num_processes), recipe, accelerator.is_main_process)
    folder.find(overwrite=overwrite, new_run=new_run, from_step=from_step, inexact=inexact)
    encoder = open_encoder(config, recipe, folder.last)
    with closing(folder), Signals() as signals, explained(accelerator):
        folder.begin(Fingerprint().of([], encoder.backbone.state_dict()) if accelerator.is_main_process else "")
        accelerator.wait_for_everyone()
        _open_trackers(accelerator, config, folder.path)
        running = Running(accelerator, Plan(config, recipe, encoder, stages), folder, signals, evaluate, quiet)
        ended: Stopped | None = None
        try:
            running.stages()
        except Stopped as stopped:
            ended = stopped.with_traceback(None)
    _end(accelerator)
    if ended:
        raise ended
    return folder.path


@dataclass
class Running:
    """A run under way: the stages that are left, one after the other, with checkpoints and evaluation between their steps."""

    accelerator: Accelerator
    todo: Plan
    folder: RunFolder
    signals: Signals
    evaluate: Evaluate | None
    quiet: bool
    guide: Guide | None = None
    beside: Beside = field(default_factory=Beside)

    def stages(self) -> None:
        """Train what is left to its end."""
        left = [planned for planned in self.todo.stages if planned[0].name not in self.folder.done]
        for number, (stage, run, mixture) in enumerate(left):
            if number:
                self.todo.encoder = open_encoder(self.todo.config, self.todo.recipe, self.folder.last)
            self._finish(stage, self._train(stage, run, mixture))
        self._on_main(self.folder.complete)

    def _train(self, stage: Stage, run: StageRun, mixture: Mixture) -> Live:
        config, encoder, accelerator = self.todo.config, self.todo.encoder, self.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        if run.batch % ranks:
            raise ConfigError(f"stages.{stage.name}.batch={run.batch} does not divide by {ranks} processes")
        seed_step(config.seed, stage.name, -1, 0)  # new adapters begin equal on all processes, and after a restart
        live = self._live(stage, run, Quarantine((run.data or config.data).max_bad, len(mixture)))
        self.guide = Guide.load(run.loss.guide, encoder, accelerator.device) if run.loss.guide else None
        where = {"rank": rank, "ranks": ranks, "cost": cost_of(encoder.backbone) if ranks > 1 else None}
        data = StageData(mixture, encoder.preparer, stage, seed=config.seed, batch=run.batch, **where)
        with live.reporter, compiled_layers(encoder.backbone, config.compile):
            self._settle(live, stage, run, data)
            if self.folder.checkpoint and self.folder.checkpoint.stage == stage.name:
                live.restore(self.folder.checkpoint)
            saved = live.step
            for samples in batches(data, live.step, run.steps, config.workers):
                if code := self.signals.agreed(accelerator):
                    self._stop(live, stage, code, saved)
                self._step(live, stage, run, samples)
                with live.reporter.pause():
                    score = self._score(live, stage, run)
                    if score is not None or (config.save_every and live.step % config.save_every == 0 and live.step < run.steps):
                        self._save(live, stage, score)
                        saved = live.step
        return live

    def _live(self, stage: Stage, run: StageRun, quarantine: Quarantine) -> Live:
        model, self.beside, optimizer, scheduler = _prepare(self.accelerator, self.todo.config, self.todo.encoder.backbone, stage, run)
        fit_layers(self.accelerator, self.todo.config, self.todo.encoder.backbone, stage, run)
        reporter = Reporter(self.folder.metrics, stage.name, run.steps, self.accelerator, quiet=self.quiet, every=run.log_every)
        reporter.peak = self.todo.config.peak_tflops
        model.train()
        return Live(self.accelerator, {"model": model, **self.beside.modules}, optimizer, scheduler, quarantine, reporter)

    def _settle(self, live: Live, stage: Stage, run: StageRun, data: StageData) -> None:
        """Do the first batch for nothing: DDP orders its buckets anew after one, and by that order sums over three processes round."""
        model, accelerator = live.modules["model"], self.accelerator
        if accelerator.num_processes > 2 and isinstance(model, DistributedDataParallel):
            seed = seed_step(self.todo.config.seed, stage.name, 0, accelerator.process_index)
            take_step(accelerator, model, data[0], stage, run, seed=seed, beside=self.beside, judge=self.guide)
            live.optimizer.zero_grad()

    def _step(self, live: Live, stage: Stage, run: StageRun, samples: Sequence[Sample]) -> None:
        accelerator, began = self.accelerator, time.perf_counter()
        seed = seed_step(self.todo.config.seed, stage.name, live.step, accelerator.process_index)
        for sample in samples:
            live.quarantine.add(sample)
        model = live.modules["model"]
        try:
            result = take_step(accelerator, model, samples, stage, run, seed=seed, beside=self.beside, judge=self.guide)
            norm = accelerator.clip_grad_norm_(live.optimizer.param_groups[0]["params"], run.optim.clip)
            self.beside.clip(run.optim.clip)
            check_finite(torch.as_tensor(norm), "gradient norm")
        except TrainingError as error:
            where = f"stage {stage.name}, step {live.step + 1}, rows {[(sample.source, sample.row) for sample in samples]}"
            raise TrainingError(f"{where}: {error}") from error
        live.optimizer.step()
        rate = live.scheduler.get_last_lr()[0]
        live.scheduler.step()
        live.optimizer.zero_grad()
        flop = useful_flops(self.todo.config, self.todo.encoder.backbone, stage, samples)
        live.reporter.step(live.step, result, float(norm), rate, live.quarantine, time.perf_counter() - began, flop)
        live.step += 1

    def _score(self, live: Live, stage: Stage, run: StageRun) -> float | None:
        """Evaluate where it is due, on every process alike because a sharded model needs them all."""
        wanted = self.todo.config.evaluate
        if wanted is None or self.evaluate is None or stage != self.todo.recipe.encoding:
            return None
        if live.step % wanted.every and live.step < run.steps:
            return None
        model = live.modules["model"].eval()
        scores = dict(self.evaluate(self.todo.encoder))
        model.train()
        live.reporter.evaluation(live.step, scores)
        return choose(scores, wanted.metric)

    def _save(self, live: Live, stage: Stage, score: float | None) -> None:
        live.reporter.sync()
        parts = live.gather()
        self._on_main(lambda: self.folder.save(stage.name, live.step, *parts, score))

    def _stop(self, live: Live, stage: Stage, code: int, saved: int) -> None:
        if live.step > saved:
            self._save(live, stage, None)
        raise Stopped(f"a signal ended the run after step {live.step} of stage {stage.name}; the same command goes on from there", code)

    def _finish(self, stage: Stage, live: Live) -> None:
        """Save the model of a stage, and that of its best checkpoint."""
        account = Quarantine.merged(gather_object([live.quarantine]))
        model = self.accelerator.unwrap_model(live.modules["model"])
        sharded = isinstance(model, FSDPModule)
        weights = live.gather()[0] if sharded else {}
        self.accelerator.free_memory()

        def save() -> None:
            top = self.folder.best(stage.name)
            if top:
                self._write(self._rebuilt(stage, top.tensors(WEIGHTS)), "best")
            self._write(self._rebuilt(stage, weights) if sharded else self.todo.encoder, stage.name)
            best = {"stage": stage.name, "step": top.step, "score": top.score} if top else None
            self.folder.stage_done(stage.name, dict(account.reasons), best)

        self.todo.encoder.backbone = model
        self._on_main(save)
        self.folder.checkpoint = None
        self.folder.done = broadcast_object_list([self.folder.done])[0]

    def _write(self, encoder: Encoder, name: str) -> None:
        adapters.merge(encoder.backbone)
        encoder.backbone.eval()
        with atomic_folder(self.folder.path / name) as aside:
            save_stage(encoder, aside)

    def _rebuilt(self, stage: Stage, weights: Tensors) -> Encoder:
        """The stage's first model with what was trained put into it."""
        encoder = open_encoder(self.todo.config, self.todo.recipe, self.folder.last)
        open_parameters(self.todo.config, encoder.backbone, stage)
        mine = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
        load_weights(adapters.trainable(encoder.backbone), mine, "checkpoint")
        return encoder

    def _on_main(self, action: Callable[[], object]) -> None:
        """Do something on the first process; where it fails there, it fails on all, so that none waits for ever."""
        problem: ComatchError | None = None
        if self.accelerator.is_main_process:
            try:
                action()
            except ComatchError as error:
                problem = error
        told = broadcast_object_list([problem and str(problem)])[0]
        if told:
            raise problem or TrainingError(told)


def check_evaluation(config: RunConfig, recipe: Recipe, evaluate: Evaluate | None) -> None:
    """Raise ConfigError where evaluation is asked for and cannot be had, or the other way round."""
    if (config.evaluate is None) != (evaluate is None):
        given = "none was passed" if evaluate is None else "one was passed"
        raise ConfigError(f"evaluate in the config and the function evaluate=... go together: the config has {config.evaluate}, {given}")
    if config.evaluate and (recipe.encoding is None or recipe.encoding.name not in config.stages):
        stage = recipe.encoding.name if recipe.encoding else "a stage with a pooling"
        raise ConfigError(f"evaluate has no effect, because {stage} of recipe {recipe.name!r} is not trained here; remove it")


def choose(scores: Mapping[str, float], metric: str) -> float:
    """One of the scores, or the mean of all. Raises ConfigError for an unknown name, TrainingError for a score that is no number."""
    if metric != "mean" and metric not in scores:
        raise ConfigError(f"evaluate.metric is {metric!r}; the scores are mean, {', '.join(scores)}")
    score = sum(scores.values()) / len(scores) if metric == "mean" and "mean" not in scores else scores[metric]
    if not math.isfinite(score):
        raise TrainingError(f"the evaluation's {metric} is {score}, so no best can be chosen; look at {dict(scores)}")
    return float(score)


def _prepare(
    accelerator: Accelerator, config: RunConfig, backbone: Backbone, stage: Stage, run: StageRun
) -> tuple[nn.Module, Beside, Any, Any]:
    beside = Beside.of(backbone, stage, run, whole=config.adapter.kind == "full")
    open_parameters(config, backbone, stage)
    params = list(adapters.trainable(backbone).values())
    o = run.optim
    optimizer = torch.optim.AdamW(params, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    model, optimizer = accelerator.prepare(backbone, optimizer)
    beside.join(accelerator.device, optimizer, o)
    return model, beside, optimizer, schedule(optimizer, o, run.steps)


def schedule(optimizer: Any, optim: OptimConfig, steps: int) -> Any:
    """Linear warm-up over a share of the steps, then to zero by a cosine or a line, or constant."""
    warmup = round(optim.warmup * steps)
    if optim.schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup)
    fall = get_linear_schedule_with_warmup if optim.schedule == "linear" else get_cosine_schedule_with_warmup
    return fall(optimizer, warmup, steps)


def _open_trackers(accelerator: Accelerator, config: RunConfig, path: Path) -> None:
    if not config.tracking:
        return
    accelerator.project_configuration.set_directories(str(path))
    try:
        accelerator.init_trackers(config.name, config={"digest": config.digest})
    except Exception as error:  # noqa: BLE001 - a tracker is other people's code and network; no run is lost to it
        accelerator.trackers = []
        warnings.warn(f"the tracker did not start ({error!r}); training goes on without it", stacklevel=2)


def _end(accelerator: Accelerator) -> None:
    # Gloo's group must not outlive itself in a model of DDP: whoever frees that last waits for a thread that waits for it.
    accelerator.free_memory()
    try:
        accelerator.end_training()
    except Exception as error:  # noqa: BLE001 - as above
        warnings.warn(f"the tracker did not end well ({error!r})", stacklevel=2)
    AcceleratorState._reset_state()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
