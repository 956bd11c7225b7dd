"""The training loop. A step depends only on settings, data, the state of model and optimiser, and the step number.

The image order is drawn from (seed, epoch) and the views from (seed, step), each with a separate generator. A resumed
run therefore continues as if it had never stopped, without a saved random state. Two runs that differ only in the
implementation of the loss see the same batches.

On several ranks, a step computes the same function as on one, up to rounding and the random numbers of dropout. Each
rank takes a part of the batch, with the views that these images have in the whole batch. The loss, its gradient and the
BatchNorm statistics cover the whole batch. A DataLoader gives weaker guarantees; see `feed.LoaderOrder`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from .. import alignment, cached_backward, error_budget, uniformity
from .batch_norm import over_ranks
from .build import load_parameters, make_model, pick_device
from .checkpoint import FILE_NAME, check_agreement, load_checkpoint, resume_path, save_checkpoint
from .config import DEFAULT_PRESET, PROGRAM, Config
from .config_file import write_config
from .data import ImageData
from .feed import Views, make_feed
from .history import History, TrainingError
from .loader import LoaderData
from .logs import Log, check_logs, open_logs
from .models import DEFAULT_WIDTH, SimCLR
from .objective import build_objective
from .optim import build_optimizer, default_learning_rate, learning_rate
from .output import OutputFolder, first_line, last_line, printable
from .ranks import ALONE, Ranks
from .settings import resolve
from .sources import require
from .stopping import InterruptedRun, StopRequest
from .stream import stream

# Upper bound on the size of a run's report, figures and logs.
_REPORT_BYTES = 16 * 2**20
_READING_FAILED = 1000  # larger than any signal number


class _Batch(NamedTuple):
    """The loss of one step and its inputs on this rank, all detached."""

    z_i: Tensor
    z_j: Tensor
    temperature: Tensor | float
    loss: Tensor


class Trainer:
    """A run in memory: model, loss, optimiser, history and the current step.

        trainer = Trainer(Config(out=Path("runs/mine"), epochs=100), DataLoader(...), encoder=my_module)
        trainer.fit()

    Args:
        config: the settings; `config.out` must be a writable folder.
        data: the images: the result of `load_data`, a map-style Dataset (see `ImageData.from_datasets`), or a
            DataLoader (see `loader.LoaderData`). A DataLoader's batches are used in the loader's order.
        ranks: the processes of the run. Each process creates a trainer and calls `fit`; the first rank writes the
            checkpoints. Creating a trainer never waits for other ranks, so it can fail on one rank alone.
        encoder: a module that maps images (N, C, H, W) to features (N, F), trained in place; None: the encoder that
            `config.model` names.

    Attributes:
        model: the encoder, `model.encoder`, and the projection head.
        step: number of completed steps.
        history: loss, learning rate and temperature of every step, and the measurements taken every few steps.
        settings: the settings by name, resolved for these data and this machine.

    Raises:
        ValueError, TypeError: a setting is out of range; the device, the backend, the data or the encoder cannot be
            used; the folder is not writable; or the checkpoint to resume from does not match.
        FileNotFoundError, FileExistsError: there is no checkpoint to resume from, or a checkpoint would be overwritten.
        ImportError: a package that the settings require is missing.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData | LoaderData | Dataset[Any] | DataLoader[Any],
        ranks: Ranks = ALONE,
        *,
        encoder: nn.Module | None = None,
    ) -> None:
        config.check()
        check_logs(config)
        self.data = _training_data(data, config)
        if config.augment == "auto":  # chosen by the actual data, which may come from Python
            config = replace(config, augment=DEFAULT_PRESET.get(self.data.name, "photos"))
        self.config = config
        self.ranks = ranks
        self.device = pick_device(config.device, ranks)
        self.model = self._make_model(encoder)  # also checks that the encoder can be copied
        self._initial = None if encoder is None else copy.deepcopy(self.model).cpu()
        self.loss = build_objective(config, ranks.group).to(self.device)
        self._try_the_loss()

        self.feed = make_feed(config, self.data, ranks, self.device)
        self.batch, self.steps_per_epoch = self.feed.batch, self.feed.steps_per_epoch
        self.schedule_steps = config.epochs * self.steps_per_epoch
        self.warmup_steps = min(round(config.warmup * self.steps_per_epoch), self.schedule_steps - 1)
        self.peak_lr = config.lr or default_learning_rate(config.optimizer, self.batch)
        self.optimizer = build_optimizer(
            config.optimizer, (self.model, self.loss), self.peak_lr, config.weight_decay, config.momentum
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.model.amp_dtype == torch.float16)
        self.settings = resolve(config, self)

        self.step = 0
        self.seconds = 0.0
        self.history = History()
        self.run_id = secrets.token_hex(4)
        self.folder = OutputFolder(config.out)
        self._stop = StopRequest(speak=ranks.first)
        source = resume_path(config) if config.resume else None
        if source:
            self._resume(source)
        check_folder(config)
        self._owns_folder = False
        if ranks.first:
            self.folder.check(self._bytes_to_write())

    def _make_model(self, encoder: nn.Module | None) -> SimCLR:
        try:
            return make_model(self.config, self.data, self.device, encoder)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"the model cannot be built: {first_line(error)}") from error

    def untrained(self) -> SimCLR:
        """Return the model as it was before its first step."""
        if self._initial is not None:
            return copy.deepcopy(self._initial).to(self.device)
        return self._make_model(None)

    @property
    def has_own_encoder(self) -> bool:
        """Whether the encoder was passed as a module, not named by the settings."""
        return self._initial is not None

    @property
    def images(self) -> ImageData:
        """The data set. ValueError for a DataLoader, which has no unaugmented images to evaluate an encoder on."""
        if isinstance(self.data, LoaderData):
            raise ValueError(
                "a run on a DataLoader cannot be evaluated: pass a Dataset or ImageData, which hold test images"
            )
        return self.data

    def _bytes_to_write(self) -> int:
        """Return an upper bound on the bytes on disk: the old and the new checkpoint, and the report."""
        values = sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())
        moments = {"adamw": 2, "lars": 1}[self.config.optimizer] * values
        history = 100 * self.schedule_steps
        return 2 * (values + moments + history) + _REPORT_BYTES

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the run's folder in this block, on the rank that writes the files. `fit` holds it as well.

        Raises:
            BlockingIOError: another run holds the lock.
            FileExistsError: another run has written its checkpoint there in the meantime.
        """
        with contextlib.ExitStack() as stack:
            with self.ranks.all_or_none():
                if self.ranks.first:
                    stack.enter_context(self.folder.locked())
                    if not self._owns_folder:
                        check_folder(self.config)
                    self._owns_folder = True  # from now on, a checkpoint there is this run's
            yield

    @property
    def last_step(self) -> int:
        """The step at which this run stops: the end of the schedule or --max-steps, whichever comes first."""
        return min(self.schedule_steps, self.config.max_steps or self.schedule_steps)

    def fit(self, until: int | None = None) -> None:
        """Train to `last_step`, or to `until` if that is earlier. Checkpoints are written on the way and at the end.

        Ctrl-C and SIGTERM stop all ranks after the current step, with a checkpoint. A second Ctrl-C stops at once.

        Raises:
            TrainingError: the loss failed its verification, is no longer finite or cannot be computed; or images can no
                longer be read, in which case a checkpoint was written.
            MemoryError: a step does not fit in memory.
            InterruptedRun: a signal stopped the run, and a checkpoint was written. It is a KeyboardInterrupt.
            BlockingIOError: another run is writing to the folder.
            OSError: the checkpoint or a log cannot be written.
            LogError: TensorBoard or Weights & Biases cannot be used. It is a ValueError.
        """
        last_step = self.last_step if until is None else min(until, self.last_step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.writing())
            stack.enter_context(self._stop.listening())
            logs = [stack.enter_context(contextlib.closing(log)) for log in self._open_logs()]
            bar = stack.enter_context(self._progress_bar())
            # The feed is closed first, so its worker processes end while signals are still handled.
            feed = stack.enter_context(contextlib.closing(self.feed.steps(self.step, last_step)))
            self._train(last_step, feed, logs, bar)
            self.save()
            self._stop_if_asked()

    def _train(self, last_step: int, feed: Iterator[Views], logs: list[Log], bar: Any) -> None:
        config = self.config
        started = time.perf_counter() - self.seconds
        measured = (self.step, time.perf_counter())
        while self.step < last_step:
            try:
                batch = self._train_step(self._next(feed))
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise MemoryError(
                    f"memory ran out in step {self.step}: {first_line(error)}; try a smaller --batch-size, or "
                    "--accumulate-batch with a small --chunk"
                ) from error
            done = self.step + 1
            self.seconds = time.perf_counter() - started
            if config.verify_every and self.step % config.verify_every == 0:
                self._verify(batch)
            if self.step % config.log_every == 0 or done == last_step:
                rate = (done - measured[0]) * self.batch / (time.perf_counter() - measured[1])
                measured = (done, time.perf_counter())
                row = self._measure(batch, rate)
                for log in logs:
                    log.write(row)
                shown = {name: f"{row[name]:.3f}" for name in ("loss", "alignment", "uniformity")}
                bar.set_postfix(shown | {"images/s": f"{rate:.0f}"}, refresh=False)
            self.step = done
            bar.update()
            if config.checkpoint_every and done % config.checkpoint_every == 0 and done < last_step:
                self.save()

    def _next(self, feed: Iterator[Views]) -> Views:
        """Return the next step's views. If any rank should stop or cannot read its images, all ranks save and raise."""
        views, words = None, ""
        if not self._stop.number:
            try:
                views = next(feed)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # from the data set's code, perhaps with a worker's traceback
                words = last_line(error)
        self._stop_if_asked(words)
        assert views is not None
        return views

    def _stop_if_asked(self, unreadable: str = "") -> None:
        """Save and raise if any rank was asked to stop, or cannot read its images (`unreadable` is the reason)."""
        # On each rank a signal takes precedence: it may have killed the workers, and so caused the read error.
        reason = self.ranks.largest(self._stop.number or (_READING_FAILED if unreadable else 0))
        if not reason:
            return
        self.save()
        self._stop.settle()
        if reason < _READING_FAILED:
            raise InterruptedRun(f"interrupted at step {self.step} of {self.last_step}; {self._how_to_go_on()}", reason)
        words = self.ranks.tell(unreadable)
        raise TrainingError(f"the images of step {self.step} cannot be read: {words}; {self._how_to_go_on()}")

    def _how_to_go_on(self) -> str:
        return f"checkpoint saved; continue with {PROGRAM} --resume --out {shlex.quote(printable(self.config.out))}"

    def _open_logs(self) -> list[Log]:
        if not self.ranks.first:
            return []
        write_config(self.config.out, self.settings)
        return open_logs(self.config, self.settings, self.step, self.run_id, self.history.measured())

    def save(self) -> None:
        """Write the checkpoint of the current step. Its format does not depend on the number of ranks.

        Raises:
            TrainingError: the loss of a step was not finite; no checkpoint is written.
            OSError: the checkpoint cannot be written; the previous one is unchanged.
        """
        self.history.flush(self.step)
        if not self.ranks.first:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "config": self.config.to_dict(),
            "settings": self.settings,
            "own_encoder": self._initial is not None,
            "own_data": self.data.name != self.config.data,
            "data": self.data.fingerprint(),
            "image_shape": list(self.data.image_shape),
            "history": self.history.columns,
            "run_id": self.run_id,
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(self.config.out / FILE_NAME, state)

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path)
        try:
            check_agreement(self.settings, state["settings"], self.data.fingerprint(), state["data"])
            load_parameters(self.model, state["model"], printable(path))
            self.loss.load_state_dict(state["loss"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.history = History(state["history"])
            self.step, self.seconds, self.run_id = state["step"], state["seconds"], state["run_id"]
        except KeyError as error:
            raise ValueError(f"{printable(path)} is not a checkpoint of a run: it lacks {error}") from error
        except RuntimeError as error:
            raise ValueError(f"{printable(path)} does not fit the model: {first_line(error)}") from error

    def _train_step(self, views: Views) -> _Batch:
        """Update the parameters once."""
        rate = learning_rate(self.step, self.schedule_steps, self.warmup_steps, self.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seen: list[_Batch] = []

        def objective(z_i: Tensor, z_j: Tensor) -> Tensor:
            try:
                loss: Tensor = self.loss(z_i, z_j)
            except ValueError as error:  # a learnt temperature is no longer a valid number
                raise TrainingError(
                    f"the loss cannot be computed at step {self.step}: {error}; a lower --lr may help"
                ) from error
            temperature = self.loss.temperature
            if isinstance(temperature, Tensor):
                temperature = temperature.detach()
            seen.append(_Batch(z_i.detach(), z_j.detach(), temperature, loss.detach()))
            return self.scaler.scale(loss)

        self._replica.train()
        self.optimizer.zero_grad()
        with self._random_numbers_of_the_model():
            if self.config.accumulate_batch:
                cached_backward(self._replica, views[:2], objective, chunk_size=views.chunks)
            else:
                objective(*self._replica(torch.cat(views[:2])).chunk(2)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        (batch,) = seen
        self.history.record(batch.loss, rate, batch.temperature)
        return batch

    @contextlib.contextmanager
    def _random_numbers_of_the_model(self) -> Iterator[None]:
        """In this block PyTorch's global generators, used by dropout, are seeded by step and rank."""
        seed = stream(self.config.seed, f"model of rank {self.ranks.rank}", self.step).initial_seed()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    @functools.cached_property
    def _replica(self) -> nn.Module:
        """The model that a step runs. On several ranks it uses DDP, with BatchNorm over the rows of all ranks."""
        if self.ranks.group is None:
            return self.model
        # An encoder from outside may have parameters that its features do not depend on. The package's own encoders
        # have no such parameters, and a search for them would walk the graph in every step.
        foreign = self._initial is not None or self.config.model not in DEFAULT_WIDTH
        replica = DistributedDataParallel(
            over_ranks(self.model, self.ranks.group),
            process_group=self.ranks.group,
            find_unused_parameters=foreign,
        )
        # Buffers are already equal on all ranks, so DDP need not broadcast them. The attribute is set because PyTorch
        # 2.13 deprecates the constructor's argument, and older versions lack its replacement.
        replica.broadcast_buffers = False
        return replica

    def _measure(self, batch: _Batch, rate: float) -> dict[str, float]:
        z_i, z_j = self.ranks.gather(batch.z_i), self.ranks.gather(batch.z_j)
        self.history.flush(self.step + 1)
        self.history.log(
            "measured",
            step=self.step,
            seconds=self.seconds,
            images_per_second=rate,
            alignment=float(alignment(z_i, z_j)),
            uniformity=float(uniformity(torch.cat((z_i, z_j)))),
        )
        return self.history.row(-1)

    def _verify(self, batch: _Batch) -> None:
        report = error_budget.compare(
            batch.z_i, batch.z_j, batch.temperature, backend=self.loss.backend, group=self.ranks.group
        )
        names = ("loss_error", "loss_budget", "gradient_error", "gradient_budget")
        self.history.log("verified", step=self.step, **{name: float(getattr(report, name)) for name in names})
        if not report.ok:
            raise TrainingError(
                f"the loss failed its verification at step {self.step}: the relative error of the loss is "
                f"{report.loss_error:.3g} (budget {report.loss_budget:.3g}), and of the gradient "
                f"{report.gradient_error:.3g} (budget {report.gradient_budget:.3g}), backend {self.loss.backend}"
            )

    def _try_the_loss(self) -> None:
        """Call the loss once, so that a backend that does not run here fails before training starts."""
        z = torch.ones(2, self.config.proj_dim, device=self.device, dtype=self.model.amp_dtype or torch.float32)
        try:
            build_objective(self.config).to(self.device)(z, z)
        except RuntimeError as error:
            raise ValueError(f"--backend {self.loss.backend} cannot be used: {error}") from error

    def _progress_bar(self) -> Any:
        if self.config.quiet or not self.ranks.first:
            return contextlib.nullcontext(_NoBar())
        try:
            tqdm = require("tqdm").tqdm
        except ImportError:
            return contextlib.nullcontext(_NoBar())
        return tqdm(
            total=self.last_step,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            desc=self.data.title,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # keep log files short
        )


class _NoBar:
    def update(self) -> None: ...

    def set_postfix(self, *args: object, **kwargs: object) -> None: ...


def check_folder(config: Config) -> None:
    """Raise FileExistsError if the run would overwrite a checkpoint that it does not resume from."""
    target = config.out / FILE_NAME
    source = resume_path(config) if config.resume else None
    its_own = source is not None and source.exists() and target.exists() and source.samefile(target)
    if target.exists() and not config.overwrite and not its_own:
        raise FileExistsError(
            f"{printable(config.out)} holds another run's checkpoint: continue that run with --resume, discard it with "
            "--overwrite, or choose another --out"
        )


def _training_data(data: object, config: Config) -> ImageData | LoaderData:
    if isinstance(data, ImageData | LoaderData):
        return data
    if isinstance(data, DataLoader):
        return LoaderData(data)
    if isinstance(data, Dataset):
        items: Any = data  # a Dataset may lack a length; from_datasets reports that
        return ImageData.from_datasets(
            items, in_memory=config.in_memory, workers=config.workers or 0, skip_bad=config.skip_bad
        )
    raise TypeError(f"data must be ImageData, a Dataset or a DataLoader, got {type(data).__name__}")
