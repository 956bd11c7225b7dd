"""Gradient caching: a batch larger than the encoder's activations fit in memory, with the gradient of the whole.

A contrastive loss does not split over a batch: every row is every other row's negative. But given the loss's
gradient with respect to the *embeddings*, the encoder's part of the chain rule is a sum over rows and does split.
So: encode in chunks without a graph, form the loss and its gradient on all embeddings, then encode each chunk again,
with a graph, and pull its share of that gradient through. Gao et al., "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup", 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .chunked_view import Lengths, Output, chunked_views
from .two_passes import TwoPasses


@torch.inference_mode(False)
def cached_backward(
    encoder: nn.Module | Sequence[nn.Module],
    views: Iterable[Any],
    loss_fn: Callable[..., Tensor],
    *,
    chunk_size: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
    chunk_tokens: int | None = None,
    lengths: Lengths | Sequence[Lengths] = "attention_mask",
    unpack: bool = False,
    encoder_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    output: Output | Sequence[Output] = None,
) -> Tensor:
    """Like `loss = loss_fn(*(encoder(view) for view in views)); loss.backward()`, with `chunk_size` rows at a time.

    The encoder runs twice on every chunk, the second time from the same state and on the same random numbers as the
    first, so the second pass repeats the first and both end as after one pass. The gradient is the whole batch's, with
    one exception that lies in the encoder: a layer that mixes rows, BatchNorm in training mode above all, sees a chunk
    where it would have seen the batch.

    - State is put back: registered buffers, the encoder's and its submodules' attributes, and what lists, tuples,
      dictionaries, sets and deques among them hold: tensors, NumPy arrays, numbers, generators. Updates in place and
      by assignment are alike. The objects stay the same ones.
    - Random numbers are repeated of the global generators of PyTorch (on the CPU and on every device of a parameter,
      buffer or view), Python and NumPy, and of generators among the attributes.
    - Not repeated are changes that a forward makes to parameters (a momentum encoder is updated outside), to objects of
      other classes, and outside the encoder, as a hook may. If the second pass's embeddings are far from the first's,
      that is an error.

    Args:
        encoder: a module that maps n rows to (n, D) embeddings, or a list of modules, one for each view, such as CLIP's
            two towers; a module may be in it several times. Wrapped in DistributedDataParallel, it synchronises its
            gradients once, in its last chunk; where that does not use all parameters (a tower for each view in one
            module), it needs find_unused_parameters=True. Under `fully_shard` every chunk reduces its gradients, so
            that no rank holds more than its shard of them. An encoder whose views get no gradient (a frozen tower)
            runs once.
        views: one input per view of the batch: a tensor of any dtype, or mappings (such as Hugging Face's
            BatchEncoding), lists, tuples and dataclasses of tensors, nested to any depth. Every tensor has the batch
            along its first dimension and is cut into the same chunks; 0-d tensors and objects of other types go into
            every chunk as they are. Inputs get no gradient, and the encoder works on copies of them.
        loss_fn: takes one (N, D) tensor of embeddings per view and returns a scalar; parameters of its own (a
            learnable temperature) get their gradients too. For half precision scale the loss here, with
            `lambda *z: scaler.scale(loss(*z))` for a GradScaler; `scaler.step` and `scaler.update` follow the call.
        chunk_size: rows of a view that the encoder sees at once, at least 1; or the rows of each chunk, which add up to
            a view's; or such a list for each view. Views are never mixed in a chunk. An encoder that mixes rows over
            the ranks of a batch needs as many chunks on each of them, and so does one under `fully_shard`: a chunk of
            a list may be of no rows, and so may the views.
        chunk_tokens: in place of `chunk_size`, the most tokens that the encoder sees at once. Rows keep their order,
            and a row with more tokens is a chunk by itself. Ranks may then have different numbers of chunks, which
            `fully_shard` does not take.
        lengths: how `chunk_tokens` counts: the key (or attribute) of a mask, (N, ...), with a nonzero element for each
            token; or a function that takes a view and returns N integers; or a list of these, one for each view. If
            the encoder computes padding too, every row costs the padded width: return that.
        unpack: call the encoder by `encoder(**view)` where a view is a mapping, as Hugging Face's models are called,
            and by `encoder(*view)` where it is a list or tuple. Otherwise a view is one argument, whatever it is.
        encoder_kwargs: keyword arguments of every call, the same for all chunks and not copied; or a list of them, one
            for each view.
        output: which part of the encoder's output the embeddings are: a key or an index ("pooler_output", 0), the name
            of an attribute, or a function of the output; or a list of these, one for each view. None where the encoder
            returns the embeddings. A model that embeds two inputs at once (a whole CLIP) is an encoder of one view with
            both: let a function concatenate its embeddings along dimension 1, and `loss_fn` split them.

    Returns:
        The loss as `loss_fn` returned it, a 0-d tensor without a graph. Gradients are accumulated in the parameters'
        `.grad`, as `backward` does; their hooks see the gradient of one chunk.

    Raises:
        TypeError: the encoder is not a module or returns no dense tensor, a view holds no tensor or one that is not
            dense, the loss is not a floating-point tensor, an argument is of another type, or chunk_size is given
            beside chunk_tokens.
        ValueError: there is no view, a view is empty, on the meta device or has a graph, its tensors have different
            numbers of rows, chunk_size or chunk_tokens is below 1, the chunks are not the rows of a view, a list has
            not an element for each view, there is no mask to count the tokens of, what the encoder returns has no such
            `output`, the loss is not a scalar, the encoder returns another number of rows or chunks of different
            shapes, has a lazy layer that never ran or parameters on the meta device, or is DistributedDataParallel with
            static_graph=True.
        RuntimeError: nothing requires a gradient, the encoder's embeddings do not although its parameters do, loss_fn
            has called backward itself, the second pass did not repeat the first, the last chunk under
            DistributedDataParallel does not synchronise all gradients, or the call is within
            `torch.nn.utils.parametrize.cached()`.

        After any error, the encoder's or the loss's own too, the encoder's state and the generators are as before the
        call; gradients may have been accumulated in part.

    Activations are held for one chunk; embeddings for the whole batch; one copy of the state. A forward under autocast
    is under autocast in both passes if the call is. The encoder may use `torch.utils.checkpoint`, with either
    `use_reentrant`.

    Example:
        >>> import torch, fastntxent
        >>> encoder, views = torch.nn.Linear(8, 4), torch.randn(2, 6, 8)
        >>> loss = fastntxent.cached_backward(encoder, views.unbind(), fastntxent.NTXentLoss(), chunk_size=4)
        >>> encoder.weight.grad.shape
        torch.Size([4, 8])

        Two towers, of which one takes what a tokenizer returns, with 6 tokens at a time:

        >>> class Text(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words = torch.nn.Embedding(9, 4)
        ...     def forward(self, input_ids, attention_mask):
        ...         return {"pooled": (self.words(input_ids) * attention_mask[..., None]).sum(1)}
        >>> text = {"input_ids": torch.randint(9, (6, 3)), "attention_mask": torch.ones(6, 3)}
        >>> loss = fastntxent.cached_backward(
        ...     [encoder, Text()], [views[0], text], fastntxent.CLIPLoss(), unpack=True, output=[None, "pooled"],
        ...     chunk_tokens=6, lengths=[lambda images: [1] * len(images), "attention_mask"],
        ... )
    """
    chunked = chunked_views(
        encoder,
        views,
        chunk_size=chunk_size,
        chunk_tokens=chunk_tokens,
        lengths=lengths,
        unpack=unpack,
        encoder_kwargs=encoder_kwargs,
        output=output,
    )
    _check_loss_fn(loss_fn)
    if getattr(parametrize, "_cache_enabled", 0):
        raise RuntimeError(
            "cached_backward must not be called within torch.nn.utils.parametrize.cached(), which would keep the first "
            "pass's weights, without a graph, for the second"
        )
    passes = TwoPasses(chunked)
    try:
        leaves = passes.first()
        with torch.enable_grad():
            loss = _checked_loss(loss_fn(*leaves), leaves)
            loss.backward()
        passes.second([leaf.grad for leaf in leaves])
        _check_learnt(loss, leaves, passes)
    except BaseException:
        passes.undo()
        raise
    return loss.detach()


def _check_loss_fn(loss_fn: object) -> None:
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        raise TypeError(
            f"loss_fn must be a function of embeddings, got the class {loss_fn.__name__}: pass an object of it"
        )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of embeddings, got {type(loss_fn).__name__}")


def _checked_loss(loss: Any, leaves: Sequence[Tensor]) -> Tensor:
    """The loss of embeddings that are leaves, which a backward can start from."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a torch.Tensor, got {type(loss).__name__}")
    if loss.layout != torch.strided or loss.is_nested or loss.is_meta:
        got = "a nested tensor" if loss.is_nested else "a tensor on the meta device" if loss.is_meta else loss.layout
        raise TypeError(f"loss_fn must return a dense (strided) tensor with a value, got {got}")
    if loss.ndim != 0:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn must return a floating-point scalar, got {loss.dtype}")
    if any(leaf.grad is not None for leaf in leaves):
        raise RuntimeError("loss_fn must return the loss alone, got one whose backward it has called already")
    if not loss.requires_grad:
        if any(leaf.requires_grad for leaf in leaves):
            why = "of embeddings that do: is there a detach() or no_grad() in it?"
        else:
            why = "as neither the encoder nor loss_fn has anything to learn"
        raise RuntimeError(f"loss_fn must return a loss to differentiate, got one that does not require grad, {why}")
    return loss


def _check_learnt(loss: Tensor, leaves: Sequence[Tensor], passes: TwoPasses) -> None:
    """The loss's gradient has come to a parameter, as an encoder's may be cut from its embeddings."""
    if passes.learnt or all(leaf.grad is None for leaf in leaves) or _has_other_leaves(loss, leaves):
        return
    raise RuntimeError(
        "encoder must return embeddings that require a gradient, as its parameters do, got none that do: is there a "
        "detach() or no_grad() in its forward?"
    )


def _has_other_leaves(loss: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether the graph of the loss ends in anything but these leaves."""
    known, seen, ahead = set(map(id, leaves)), set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            return True
        ahead += [following for following, _ in node.next_functions]
    return loss.grad_fn is None
