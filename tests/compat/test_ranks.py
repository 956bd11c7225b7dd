"""Drop-ins on several ranks, compared with the whole batch in one process and with the libraries on the same ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from fastntxent.compat import (
    gist,
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    simclr,
    solo_learn,
    torchmultimodal,
)
from fastntxent.compat.shared import world_size
from tests import peers
from tests.ranks import on_ranks
from tests.test_distributed import RTOL, SIZES, TAU, VIEWS, D, encoder, mine, whole_batch

# A call takes embeddings (VIEWS, n, D), ids (n,) and a learnable temperature.
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def of_lightly(name: str, sign: int = 1, **options: Any) -> Call:
    return lambda z, ids, tau: getattr(lightly, name)(tau if sign > 0 else -TAU, gather_distributed=True, **options)(
        z[0], z[1]
    )


def memory_bank(sign: int) -> Call:
    """Three steps: the first sees the bank's random rows, the second also the rows that the first stored. Two ranks
    together have 13 samples, so the second step's rows do not all fit and are cut off at the end of the bank.
    """

    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
        torch.manual_seed(0)
        bank = (25, D)
        loss = lightly.NTXentLoss(tau if sign > 0 else -TAU, memory_bank_size=bank, gather_distributed=True).to(z.dtype)
        return loss(z[0], z[1]) + loss(z[1], z[2]) + loss(z[2], z[0])

    return call


def rank_here() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return a differentiable weight for each pair."""
    return (a - b).square().sum(dim=1)


def of_open_clip(local_loss: bool, gather_with_grad: bool) -> Call:
    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Any:
        loss = open_clip.ClipLoss(local_loss, gather_with_grad, rank=rank_here(), world_size=world_size())
        return loss(*normalize(z[:2], dim=2), 1 / tau, logit_bias=torch.tensor(-3.0))

    return call


def of_open_clip_with_ids(name: str) -> Call:
    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
        loss = getattr(open_clip, name)(rank=rank_here(), world_size=world_size())
        return loss(*normalize(z[:2], dim=2), 1 / tau, logit_bias=torch.tensor(-3.0), ids=ids)

    return call


def distilled_by_open_clip(z: Tensor, ids: Tensor, tau: Tensor) -> Any:
    """Return the sum of both losses, with a teacher of fewer features."""
    loss = open_clip.DistillClipLoss(rank=rank_here(), world_size=world_size())
    teacher = normalize(z[[2, 0], :, :9].detach(), dim=2)
    return sum(loss(*normalize(z[:2], dim=2), 1 / tau, *teacher, 4.0))


def of_torchmultimodal(backprop_type: torchmultimodal.BackpropType, masked: bool = False, **options: Any) -> Call:
    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
        a, b = normalize(z[:2], dim=2)
        mask = ids > 0 if masked else None
        return torchmultimodal.contrastive_loss_with_temperature(a, b, -tau.log(), mask, backprop_type, options).loss

    return call


def of_sentence_transformers(columns: int, with_ids: bool = False, **options: Any) -> Call:
    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
        loss = sentence_transformers.MultipleNegativesRankingLoss(None, 1 / tau, gather_across_devices=True, **options)
        return loss(z[:columns].unbind(), ids=ids if with_ids else None)

    return call


def of_gist(columns: int, **options: Any) -> Call:
    """The guide has fewer features than the model."""

    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
        loss = gist.GISTEmbedLoss(None, None, tau, gather_across_devices=True, **options)
        return loss.compute_loss_from_embeddings(z[:columns].unbind(), z[:columns, :, :9].detach().unbind())

    return call


def of_simclr(norm: bool, by_sample: bool) -> Call:
    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
        strategy = SimpleNamespace(num_replicas_in_sync=world_size())
        weights = ids / 2 if by_sample else 0.7  # some are 0
        hidden = z[:2] if norm else normalize(z[:2], dim=2)
        return simclr.add_contrastive_loss(hidden.flatten(0, 1), norm, tau, strategy=strategy, weights=weights).loss

    return call


def of_metric_learning(name: str) -> Call:
    """The labels are floats, and a rank may lack some of their values."""
    wrapper, loss = pytorch_metric_learning.DistributedLossWrapper, getattr(pytorch_metric_learning, name)
    return lambda z, ids, tau: wrapper(loss(tau))(z[:2].flatten(0, 1), ids.repeat(2) / 4)


class SquaredReducer:
    """A reducer with the library's interface: the mean of squared losses, weighted by the labels if there is one loss
    per row."""

    def __call__(self, loss_dict: dict[str, Any], embeddings: Tensor, labels: Tensor) -> Tensor:
        weights = labels.to(embeddings) if loss_dict["loss"]["reduction_type"] == "element" else 1
        return (weights * loss_dict["loss"]["losses"].square()).mean()


def of_metric_learning_and(name: str, efficient: bool = False, reducer: Any = None, **wanted: bool) -> Call:
    """A loss with references (with or without labels of their own), with pairs, with both, or with only a reducer."""

    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
        loss = getattr(pytorch_metric_learning, name)(tau, reducer=reducer)
        options: dict[str, Any] = {}
        if wanted.get("references"):
            options = {"ref_emb": z[1], "ref_labels": None if wanted.get("alike") else ids + 1}
        if wanted.get("pairs"):
            options["indices_tuple"] = pairs_own_first(ids, efficient)
        return pytorch_metric_learning.DistributedLossWrapper(loss, efficient)(z[0], ids, **options)

    return call


def pairs_own_first(ids: Tensor, efficient: bool) -> tuple[Tensor, ...]:
    """Return all positive and negative pairs whose anchors have labels of 1 or more. This rank's rows come first. If
    `efficient`, only this rank's rows are anchors.
    """
    of_ranks, first = [ids], 0
    if dist.is_initialized():
        of_ranks = [ids] * dist.get_world_size()
        dist.all_gather_object(of_ranks, ids)
        first = dist.get_rank()
    of_ranks = [of_ranks.pop(first), *of_ranks]
    labels = torch.cat(of_ranks)
    anchors = torch.cat([label >= 1 for label in of_ranks]) & (torch.arange(len(labels)) < len(ids)).logical_or(
        torch.tensor(not efficient)
    )
    alike = (labels[:, None] == labels) & anchors[:, None]
    return *torch.where(alike.clone().fill_diagonal_(False)), *torch.where(~alike & anchors[:, None])


def of_memory(name: str, masked: bool) -> Call:
    """Three steps; the memory cannot hold two batches at once."""

    def call(z: Tensor, ids: Tensor, tau: Tensor) -> Any:
        loss = getattr(pytorch_metric_learning, name)(tau)
        memory = pytorch_metric_learning.CrossBatchMemory(loss, D, memory_size=17)
        wrapper = pytorch_metric_learning.DistributedLossWrapper(memory)
        mask = ids % 2 == 0 if masked else None
        return sum(wrapper(rows, ids, enqueue_mask=mask) for rows in z)

    return call


ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = {"directions": ("query_to_doc", "doc_to_query")}
GLOBAL, LOCAL, NONE = torchmultimodal.BackpropType

CASES: dict[str, Call] = {
    "lightly nt_xent": of_lightly("NTXentLoss"),
    "lightly nt_xent, negative temperature": of_lightly("NTXentLoss", sign=-1),
    "lightly bank": memory_bank(1),
    "lightly bank, negative temperature": memory_bank(-1),
    "lightly dcl": of_lightly("DCLLoss"),
    "lightly dcl, negative temperature": of_lightly("DCLLoss", sign=-1),
    "lightly dcl, weights": of_lightly("DCLLoss", weight_fn=distances),
    "lightly dclw": of_lightly("DCLWLoss", sigma=0.7),
    "open_clip": of_open_clip(False, False),
    "open_clip, local_loss": of_open_clip(True, False),
    "open_clip, gather_with_grad": of_open_clip(False, True),
    "open_clip, both": of_open_clip(True, True),
    "open_clip, distilled": distilled_by_open_clip,
    "open_clip, ids": of_open_clip_with_ids("ClipLoss"),
    "open_clip, siglip ids": of_open_clip_with_ids("SigLipLoss"),
    "torchmultimodal": of_torchmultimodal(GLOBAL),
    "torchmultimodal, local": of_torchmultimodal(LOCAL, label_smoothing=0.2),
    "torchmultimodal, none": of_torchmultimodal(NONE, reduction="sum"),
    "torchmultimodal, mask": of_torchmultimodal(GLOBAL, masked=True, label_smoothing=0.2),
    "torchmultimodal, mask, sum": of_torchmultimodal(GLOBAL, masked=True, reduction="sum"),
    "sentence_transformers": of_sentence_transformers(2),
    "sentence_transformers, negatives": of_sentence_transformers(3),
    "sentence_transformers, both": of_sentence_transformers(2, **BOTH),
    "sentence_transformers, per direction": of_sentence_transformers(3, partition_mode="per_direction", **BOTH),
    "sentence_transformers, all": of_sentence_transformers(3, directions=ALL_DIRECTIONS),
    "sentence_transformers, ids": of_sentence_transformers(3, with_ids=True, directions=ALL_DIRECTIONS),
    "sentence_transformers, harder": of_sentence_transformers(
        3, directions=ALL_DIRECTIONS, hardness_mode="all_negatives", hardness_strength=2.0
    ),
    "gist": of_gist(2),
    "gist, negatives": of_gist(3, margin=0.1, margin_strategy="relative", contrast_anchors=False),
    "simclr": of_simclr(True, False),
    "simclr, weights": of_simclr(True, True),
    "simclr, rows as they are": of_simclr(False, False),
    "pytorch_metric_learning nt_xent": of_metric_learning("NTXentLoss"),
    "pytorch_metric_learning sup_con": of_metric_learning("SupConLoss"),
    "pytorch_metric_learning sup_con, reducer": of_metric_learning_and("SupConLoss", reducer=SquaredReducer()),
    "pytorch_metric_learning nt_xent, reducer": of_metric_learning_and("NTXentLoss", reducer=SquaredReducer()),
    "pytorch_metric_learning sup_con, references": of_metric_learning_and("SupConLoss", references=True),
    "pytorch_metric_learning nt_xent, references": of_metric_learning_and("NTXentLoss", references=True),
    "pytorch_metric_learning nt_xent, own": of_metric_learning_and("NTXentLoss", references=True, alike=True),
    "pytorch_metric_learning sup_con, pairs": of_metric_learning_and("SupConLoss", pairs=True),
    "pytorch_metric_learning nt_xent, pairs": of_metric_learning_and("NTXentLoss", pairs=True),
    "pytorch_metric_learning nt_xent, own pairs": of_metric_learning_and("NTXentLoss", True, pairs=True),
    "pytorch_metric_learning sup_con, own pairs, references": of_metric_learning_and(
        "SupConLoss", True, pairs=True, references=True
    ),
    "pytorch_metric_learning nt_xent, memory": of_memory("NTXentLoss", False),
    "pytorch_metric_learning sup_con, memory": of_memory("SupConLoss", False),
    "pytorch_metric_learning nt_xent, memory, mask": of_memory("NTXentLoss", True),
    "solo_learn": lambda z, ids, tau: solo_learn.simclr_loss_func(z.flatten(0, 1), ids.repeat(VIEWS), tau),
    "solo_learn, some alone": lambda z, ids, tau: solo_learn.simclr_loss_func(z[0], ids / 4, tau),
}


class Result(NamedTuple):
    loss: Tensor
    d_weight: Tensor
    d_bias: Tensor
    d_temperature: Tensor


def evaluate(model: nn.Module, x: Tensor, ids: Tensor, call: Call) -> Result:
    model.zero_grad()
    tau = torch.tensor(TAU, dtype=x.dtype, requires_grad=True)
    loss = call(model(x.flatten(0, 1)).view(*x.shape[:2], D), ids, tau)
    loss.backward()
    d_tau = torch.zeros(()) if tau.grad is None else tau.grad  # a negative temperature is a plain number
    return Result(loss.detach(), *(p.grad.clone() for p in model.parameters()), d_tau)


def assert_close(result: Result, expected: Result, rtol: float) -> None:
    for field, value, true in zip(Result._fields, result, expected, strict=True):
        assert (value.double() - true).abs().max() <= rtol * true.abs().max(), field


def everything() -> dict[str, Any]:
    """Return everything that the tests below check, so that the ranks are started only once."""
    model, (x, ids) = DistributedDataParallel(encoder()), mine(world_size())
    found: dict[str, Any] = {"cases": {name: evaluate(model, x, ids, call) for name, call in CASES.items()}}
    if world_size() == WORLD:
        found["libraries"] = both_of_every_library()
    else:
        found["outputs"] = outputs()
    return found


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    """Results of `everything` on two ranks, with 5 and 8 samples."""
    return on_ranks(2, everything)


@pytest.fixture(scope="module")
def of_three() -> list[dict[str, Any]]:
    """Results of `everything` on three ranks, with 4, 0 and 6 samples."""
    return on_ranks(3, everything)


# --- one process with the whole batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", ["of_two", pytest.param("of_three", marks=pytest.mark.slow)])
def test_results_of_ranks_equal_one_process_with_the_whole_batch(ranks: str, name: str, request: pytest.FixtureRequest):
    of_ranks = request.getfixturevalue(ranks)
    x, ids = whole_batch(sum(SIZES[len(of_ranks)]))
    expected = evaluate(encoder(torch.float64), x.double(), ids, CASES[name])
    for of_rank in of_ranks:
        assert_close(of_rank["cases"][name], expected, RTOL)


# --- the libraries, on two ranks with the same number of samples -----------------------------------------------------

WORLD = 2
N = min(SIZES[WORLD])

# A function that runs on a rank and returns our call and the library's call.
Pair = Callable[[], tuple[Call, ...]]


def lightly_pair(file: str, name: str, **options: Any) -> Pair:
    def of(module: Any) -> Call:
        torch.manual_seed(0)  # for the bank's initial random rows
        loss = getattr(module, name)(TAU, gather_distributed=True, **options).double()
        return lambda z, ids, tau: loss(z[0], z[1]) + loss(z[1], z[2])

    def pair() -> tuple[Call, ...]:
        library, utils = peers.lightly(file), vars(sys.modules["lightly.models.utils"])
        # tests.peers leaves this module empty if torchvision is missing.
        utils.setdefault("concat_all_gather", concat_all_gather)
        return of(lightly), of(library)

    return pair


@torch.no_grad()
def concat_all_gather(x: Tensor) -> Tensor:
    gathered = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(gathered, x)
    return torch.cat(gathered)


def metric_learning_pair(name: str, **options: Any) -> Pair:
    def of(losses: Any, wrapper: Any) -> Call:
        loss = wrapper.DistributedLossWrapper(getattr(losses, name)(TAU), **options)
        return lambda z, ids, tau: loss(z[:2].flatten(0, 1), ids.repeat(2))

    theirs = "pytorch_metric_learning.losses", "pytorch_metric_learning.utils.distributed"
    return lambda: (of(pytorch_metric_learning, pytorch_metric_learning), of(*map(peers.needs, theirs)))


def metric_learning_memory_pair(name: str, ours_of_theirs: bool) -> Pair:
    """Compare our memory and loss with the library's. With `ours_of_theirs`, our loss is in the library's memory. Each
    memory has room for two batches of all ranks.
    """

    def of(losses: Any, wrapper: Any, memory: Any) -> Call:
        def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
            held = memory.CrossBatchMemory(getattr(losses, name)(TAU), D, memory_size=2 * WORLD * z.shape[1])
            loss = wrapper.DistributedLossWrapper(held.to(z.dtype))
            return loss(z[0], ids) + loss(z[1], ids) + loss(z[2], ids)

        return call

    def pair() -> tuple[Call, ...]:
        losses, wrapper = map(
            peers.needs, ("pytorch_metric_learning.losses", "pytorch_metric_learning.utils.distributed")
        )
        ours = pytorch_metric_learning
        return of(ours, ours, losses if ours_of_theirs else ours), of(losses, wrapper, losses)

    return pair


def metric_learning_miner_pair(name: str, references: bool) -> Pair:
    """A loss of the pairs that the library's miner finds across ranks."""

    def of(losses: Any, wrapper: Any) -> Call:
        distributed = peers.needs("pytorch_metric_learning.utils.distributed")
        miner = peers.needs("pytorch_metric_learning.miners").TripletMarginMiner(0.3)
        miner = distributed.DistributedMinerWrapper(miner)
        loss = wrapper.DistributedLossWrapper(getattr(losses, name)(TAU))

        def call(z: Tensor, ids: Tensor, tau: Tensor) -> Tensor:
            others = (z[1], ids) if references else (None, None)
            return loss(z[0], ids, miner(z[0], ids, *others), *others)

        return call

    theirs = "pytorch_metric_learning.losses", "pytorch_metric_learning.utils.distributed"
    return lambda: (of(pytorch_metric_learning, pytorch_metric_learning), of(*map(peers.needs, theirs)))


def open_clip_pair(local_loss: bool, gather_with_grad: bool) -> Pair:
    def of(module: Any) -> Call:
        loss = module.ClipLoss(local_loss, gather_with_grad, rank=dist.get_rank(), world_size=WORLD)
        return lambda z, ids, tau: loss(*normalize(z[:2], dim=2), 1 / tau)

    return lambda: (of(open_clip), of(peers.open_clip()))


def sentence_transformers_pair(**options: Any) -> Pair:
    def of(module: Any) -> Call:
        loss = module.MultipleNegativesRankingLoss(None, 1 / TAU, gather_across_devices=True, **options)
        return lambda z, ids, tau: loss.compute_loss_from_embeddings(list(z), None)

    return lambda: (of(sentence_transformers), of(peers.sentence_transformers().sentence_transformer.losses))


# The factors from our results to the library's: for the mean of the ranks' losses, for the gradients of the encoder's
# parameters, and for the gradient of the temperature.
LIBRARIES: dict[str, tuple[Pair, tuple[float, float, float]]] = {
    "lightly nt_xent": (lightly_pair("ntx_ent_loss", "NTXentLoss"), (1, 1, 1)),
    "lightly bank": (lightly_pair("ntx_ent_loss", "NTXentLoss", memory_bank_size=(24, D)), (1, 1, 1)),
    "lightly dcl": (lightly_pair("dcl_loss", "DCLLoss"), (1, 1, 1)),
    "lightly dcl, weights": (lightly_pair("dcl_loss", "DCLLoss", weight_fn=distances), (1, 1, 1)),
    "pytorch_metric_learning nt_xent": (metric_learning_pair("NTXentLoss"), (WORLD, 1, 1)),
    "pytorch_metric_learning sup_con": (metric_learning_pair("SupConLoss"), (WORLD, 1, 1)),
    "pytorch_metric_learning nt_xent, memory": (metric_learning_memory_pair("NTXentLoss", False), (WORLD, 1, 1)),
    "pytorch_metric_learning sup_con, its memory": (metric_learning_memory_pair("SupConLoss", True), (WORLD, 1, 1)),
    "pytorch_metric_learning nt_xent, miner": (metric_learning_miner_pair("NTXentLoss", False), (WORLD, 1, 1)),
    "pytorch_metric_learning sup_con, miner": (metric_learning_miner_pair("SupConLoss", True), (WORLD, 1, 1)),
    "open_clip": (open_clip_pair(False, False), (1, 1 / WORLD, 1)),
    "open_clip, gather_with_grad": (open_clip_pair(False, True), (1, 1, 1)),
    "open_clip, both": (open_clip_pair(True, True), (1, 1, 1)),
    "sentence_transformers": (sentence_transformers_pair(), (1, 1, 1)),
    "sentence_transformers, all": (
        sentence_transformers_pair(directions=ALL_DIRECTIONS, hardness_mode="all_negatives", hardness_strength=2.0),
        (1, 1, 1),
    ),
}

# Library losses whose gradient lacks terms, and is therefore not a multiple of the right gradient.
PARTIAL: dict[str, Pair] = {
    "pytorch_metric_learning sup_con, efficient": metric_learning_pair("SupConLoss", efficient=True),
    "open_clip, local_loss": open_clip_pair(True, False),
}


def both_of_every_library() -> dict[str, Any]:
    """For each case of LIBRARIES and PARTIAL, return our result and the library's (averaged across ranks, as by DDP),
    or the reason why the case is skipped.
    """
    model = DistributedDataParallel(encoder(torch.float64))
    x, ids = mine(WORLD)
    found: dict[str, Any] = {}
    for name, pair in {**{name: pair for name, (pair, _) in LIBRARIES.items()}, **PARTIAL}.items():
        try:
            ours, theirs = (evaluate(model, x[:, :N].double(), ids[:N], call) for call in pair())
        except pytest.skip.Exception as reason:
            found[name] = str(reason)
            continue
        for number in (theirs.loss, theirs.d_temperature):
            dist.all_reduce(number)
            number /= WORLD
        found[name] = ours, theirs
    return found


def both(of_rank: dict[str, Any], name: str) -> tuple[Result, Result]:
    found = of_rank["libraries"][name]
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("name", LIBRARIES)
def test_library_on_two_ranks_differs_only_by_known_factors(of_two, name: str):
    for of_rank in of_two:
        ours, theirs = both(of_rank, name)
        loss, features, temperature = LIBRARIES[name][1]
        factors = Result(*map(torch.tensor, (loss, features, features, temperature)))
        assert_close(theirs, Result(*(factor * value for factor, value in zip(factors, ours, strict=True))), 1e-9)


@pytest.mark.parametrize("name", PARTIAL)
def test_library_gradient_lacks_terms(of_two, name: str):
    ours, theirs = both(of_two[0], name)
    alike = torch.cosine_similarity(ours.d_weight.flatten(), theirs.d_weight.flatten(), dim=0)
    assert alike < 0.999


# --- outputs and errors ----------------------------------------------------------------------------------------------


def formed(logits: Any, rows: Tensor) -> tuple[Any, ...]:
    return logits.shape, logits.dense().detach(), logits.argmax(), torch.autograd.grad(logits.dense().sum(), rows)[0]


def outputs() -> dict[str, Any]:
    """Return outputs on ranks with 4, 0 and 6 samples."""
    rank = dist.get_rank()
    x, ids = mine(3)
    z = normalize(x, dim=2).requires_grad_()
    found: dict[str, Any] = {}
    if len(ids):  # a group exists, but the defaults of these losses do not gather
        found["own"] = lightly.NTXentLoss()(x[0], x[1]), open_clip.ClipLoss()(x[0], x[1], 2.0)
    of_simclr = simclr.add_contrastive_loss(z[:2].flatten(0, 1), False, 0.5, strategy=dist.group.WORLD)
    found["simclr"] = of_simclr.loss.detach(), of_simclr.labels, *formed(of_simclr.logits, z)
    mask = ids > 0
    out = torchmultimodal.contrastive_loss_with_temperature(z[0], z[1], torch.tensor(1.0), mask)
    found["torchmultimodal"] = *formed(out.logits_a, z), *formed(out.logits_b, z)
    none = {"reduction": "none"}
    out = torchmultimodal.contrastive_loss_with_temperature(
        z[0], z[1], torch.tensor(1.0), mask, cross_entropy_kwargs=none
    )
    found["none"] = out.loss_a.detach(), out.loss_b.detach()
    wrapper = pytorch_metric_learning.DistributedLossWrapper(pytorch_metric_learning.SupConLoss())
    few = torch.zeros_like(ids), torch.arange(len(ids)) + 100 * rank  # no negatives, then no positives
    found["few"] = [wrapper(z[0], labels).item() for labels in few]
    found["errors"] = [message(call) for call in BAD.values()]
    return found


def clip(**options: Any) -> Callable[[Tensor], Any]:
    return lambda z: open_clip.ClipLoss(**{"rank": rank_here(), "world_size": 3, **options})(z, z, 2.0)


def wrapped(labels: Tensor | None, **options: Any) -> Callable[[Tensor], Tensor]:
    loss = pytorch_metric_learning.SupConLoss()
    return lambda z: pytorch_metric_learning.DistributedLossWrapper(loss)(z, labels, **options)


def in_memory(labels: Tensor | None, **options: Any) -> Callable[[Tensor], Tensor]:
    memory = pytorch_metric_learning.CrossBatchMemory(pytorch_metric_learning.SupConLoss(), 4, memory_size=64)
    return lambda z: pytorch_metric_learning.DistributedLossWrapper(memory)(z, labels, **options)


def replicas(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: simclr.add_contrastive_loss(z, **options).loss


# Part of an error message, and the call that must raise this error on every rank. Each rank has four rows.
BAD: dict[str, Callable[[Tensor], Any]] = {
    "world_size must be 1 or the size of the default process group, 3, got 2": clip(world_size=2),
    "rank must be this process's rank in the default group": clip(rank=3),
    "use_horovod must be False if world_size is above 1": clip(use_horovod=True),
    "strategy.num_replicas_in_sync must be 1 or the size of the default process group, 3, got 8": replicas(
        strategy=SimpleNamespace(num_replicas_in_sync=8)
    ),
    "tpu_context must be None, a process group, or have num_replicas_in_sync or num_replicas, got str": replicas(
        tpu_context="tpu"
    ),
    "labels must be given in a process group, got None": wrapped(None),
    "enqueue_mask must be None without a CrossBatchMemory": wrapped(torch.arange(4), enqueue_mask=torch.ones(4) > 0),
    "indices_tuple must be None with a CrossBatchMemory in a process group": in_memory(
        torch.arange(4), indices_tuple=(None,) * 3
    ),
    "ref_emb and ref_labels must be None with a CrossBatchMemory": in_memory(torch.arange(4), ref_emb=torch.eye(4)),
    "labels must be given with a CrossBatchMemory, got None": in_memory(None),
    "indices_tuple must have indices in [0, 12)": wrapped(None, indices_tuple=(torch.tensor([12]),) * 3),
    "temperature is 1 on rank 0; 2 on rank 1; 3 on rank 2": lambda z: lightly.DCLLoss(
        dist.get_rank() + 1, gather_distributed=True
    )(z, z),
}


def message(call: Callable[[Tensor], Tensor]) -> str:
    try:
        call(torch.eye(4))
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return "none"


def whole() -> tuple[Tensor, Tensor, list[slice]]:
    """Return the unit rows and ids of the whole batch, and each rank's slice of it."""
    sizes = SIZES[3]
    x, ids = whole_batch(sum(sizes))
    return normalize(x, dim=2), ids, [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(3)]


def assert_formed(found: tuple[Any, ...], rows: Tensor, columns: Tensor, scale: float) -> None:
    """Check that `found` has the logits of the rows with the columns, and the gradient of the logits' sum with respect
    to the rows."""
    shape, dense, argmax, gradient = found
    expected = scale * rows @ columns.T
    assert shape == dense.shape == expected.shape
    torch.testing.assert_close(dense, expected)
    assert torch.equal(argmax, expected.argmax(dim=1))
    torch.testing.assert_close(gradient[gradient.any(dim=2)], scale * columns.sum(dim=0).expand_as(rows))


def test_simclr_returns_each_ranks_logits_and_labels_among_all_columns(of_three):
    z, _, parts = whole()
    expected = simclr.add_contrastive_loss(z[:2].flatten(0, 1), False, 0.5).loss
    for of_rank, here in zip(of_three, parts, strict=True):
        loss, labels, *logits = of_rank["outputs"]["simclr"]
        torch.testing.assert_close(loss, expected)  # with the group itself as the strategy
        assert labels.tolist() == list(range(here.start, here.stop))
        assert_formed(tuple(logits), z[0, here], z[1], 2)


def test_torchmultimodal_returns_each_ranks_logits_and_losses(of_three):
    z, ids, parts = whole()
    scale, none = torch.tensor(1.0), {"reduction": "none"}
    expected = torchmultimodal.contrastive_loss_with_temperature(z[0], z[1], scale, cross_entropy_kwargs=none)
    for of_rank, here in zip(of_three, parts, strict=True):
        kept = ids[here] > 0
        assert_formed(of_rank["outputs"]["torchmultimodal"][:4], z[0, here][kept], z[1], scale.exp().item())
        assert_formed(of_rank["outputs"]["torchmultimodal"][4:], z[1, here][kept], z[0], scale.exp().item())
        for of_direction, all_losses in zip(
            of_rank["outputs"]["none"], (expected.loss_a, expected.loss_b), strict=True
        ):
            torch.testing.assert_close(of_direction, all_losses[here][kept])


def test_loss_is_zero_without_negatives_or_positives_on_any_rank(of_three):
    for of_rank in of_three:
        assert of_rank["outputs"]["few"] == [0, 0]


def test_losses_that_do_not_gather_ignore_the_group(of_three):
    x, _ = whole_batch(sum(SIZES[3]))
    for of_rank, here in zip(of_three, whole()[2], strict=True):
        if "own" in of_rank["outputs"]:
            expected = lightly.NTXentLoss()(*x[:2, here]), open_clip.ClipLoss()(*x[:2, here], 2.0)
            torch.testing.assert_close(of_rank["outputs"]["own"], expected)


@pytest.mark.parametrize("says", BAD)
def test_invalid_arguments_raise_on_every_rank(of_three, says: str):
    index = list(BAD).index(says)
    for of_rank in of_three:
        assert says in of_rank["outputs"]["errors"][index]


@pytest.mark.parametrize("call", [clip(), replicas(strategy=SimpleNamespace(num_replicas_in_sync=3))])
def test_several_processes_without_a_group_are_an_error(call: Callable[[Tensor], Tensor]):
    with pytest.raises(RuntimeError, match=r"of 3 needs torch.distributed.init_process_group to be called"):
        call(torch.eye(4))
