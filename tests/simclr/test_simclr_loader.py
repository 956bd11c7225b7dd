"""The user's DataLoader as training data, and worker processes."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fastntxent.simclr import Config, Trainer, load_encoder
from fastntxent.simclr.loader import LoaderData
from fastntxent.simclr.stopping import read


class Pairs(Dataset):
    """Two views of each image, with a label, as a user's transform might make them."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        view = self.images[index].float() / 255
        return (view, view.flip(-1)), index % 3


@pytest.fixture
def fit(tmp_path):
    """Return a function that trains on a DataLoader in a new folder, and returns the trainer."""
    folders = iter(range(100))

    def train(loader, encoder=None, **options):
        settings = {
            "epochs": 3,
            "width": 0 if encoder else 4,
            "proj_hidden": 16,
            "proj_dim": 8,
            "device": "cpu",
            "quiet": True,
        }
        trainer = Trainer(
            Config(**{**settings, "out": tmp_path / f"{next(folders)}", **options}), loader, encoder=encoder
        )
        trainer.fit()
        return trainer

    return train


def test_training_reads_a_loader_of_images_in_its_order(stripes, fit):
    seen = []

    class Watched(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Watched(stripes.train_images, stripes.train_labels), batch_size=32)
    trainer = fit(loader, epochs=2)
    assert (trainer.batch, trainer.steps_per_epoch, trainer.step) == (32, 3, 6)
    assert seen[32:] == 2 * list(range(83)), "before training, one batch should be read, for its shape"
    assert trainer.settings["image_size"] == 16
    images = stripes.train_images[:40].float() / 255
    floating = fit(DataLoader(TensorDataset(images), batch_size=20))
    as_bytes = fit(DataLoader(TensorDataset(stripes.train_images[:40]), batch_size=20))
    assert floating.history.columns["steps"] == as_bytes.history.columns["steps"]


def test_views_of_a_loader_are_not_augmented(stripes, fit, monkeypatch):
    monkeypatch.delattr("fastntxent.simclr.feed.two_views")
    trainer = fit(DataLoader(Pairs(stripes.train_images[:64]), batch_size=32, shuffle=True))
    losses = trainer.history.columns["steps"]["loss"]
    assert len(losses) == 6
    assert all(torch.isfinite(torch.tensor(losses)))


def test_run_on_a_loader_resumes_within_an_epoch(stripes, fit, tmp_path):
    loader = DataLoader(TensorDataset(stripes.train_images), batch_size=32)
    whole = fit(loader)
    fit(loader, out=tmp_path / "part", max_steps=4)
    resumed = fit(loader, out=tmp_path / "part", resume="auto")
    assert resumed.history.columns["steps"] == whole.history.columns["steps"]


def test_users_encoder_is_trained_on_a_loader(stripes, fit, tmp_path):
    encoder = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = encoder[0].weight.detach().clone()
    fit(DataLoader(TensorDataset(stripes.train_images), batch_size=32), encoder, out=tmp_path / "own")
    assert not torch.equal(encoder[0].weight, before), "the module itself should be trained"
    fresh = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    loaded = load_encoder(tmp_path / "own", encoder=fresh)
    x = stripes.test_images.float() / 255
    torch.testing.assert_close(loaded(x), encoder.eval()(x))


def test_workers_of_a_loader_do_not_change_the_run(stripes, fit):
    in_workers = fit(DataLoader(TensorDataset(stripes.train_images), batch_size=32, num_workers=2))
    alone = fit(DataLoader(TensorDataset(stripes.train_images), batch_size=32))
    assert in_workers.history.columns["steps"] == alone.history.columns["steps"]


def test_workers_of_a_data_set_do_not_change_the_run(stripes, make_trainer):
    curves = []
    for workers in (0, 2):
        trainer = make_trainer(f"workers{workers}", workers=workers)
        trainer.fit()
        curves.append(trainer.history.columns["steps"])
    assert curves[0] == curves[1]


def test_loader_passes_the_epoch_to_its_sampler(stripes, fit):
    epochs = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    data = TensorDataset(stripes.train_images)
    fit(DataLoader(data, batch_size=32, sampler=Sampler(data)))
    assert epochs == [0, 1, 2]


IMAGES = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)


def of(images, batch_size=4):
    return DataLoader(TensorDataset(images), batch_size)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


class Counted(Endless):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(self.images)


class Faulty(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise KeyError("boom")


class Items(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.item


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(Endless(), 4), TypeError, "must be a DataLoader with a length"),
        (of(IMAGES[:0]), ValueError, "at least one batch"),
        (DataLoader(Counted(IMAGES[:0]), 4), ValueError, "at least one batch, but it yielded none"),
        (DataLoader(Counted(IMAGES), 7), ValueError, "the last of its 8 images .*drop_last=True"),
        (DataLoader(Faulty(), 4), ValueError, "^the first batch of the DataLoader cannot be read: 'boom'$"),
        pytest.param(  # PyTorch waits ten seconds for the worker
            DataLoader(Faulty(), 4, num_workers=1), ValueError, "^the first batch .* cannot be read: KeyError: 'boom'$",
            marks=pytest.mark.slow,
        ),
        (of(IMAGES[:5]), ValueError, "the last of its 5 images .*drop_last=True"),
        (of(IMAGES, batch_size=1), ValueError, "at least 2 images, got 1"),
        (of(IMAGES[:, 0]), TypeError, r"got list of \(torch.uint8 of shape \(4, 8"),
        (of(IMAGES.long()), TypeError, "must be uint8 or floating-point, got torch.int64"),
        (of(IMAGES - 0.5), ValueError, r"must lie in \[0, 1\], got \[-0.5, -0.5\]"),
        (DataLoader(Items({"image": IMAGES[0]}), 4), TypeError, "got dict"),
        (DataLoader(Items((IMAGES[0], IMAGES[0])), 4), TypeError, "two views .* must be floating"),
        (DataLoader(Items(((IMAGES[0], IMAGES[0]), 1)), 4), TypeError, "two views .* must be floating"),
        (DataLoader(Items(((IMAGES[0] / 255,) * 3, 1)), 4), TypeError, "or two views of each image"),
    ],
)  # fmt: skip
def test_unusable_loader_is_refused_with_the_reason(loader, error, message):
    with pytest.raises(error, match=message):
        LoaderData(loader)


def test_loader_data_distinguishes_views_from_images():
    views = torch.rand(8, 3, 8, 8)
    for batch, are_views in (
        (views, False), ((views, torch.arange(8)), False), ((views,), False), ((views, views), True),
        (((views, views), torch.arange(8)), True), ([[views, views]], True), ((views, views, torch.arange(8)), True),
    ):  # fmt: skip
        loader = of(IMAGES)
        assert isinstance(LoaderData(loader).images_of(batch), tuple) is are_views


def test_loader_may_have_an_iterable_dataset_or_views_in_double_precision(stripes, fit):
    fit(DataLoader(Counted(stripes.train_images[:8]), 4))
    views = stripes.train_images[:8].double() / 255
    fit(DataLoader(TensorDataset(views, views.flip(-1)), 4))


class Handlers(Dataset):
    """Images of zeros if the worker process ignores SIGINT and SIGTERM, else of ones. The label is `_SET[0]`."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ignored = all(signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGINT, signal.SIGTERM))
        return torch.full((1, 8, 8), 1 - int(ignored), dtype=torch.uint8), _SET[0]


_SET: list[int] = []


def _set(worker):
    _SET.append(100 + worker)


def test_workers_of_a_users_loader_ignore_stop_signals():
    loader = DataLoader(Handlers(), 4, num_workers=1, worker_init_fn=_set)
    images, values = next(iter(LoaderData(loader).loader))
    assert images.sum() == 0
    assert values.tolist() == [100] * 4, "the user's worker_init_fn should run too"


def test_trainer_refuses_a_list_as_data_and_accumulation_with_a_loader(stripes, tmp_path):
    loader = of(IMAGES)
    with pytest.raises(ValueError, match="--accumulate-batch needs a data set"):
        Trainer(Config(out=tmp_path / "run", accumulate_batch=8), loader)
    with pytest.raises(TypeError, match="data must be ImageData, a Dataset or a DataLoader, got list"):
        Trainer(Config(out=tmp_path / "run"), [IMAGES])


def test_loader_that_ends_early_is_an_error(stripes, tmp_path, make_trainer):
    class Short(DataLoader):
        def __len__(self):
            return 5

    trainer = make_trainer(data=Short(TensorDataset(stripes.train_images), batch_size=32))
    with pytest.raises(RuntimeError, match="must yield 5 batches per epoch, as its length says, but ended after 3"):
        trainer.fit()


@pytest.mark.parametrize(
    ("options", "sample"),
    [("num_workers=1, persistent_workers=True", "torch.rand(3, 8, 8)"), ("num_workers=1", "1 / 0")],
    ids=["persistent", "raises"],
)
def test_process_that_keeps_an_iterator_of_workers_exits_cleanly(options, sample):
    code = f"""
        import torch
        from torch.utils.data import DataLoader, Dataset
        from fastntxent.simclr.loader import LoaderData

        class Images(Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                return {sample}

        try:
            kept = LoaderData(DataLoader(Images(), 4, {options}))
        except ValueError as error:
            kept = error
        print("at the end", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "at the end\n", done.stderr
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
def test_workers_leave_no_open_files_after_an_epoch():
    loader = LoaderData(DataLoader(TensorDataset(torch.rand(8, 3, 8, 8)), 4, num_workers=1)).loader
    opened = []
    for _ in range(8):
        assert len(list(read(loader))) == 2
        opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[-1] <= opened[0] + 4, "a worker that is not released keeps two files open"
