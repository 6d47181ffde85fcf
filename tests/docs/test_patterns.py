"""The patterns of docs/frameworks.md that need nothing but torch, against NumPy."""

from __future__ import annotations

import itertools
import json
import operator
import os
import re
import socket
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pages import ROOT, run_example
from processes import ForkServer
from torch import nn
from torch.distributed.fsdp import fully_shard

from autoclip.core import StateError
from autoclip.torch import QuantileClip

sys.path.append(str(ROOT / "tests" / "frameworks"))

from recipes import Watch, run_recipe, weights, windows_of

EXAMPLE = ROOT / "docs" / "examples" / "expert_parallel.py"


def network(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(one, two) for one, two in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def batches(count: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(8, width, generator=generator) * (1 + 4 * (step % 3)) for step in range(count)
    ]


PACKAGES = {
    "composer": "mosaicml",
    "ignite": "pytorch-ignite",
    "keras rs": "keras-rs",
    "kerashub": "keras-hub",
    "kerastuner": "keras-tuner",
    "nnu-net": "nnunetv2",
    "pytorch forecasting": "pytorch-forecasting",
    "pytorch geometric": "torch-geometric",
    "ray tune": "ray",
    "rllib": "ray",
    "sentence transformers": "sentence-transformers",
    "tabnet": "pytorch-tabnet",
    "tensorflow probability": "tensorflow-probability",
}


def test_the_overview_names_the_tested_versions() -> None:
    lines = (ROOT / "docs" / "frameworks.md").read_text("utf-8").splitlines()
    cells = [line.split(" | ")[0] for line in lines if line.startswith("| [")]
    plain = ", ".join(re.sub(r"[|[\]]|\(.*?\)", "", cell).strip() for cell in cells)
    versions = dict(re.findall(r"(\w[\w \-]*?) +(\d+\.\d+)", plain))
    assert len(versions) >= len(cells)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    pins = dict(re.findall(r'"([\w-]+)(?:\[.*?\])?==([\d.]+)', project))
    for name, version in versions.items():
        package = PACKAGES.get(name.lower(), name.lower())
        assert pins[package].startswith(version), name


# -- Several optimizers ------------------------------------------------------------------------


def gan(steps: int = 12) -> dict[str, Any]:
    given = {"generator": network(2, 8, 3), "discriminator": network(3, 8, 1), "latent_size": 2}
    return run_recipe("gan", batches=batches(steps, 3), **given)


def test_gan_clips_each_network_by_its_own_history() -> None:
    with Watch(quantile=0.9) as watch:
        names = gan()
    assert watch.steps() == [12, 12]
    assert watch.clipped > 5
    assert list(watch.norms) == [names["d_optimizer"], names["g_optimizer"]]


def test_gan_resumes() -> None:
    names = gan()
    for part in ("g", "d"):
        optimizer = names[f"{part}_optimizer"]
        model = names["generator" if part == "g" else "discriminator"]
        other = QuantileClip.as_optimizer(torch.optim.Adam(model.parameters()), quantile=0.9)
        other.load_state_dict(optimizer.state_dict())
        assert windows_of(other) == windows_of(optimizer)


def test_one_clipper_for_several_optimizers() -> None:
    model, plain = network(4, 8, 1), network(4, 8, 1)
    names = run_recipe("muon", model=model, batches=regression())

    matrices = [p for p in plain.parameters() if p.ndim == 2]
    others = [p for p in plain.parameters() if p.ndim != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=1e-3)]
    norms: list[float] = []
    clipped = 0
    for x, y in regression():
        nn.functional.mse_loss(plain(x), y).backward()
        gradients = [p.grad for p in plain.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.double().norm() for g in gradients]).norm()))
        coefficient = min(1.0, float(np.quantile(norms, 0.9)) / norms[-1])
        clipped += coefficient < 1
        for gradient in gradients:
            gradient.mul_(coefficient)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert clipped > 1
    # Muon computes in bfloat16, where a difference of one bit is 0.4 % of its steps of 0.02.
    torch.testing.assert_close(weights(model), weights(plain), rtol=0.0, atol=1e-3)
    clipper = QuantileClip(model.named_parameters(), quantile=0.9, global_clipping=True)
    clipper.load_state_dict(names["saved"]["clipper"])
    ((window,),) = (group.windows() for group in clipper.export_state().groups)
    np.testing.assert_allclose(window, norms, rtol=1e-4)


# -- An optimizer step inside the backward pass ------------------------------------------------


def regression(steps: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x, x.sum(dim=1, keepdim=True)) for x in batches(steps, 4)]


def test_steps_in_the_backward_pass_are_those_of_one_optimizer() -> None:
    model, plain = network(4, 8, 1), network(4, 8, 1)
    with Watch(quantile=0.9) as watch:
        names = run_recipe("in-backward", model=model, batches=regression())
    assert watch.steps() == [12] * 4
    assert watch.clipped > 5
    assert all(parameter.grad is None for parameter in model.parameters())

    optimizer = QuantileClip.as_optimizer(
        torch.optim.AdamW(plain.parameters(), lr=1e-3), quantile=0.9
    )
    for x, y in regression():
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
    assert torch.equal(weights(model), weights(plain))
    windows = [windows_of(one)[0] for one in names["optimizers"].values()]
    assert windows == list(windows_of(optimizer).values())

    parameters = dict(model.named_parameters())
    for name, saved in names["saved"].items():
        one = torch.optim.AdamW([parameters[name]], lr=1e-3)
        QuantileClip.as_optimizer(one, quantile=0.9).load_state_dict(saved)
        assert windows_of(one) == windows_of(names["optimizers"][name])


def step_in_the_backward_pass_with_fsdp2(steps: int) -> None:
    """Print the history of each parameter, from half of each batch on each of two processes."""
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    model = network(4, 8, 1)
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)
    halves = [(x[rank::count], y[rank::count]) for x, y in regression(steps)]
    optimizers = run_recipe("in-backward", model=model, batches=halves)["optimizers"]
    print(json.dumps([windows_of(optimizer)[0] for optimizer in optimizers.values()]))


def test_steps_in_the_backward_pass_with_fsdp2(server: ForkServer) -> None:
    names = run_recipe("in-backward", model=network(4, 8, 1), batches=regression())
    expected = [windows_of(optimizer)[0] for optimizer in names["optimizers"].values()]
    outcomes = server.run(
        step_in_the_backward_pass_with_fsdp2, {"steps": 12}, count=2, port=free_port()
    )
    for outcome in outcomes:
        assert outcome.status == 0, str(outcome)
        (line,) = re.findall(r"^\[\[.*\]\]$", outcome.output, re.MULTILINE)
        np.testing.assert_allclose(json.loads(line), expected, rtol=1e-4)


# -- Parameters that are replaced --------------------------------------------------------------


def gaussians(count: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (count, 3), "opacities": (count,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def test_replaced_parameters_keep_their_history() -> None:
    tensors = gaussians(10)
    growing = itertools.accumulate(itertools.repeat(1.05), operator.mul)

    def render_loss(tensors: dict[str, nn.Parameter]) -> torch.Tensor:
        squares = [(tensor**2).sum() for tensor in tensors.values()]
        return next(growing) * torch.stack(squares).sum()

    with Watch(quantile=0.9, history_length=100) as watch:
        names = run_recipe("gaussian-splatting", gaussians=tensors, render_loss=render_loss)
    assert watch.steps() == [40]
    assert watch.clipped > 20
    assert {name: len(tensor) for name, tensor in tensors.items()} == {"means": 12, "opacities": 12}
    optimizer = names["optimizer"]

    def made(count: int) -> Any:
        groups = [{"params": [tensor]} for tensor in gaussians(count).values()]
        adam = torch.optim.Adam(groups)
        return QuantileClip.as_optimizer(adam, quantile=0.9, history_length=100)

    other = made(12)
    other.load_state_dict(optimizer.state_dict())
    assert windows_of(other) == windows_of(optimizer)
    with pytest.raises(StateError, match="shapes differ"):
        made(10).load_state_dict(optimizer.state_dict())


# -- Mixture of experts ------------------------------------------------------------------------


def run_ranks(path: str, arguments: list[str], processes: int, port: int) -> None:
    """Run the example, also in one process as torchrun would."""
    os.environ.setdefault("RANK", "0")
    os.environ.update(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_example(path, arguments)


def printed(server: ForkServer, processes: int, *options: str) -> list[float]:
    """The loss and the norms of the example's last step."""
    port = free_port()
    arguments = {"path": EXAMPLE, "arguments": ["8", *options], "processes": processes}
    outcomes = server.run(run_ranks, {**arguments, "port": port}, processes, port=port)
    for outcome in outcomes:
        assert outcome.status == 0, str(outcome)
    (line,) = re.findall(r"^loss .*norms .*$", outcomes[0].output, re.MULTILINE)
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


@pytest.mark.parametrize("options", [(), ("--global",)])
def test_experts_on_two_processes_as_on_one(server: ForkServer, options: tuple[str, ...]) -> None:
    one, two = (printed(server, count, *options) for count in (1, 2))
    assert len(one) == (2 if options else 8)
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=2e-5)  # printed with five decimals
