"""The training loop. A step is a function of (settings, data, parameters, step number) and of nothing else.

The order of the images is drawn from (seed, epoch) and the views from (seed, step), each from a generator of its
own. So a run that goes on from a checkpoint needs no saved random state to repeat what it would have done, and
two runs that differ only in the loss's implementation see the same batches.

Over several ranks a step is the same function, up to rounding: each rank takes its part of the batch, with the views
that it has in it, and the loss, its gradient and BatchNorm's statistics are those of the whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import alignment, budget, cached_backward, uniformity
from .augment import PRESETS, two_views
from .batch_norm import over_ranks
from .build import make_model, pick_device
from .checkpoint import FILE_NAME, check_agreement, load_checkpoint, resume_path, save_checkpoint
from .config import Config
from .data import ImageData
from .history import History, TrainingError
from .objective import build_objective
from .optim import build_optimizer, default_learning_rate, learning_rate
from .ranks import ALONE, Ranks
from .sources import require


class _Batch(NamedTuple):
    """What the loss saw of this rank and gave in one step, without a graph."""

    z_i: Tensor
    z_j: Tensor
    temperature: Tensor | float
    loss: Tensor


class Trainer:
    """A run in memory: model, loss, optimiser, history, and the step it is at.

    Args:
        config: the settings; `config.out` must be a folder that can be written to.
        data: the images.
        ranks: the processes of the run. Each makes a trainer and calls `fit`; the first writes the checkpoints. What
            needs the others happens in `fit`: making a trainer may fail on one rank alone.

    Raises:
        ValueError: a setting is out of range, the device or the backend cannot be used, or the checkpoint to resume
            from does not fit.
        FileNotFoundError, FileExistsError: there is no checkpoint to resume from, or one that would be lost.
    """

    def __init__(self, config: Config, data: ImageData, ranks: Ranks = ALONE) -> None:
        config.check()
        self.config = config
        self.data = data
        self.ranks = ranks
        self.device = pick_device(config.device, ranks)
        self.model = make_model(config, data, self.device)
        self.loss = build_objective(config, ranks.group).to(self.device)
        self._try_the_loss()

        n = len(data.train_images)
        self.batch = min(config.batch, n)
        # A last batch of one sample has no negative, and BatchNorm no variance.
        self.steps_per_epoch = n // self.batch + (n % self.batch >= 2)
        self.schedule_steps = config.epochs * self.steps_per_epoch
        self.warmup_steps = min(round(config.warmup * self.steps_per_epoch), self.schedule_steps - 1)
        self.peak_lr = config.lr or default_learning_rate(config.optimizer, self.batch)
        self.optimizer = build_optimizer(
            config.optimizer, (self.model, self.loss), self.peak_lr, config.weight_decay, config.momentum
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.model.amp_dtype == torch.float16)

        self.step = 0
        self.seconds = 0.0
        self.history = History()
        target = config.out / FILE_NAME
        source = resume_path(config) if config.resume else None
        if source:
            self._resume(source)
        if target.exists() and not config.overwrite and not (source and source.samefile(target)):
            raise FileExistsError(
                f"{config.out} holds another run's checkpoint: continue that one with --resume, lose it with "
                "--overwrite, or choose another --out"
            )
        try:
            config.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {config.out} cannot be made a folder: {error.strerror}") from error

    @property
    def last_step(self) -> int:
        """Where this run stops: the end of the schedule, or --max-steps."""
        return min(self.schedule_steps, self.config.max_steps or self.schedule_steps)

    def fit(self, until: int | None = None) -> None:
        """Train to `last_step`, or to the step `until` before it, with checkpoints on the way and one at the end.

        Raises:
            TrainingError: the loss failed its verification, or is no longer finite.
        """
        config = self.config
        last_step = self.last_step if until is None else min(until, self.last_step)
        started = time.perf_counter() - self.seconds
        measured = (self.step, time.perf_counter())
        with self._progress_bar() as bar:
            while self.step < last_step:
                batch = self._train_step()
                done = self.step + 1
                if config.verify_every and self.step % config.verify_every == 0:
                    self._verify(batch)
                if self.step % config.log_every == 0 or done == last_step:
                    rate = (done - measured[0]) * self.batch / (time.perf_counter() - measured[1])
                    measured = (done, time.perf_counter())
                    bar.set_postfix(self._measure(batch) | {"images/s": f"{rate:.0f}"}, refresh=False)
                self.step = done
                self.seconds = time.perf_counter() - started
                bar.update()
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < last_step:
                    self.save()
        self.save()

    def save(self) -> None:
        """Write the checkpoint of the present step, which is the same for any number of ranks."""
        self.history.flush(self.step)
        if not self.ranks.first:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "config": self.config.to_dict(),
            "data": self.data.fingerprint(),
            "channels": self.data.channels,
            "image_size": self.data.image_size,
            "image_shape": list(self.data.train_images.shape[1:]),
            "history": self.history.columns,
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(self.config.out / FILE_NAME, state)

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path)
        check_agreement(self.config, state["config"], self.data.fingerprint(), state["data"])
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = History(state["history"])
        self.step, self.seconds = state["step"], state["seconds"]

    def _train_step(self) -> _Batch:
        """One update of the parameters."""
        rate = learning_rate(self.step, self.schedule_steps, self.warmup_steps, self.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        indices = self._indices()
        parts = [self.ranks.part(chunk) for chunk in torch.arange(len(indices)).split(self._chunk(len(indices)))]
        rows = torch.cat(parts)
        images = self.data.train_images[indices[rows]].to(self.device)
        views = two_views(
            images, PRESETS[self.config.preset], stream(self.config.seed, "views", self.step),
            rows=rows, batch=len(indices),
        )  # fmt: skip
        seen: list[_Batch] = []

        def objective(z_i: Tensor, z_j: Tensor) -> Tensor:
            loss: Tensor = self.loss(z_i, z_j)
            temperature = self.loss.temperature
            if isinstance(temperature, Tensor):
                temperature = temperature.detach()
            seen.append(_Batch(z_i.detach(), z_j.detach(), temperature, loss.detach()))
            return self.scaler.scale(loss)

        self._replica.train()
        self.optimizer.zero_grad()
        if self.config.accumulate_batch:
            cached_backward(self._replica, views, objective, chunk_size=[len(part) for part in parts])
        else:
            objective(*self._replica(torch.cat(views)).chunk(2)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        (batch,) = seen
        self.history.record(batch.loss, rate, batch.temperature)
        return batch

    @functools.cached_property
    def _replica(self) -> nn.Module:
        """The model as a step runs it: over several ranks, with BatchNorm of all rows and the mean of the gradients."""
        if self.ranks.group is None:
            return self.model
        replica = DistributedDataParallel(over_ranks(self.model, self.ranks.group), process_group=self.ranks.group)
        # They are the same on every rank. As an argument it is deprecated in PyTorch 2.13, and what replaces it is new.
        replica.broadcast_buffers = False
        return replica

    def _chunk(self, n: int) -> int:
        """How many of a step's n images all ranks together encode at once."""
        config = self.config
        return even_chunk(n, config.chunk or config.batch_size) if config.accumulate_batch else n

    def _indices(self) -> Tensor:
        """The images of this step, on all ranks."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(len(self.data.train_images), generator=stream(self.config.seed, "order", epoch))
        return order[position * self.batch : (position + 1) * self.batch]

    def _measure(self, batch: _Batch) -> dict[str, str]:
        z_i, z_j = self.ranks.gather(batch.z_i), self.ranks.gather(batch.z_j)
        values = {
            "alignment": float(alignment(z_i, z_j)),
            "uniformity": float(uniformity(torch.cat((z_i, z_j)))),
        }
        loss = self.history.flush(self.step + 1)
        self.history.log("measured", step=self.step, **values)
        return {name: f"{value:.3f}" for name, value in {"loss": loss, **values}.items()}

    def _verify(self, batch: _Batch) -> None:
        report = budget.compare(
            batch.z_i, batch.z_j, batch.temperature, backend=self.loss.backend, group=self.ranks.group
        )
        names = ("loss_error", "loss_budget", "gradient_error", "gradient_budget")
        self.history.log("verified", step=self.step, **{name: float(getattr(report, name)) for name in names})
        if not report.ok:
            raise TrainingError(
                f"the loss failed its verification at step {self.step}: relative error of the loss "
                f"{report.loss_error:.3g} (budget {report.loss_budget:.3g}), of the gradient "
                f"{report.gradient_error:.3g} (budget {report.gradient_budget:.3g}), backend {self.loss.backend}"
            )

    def _try_the_loss(self) -> None:
        """Find out now, and not after the first epoch's augmentation, whether the backend runs here."""
        z = torch.ones(2, self.config.proj_dim, device=self.device, dtype=self.model.amp_dtype or torch.float32)
        try:
            build_objective(self.config).to(self.device)(z, z)
        except RuntimeError as error:
            raise ValueError(f"--backend {self.loss.backend} cannot be used: {error}") from error

    def _progress_bar(self) -> Any:
        if self.config.quiet or not self.ranks.first:
            return contextlib.nullcontext(_NoBar())
        return require("tqdm").tqdm(
            total=self.last_step,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            desc=self.config.data,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file wants few lines
        )


class _NoBar:
    def update(self) -> None: ...

    def set_postfix(self, *args: object, **kwargs: object) -> None: ...


def stream(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator that is a function of its arguments; different arguments give unrelated numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def even_chunk(n: int, chunk: int) -> int:
    """The largest chunk size up to `chunk` that leaves no single row over, which BatchNorm could not use.

    Where there is none (chunks of 2 and an odd n) it is the next larger one.
    """
    chunk = min(chunk, n)
    sizes = itertools.chain(range(chunk, 1, -1), range(chunk, n + 1))
    return next(size for size in sizes if n % size != 1)
