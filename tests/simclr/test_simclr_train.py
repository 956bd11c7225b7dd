import dataclasses
import math
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastntxent import NTXentLoss
from fastntxent.backends.blocked import BACKEND
from fastntxent.simclr import Config, Trainer, TrainingError, load_encoder
from fastntxent.simclr.checkpoint import load_checkpoint, save_checkpoint, with_saved_options
from fastntxent.simclr.config import parse_args
from fastntxent.simclr.feed import even_chunk
from fastntxent.simclr.pipeline import forewarn, prepare
from fastntxent.simclr.stream import stream


def parameters(trainer):
    return {**trainer.model.state_dict(), **{f"loss.{k}": v for k, v in trainer.loss.state_dict().items()}}


def assert_same_bits(one, other):
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_fit_lowers_the_loss(make_trainer):
    trainer = make_trainer(epochs=20)
    trainer.fit()
    losses = trainer.history.columns["steps"]["loss"]
    assert len(losses) == trainer.step == 60
    assert losses[-1] < losses[0] - 0.5, "the last batch is smaller, which lowers its loss further"
    assert losses[-2] < losses[0] - 0.3


def test_feed_yields_every_image_once_per_epoch(make_trainer):
    trainer = make_trainer()
    for epoch in range(2):
        seen = []
        for position in range(trainer.steps_per_epoch):
            seen.append(trainer.feed._indices(epoch * trainer.steps_per_epoch + position))
        assert sorted(torch.cat(seen).tolist()) == list(range(83))
        assert [len(part) for part in seen] == [32, 32, 19]


@pytest.mark.parametrize(("count", "steps"), [(64, 2), (65, 2), (66, 3), (20, 1)])
def test_fit_drops_only_a_last_batch_of_one(make_trainer, stripes, count, steps):
    fewer = {"train_images": stripes.train_images[:count], "train_labels": stripes.train_labels[:count]}
    trainer = make_trainer(data=dataclasses.replace(stripes, **fewer), epochs=1)
    assert trainer.steps_per_epoch == steps
    trainer.fit()
    assert trainer.step == steps


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learn_temperature": True},
        {"optimizer": "lars"},
        {"accumulate_batch": 64, "chunk": 16},
        {"objective": "alignment", "norm": "none"},
        {"objective": "distribution"},
    ],
)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_trainer, options, stop):
    whole = make_trainer("whole", **options)
    whole.fit()
    part = make_trainer("part", max_steps=stop, checkpoint_every=1, **options)
    part.fit()
    assert part.step == stop
    resumed = make_trainer("part", resume="auto", **options)
    assert resumed.step == stop
    resumed.fit()
    assert resumed.step == whole.step > stop
    assert_same_bits(resumed, whole)
    assert resumed.history.columns["steps"] == whole.history.columns["steps"]


def test_forewarn_notes_a_batch_larger_than_the_data(make_trainer):
    assert forewarn(make_trainer(batch_size=83)) == []
    (note,) = forewarn(make_trainer(batch_size=84))
    assert note.startswith("--batch-size 84 exceeds the 83 training images")
    (note,) = forewarn(make_trainer(accumulate_batch=90))
    assert note.startswith("--accumulate-batch 90 exceeds the 83")


def test_auto_augmentation_depends_on_the_given_data(make_trainer, stripes):
    def chosen(data):
        return make_trainer(data=data, augment="auto").settings["augment"]

    assert chosen(stripes) == "photos", "the default of --data should not matter"
    assert chosen(dataclasses.replace(stripes, name="fashion-mnist")) == "objects"
    assert chosen(DataLoader(TensorDataset(stripes.train_images), 16)) == "photos"
    assert make_trainer(augment="none").settings["augment"] == "none"


@pytest.mark.parametrize("encoder", ["uncopied", "lazy"])
def test_trainer_checks_an_encoder_before_it_copies_it(stripes, tmp_path, encoder):
    module = nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1))
    config = Config(out=tmp_path / "run", device="cpu")
    if encoder == "lazy":
        trainer = Trainer(config, stripes, encoder=module)
        twin = trainer.untrained().state_dict()
        assert all(torch.equal(value, twin[name]) for name, value in trainer.model.state_dict().items())
        return
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"must be a module that copy.deepcopy can copy, .*cannot pickle"):
        Trainer(config, stripes, encoder=module)


def test_learnt_temperature_out_of_range_ends_the_run_with_advice(make_trainer):
    with pytest.raises(
        TrainingError, match=r"the loss cannot be computed at step \d: .*temperature.*; a lower --lr may help"
    ):
        make_trainer(learn_temperature=True, lr=100.0).fit()


def test_run_without_tqdm_has_no_progress_bar(make_trainer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    make_trainer(quiet=False, max_steps=1).fit()
    assert capsys.readouterr().err == ""


def test_resume_names_every_difference(make_trainer, stripes):
    make_trainer(max_steps=1).fit()
    changed = {"batch_size": 16, "seed": 3, "optimizer": "lars", "epochs": 9, "temperature": 0.1}
    with pytest.raises(ValueError, match="cannot resume") as caught:
        make_trainer(resume="auto", **changed)
    for name in ("--batch-size", "--seed", "--optimizer", "--epochs", "--temperature"):
        assert name in str(caught.value)
    assert "--proj-dim" not in str(caught.value)
    assert "--seed (checkpoint 0, now 3)" in str(caught.value)
    other_data = dataclasses.replace(stripes, train_images=255 - stripes.train_images)
    with pytest.raises(ValueError, match="the training images"):
        make_trainer(resume="auto", data=other_data)


def test_resume_allows_changes_of_bookkeeping_options(make_trainer):
    make_trainer(max_steps=1).fit()
    trainer = make_trainer(resume="auto", log_every=1, verify_every=1, checkpoint_every=1, knn=3, max_steps=2)
    trainer.fit()
    assert trainer.step == 2


def test_trainer_does_not_overwrite_a_checkpoint_unasked(make_trainer):
    make_trainer(max_steps=1).fit()
    with pytest.raises(FileExistsError, match="--resume, discard it with --overwrite"):
        make_trainer()
    assert make_trainer(overwrite=True).step == 0


def test_resume_into_another_folder_does_not_overwrite_its_checkpoint(make_trainer, tmp_path):
    for folder in ("one", "two"):
        make_trainer(folder, max_steps=1).fit()
    source = str(tmp_path / "one" / "checkpoint.pt")
    with pytest.raises(FileExistsError, match="holds another run's checkpoint"):
        make_trainer("two", resume=source)
    assert make_trainer("three", resume=source).step == 1
    assert make_trainer("one", resume=source).step == 1


def test_resume_without_a_sound_checkpoint_is_an_error(make_trainer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        make_trainer(resume="auto")
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "sound.pt", {"step": 1})
    sound = (tmp_path / "sound.pt").read_bytes()
    for content in (b"", b"no checkpoint at all", b"junk" * 100, sound[: len(sound) // 2]):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as a checkpoint|version of the trainer"):
            make_trainer(resume="auto")
    torch.save({"something": "else"}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        make_trainer(resume="auto")


def test_save_checkpoint_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def fail_half_way(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1


@pytest.mark.slow
def test_kill_during_a_run_leaves_a_checkpoint_to_resume(cli, tmp_path):
    # The run is too long to end before the kill, even on a busy machine. Curves are compared up to 20 steps beyond the
    # last checkpoint.
    options = ["--data", "digits", "--epochs", "20000", "--width", "4", "--device", "cpu", "--quiet"]
    process = cli(*options, "--checkpoint-every", "1", "--out", tmp_path / "killed", wait=False)
    path = tmp_path / "killed" / "checkpoint.pt"
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    _, errors = process.communicate()
    assert path.exists(), errors
    last = str(load_checkpoint(path)["step"] + 20)
    resumed = prepare(with_saved_options({"resume": str(path), "max_steps": int(last)}))
    assert resumed.step > 0
    resumed.fit()
    whole = prepare(with_saved_options(parse_args([*options, "--max-steps", last, "--out", str(tmp_path / "whole")])))
    whole.fit()
    assert_same_bits(resumed, whole)
    assert resumed.history.columns["steps"] == whole.history.columns["steps"]


def test_fused_and_reference_give_the_same_curve(make_trainer):
    curves = {}
    for loss in ("fused", "reference"):
        trainer = make_trainer(loss, loss=loss, epochs=7, max_steps=20)
        trainer.fit()
        curves[loss] = trainer.history.columns["steps"]["loss"]
    assert len(curves["fused"]) == 20
    assert curves["fused"] == pytest.approx(curves["reference"], rel=1e-4)


def test_learnt_temperature_changes_and_is_recorded(make_trainer):
    trainer = make_trainer(learn_temperature=True)
    trainer.fit()
    temperatures = trainer.history.columns["steps"]["temperature"]
    assert temperatures[0] == pytest.approx(0.5)
    assert abs(temperatures[-1] - 0.5) > 1e-3
    fixed = make_trainer("fixed")
    fixed.fit()
    assert set(fixed.history.columns["steps"]["temperature"]) == {0.5}


def without_batch_norm(module):
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)


@pytest.mark.parametrize("chunk", [2, 7, 16, 100])
def test_accumulate_batch_has_the_gradient_of_the_whole_batch(make_trainer, chunk):
    gradients = {}
    for folder, options in (("whole", {"batch_size": 48}), ("chunks", {"accumulate_batch": 48, "chunk": chunk})):
        trainer = make_trainer(folder, max_steps=1, learn_temperature=True, **options)
        without_batch_norm(trainer.model)
        trainer.fit()
        modules = (*trainer.model.named_parameters(), *trainer.loss.named_parameters())
        gradients[folder] = {name: p.grad for name, p in modules}
    assert "log_temperature" in gradients["whole"]
    for name, gradient in gradients["whole"].items():
        torch.testing.assert_close(gradients["chunks"][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "chunk", "expected"), [(257, 256, 255), (256, 128, 128), (5, 2, 3), (7, 2, 4), (7, 6, 5), (2, 9, 2)]
)
def test_even_chunk_never_leaves_a_single_row(n, chunk, expected):
    assert even_chunk(n, chunk) == expected
    assert n % expected != 1


def test_verify_passes_and_is_recorded(make_trainer):
    trainer = make_trainer(verify_every=4, learn_temperature=True)
    trainer.fit()
    verified = trainer.history.columns["verified"]
    assert verified["step"] == [0, 4, 8]
    assert all(
        0 <= error <= budget for error, budget in zip(verified["loss_error"], verified["loss_budget"], strict=True)
    )


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_verify_stops_a_run_whose_loss_is_wrong(make_trainer, monkeypatch, wrong):
    right = type(BACKEND).nt_xent_scalar

    def nt_xent_scalar(self, *args):
        loss, d_z_i, d_z_j, d_inv_tau = right(self, *args)
        if wrong == "loss":
            return loss * 1.001, d_z_i, d_z_j, d_inv_tau
        return loss, d_z_i * 1.001, d_z_j, d_inv_tau

    trainer = make_trainer(backend="blocked", verify_every=2)
    trainer.step = 2
    trainer.history.columns["steps"]["loss"] = [5.0, 5.0]
    monkeypatch.setattr(type(BACKEND), "nt_xent_scalar", nt_xent_scalar)
    with pytest.raises(TrainingError, match=r"failed its verification at step 2: .*budget .*, backend blocked"):
        trainer.fit()


def test_fit_stops_at_a_loss_that_is_not_finite(make_trainer, tmp_path, monkeypatch):
    make_trainer(max_steps=1).fit()
    trainer = make_trainer(resume="auto", checkpoint_every=1)
    forward = NTXentLoss.forward
    monkeypatch.setattr(NTXentLoss, "forward", lambda self, z_i, z_j: forward(self, z_i, z_j) * math.nan)
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        trainer.fit()
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 1, "the last sound checkpoint must stay"


def test_stream_differs_with_each_of_its_arguments():
    keys = [(0, "views", 0), (1, "views", 0), (0, "order", 0), (0, "views", 1)]
    draws = [tuple(torch.rand(4, generator=stream(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert tuple(torch.rand(4, generator=stream(*keys[0])).tolist()) == draws[0]


@pytest.mark.parametrize("model", ["conv", "resnet18"])
def test_load_encoder_gives_the_trained_features(make_trainer, stripes, tmp_path, model):
    trainer = make_trainer(model=model, width=8, max_steps=2)
    trainer.fit()
    encoder = load_encoder(tmp_path / "run" / "checkpoint.pt")
    x = stripes.test_images / 255
    torch.testing.assert_close(encoder(x), trainer.model.eval().encoder(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_fit_lowers_the_loss_on_a_cuda_device(make_trainer, amp):
    trainer = make_trainer(device="cuda", amp=amp, epochs=20, verify_every=10)
    trainer.fit()
    losses = trainer.history.columns["steps"]["loss"]
    assert losses[-2] < losses[0] - 0.3
