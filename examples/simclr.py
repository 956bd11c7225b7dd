"""SimCLR in plain PyTorch on scikit-learn's digits: NT-Xent with a learnt temperature, then a linear probe.

python examples/simclr.py --steps 150 --batch 128
"""

import argparse
import itertools

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastntxent


def augment(images: Tensor) -> Tensor:
    """Return the images (N, 1, 8, 8), each with a random shift and brightness, and noise."""
    shifted = nn.functional.pad(images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)  # (N, 1, 3, 3, 8, 8)
    N = len(images)
    crops = shifted[torch.arange(N), :, torch.randint(3, (N,)), torch.randint(3, (N,))]
    return crops * torch.empty(N, 1, 1, 1).uniform_(0.7, 1.3) + 0.1 * torch.randn_like(crops)


@torch.no_grad()
def probe(encoder: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the accuracy of a linear classifier on frozen features: fitted to 200 samples, scored on the others."""
    encoder.eval()
    features = encoder(images).numpy()
    encoder.train()
    classifier = LogisticRegression(max_iter=1000).fit(features[:200], labels[:200])
    return float(classifier.score(features[200:], labels[200:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    if args.steps < 1 or not 2 <= args.batch <= len(images):
        parser.error(f"--steps must be at least 1 and --batch 2 to {len(images)}, got {args.steps} and {args.batch}")
    loader = DataLoader(TensorDataset(images), batch_size=args.batch, shuffle=True, drop_last=True)

    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    projector = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    loss_fn = fastntxent.NTXentLoss(temperature=0.2, learn_temperature=True)
    # Weight decay would pull the temperature's logarithm towards 0, and so the temperature towards 1.
    groups = [
        {"params": [*encoder.parameters(), *projector.parameters()], "weight_decay": 1e-4},
        {"params": loss_fn.parameters(), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)

    before = probe(encoder, images, labels)
    losses = []
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for (batch,) in itertools.islice(epochs, args.steps):
        z_i, z_j = projector(encoder(augment(batch))), projector(encoder(augment(batch)))
        loss = loss_fn(z_i, z_j)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    print(f"temperature: 0.2 -> {loss_fn.log_temperature.exp().item():.3f}")
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"linear probe: {before:.3f} -> {probe(encoder, images, labels):.3f}")  # the projector is not used again


if __name__ == "__main__":
    main()
