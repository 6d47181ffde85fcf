"""Lightning: clippers made by the module or by the callback, resumed, and logged when asked."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autoclip.core.inspect import read_states
from autoclip.torch import Clipper, QuantileClip, StandardClip
from autoclip.torch.lightning import AutoClipCallback
from autoclip.torch.logging import summarize

SETTINGS: dict[str, Any] = {"quantile": 0.5, "history_length": 16}
BATCHES = 6
NAMES = {"autoclip/total_norm", "autoclip/clipped_norm", "autoclip/clipped"}

pytestmark = [
    # Lightning's own: too few workers, no validation, a folder that exists.
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Batches(torch.utils.data.Dataset[Tensor]):
    """Batches whose gradients grow and shrink, so that some steps clip; the same each epoch."""

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(i)
        return torch.randn(5, 4, generator=generator) * (1.0, 3.0, 0.5, 5.0, 2.0, 8.0)[i]


class Module(LightningModule):
    def __init__(self, attach: bool = True, automatic: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.attach = attach
        self.automatic_optimization = automatic

    def loss(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        if self.attach:
            optimizer = QuantileClip.as_optimizer(optimizer, **SETTINGS)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"},
        }


class Stop(Callback):
    """Ends training after some epochs, as an interruption would, with the same settings."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def make_trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(default_root_dir=folder, callbacks=[*callbacks], **{**defaults, **settings})


def loader() -> DataLoader[Tensor]:
    return DataLoader(Batches(), batch_size=None)


def fit(module: Module, trainer: Trainer, **settings: Any) -> Clipper:
    with warnings.catch_warnings():
        # Read-only properties are deprecated and Lightning's fit looks at all of them.
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        trainer.fit(module, loader(), **settings)
    return trainer.optimizers[0].clipper


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def windows(clipper: Clipper) -> list[list[float]]:
    return [w.tolist() for group in clipper.export_state().groups for w in group.windows()]


def by_hand(
    epochs: int = 1, accumulate: int = 1, autocast: bool = False
) -> tuple[Tensor, list[list[float]]]:
    """The same training in a plain loop, with `clipper.step()` called by hand."""
    module = Module(attach=False)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    clipper = QuantileClip(module.parameters(), **SETTINGS)
    for _ in range(epochs):
        for i, batch in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
                loss = module.loss(batch)
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == BATCHES:
                clipper.step()
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
    return weights(module), windows(clipper)


def lengths(clipper: Clipper) -> set[int]:
    return {len(w) for group in clipper.export_state().groups for w in group.windows()}


ATTACHED = pytest.mark.parametrize("by", ["module", "callback"])


def callbacks_for(by: str) -> list[Callback]:
    return [] if by == "module" else [AutoClipCallback(**SETTINGS)]


# -- training ----------------------------------------------------------------------------------


@ATTACHED
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_as_in_a_plain_loop(tmp_path: Path, by: str, automatic: bool) -> None:
    module = Module(attach=by == "module", automatic=automatic)
    clipper = fit(module, make_trainer(tmp_path, *callbacks_for(by), max_epochs=1))
    expected, history = by_hand()
    assert torch.equal(weights(module), expected)
    assert windows(clipper) == history
    assert lengths(clipper) == {BATCHES}


@ATTACHED
def test_accumulation_records_once_a_step(tmp_path: Path, by: str) -> None:
    module = Module(attach=by == "module")
    trainer = make_trainer(tmp_path, *callbacks_for(by), max_epochs=2, accumulate_grad_batches=4)
    clipper = fit(module, trainer)
    assert lengths(clipper) == {4}  # in each epoch, four batches and then the two that are left
    expected, history = by_hand(epochs=2, accumulate=4)
    assert torch.equal(weights(module), expected)
    assert windows(clipper) == history


@ATTACHED
def test_bfloat16_autocast(tmp_path: Path, by: str) -> None:
    module = Module(attach=by == "module")
    trainer = make_trainer(tmp_path, *callbacks_for(by), max_epochs=1, precision="bf16-mixed")
    clipper = fit(module, trainer)
    expected, history = by_hand(autocast=True)
    assert torch.equal(weights(module), expected)
    assert windows(clipper) == history


# -- resume ------------------------------------------------------------------------------------


@ATTACHED
@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_resuming_at_an_epochs_end_is_as_never_stopping(
    tmp_path: Path, by: str, automatic: bool, epochs: int
) -> None:
    whole = Module(attach=by == "module", automatic=automatic)
    expected = fit(whole, make_trainer(tmp_path, *callbacks_for(by)))
    half = Module(attach=by == "module", automatic=automatic)
    trainer = make_trainer(tmp_path, *callbacks_for(by), Stop(epochs))
    stopped = fit(half, trainer).state_dict()["data"]
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    rest = Module(attach=by == "module", automatic=automatic)
    seen: list[bytes] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(trainer.optimizers[0].clipper.state_dict()["data"])

    again = make_trainer(tmp_path, *callbacks_for(by), Look())
    # What Lightning 2.6 reads by default since torch 2.6 does.
    resumed = fit(rest, again, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert seen == [stopped]
    assert torch.equal(weights(rest), weights(whole))
    assert not torch.equal(weights(rest), weights(half))
    assert resumed.state_dict()["data"] == expected.state_dict()["data"]
    assert lengths(resumed) == {16}


def names(clipper: Clipper) -> list[str | None]:
    return [each.name for group in clipper.export_state().groups for each in group.parameters]


NAMED = [f"net.{layer}.{each}" for layer in (0, 2) for each in ("weight", "bias")]


@pytest.mark.parametrize("saved_by", ["module", "callback"])
@pytest.mark.parametrize("loaded_by", ["module", "callback"])
def test_checkpoints_load_with_names_and_without(
    tmp_path: Path, saved_by: str, loaded_by: str
) -> None:
    trainer = make_trainer(tmp_path, *callbacks_for(saved_by), max_epochs=1)
    saved = fit(Module(attach=saved_by == "module"), trainer)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = make_trainer(tmp_path, *callbacks_for(loaded_by), max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Be aware that|.*LeafSpec|.*workers|Checkpoint")
        module = Module(attach=loaded_by == "module")
        resumed = fit(module, again, ckpt_path=tmp_path / "last.ckpt")
    assert windows(resumed) == windows(saved)
    for clipper, by in ((saved, saved_by), (resumed, loaded_by)):
        assert names(clipper) == (NAMED if by == "callback" else [None] * 4)


def test_messages_and_reports_name_the_modules_parameters(tmp_path: Path) -> None:
    class Broken(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.loss(batch) + self.net[2].bias.sum() * (math.nan if batch_idx == 2 else 1)

    callback = AutoClipCallback(**SETTINGS, on_nonfinite="raise")
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(FloatingPointError, match=r"gradient of net\.2\.bias"):
        fit(Broken(attach=False), trainer)
    clipper = trainer.optimizers[0].clipper
    assert list(clipper.last.names) == NAMED
    assert [row.name for row in summarize(clipper).rows] == NAMED


def test_parameters_that_come_later_are_named_in_the_next_checkpoint(tmp_path: Path) -> None:
    class Finetuning(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    class Head(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    trainer = make_trainer(
        tmp_path,
        AutoClipCallback(**SETTINGS),
        Finetuning(),
        max_epochs=2,
        enable_checkpointing=True,
    )
    clipper = fit(Head(attach=False), trainer)
    assert names(clipper) == [*NAMED[2:], *NAMED[:2]]
    [state] = read_states(next(tmp_path.rglob("*.ckpt"))).values()
    assert [each.name for group in state.groups for each in group.parameters] == names(clipper)


def test_a_checkpoint_without_a_history_warns(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Module(attach=False), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = make_trainer(tmp_path, AutoClipCallback(**SETTINGS), max_epochs=2)
    with pytest.warns(UserWarning, match="has no 'autoclip' entry"):
        clipper = fit(Module(attach=False), again, ckpt_path=tmp_path / "last.ckpt")
    assert lengths(clipper) == {BATCHES}


# -- the callback ------------------------------------------------------------------------------


def test_another_rule(tmp_path: Path) -> None:
    callback = AutoClipCallback(StandardClip, deviations=0.5, global_clipping=True)
    module = Module(attach=False)
    clipper = fit(module, make_trainer(tmp_path, callback, max_epochs=1))
    assert isinstance(clipper, StandardClip)
    assert clipper.global_clipping and clipper.defaults["deviations"] == 0.5


def test_wrong_settings_are_found_at_once() -> None:
    with pytest.raises(ValueError, match="quantile"):
        AutoClipCallback(quantile=2.0)
    with pytest.raises(TypeError, match="deviations"):
        AutoClipCallback(deviations=2.0)


def test_fitting_twice_with_one_callback(tmp_path: Path) -> None:
    callback = AutoClipCallback(**SETTINGS)
    for _ in range(2):
        clipper = fit(Module(attach=False), make_trainer(tmp_path, callback, max_epochs=1))
        assert lengths(clipper) == {BATCHES}


def test_one_callback_keeps_no_model_alive(tmp_path: Path) -> None:
    callback = AutoClipCallback(**SETTINGS)
    references = []
    for _ in range(2):
        module = Module(attach=False)
        clipper = fit(module, make_trainer(tmp_path, callback, max_epochs=1))
        references += [weakref.ref(clipper), *map(weakref.ref, module.parameters())]
        del module, clipper
    # These are what Lightning leaves on each callback: methods of the last module.
    callback.log = callback.log_dict = None
    gc.collect()
    assert [each() for each in references] == [None] * 10


def test_a_callback_can_be_copied_and_pickled(tmp_path: Path) -> None:
    """As strategies do that start processes."""
    callback = AutoClipCallback(**SETTINGS)
    clipper = fit(Module(attach=False), make_trainer(tmp_path, callback, max_epochs=1))
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        again = fit(Module(attach=False), make_trainer(tmp_path, copied, max_epochs=1))
        assert again.state_dict() == clipper.state_dict()


def test_an_optimizer_that_is_attached_already(tmp_path: Path) -> None:
    """Without arguments the callback only logs; with them, it contradicts the module."""
    trainer = make_trainer(tmp_path, AutoClipCallback(), max_epochs=1)
    clipper = fit(Module(), trainer)
    assert SETTINGS.items() <= clipper.defaults.items()
    assert trainer.logged_metrics.keys() | trainer.callback_metrics.keys() >= NAMES
    with pytest.raises(RuntimeError, match="has a clipper already"):
        fit(Module(), make_trainer(tmp_path, AutoClipCallback(quantile=0.5)))


class Outer(torch.optim.Optimizer):
    """An optimizer around another one, as Lookahead's are."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_without_settings_it_finds_the_clipper_of_an_optimizer_inside(tmp_path: Path) -> None:
    module = Module(attach=False)
    made = QuantileClip.as_optimizer(torch.optim.SGD(module.parameters(), lr=0.1), **SETTINGS)
    module.configure_optimizers = lambda: Outer(made)  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, AutoClipCallback(), max_epochs=1)
    trainer.fit(module, loader())
    assert [hasattr(each, "clipper") for each in (trainer.optimizers[0], made)] == [False, True]
    assert trainer.callback_metrics.keys() >= NAMES


class Adversarial(Module):
    """Two optimizers, of which those whose index is given come with a clipper."""

    def __init__(self, *clipped: int) -> None:
        super().__init__(attach=False, automatic=False)
        self.clipped = clipped

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]
        for i in self.clipped:
            QuantileClip.as_optimizer(optimizers[i], **SETTINGS)
        return optimizers


@pytest.mark.parametrize("clipped", [0, 1])
def test_without_settings_it_adds_no_clipper_beside_one_that_was_chosen(
    tmp_path: Path, clipped: int
) -> None:
    trainer = make_trainer(tmp_path, AutoClipCallback(), max_epochs=1)
    trainer.fit(Adversarial(clipped), loader())
    assert [hasattr(each, "clipper") for each in trainer.optimizers] == [clipped == 0, clipped == 1]
    logged = trainer.callback_metrics.keys()
    assert {name for name in logged if name.startswith("autoclip/")} == {
        f"{name}/{clipped}" for name in NAMES
    }


def test_without_settings_and_clippers_each_optimizer_gets_one(tmp_path: Path) -> None:
    callback = AutoClipCallback()
    for _ in range(2):
        trainer = make_trainer(tmp_path, callback, max_epochs=1)
        trainer.fit(Adversarial(), loader())
        assert all(isinstance(each.clipper, QuantileClip) for each in trainer.optimizers)


@pytest.mark.parametrize("clipped", [0, 1])
def test_settings_for_an_optimizer_that_has_a_clipper_attach_nothing(
    tmp_path: Path, clipped: int
) -> None:
    trainer = make_trainer(tmp_path, AutoClipCallback(quantile=0.5), max_epochs=1)
    with pytest.raises(RuntimeError, match="has a clipper already"):
        trainer.fit(Adversarial(clipped), loader())
    assert [hasattr(each, "clipper") for each in trainer.optimizers] == [clipped == 0, clipped == 1]


def test_lightnings_own_clipping_comes_first_and_is_warned_about(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, AutoClipCallback(**SETTINGS), max_epochs=1, gradient_clip_val=1e-3
    )
    with pytest.warns(UserWarning, match=r"gradient_clip_val=0\.001 before AutoClip sees them"):
        clipper = fit(Module(attach=False), trainer)
    windows = [w for group in clipper.export_state().groups for w in group.windows()]
    total = sum(w.astype(float) ** 2 for w in windows) ** 0.5
    assert total == pytest.approx(1e-3, rel=1e-3)  # so it is: each recorded norm is clipped


# -- logging -----------------------------------------------------------------------------------


class Recorder:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        recorder = self

        class Keep(CSVLogger):
            def log_metrics(self, metrics: Any, step: int | None = None) -> None:
                assert step is not None
                recorder.rows.setdefault(step, {}).update(metrics)

        self.logger = Keep


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_values_are_logged_on_the_steps_that_lightning_logs(
    tmp_path: Path, automatic: bool
) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        AutoClipCallback(**SETTINGS),
        max_epochs=2,
        log_every_n_steps=4,
        logger=recorder.logger(tmp_path),
    )
    fit(Module(attach=False, automatic=automatic), trainer)
    logged = {step for step, row in recorder.rows.items() if row.keys() >= NAMES}
    assert logged == {3, 7, 11}


def test_the_values_are_those_of_the_step(tmp_path: Path) -> None:
    recorder = Recorder()
    module = Module(attach=False)
    trainer = make_trainer(
        tmp_path, AutoClipCallback(**SETTINGS), max_epochs=1, logger=recorder.logger(tmp_path)
    )
    fit(module, trainer)
    # The same training by hand, and what its clipper reports.
    other = Module(attach=False)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    clipper = QuantileClip(other.parameters(), **SETTINGS)
    clipped = set()
    for step, batch in enumerate(loader()):
        optimizer.zero_grad()
        other.loss(batch).backward()
        total_norm = clipper.step()
        optimizer.step()
        last = clipper.last
        row = recorder.rows[step]
        assert row["autoclip/total_norm"] == pytest.approx(float(total_norm))
        after = torch.cat([p.grad.flatten() for p in other.parameters()]).norm()
        assert row["autoclip/clipped_norm"] == pytest.approx(float(after))
        assert row["autoclip/clipped"] == float((last.coefficients < 1).float().mean())
        clipped.add(row["autoclip/clipped"])
    assert len(clipped) > 1


def test_with_accumulation_only_real_steps_are_logged(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path,
        AutoClipCallback(**SETTINGS),
        max_epochs=1,
        accumulate_grad_batches=3,
        logger=recorder.logger(tmp_path),
    )
    fit(Module(attach=False), trainer)
    assert {step for step, row in recorder.rows.items() if row.keys() >= NAMES} == {0, 1}


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
def test_nothing_is_read_on_other_steps(
    tmp_path: Path, automatic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`clipper.last` is what would wait for a device."""
    reads: list[int] = []
    trainer = make_trainer(
        tmp_path, AutoClipCallback(**SETTINGS), max_epochs=2, log_every_n_steps=5
    )
    last = Clipper.last.fget

    def counted(clipper: Clipper) -> Any:
        reads.append(trainer.fit_loop.epoch_loop._batches_that_stepped)
        return last(clipper)

    monkeypatch.setattr(Clipper, "last", property(counted))
    fit(Module(attach=False, automatic=automatic), trainer)
    assert reads == [4, 9]


def test_several_optimizers_have_a_clipper_each(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, AutoClipCallback(**SETTINGS), max_epochs=1, logger=recorder.logger(tmp_path)
    )
    fit(Adversarial(), trainer)
    assert [len(o.clipper.export_state().row_names) for o in trainer.optimizers] == [2, 2]
    names = {f"{name}/{i}" for name in NAMES for i in range(2)}
    assert all(recorder.rows[step].keys() >= names for step in range(BATCHES))
    assert all(not recorder.rows[step].keys() & NAMES for step in range(BATCHES))
