"""SimCLR under Lightning's DDP: every rank takes negatives from all ranks.

python examples/lightning_ddp.py --devices 2 --steps 60 --batch 128
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastntxent


class SimCLR(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU())
        self.projector = nn.Linear(256, 32)
        # "world" is looked up at each call, so the loss can be created here, before Lightning starts the process group.
        self.loss_fn = fastntxent.NTXentLoss(temperature=0.2, learn_temperature=True, group="world")
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (images,) = batch
        views = torch.cat([images + 0.2 * torch.randn_like(images) for _ in range(2)])
        # One pass over both views, so that DDP broadcasts BatchNorm's buffers once a step.
        z_i, z_j = fastntxent.split_views(self.projector(self.encoder(views)))
        loss = self.loss_fn(z_i, z_j)
        self.log("loss", loss, prog_bar=True)  # no sync_dist: every rank has the loss of the whole batch
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        temperature = list(self.loss_fn.parameters())
        weights = [*self.encoder.parameters(), *self.projector.parameters()]
        groups = [{"params": weights, "weight_decay": 1e-4}, {"params": temperature, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3)

    def on_train_start(self) -> None:
        torch.manual_seed(self.global_rank)  # otherwise every rank would draw the same noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="samples per rank")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    loader = DataLoader(TensorDataset(images), batch_size=args.batch, shuffle=True, drop_last=True)
    model = SimCLR()
    trainer = L.Trainer(
        accelerator=args.accelerator, devices=args.devices, strategy="ddp", max_steps=args.steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    if trainer.is_global_zero:
        print(f"loss: {model.losses[0]:.3f} -> {model.losses[-1]:.3f} on {trainer.world_size} ranks")


if __name__ == "__main__":
    main()
