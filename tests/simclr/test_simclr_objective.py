import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastntxent.simclr.checkpoint import check_agreement
from fastntxent.simclr.config import Config
from fastntxent.simclr.models import build_model
from fastntxent.simclr.objective import build_objective

TAU = 0.3


def dense_terms(z_i, z_j):
    """Return L_a and L_d from the full similarity matrix."""
    n = len(z_i)
    u = F.normalize(torch.cat((z_i, z_j)), dim=1)
    sims = u @ u.T
    others = sims.masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    positives = torch.cat((sims.diagonal(n), sims.diagonal(n)))
    return {
        "alignment": -positives.sum() / n,
        "distribution": TAU / n * torch.logsumexp(others / TAU, dim=1).sum(),
    }


@pytest.mark.parametrize("objective", ["alignment", "distribution"])
@pytest.mark.parametrize("loss", ["fused", "reference"])
def test_objective_of_one_term_equals_the_dense_term_with_its_gradient(objective, loss):
    views = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_i, z_j = views.unbind()
    for z in (z_i, z_j):
        z.requires_grad_()
    module = build_objective(Config(objective=objective, loss=loss, temperature=TAU))
    value, expected = module(z_i, z_j), dense_terms(z_i, z_j)[objective]
    torch.testing.assert_close(value, expected)
    gradients = torch.autograd.grad(value, (z_i, z_j)), torch.autograd.grad(expected, (z_i, z_j))
    torch.testing.assert_close(*gradients)
    assert min(float(gradient.norm()) for gradient in gradients[0]) > 0.01


def test_objectives_add_up_to_the_loss():
    z_i, z_j = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).unbind()
    parts = [
        build_objective(Config(objective=name, temperature=TAU))(z_i, z_j) for name in ("alignment", "distribution")
    ]
    whole = build_objective(Config(temperature=TAU))(z_i, z_j)
    torch.testing.assert_close(sum(parts), 2 * TAU * whole)


def test_alignment_alone_collapses_and_both_terms_together_do_not(make_trainer):
    similarity = {}
    for objective in ("alignment", "nt_xent"):
        trainer = make_trainer(objective, objective=objective, norm="none", epochs=20)
        trainer.fit()
        trainer.model.eval()
        with torch.no_grad():
            u = F.normalize(trainer.model(trainer.data.test_images / 255), dim=1)
        similarity[objective] = float((u @ u.T).mean())
    assert similarity["alignment"] > 0.999
    assert similarity["nt_xent"] < 0.8


def test_fit_until_a_step_stops_there_and_continues_as_if_uninterrupted(make_trainer):
    whole, part = make_trainer("whole"), make_trainer("part")
    whole.fit()
    part.fit(4)
    assert part.step == 4
    part.fit(2)
    assert part.step == 4, "training up to an earlier step should be a no-op"
    part.fit(10**6)
    assert part.step == whole.step == part.last_step
    assert part.history.columns["steps"] == whole.history.columns["steps"]


@pytest.mark.parametrize("option", [{"learn_temperature": True}, {"verify_every": 5}])
def test_options_of_the_whole_loss_are_refused_for_one_term(option):
    Config(**option).check()
    (name,) = option
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} requires --objective nt_xent, got alignment"):
        Config(objective="alignment", **option).check()


def test_option_missing_from_an_old_checkpoint_counts_as_the_default():
    saved = Config().to_dict()
    del saved["objective"], saved["norm"]
    check_agreement(Config().to_dict(), saved, "data", "data")
    with pytest.raises(ValueError, match=r"--objective \(checkpoint nt_xent, now alignment\)"):
        check_agreement(Config(objective="alignment").to_dict(), saved, "data", "data")


@pytest.mark.parametrize("model", ["conv", "resnet18"])
def test_model_without_batch_norm_treats_an_image_alike_in_any_batch(model):
    net = build_model(
        model, mean=[0.4], std=[0.2], image_size=16, width=8, hidden=8, proj_dim=6, seed=0, batch_norm=False
    )
    kinds = [type(module) for module in net.modules()]
    assert nn.BatchNorm2d not in kinds
    assert nn.BatchNorm1d not in kinds
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert all(layer.bias is not None for layer in layers), "without BatchNorm's shift, layers need a bias"
    net.train()
    x = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x)[:2], net(x[:2]), rtol=1e-4, atol=1e-5)
