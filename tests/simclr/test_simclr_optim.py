import math

import pytest
import torch
from torch import nn

from fastntxent.simclr.optim import LARS, build_optimizer, default_learning_rate, learning_rate


def test_lars_takes_steps_worked_out_by_hand():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = LARS([{"params": [w], "weight_decay": 0.1}], lr=2.0, momentum=0.5, trust=0.01)
    w.grad = torch.tensor([[0.7, -0.4]])
    optimizer.step()
    # With gradient g, decayed gradient d and momentum m: d = g + 0.1 w = (1, 0), ||w|| = 5, ||d|| = 1, so
    # m = 2 * 0.01 * 5 * d = (0.1, 0).
    torch.testing.assert_close(w.data, torch.tensor([[2.9, 4.0]]))
    w.grad = torch.tensor([[-0.29, 2.6]])
    optimizer.step()
    # d = (0, 3), so m = 0.5 * (0.1, 0) + 2 * 0.01 * ||w|| / 3 * (0, 3).
    size = math.hypot(2.9, 4.0)
    torch.testing.assert_close(w.data, torch.tensor([[2.9 - 0.05, 4.0 - 0.02 * size]]))


def test_lars_without_adaptation_is_sgd_with_momentum():
    w, v = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    lars = LARS([{"params": [w], "adapt": False}], lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD([v], lr=0.1, momentum=0.9)
    for gradient in ([0.5, 1.0], [-0.25, 2.0], [1.0, 0.0]):
        w.grad, v.grad = torch.tensor(gradient), torch.tensor(gradient)
        lars.step()
        sgd.step()
    torch.testing.assert_close(w, v)


@pytest.mark.parametrize(("weight", "gradient"), [([[0.0, 0.0]], [[1.0, 2.0]]), ([[1.0, 2.0]], [[0.0, 0.0]])])
def test_lars_survives_a_zero_norm(weight, gradient):
    w = nn.Parameter(torch.tensor(weight))
    w.grad = torch.tensor(gradient)
    LARS([{"params": [w]}], lr=0.5).step()
    torch.testing.assert_close(w.data, torch.tensor(weight) - 0.5 * torch.tensor(gradient))


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_build_optimizer_does_not_decay_vectors_or_the_temperature(optimizer):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    loss = nn.Module()
    loss.log_temperature = nn.Parameter(torch.tensor(0.0))
    decayed, spared = build_optimizer(optimizer, (net, loss), 0.1, 0.3, 0.9).param_groups
    assert [p.ndim for p in decayed["params"]] == [4]
    assert sorted(p.ndim for p in spared["params"]) == [0, 1, 1, 1]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    if optimizer == "lars":
        assert (decayed["adapt"], spared["adapt"]) == (True, False)


def test_learning_rate_warms_up_and_follows_half_a_cosine():
    rates = [learning_rate(step, total=110, warmup=10, peak=2.0) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[60] == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(0, total=1, warmup=0, peak=3.0) == 3.0


def test_default_learning_rate_of_lars_grows_with_the_root_of_the_batch():
    assert default_learning_rate("lars", 256) == pytest.approx(1.2)
    assert default_learning_rate("lars", 4096) == pytest.approx(4.8)
    assert default_learning_rate("adamw", 256) == default_learning_rate("adamw", 4096)
