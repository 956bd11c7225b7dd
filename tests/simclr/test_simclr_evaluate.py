import copy
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastntxent.simclr import Config, ImageData, selection
from fastntxent.simclr import evaluate as evaluate_module
from fastntxent.simclr.evaluate import (
    NEEDED,
    check_ready,
    effective_rank,
    encode,
    evaluate,
    knn_accuracy,
    probe_accuracy,
    raw_pixels,
    recalibrate,
)
from fastntxent.simclr.selection import choose

from .conftest import ROOT

THREE = {"trained", "untrained", "raw pixels"}


class OnDemand:
    """Images that are read on demand; `most` is the largest number read at once."""

    def __init__(self, images):
        self.images, self.most = images, 0

    @property
    def shape(self):
        return self.images.shape

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        found = self.images[rows]
        self.most = max(self.most, len(found))
        return found


def labelled(train_labels, test_labels, class_names=("a", "b", "c")):
    """Return data with these labels and blank images."""
    train, test = (torch.tensor(labels) for labels in (train_labels, test_labels))
    images = [torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8) for labels in (train, test)]
    return ImageData("made", images[0], train, images[1], test, class_names)


def test_effective_rank_counts_the_directions_in_use():
    corners = torch.cat((torch.eye(5), -torch.eye(5)))
    assert effective_rank(corners) == pytest.approx(5)
    assert effective_rank(torch.arange(10.0)[:, None] * torch.rand(1, 7) + 3) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(10, 7)) == pytest.approx(1)


def test_knn_accuracy_compares_rows_by_angle():
    known = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [1.0, 10.0]])
    unknown = torch.tensor([[0.01, 0.001], [0.001, 0.01], [0.02, 0.05]])
    labels = torch.tensor([0, 0, 1, 1])
    assert knn_accuracy(known, labels, unknown, torch.tensor([0, 1, 1]), k=1) == 1.0
    assert knn_accuracy(known, labels, unknown, torch.tensor([0, 1, 0]), k=1) == pytest.approx(2 / 3)
    assert knn_accuracy(known, labels, unknown, torch.tensor([0, 1, 1]), k=50) == 1.0, "k may exceed len(known)"


def test_probe_accuracy_ignores_the_scale_of_features():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    scaled = x * torch.tensor([1e-4, 1e3, 0.0])
    assert probe_accuracy(scaled[:200], labels[:200], scaled[200:], labels[200:]) > 0.95


def test_recalibrate_weights_all_images_equally():
    net = nn.Sequential(nn.BatchNorm2d(1))
    images = torch.randint(0, 256, (2048, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    net(torch.rand(4, 1, 4, 4) + 5)
    recalibrate(net, images, torch.device("cpu"))
    assert net[0].running_mean.item() == pytest.approx((images / 255).mean().item(), abs=1e-5)
    features = encode(net, images, torch.device("cpu"))
    assert features.mean().item() == pytest.approx(0, abs=1e-4)
    assert features.std().item() == pytest.approx(1, abs=1e-3)


def test_evaluate_scores_three_representations_and_leaves_the_model_unchanged(make_trainer):
    trainer = make_trainer(epochs=8)
    trainer.fit()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(evaluation.scores["knn"]) == set(evaluation.scores["linear probe"]) == THREE
    assert all(0 <= value <= 1 for value in evaluation.scores["knn"].values())
    assert evaluation.scores["alignment"]["trained"] < evaluation.scores["alignment"]["untrained"]
    assert evaluation.notes == []
    again = evaluate(trainer.model, trainer.config, trainer.data)
    assert again.scores == evaluation.scores


def test_evaluate_without_labels_leaves_accuracies_out_with_a_note(make_trainer, stripes):
    bare = dataclasses.replace(stripes, train_labels=-torch.ones_like(stripes.train_labels))
    trainer = make_trainer(data=bare)
    evaluation = evaluate(trainer.model, trainer.config, bare)
    assert set(evaluation.scores) == {"effective rank", "alignment", "uniformity"}
    assert "no labels" in evaluation.notes[0]


def test_evaluate_respects_eval_limit_and_notes_it(make_trainer):
    trainer = make_trainer(eval_limit=20)
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    assert all(len(features) == 20 for features in evaluation.features.values())
    assert "At most 20 images" in evaluation.notes[0]


@pytest.mark.parametrize("rows", [3000, 30])
def test_effective_rank_from_the_gram_matrix_equals_the_exact_one(monkeypatch, rows):
    features = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -6, 40) + 5
    features[:, -4:] = 0
    exact = effective_rank(features)
    monkeypatch.setattr(evaluate_module, "EXACT_VALUES", 0)
    assert effective_rank(features) == pytest.approx(exact, rel=1e-5)


def test_recalibrate_computes_statistics_without_dropout():
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1))
    images = torch.full((64, 1, 4, 4), 51, dtype=torch.uint8)
    recalibrate(net, images, torch.device("cpu"))
    assert net[1].running_mean.item() == pytest.approx(0.2, abs=1e-6)


def test_raw_pixels_of_large_images_are_averaged_down():
    assert raw_pixels(torch.zeros(3, 3, 32, 32, dtype=torch.uint8)).shape == (3, 3072)
    assert raw_pixels(torch.zeros(3, 1, 64, 64, dtype=torch.uint8)).shape == (3, 1024)
    large = raw_pixels(torch.full((3, 3, 64, 48), 255, dtype=torch.uint8))
    assert large.shape == (3, 3 * 18 * 18)
    assert torch.allclose(large, torch.ones(()))


@pytest.mark.parametrize("module", list(NEEDED))
def test_check_ready_names_the_package_that_is_missing(stripes, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"needs the package {NEEDED[module]}: pip install fastntxent\[simclr\]"):
        check_ready(Config(), stripes)


@pytest.mark.parametrize("error", [ImportError, ValueError, AttributeError, OSError, RuntimeError])
def test_check_ready_reports_a_broken_installation_in_one_line(stripes, monkeypatch, error):
    def broken(module):
        raise error("numpy.dtype size changed\nand two screens of advice")

    monkeypatch.setattr(evaluate_module, "import_module", broken)
    with pytest.raises(ImportError) as caught:
        check_ready(Config(), stripes)
    assert "the installed one does not work (numpy.dtype size changed): pip install" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "test", "notes"),
    [
        ([0, 1, 2, -1], [0, 1, -1], []),
        ([-1, -1], [-1, -1], ["The images have no labels, so accuracies are not measured."]),
        ([-1, -1], [0, 1], ["The training images have no labels, so accuracies are not measured."]),
        ([0, 1], [-1, -1], ["The test images have no labels, so accuracies are not measured."]),
        ([1, 1, -1], [0, 1], ["All labelled training images are of one class (b), so accuracies are not measured."]),
        (
            [0, 1],
            [0, 2, 2, 3],
            [
                "3 test images are left out of the accuracies: no training image among those used is of the same "
                "class (c, (no name))."
            ],
        ),
        (
            [0, 1],
            [2],
            [
                "1 test image is left out of the accuracies: no training image among those used is of the same "
                "class (c).",
                "No test image is of a class that has a training image, so accuracies are not measured.",
            ],
        ),
    ],
)
def test_check_ready_notes_what_will_not_be_measured(train, test, notes):
    assert check_ready(Config(), labelled(train, test, ("a", "b", "c", " "))) == notes


def test_choose_takes_one_image_of_each_class_first():
    labels = [0] * 590 + [1] * 10 + [-1] * 50
    choice = choose(Config(eval_limit=20), labelled(labels, labels))
    assert len(choice.train) == len(choice.test) == 20
    assert choice.train.labels.unique().tolist() == choice.test.labels.unique().tolist() == [0, 1]
    assert choice.accuracies
    again = choose(Config(eval_limit=20), labelled(labels, labels))
    assert torch.equal(choice.train.indices, again.train.indices)
    with_all = choose(Config(eval_limit=640), labelled(labels, labels))
    assert (with_all.train.labels >= 0).sum() == 600, "labelled images should come first"


def test_choose_covers_as_many_classes_as_the_limit_allows():
    labels = list(range(50)) * 4
    choice = choose(Config(eval_limit=7), labelled(labels, labels, tuple(map(str, range(50)))))
    assert len(choice.train.labels.unique()) == 7


def test_choose_keeps_the_fixed_order_if_its_start_holds_every_class():
    labels = torch.arange(300) % 3
    order = torch.from_numpy(np.random.default_rng(0).permutation(300))
    choice = choose(Config(eval_limit=100), labelled(labels.tolist(), labels.tolist()))
    assert torch.equal(choice.train.indices, order[:100])


def test_evaluate_leaves_out_test_images_whose_class_has_no_training_image(make_trainer, stripes):
    labels = stripes.train_labels.clone()
    labels[labels == 2] = -1
    data = dataclasses.replace(stripes, train_labels=labels)
    trainer = make_trainer(data=data)
    evaluation = evaluate(trainer.model, trainer.config, data)
    kept = stripes.test_labels < 2
    alone = dataclasses.replace(data, test_labels=torch.where(kept, stripes.test_labels, -1))
    assert evaluation.scores == evaluate(trainer.model, trainer.config, alone).scores
    assert set(evaluation.scores["knn"]) == THREE
    assert "(plain)" in evaluation.notes[0]


@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_evaluate_reads_on_demand_images_a_few_at_a_time(make_trainer, stripes, monkeypatch, kept_bytes):
    for module in (evaluate_module, selection):
        monkeypatch.setattr(module, "ROWS", 16)
    monkeypatch.setattr(selection, "LEAST_ROWS", 4)
    monkeypatch.setattr(selection, "KEPT_BYTES", kept_bytes)
    trainer = make_trainer(eval_limit=70)
    in_memory = evaluate(trainer.model, trainer.config, stripes)
    train, test = OnDemand(stripes.train_images), OnDemand(stripes.test_images)
    on_demand = dataclasses.replace(stripes, train_images=train, test_images=test)
    evaluation = evaluate(trainer.model, trainer.config, on_demand, untrained=trainer.untrained)
    assert evaluation.scores == in_memory.scores
    assert 0 < train.most <= 16
    assert 0 < test.most <= 16


def test_evaluate_leaves_out_features_that_are_not_finite(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        next(trainer.model.encoder.parameters()).fill_(float("nan"))
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    assert all(set(values) <= {"untrained", "raw pixels"} for values in evaluation.scores.values())
    assert set(evaluation.scores["knn"]) == {"untrained", "raw pixels"}
    json.dumps(evaluation.to_dict(), allow_nan=False)
    assert "Not evaluated: the features of the trained encoder (they are not all finite numbers)." in evaluation.notes


def test_evaluate_leaves_out_features_whose_squares_overflow(make_trainer):
    trainer = make_trainer(norm="none")
    with torch.no_grad():
        list(trainer.model.encoder.parameters())[-2].mul_(1e30)
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    assert "trained" not in evaluation.scores["knn"]
    assert any("the features of the trained encoder (they are as large as" in note for note in evaluation.notes)


@pytest.mark.parametrize(
    ("function", "measure"),
    [("knn_accuracy", "knn"), ("probe_accuracy", "linear probe"), ("effective_rank", "effective rank"),
     ("alignment", "alignment"), ("uniformity", "uniformity")],
)  # fmt: skip
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no convergence\nadvice"), ValueError("one class")])
def test_evaluate_notes_a_measure_that_raises(make_trainer, monkeypatch, function, measure, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(evaluate_module, function, fail)
    trainer = make_trainer()
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    assert measure not in evaluation.scores
    assert len(evaluation.scores) == 4
    words = str(error).partition("\n")[0] or "out of memory"
    assert f"of the trained encoder ({words})." in evaluation.notes[0]


def test_evaluate_notes_a_measure_that_is_not_a_number(make_trainer, monkeypatch):
    monkeypatch.setattr(evaluate_module, "uniformity", lambda z: torch.tensor(float("nan")))
    trainer = make_trainer()
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    assert "uniformity" not in evaluation.scores
    assert evaluation.notes[0] == "Not measured: uniformity of the trained encoder (it is not a finite number)."


def test_evaluate_without_an_untrained_model_leaves_its_column_out(make_trainer, monkeypatch):
    def fail(*args):
        raise ValueError("a user's module cannot be built again")

    trainer = make_trainer()
    model = copy.deepcopy(trainer.model)
    whole = evaluate(trainer.model, trainer.config, trainer.data)
    monkeypatch.setattr(evaluate_module, "make_model", fail)
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    assert all("untrained" not in values for values in evaluation.scores.values())
    assert evaluation.notes == ["Not fully evaluated: the untrained encoder (a user's module cannot be built again)."]
    again = evaluate(trainer.model, trainer.config, trainer.data, untrained=lambda: copy.deepcopy(model))
    assert again.scores == whole.scores
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_evaluate_of_constant_images_measures_what_it_can(make_trainer, stripes):
    plain = {f"{part}_images": torch.full_like(getattr(stripes, f"{part}_images"), 128) for part in ("train", "test")}
    trainer = make_trainer(data=dataclasses.replace(stripes, **plain))
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    assert set(evaluation.scores["knn"]) == THREE
    assert evaluation.scores["effective rank"]["raw pixels"] == pytest.approx(1)
    json.dumps(evaluation.to_dict(), allow_nan=False)


MEASURE_MEMORY = """
import resource, sys, torch
from fastntxent.simclr import Config, ImageData
from fastntxent.simclr.build import make_model
from fastntxent.simclr.evaluate import check_ready, evaluate
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.set_num_threads(1)
labels = torch.arange(700) % 3
images = torch.zeros(700, 3, 64, 64, dtype=torch.uint8)
images[:, :, :, ::4] = (80 * labels + 40).view(-1, 1, 1, 1)
data = ImageData("made", images, labels, images, labels, ("a", "b", "c"))
config = Config(data="npz", device="cpu", eval_limit=600)
check_ready(config, data)
model = make_model(config, data, torch.device("cpu"))
before = peak()
scores = evaluate(model, config, data).scores
assert len(scores) == 5, scores
print(peak() - before)
"""


@pytest.mark.slow
def test_evaluate_needs_little_memory_beyond_the_images():
    pytest.importorskip("resource", reason="needs POSIX, which reports the peak memory of a process")
    result = subprocess.run([sys.executable, "-c", MEASURE_MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kib = int(result.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kib < 350 * 1024
