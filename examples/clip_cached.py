"""CLIP with gradient caching: two towers, and only one chunk of the batch at a time has activations in memory.

python examples/clip_cached.py --steps 80 --batch 512 --chunk 64
"""

import argparse

import torch
from torch import Tensor, nn

import fastntxent

CONCEPTS, WORDS, PIXELS = 24, 4, 16 * 16  # a caption names 2 to 4 of 24 concepts


class TextTower(nn.Module):
    """Encodes a caption from the mean of its word vectors; the mask leaves out the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(CONCEPTS + 1, 64)
        self.head = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None]
        pooled: Tensor = self.head((self.words(input_ids) * mask).sum(1) / mask.sum(1))
        return pooled


def draw(count: int, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return noisy sums of the concepts' pictures (N, pixels), and captions as a tokenizer returns them."""
    chosen = torch.rand(count, CONCEPTS).topk(WORDS).indices
    mask = torch.arange(WORDS) < torch.randint(2, WORDS + 1, (count, 1))
    images = (pictures[chosen] * mask[..., None]).sum(1) + torch.randn(count, PIXELS)
    return images, {"input_ids": torch.where(mask, chosen + 1, 0), "attention_mask": mask.float()}


@torch.no_grad()
def accuracy(towers: list[nn.Module], images: Tensor, texts: dict[str, Tensor]) -> float:
    """Return the share of images whose own caption is the most similar one."""
    nearest = fastntxent.retrieve(towers[0](images), towers[1](**texts), k=1).indices[:, 0]
    return (nearest == torch.arange(len(images))).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=64, help="rows that a tower encodes at a time")
    args = parser.parse_args()
    torch.manual_seed(0)

    pictures = torch.randn(CONCEPTS, PIXELS)
    towers = [nn.Sequential(nn.Linear(PIXELS, 128), nn.GELU(), nn.Linear(128, 64)), TextTower()]
    loss_fn = fastntxent.CLIPLoss(temperature=0.07)  # the logit scale is learnt, and at most 100
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for tower in towers for p in tower.parameters()], "weight_decay": 0.01},
            {"params": loss_fn.parameters(), "weight_decay": 0.0},
        ],
        lr=2e-3,
    )
    held_out = draw(256, pictures)
    before, losses = accuracy(towers, *held_out), []
    for _ in range(args.steps):
        optimizer.zero_grad()
        # `cached_backward` calls backward itself. With `unpack`, it calls the text tower as tower(**texts).
        pairs = draw(args.batch, pictures)
        loss = fastntxent.cached_backward(towers, pairs, loss_fn, chunk_size=args.chunk, unpack=True)
        optimizer.step()
        losses.append(loss.item())

    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"retrieval: {before:.3f} -> {accuracy(towers, *held_out):.3f}")


if __name__ == "__main__":
    main()
