"""SupCon on scikit-learn's digits: two views of each sample, positives by class, then a linear probe.

python examples/sup_con.py --steps 100 --batch 128
"""

import argparse
import itertools

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastntxent

TRAIN = 400  # the first samples are for training, with their labels; the others are held out


@torch.no_grad()
def probe(encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy of a linear classifier, fitted to frozen features, on the held-out samples."""
    encoder.eval()
    features = encoder(images).numpy()
    encoder.train()
    classifier = LogisticRegression(max_iter=1000).fit(features[:TRAIN], labels[:TRAIN])
    return float(classifier.score(features[TRAIN:], labels[TRAIN:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    samples = TensorDataset(images[:TRAIN], labels[:TRAIN])
    loader = DataLoader(samples, batch_size=args.batch, shuffle=True, drop_last=True)

    encoder = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 16))
    projector = nn.Sequential(nn.ReLU(), nn.Linear(16, 16))
    loss_fn = fastntxent.SupConLoss(temperature=0.1)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=3e-3, weight_decay=1e-4)

    before = probe(encoder, images, labels)
    losses = []
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch, classes in itertools.islice(epochs, args.steps):
        views = torch.cat([batch + 0.1 * torch.randn_like(batch) for _ in range(2)])
        loss = loss_fn(projector(encoder(views)), classes.repeat(2))  # one label for each row of both views
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"linear probe: {before:.3f} -> {probe(encoder, images, labels):.3f}")


if __name__ == "__main__":
    main()
