"""MoCo on scikit-learn's digits: a momentum encoder computes the keys, and a queue of past keys supplies the negatives.

python examples/moco.py --steps 200 --batch 128
"""

import argparse
import copy
import itertools

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastntxent


@torch.no_grad()
def probe(encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy of a linear classifier on frozen features: fitted to 200 samples, scored on the others."""
    encoder.eval()
    features = encoder(images).numpy()
    encoder.train()
    classifier = LogisticRegression(max_iter=1000).fit(features[:200], labels[:200])
    return float(classifier.score(features[200:], labels[200:]))


def view(images: Tensor) -> Tensor:
    """Return the images (N, 64), each with a random brightness and noise."""
    return images * torch.empty(len(images), 1).uniform_(0.7, 1.3) + 0.15 * torch.randn_like(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--queue", type=int, default=512, help="number of past keys")
    parser.add_argument("--momentum", type=float, default=0.98)
    args = parser.parse_args()
    torch.manual_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images), batch_size=args.batch, shuffle=True, drop_last=True)

    encoder = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 16))
    model = nn.Sequential(encoder, nn.ReLU(), nn.Linear(16, 16))
    momentum_model = copy.deepcopy(model).requires_grad_(False)
    # As in MoCo, only the queue supplies negatives: the batch's own keys enter it after the loss is computed.
    loss_fn = fastntxent.QueueInfoNCELoss(args.queue, 16, temperature=0.1, in_batch_negatives=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)

    before = probe(encoder, images, labels)
    losses = []
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for (batch,) in itertools.islice(epochs, args.steps):
        with torch.no_grad():
            for slow, fast in zip(momentum_model.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - args.momentum)
            keys = momentum_model(view(batch))
        full = len(loss_fn.queue) == args.queue  # until then the loss grows with the number of negatives
        loss = loss_fn(model(view(batch)), keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if full:
            losses.append(loss.item())

    print(f"loss with a full queue: {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"linear probe: {before:.3f} -> {probe(encoder, images, labels):.3f}")


if __name__ == "__main__":
    main()
