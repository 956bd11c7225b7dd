"""fastntxent.compat.info_nce against info-nce-pytorch, if it is installed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastntxent.compat import info_nce as ours
from tests.peers import assert_same, batch, drawn, needs, sizes, temperatures


@given(
    **sizes,
    tau=temperatures,
    k=st.integers(1, 9),
    mode=st.sampled_from([None, "unpaired", "paired"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
@drawn
def test_info_nce_agrees_with_info_nce_pytorch(n, d, seed, tau, k, mode, reduction):
    theirs = needs("info_nce")
    (query, key), _ = batch(2, n, d, seed)
    tensors = [query, key]
    if mode:
        shape = (n, k, d) if mode == "paired" else (k, d)
        tensors.append(torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1)))
    options = {"temperature": tau, "reduction": reduction, "negative_mode": mode or "unpaired"}
    weights = torch.linspace(0.5, 2, n, dtype=torch.float64) if reduction == "none" else 1.0

    def weighted(loss):
        return lambda *inputs: (loss(*inputs) * weights).sum()

    assert_same(weighted(ours.InfoNCE(**options)), weighted(theirs.InfoNCE(**options)), tau, *tensors)
    torch.testing.assert_close(ours.info_nce(*tensors, **options), ours.InfoNCE(**options)(*tensors))


def test_invalid_arguments_are_named():
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match="negative_mode must be one of 'unpaired', 'paired', got 'both'"):
        ours.info_nce(z, z, z, negative_mode="both")
    with pytest.raises(ValueError, match="negative_keys must have 3 dimensions if negative_mode is 'paired'"):
        ours.info_nce(z, z, z, negative_mode="paired")
    with pytest.raises(ValueError, match="negative_keys must have 2 dimensions if negative_mode is 'unpaired'"):
        ours.info_nce(z, z, z[:, None])
    with pytest.raises(ValueError, match="query must have 2 dimensions"):
        ours.info_nce(z[0], z)
    with pytest.raises(ValueError, match="query and positive_key must have the same shape"):
        ours.info_nce(z, z[:3])
    with pytest.raises(TypeError, match=r"negative_keys must be a torch\.Tensor, got list"):
        ours.info_nce(z, z, [z])
    with pytest.raises(ValueError, match="query and negative_keys must have the same number of features, got 3 and 2"):
        ours.info_nce(z, z, z[:, :2])
    with pytest.raises(ValueError, match="query and negative_keys must have the same dtype"):
        ours.info_nce(z, z, z.double())
    with pytest.raises(ValueError, match="negative_keys must have 4 sets, one per query, got shape"):
        ours.info_nce(z, z, torch.randn(5, 2, 3), negative_mode="paired")
    for mode, negatives in (("unpaired", z[:0]), ("paired", z[:, None][:, :0])):
        with pytest.raises(ValueError, match="negative_keys must have at least one key, got shape"):
            ours.info_nce(z, z, negatives, negative_mode=mode)
