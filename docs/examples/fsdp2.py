"""FSDP2 on two processes. `torchrun --nproc-per-node 2 fsdp2.py [STEPS]`."""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard

from autoclip.torch import QuantileClip

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
for layer in model:
    fully_shard(layer)
fully_shard(model)
# After sharding: fully_shard replaces the parameters.
optimizer = QuantileClip.as_optimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-2), quantile=0.9, global_clipping=True
)

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
labels = torch.tensor(digits.target, device=device)
for _ in range(STEPS):
    batch = torch.randint(len(labels), (64,), device=device)[rank::world]  # equal on all ranks
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()  # clips by the norm of the whole gradient, on all processes alike

norm = optimizer.clipper.last.norms
gathered = [torch.empty_like(norm) for _ in range(world)]
dist.all_gather(gathered, norm)
assert all(torch.equal(norm, other) for other in gathered)
if rank == 0:
    print(f"loss {loss.item():.3f}; all {world} processes measured the norm {norm.item():.4f}")
    optimizer.clipper.save("history.autoclip")  # the same on all processes
dist.destroy_process_group()
