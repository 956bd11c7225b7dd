"""Gradient caching: the gradient of a whole batch whose encoder activations do not fit in memory.

A contrastive loss does not split into a sum over rows: every row is a negative of every other row. But once the
gradient of the loss with respect to the *embeddings* is known, the encoder's part of the chain rule is a sum over rows
and does split. So the first pass encodes the batch in chunks, without a graph. Then the loss and its gradient are
computed on all embeddings. The second pass encodes each chunk again, with a graph, and backpropagates the chunk's part
of the embeddings' gradient. The method is from Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", 2021.
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
    """Do `loss = loss_fn(*(encoder(view) for view in views)); loss.backward()`, encoding one chunk of rows at a time.

    Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021. The encoder runs twice
    on every chunk. The second pass starts from the same state and draws the same random numbers as the first, so it
    repeats the first, and the encoder ends in the state of a single pass. The result is the gradient of the whole
    batch, with one exception: a layer that mixes rows, such as BatchNorm in training mode, sees one chunk instead of
    the whole batch.

    - State is restored: registered buffers, and the tensors, NumPy arrays, numbers and generators among the attributes
      of the encoder and its submodules. Lists, tuples, dictionaries, sets and deques among the attributes are searched
      too. It makes no difference whether a forward updates the state in place or assigns new objects. A restore writes
      the old values into the original objects, so references to these stay valid.
    - Random numbers are repeated for the global generators of PyTorch (on the CPU and on every device of a parameter,
      buffer or view), Python and NumPy, and for generators among the attributes.
    - Other changes are not undone before the second pass: a forward's changes to parameters, to objects of other
      classes, and to anything outside the encoder, for example in a hook. So do not update a momentum encoder in the
      encoder's forward. If the second pass gives clearly different embeddings, an error is raised.

    Memory holds the activations of one chunk, the embeddings of the whole batch, and copies of the encoder's state. If
    the call is under autocast, both passes run under autocast. The encoder may use `torch.utils.checkpoint`, with
    `use_reentrant` either True or False.

    After any error, including one raised by the encoder or the loss, the encoder's state and the generators are
    restored to their values before the call. Gradients may have been accumulated in part.

    Args:
        encoder: A module that maps n rows to (n, D) embeddings, or a list of modules, one per view, such as CLIP's two
            towers; a module may appear several times. Under DistributedDataParallel the gradients are synchronised
            once, in the last chunk. If that chunk does not use all parameters, as with a single module that holds one
            tower per view, set find_unused_parameters=True. Under `fully_shard` every chunk reduces its gradients, so
            no rank holds more than its shard of them. A frozen encoder runs once, unless it shares state with one that
            is not frozen.
        views: One input per view of the batch: a tensor of any dtype, or mappings (such as Hugging Face's
            BatchEncoding), lists, tuples and dataclasses of tensors, nested to any depth. Every tensor has the batch
            along its first dimension and is cut into the same chunks; 0-d tensors and objects of other types go into
            every chunk unchanged. Inputs get no gradient, and the encoder works on copies of them.
        loss_fn: A function of one (N, D) tensor of embeddings per view that returns a scalar. Its own parameters, such
            as a learnable temperature, get their gradients too. With a GradScaler for half precision, pass
            `lambda *z: scaler.scale(loss(*z))`, and call `scaler.step` and `scaler.update` afterwards.
        chunk_size: The number of rows of a view that the encoder sees at once, at least 1; or a list with the number of
            rows in each chunk, which add up to the rows of a view; or one such list per view. A chunk never mixes
            views. An encoder that mixes rows across ranks, or one under `fully_shard`, needs the same number of chunks
            on every rank. For this, a list may contain chunks of 0 rows, and a view may be empty.
        chunk_tokens: In place of `chunk_size`, the largest number of tokens that the encoder sees at once, at least 1.
            Rows keep their order, and a row with more tokens is a chunk by itself. Ranks may then have different
            numbers of chunks, which `fully_shard` does not allow.
        lengths: How `chunk_tokens` counts tokens: the key (or attribute) of a mask, (N, ...), with a nonzero element
            for each token; or a function that takes a view and returns N integers; or a list of these, one per view. If
            the encoder also computes padding tokens, every row costs the padded width: pass a function that returns
            this width for each row.
        unpack: True calls the encoder as `encoder(**view)` if the view is a mapping, which is how Hugging Face's models
            are called, and as `encoder(*view)` if it is a list or tuple. In all other cases the view is passed as one
            argument.
        encoder_kwargs: A mapping of keyword arguments for every call, the same for all chunks and not copied; or a list
            of such mappings, one per view.
        output: Which part of the encoder's output is the embeddings: a key or an index ("pooler_output", 0), the name
            of an attribute, or a function of the output; or a list of these, one per view. None: the encoder returns
            the embeddings. For a model that embeds two inputs in one call (a whole CLIP), pass one view that holds both
            inputs. Let a function concatenate the model's two embeddings along dimension 1, and let `loss_fn` split
            them.

    Returns:
        The loss that `loss_fn` returned, without its graph, a 0-d tensor of the same dtype. Gradients are accumulated
        in the parameters' `.grad`, as in `backward`; a parameter's hooks see the gradient of one chunk at a time.

    Raises:
        TypeError: the encoder is not a module or does not return a dense tensor, a view holds no tensor or one that is
            not dense, the loss is not a floating-point tensor, another argument has the wrong type, or `chunk_size` and
            `chunk_tokens` are both given or both missing.
        ValueError: there is no view; a view is on the meta device or has a graph, its tensors differ in their number of
            rows, or it is empty and `chunk_size` lists no chunks; `chunk_size` or `chunk_tokens` is below 1, or the
            chunks do not add up to the rows of a view; a list does not have one element per view; there is no mask to
            count tokens with, or `lengths` does not give one number per row; the encoder's output has no such `output`;
            the loss is not a scalar; the encoder returns a different number of rows than it got, or rows of different
            shapes for different chunks; the encoder has a lazy layer that never ran or parameters on the meta device,
            or is DistributedDataParallel with static_graph=True.
        RuntimeError: nothing requires a gradient; the encoder's parameters require a gradient but its embeddings do
            not; `loss_fn` has already called backward; the second pass did not repeat the first; the last chunk under
            DistributedDataParallel does not synchronise all gradients; or the call is inside
            `torch.nn.utils.parametrize.cached()`.

    Example:
        >>> import torch, fastntxent
        >>> encoder, views = torch.nn.Linear(8, 4), torch.randn(2, 6, 8)
        >>> loss = fastntxent.cached_backward(encoder, views.unbind(), fastntxent.NTXentLoss(), chunk_size=4)
        >>> encoder.weight.grad.shape
        torch.Size([4, 8])

        Two towers, one of which takes the output of a tokenizer, with 6 tokens at a time:

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
            "cached_backward must not be called within torch.nn.utils.parametrize.cached(): the second pass would "
            "reuse the first pass's weights, which have no graph"
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
            f"loss_fn must be a function of embeddings, got the class {loss_fn.__name__}: pass an instance of it"
        )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of embeddings, got {type(loss_fn).__name__}")


def _checked_loss(loss: Any, leaves: Sequence[Tensor]) -> Tensor:
    """Return the loss if a backward can start from it, else raise. `leaves`: the embeddings."""
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
        raise RuntimeError("loss_fn must return the loss without calling its backward, but has called it")
    if not loss.requires_grad:
        if any(leaf.requires_grad for leaf in leaves):
            why = "although the embeddings do: is there a detach() or no_grad() in loss_fn?"
        else:
            why = "because neither the encoder nor loss_fn has anything to learn"
        raise RuntimeError(f"loss_fn must return a loss to differentiate, got one that does not require grad, {why}")
    return loss


def _check_learnt(loss: Tensor, leaves: Sequence[Tensor], passes: TwoPasses) -> None:
    """Raise if the loss's gradient reached no parameter, because the encoder cuts its embeddings from the graph."""
    if passes.learnt or all(leaf.grad is None for leaf in leaves) or _has_other_leaves(loss, leaves):
        return
    raise RuntimeError(
        "encoder must return embeddings that require a gradient, as its parameters do, got embeddings that do not: is "
        "there a detach() or no_grad() in its forward?"
    )


def _has_other_leaves(loss: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether the graph of the loss has leaves other than these."""
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
