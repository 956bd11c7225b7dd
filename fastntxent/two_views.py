"""Splitting one tensor of embeddings into the two views that the losses take."""

from __future__ import annotations

from torch import Tensor

from .options import LAYOUTS, Layout
from .validation import check_choice, check_rows, check_tensor


def split_views(z: Tensor, layout: Layout = "concatenated") -> tuple[Tensor, Tensor]:
    """The two views of a batch that holds both: (2N, D) -> (N, D), (N, D).

    Args:
        z: (2N, D) embeddings, or (N, 2, D) with the views along the second dimension, for which `layout` has no effect;
            float16, bfloat16, float32 or float64.
        layout: The order of the rows of a (2N, D) tensor. "concatenated": view 1 of all samples, then view 2 of all
            samples, as `torch.cat((z_i, z_j))` gives. "interleaved": sample by sample, view 1 then view 2.

    Returns:
        A tuple (z_i, z_j) of tensors (N, D) with the dtype of `z`. They share the memory of `z`, but an (N, 2, D)
        tensor that is not contiguous may be copied. Gradients flow back to `z`.

    Raises:
        TypeError: `z` is not a dense floating-point tensor.
        ValueError: the number of rows is odd or zero, the shape is neither of the above, or the layout is unknown.

    Example:
        >>> import torch, fastntxent
        >>> z_i, z_j = fastntxent.split_views(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), "interleaved")
        >>> z_i.flatten(), z_j.flatten()
        (tensor([1., 3.]), tensor([2., 4.]))
    """
    check_choice("layout", layout, LAYOUTS)
    check_tensor("z", z)
    if z.ndim == 3:
        if z.shape[1] != 2:
            raise ValueError(f"z must have shape (2N, D) or (N, 2, D), got {tuple(z.shape)}")
        z, layout = z.flatten(0, 1), "interleaved"
    check_rows("z", z)
    if z.shape[0] % 2:
        raise ValueError(f"z must hold two views of every sample, an even number of rows, got {z.shape[0]}")
    if layout == "interleaved":
        return z[0::2], z[1::2]
    n_samples = z.shape[0] // 2
    return z[:n_samples], z[n_samples:]
