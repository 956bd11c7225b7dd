"""No drop-in holds all pairs or mixes devices. One test measures the peak memory of the drop-in for NTXentLoss of
pytorch_metric_learning, because no other library loss needs as much memory as this one.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from fastntxent.compat import (
    info_nce,
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    simclr,
    solo_learn,
    sup_contrast,
    torchmultimodal,
)
from tests.cases import LargestTensor, needs_cuda

N, D = 2200, 8  # a quarter of N^2 is more than any tile or chunk
LABELS = (torch.arange(N) % 50).repeat(2)


def random_pairs(count):
    a, n = torch.randint(0, N, (2, count), generator=torch.Generator().manual_seed(0))
    return a, N + a, a, n.where(n != a, (n + 1) % N)


def rows(z_i, z_j):
    return torch.cat((z_i, z_j))


def features(z_i, z_j):
    return torch.stack((z_i, z_j), dim=1)


MNRL = sentence_transformers.MultipleNegativesRankingLoss
CALLS = {
    "lightly": lightly.NTXentLoss(),
    "lightly, negative temperature": lightly.NTXentLoss(-0.5),
    "lightly, memory bank": lightly.NTXentLoss(memory_bank_size=(4 * N, D)),
    "lightly DCL": lightly.DCLLoss(),
    "lightly DCLW": lightly.DCLWLoss(),
    "NTXentLoss of labels": lambda *z: pytorch_metric_learning.NTXentLoss()(rows(*z), LABELS),
    "NTXentLoss of references": lambda a, b: pytorch_metric_learning.NTXentLoss()(a, LABELS[:N], None, b, LABELS[N:]),
    "NTXentLoss of pairs": lambda *z: pytorch_metric_learning.NTXentLoss()(rows(*z), None, random_pairs(20000)),
    "SupConLoss of labels": lambda *z: pytorch_metric_learning.SupConLoss()(rows(*z), LABELS),
    "SupConLoss of references": lambda a, b: pytorch_metric_learning.SupConLoss()(a, LABELS[:N], None, b, LABELS[N:]),
    "SupConLoss of pairs": lambda *z: pytorch_metric_learning.SupConLoss()(rows(*z), None, random_pairs(20000)),
    "solo-learn": lambda *z: solo_learn.simclr_loss_func(rows(*z), LABELS),
    "SupContrast": lambda *z: sup_contrast.SupConLoss()(features(*z)),
    "SupContrast of labels": lambda *z: sup_contrast.SupConLoss(contrast_mode="one")(features(*z), LABELS[:N]),
    "info-nce-pytorch": info_nce.InfoNCE(),
    "open_clip": lambda *z: open_clip.ClipLoss()(*z, 10.0),
    "sentence-transformers": lambda a, b: MNRL(None, hardness_mode="all_negatives", hardness_strength=5.0)([a, b, -b]),
    "sentence-transformers, all directions": lambda *z: MNRL(None, directions=sentence_transformers.DIRECTIONS)([*z]),
    "simclr": lambda *z: simclr.add_contrastive_loss(rows(*z)).loss,
    "torchmultimodal": torchmultimodal.ContrastiveLossWithTemperature(),
}


def largest_of(call):
    z_i, z_j = torch.randn(2, N, D).requires_grad_().unbind()
    with LargestTensor() as largest:
        call(z_i, z_j).backward()
    return largest.numel


@pytest.mark.parametrize("name", CALLS)
def test_drop_in_never_holds_all_pairs(name):
    assert N * D <= largest_of(CALLS[name]) < N * N / 4


# In the calls left out here, the host has to derive tiles or pairs from values, which meta tensors do not have.
DEVICE_ALONE = [
    name for name in CALLS if not name.startswith("NTXentLoss") and name not in ("SupConLoss of pairs", "solo-learn")
]


@pytest.mark.parametrize("name", DEVICE_ALONE)
def test_drop_in_does_not_mix_devices(name):
    call = copy.deepcopy(CALLS[name])
    if isinstance(call, torch.nn.Module):
        call.to("meta")
    z = torch.empty(2, N, D, device="meta", requires_grad=True)
    value = call(*z)
    assert value.device.type == torch.autograd.grad(value, z)[0].device.type == "meta"


@needs_cuda
@pytest.mark.parametrize("name", CALLS)
def test_drop_in_gives_the_same_results_on_cuda_as_on_the_cpu(name):
    results = []
    for device in ("cpu", "cuda"):
        call = copy.deepcopy(CALLS[name])
        if isinstance(call, torch.nn.Module):
            call.to(device)
        z = torch.randn(2, N, D, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        value = call(*z)
        results.append([x.cpu() for x in (value, *torch.autograd.grad(value, z))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.float64])
def test_mask_is_not_copied_as_a_whole(dtype):
    mask = (torch.rand(N, N) > 0.5).to(dtype)
    assert N * D <= largest_of(lambda *z: sup_contrast.SupConLoss()(features(*z), mask=mask)) < N * N / 4


PEAK = """
import torch
from benchmarks import memory
from fastntxent.compat.pytorch_metric_learning import NTXentLoss

def step(n):
    z = torch.randn(2 * n, 128, requires_grad=True)
    NTXentLoss()(z, torch.arange(n).repeat(2)).backward()

step(32)  # loads libraries and starts threads
memory.forget_peak()
before = memory.resident_peak()
step(1024)
print(memory.resident_peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_drop_in_takes_under_50_mb_where_the_library_needs_32_gib():
    root = Path(memory.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, **memory.ALLOCATOR},
    )
    assert json.loads(done.stdout) < 50e6
