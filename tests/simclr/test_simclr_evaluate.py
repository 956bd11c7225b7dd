import dataclasses

import pytest
import torch
from torch import nn

from fastntxent.simclr.evaluate import (
    effective_rank,
    encode,
    evaluate,
    knn_accuracy,
    probe_accuracy,
    recalibrate,
)


def test_effective_rank_counts_the_directions_in_use():
    corners = torch.cat((torch.eye(5), -torch.eye(5)))
    assert effective_rank(corners) == pytest.approx(5)
    assert effective_rank(torch.arange(10.0)[:, None] * torch.rand(1, 7) + 3) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(10, 7)) == pytest.approx(1)


def test_knn_accuracy_goes_by_the_angle():
    known = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 1.0], [1.0, 10.0]])
    unknown = torch.tensor([[0.01, 0.001], [0.001, 0.01], [0.02, 0.05]])
    labels = torch.tensor([0, 0, 1, 1])
    assert knn_accuracy(known, labels, unknown, torch.tensor([0, 1, 1]), k=1) == 1.0
    assert knn_accuracy(known, labels, unknown, torch.tensor([0, 1, 0]), k=1) == pytest.approx(2 / 3)
    assert knn_accuracy(known, labels, unknown, torch.tensor([0, 1, 1]), k=50) == 1.0, "k beyond the data"


def test_probe_accuracy_ignores_the_scale_of_features():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    scaled = x * torch.tensor([1e-4, 1e3, 0.0])
    assert probe_accuracy(scaled[:200], labels[:200], scaled[200:], labels[200:]) > 0.95


def test_recalibrate_averages_over_all_images_alike():
    net = nn.Sequential(nn.BatchNorm2d(1))
    images = torch.randint(0, 256, (2048, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    net(torch.rand(4, 1, 4, 4) + 5)
    recalibrate(net, images, torch.device("cpu"))
    assert net[0].running_mean.item() == pytest.approx((images / 255).mean().item(), abs=1e-5)
    features = encode(net, images, torch.device("cpu"))
    assert features.mean().item() == pytest.approx(0, abs=1e-4)
    assert features.std().item() == pytest.approx(1, abs=1e-3)


def test_evaluate_judges_three_representations_and_leaves_the_model_alone(make_trainer):
    trainer = make_trainer(epochs=8)
    trainer.fit()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    three = {"trained", "untrained", "raw pixels"}
    assert set(evaluation.scores["knn"]) == set(evaluation.scores["linear probe"]) == three
    assert all(0 <= value <= 1 for value in evaluation.scores["knn"].values())
    assert evaluation.scores["alignment"]["trained"] < evaluation.scores["alignment"]["untrained"]
    assert evaluation.notes == []
    again = evaluate(trainer.model, trainer.config, trainer.data)
    assert again.scores == evaluation.scores


def test_evaluate_without_labels_says_so(make_trainer, stripes):
    bare = dataclasses.replace(stripes, train_labels=-torch.ones_like(stripes.train_labels))
    trainer = make_trainer(data=bare)
    evaluation = evaluate(trainer.model, trainer.config, bare)
    assert set(evaluation.scores) == {"effective rank", "alignment", "uniformity"}
    assert "no labels" in evaluation.notes[0]


def test_evaluate_limit_is_respected_and_stated(make_trainer):
    trainer = make_trainer(eval_limit=20)
    evaluation = evaluate(trainer.model, trainer.config, trainer.data)
    assert all(len(features) == 20 for features in evaluation.features.values())
    assert "At most 20 images" in evaluation.notes[0]
