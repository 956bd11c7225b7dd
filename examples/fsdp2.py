"""SimCLR under FSDP2 (`fully_shard`), on GPUs with NCCL or on CPUs with gloo.

torchrun --nproc-per-node 2 examples/fsdp2.py --steps 60 --batch 128
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastntxent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="samples per rank")
    args = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,))

    torch.manual_seed(0)  # the same weights on every rank, before they are sharded
    blocks = [nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256), nn.GELU()) for _ in range(2)]
    model = nn.Sequential(nn.Linear(64, 256), *blocks, nn.Linear(256, 32)).to(device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # The loss is not sharded. It does not need FSDP, because every rank computes the temperature's gradient for the
    # whole batch.
    loss_fn = fastntxent.NTXentLoss(temperature=0.2, learn_temperature=True, group=mesh).to(device)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.parameters(), "weight_decay": 1e-4},
            {"params": loss_fn.parameters(), "weight_decay": 0.0},
        ],
        lr=1e-3,
    )

    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1)[rank::world].to(device) / 16
    torch.manual_seed(1 + rank)  # different samples and views on every rank
    losses = []
    for _ in range(args.steps):
        batch = images[torch.randperm(len(images), device=device)[: args.batch]]
        views = torch.cat([batch + 0.2 * torch.randn_like(batch) for _ in range(2)])
        loss = loss_fn(*fastntxent.split_views(model(views)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    if rank == 0:
        print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f} on {world} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
