"""Experts beside FSDP2, as DTensors. `torchrun --nproc-per-node 2 expert_parallel.py [STEPS]`."""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from autoclip.torch import QuantileClip

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 200
GLOBAL = "--global" in sys.argv
EXPERTS, WIDTH, BATCH = 4, 32, 64
device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())
ep = min(world, 2)  # the processes that share one set of experts
mesh = init_device_mesh(device, (world // ep, ep), mesh_dim_names=("dp", "ep"))


class Experts(nn.Module):
    """Linear layers, of which each process holds some."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5
        self.weight = nn.Parameter(distribute_tensor(weight.to(device), mesh["ep"], [Shard(0)]))

    def forward(self, x):  # [experts, tokens of this process, width]
        x = DTensor.from_local(x, mesh["ep"], [Shard(1)])
        x = x.redistribute(placements=[Shard(0)])  # all-to-all: tokens go to their experts
        y = torch.bmm(x, self.weight).relu()
        return y.redistribute(placements=[Shard(1)]).to_local()  # and back


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, EXPERTS)
        self.inputs = nn.Linear(64, WIDTH)
        self.experts = Experts()
        self.outputs = nn.Linear(WIDTH, 10)

    def forward(self, x):
        probability, chosen = self.router(x).softmax(-1).max(-1)
        sent = nn.functional.one_hot(chosen, EXPERTS).T[:, :, None]  # [experts, tokens, 1]
        y = self.experts(sent * self.inputs(x))
        return self.outputs((sent * probability[:, None] * y).sum(0))


torch.manual_seed(0)
model = Model().to(device)
fully_shard(model.experts, mesh=mesh["dp"])
fully_shard(model)
for module in (model.experts, model):  # sums gradients, as the loss is divided by the whole batch
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)
# After sharding: fully_shard replaces the parameters.
optimizer = QuantileClip.as_optimizer(
    torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False),  # the meshes differ
    quantile=0.9,
    global_clipping=GLOBAL,
)

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32, device=device)
labels = torch.tensor(digits.target, device=device)
for _ in range(STEPS):
    batch = torch.randint(len(labels), (BATCH,), device=device)[rank::world]
    optimizer.zero_grad()
    scores = model(images[batch])
    loss = nn.functional.cross_entropy(scores, labels[batch], reduction="sum") / BATCH
    loss.backward()
    optimizer.step()  # clips by the norms of whole gradients, on all processes alike

dist.all_reduce(loss)
if rank == 0:
    norms = ", ".join(f"{norm:.5f}" for norm in optimizer.clipper.last.norms.tolist())
    print(f"loss {loss.item():.5f}; norms {norms}")
    optimizer.clipper.save("history.autoclip")  # the same on all processes
dist.destroy_process_group()
