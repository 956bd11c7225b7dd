"""SimCLR under Hugging Face's Accelerate: every rank takes negatives from all ranks.

torchrun --nproc-per-node 2 examples/accelerate_ddp.py --cpu --steps 60 --batch 128
accelerate launch --num_processes 2 examples/accelerate_ddp.py  # with two GPUs
"""

import argparse
import itertools

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastntxent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="samples per rank")
    parser.add_argument("--cpu", action="store_true", help="run on CPUs, with gloo")
    args = parser.parse_args()

    accelerator = Accelerator(cpu=args.cpu)
    torch.manual_seed(0)  # the same weights on every rank
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    loader = DataLoader(TensorDataset(images), batch_size=args.batch, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 32))
    # Accelerate creates no process group for a single process, and group="world" raises an error without one.
    loss_fn = fastntxent.NTXentLoss(
        temperature=0.2, learn_temperature=True, group="world" if accelerator.num_processes > 1 else None
    ).to(accelerator.device)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.parameters(), "weight_decay": 1e-4},
            {"params": loss_fn.parameters(), "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    # The loss is not passed to `prepare`, which would wrap it in DDP. That is not needed, because every rank already
    # computes the temperature's gradient for the whole batch.
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    torch.manual_seed(accelerator.process_index)  # different views on every rank
    losses = []
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for (batch,) in itertools.islice(epochs, args.steps):
        views = torch.cat([batch + 0.2 * torch.randn_like(batch) for _ in range(2)])
        # One pass over both views, so that DDP broadcasts BatchNorm's buffers once a step.
        loss = loss_fn(*fastntxent.split_views(model(views)))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())

    # Every rank has the loss of the whole batch, so there is nothing to reduce before printing.
    accelerator.print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f} on {accelerator.num_processes} ranks")
    accelerator.end_training()


if __name__ == "__main__":
    main()
