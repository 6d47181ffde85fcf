"""The Hugging Face Trainer: clippers from `optimizers=` or the callback, resumed, and logged."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from autoclip.core.inspect import read_states
from autoclip.torch import Clipper, QuantileClip, StandardClip
from autoclip.torch.transformers import AutoClipCallback

SETTINGS: dict[str, Any] = {"quantile": 0.5, "history_length": 16}
STEPS = 8
NAMES = {"autoclip/total_norm", "autoclip/clipped_norm", "autoclip/clipped"}


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.words = torch.randint(1, 20, (32, 5), generator=generator)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[i], "labels": self.words[i].sum() % 2}


def make_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )


def make_trainer(
    folder: Path, by: str = "callback", callbacks: Iterable[TrainerCallback] = (), **settings: Any
) -> Trainer:
    """A trainer whose clipper comes from `optimizers=`, or from a callback, or from none."""
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    model = make_model()
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    optimizers: Any = (None, None)
    if by == "optimizers":
        # A plain run's optimizer, with its groups.
        optimizer = Trainer(model, args).create_optimizer()
        optimizers = (QuantileClip.as_optimizer(optimizer, **SETTINGS), None)
    own = [AutoClipCallback(**SETTINGS)] if by == "callback" else []
    return Trainer(
        model,
        args,
        train_dataset=Examples(),
        eval_dataset=Examples(),
        optimizers=optimizers,
        callbacks=[*own, *callbacks],
    )


def train(trainer: Trainer, checkpoint: Path | None = None) -> Clipper:
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer.optimizer.optimizer.clipper


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def lengths(clipper: Clipper) -> set[int]:
    return {len(window) for window in windows(clipper)}


def windows(clipper: Clipper) -> list[list[float]]:
    return [w.tolist() for group in clipper.export_state().groups for w in group.windows()]


class Look(TrainerCallback):
    """Keeps what the clipper's state is at the start, and the logs as a callback sees them."""

    def __init__(self) -> None:
        self.state = b""
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = kwargs["optimizer"].optimizer.clipper.state_dict()["data"]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


ATTACHED = pytest.mark.parametrize("by", ["optimizers", "callback"])


# -- training ----------------------------------------------------------------------------------


def test_a_layer_wise_optimizer_is_said_to_update_nothing(tmp_path: Path) -> None:
    """`optim="galore_adamw_layerwise"` gives the trainer this one."""
    trainer = make_trainer(tmp_path, "callback", max_steps=1)
    trainer.optimizer = LayerWiseDummyOptimizer(optimizer_dict={})
    updates_nothing = pytest.warns(UserWarning, match=r"DummyOptimizer\.step\(\) updates nothing")
    with updates_nothing, pytest.warns(UserWarning, match="none of its parameters requires one"):
        train(trainer)


class ScheduleFree(torch.optim.AdamW):
    """With a hyperparameter of its own, as `optim="schedule_free_adamw"` has."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.defaults["warmup_steps"] = 2000
        for group in self.param_groups:
            group["warmup_steps"] = 2000


@pytest.mark.parametrize("global_clipping", [False, True])
def test_an_optimizers_own_warm_up_is_not_the_clippers(
    tmp_path: Path, global_clipping: bool
) -> None:
    callback = AutoClipCallback(quantile=0.1, global_clipping=global_clipping)
    trainer = make_trainer(tmp_path, "none", [callback])
    trainer.optimizer = ScheduleFree(trainer.model.parameters(), lr=1e-2)
    clipper = train(trainer)
    assert [group["warmup_steps"] for group in clipper.param_groups] == [0]
    assert bool((clipper.last.coefficients < 1).any())


@ATTACHED
@pytest.mark.parametrize("accumulate", [1, 3])
def test_as_clipped_by_hand(tmp_path: Path, by: str, accumulate: int) -> None:
    settings = {"gradient_accumulation_steps": accumulate}
    trainer = make_trainer(tmp_path, by, **settings)
    clipper = train(trainer)
    assert lengths(clipper) == {STEPS}  # one record an optimizer step, whatever it accumulates

    plain = make_trainer(tmp_path, "none", **settings)
    by_hand = QuantileClip(
        [{"params": g["params"]} for g in plain.create_optimizer().param_groups], **SETTINGS
    )

    class Clip(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            by_hand.step()

    plain.add_callback(Clip())
    plain.train()
    assert torch.equal(weights(trainer), weights(plain))
    assert windows(clipper) == windows(by_hand)


@ATTACHED
def test_the_groups_are_the_optimizers(tmp_path: Path, by: str) -> None:
    """By default the trainer makes two: with and without weight decay."""
    trainer = make_trainer(tmp_path, by, max_steps=2)
    clipper = train(trainer)
    groups = trainer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in clipper.param_groups] == [
        len(group["params"]) for group in groups
    ]
    assert all(
        a is b
        for ours, theirs in zip(clipper.param_groups, groups)
        for a, b in zip(ours["params"], theirs["params"])
    )


@ATTACHED
def test_bfloat16_autocast(tmp_path: Path, by: str) -> None:
    trainer = make_trainer(tmp_path, by, bf16=True)
    clipper = train(trainer)
    assert lengths(clipper) == {STEPS}
    assert torch.isfinite(weights(trainer)).all()


def test_another_rule(tmp_path: Path) -> None:
    callback = AutoClipCallback(StandardClip, deviations=0.5, global_clipping=True)
    clipper = train(make_trainer(tmp_path, "none", [callback], max_steps=2))
    assert isinstance(clipper, StandardClip)
    assert clipper.global_clipping and clipper.defaults["deviations"] == 0.5


def test_wrong_settings_are_found_at_once() -> None:
    with pytest.raises(ValueError, match="quantile"):
        AutoClipCallback(quantile=2.0)
    with pytest.raises(TypeError, match="deviations"):
        AutoClipCallback(deviations=2.0)


def test_an_optimizer_that_is_attached_already(tmp_path: Path) -> None:
    """Without settings the callback only logs; with them, it contradicts the optimizer."""
    trainer = make_trainer(tmp_path, "optimizers", [AutoClipCallback()])
    clipper = train(trainer)
    assert SETTINGS.items() <= clipper.defaults.items()
    assert trainer.state.log_history[0].keys() >= NAMES
    with pytest.raises(RuntimeError, match="has a clipper already"):
        train(make_trainer(tmp_path, "optimizers", [AutoClipCallback(quantile=0.5)]))


def test_training_twice_goes_on_with_the_same_clipper(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    clipper = train(trainer)
    assert train(trainer) is clipper
    assert lengths(clipper) == {4}


def test_an_engine_that_the_callback_cannot_know_is_an_error(tmp_path: Path) -> None:
    """ZeRO's own optimizer is not one of torch's, and calls none of the hooks."""

    class ZeroOptimizer:
        def __init__(self) -> None:
            self.param_groups: list[dict[str, Any]] = []

    trainer = make_trainer(tmp_path, "none")
    with pytest.raises(RuntimeError, match=r"no DeepSpeed engine.*add_to\(trainer\)"):
        AutoClipCallback().on_train_begin(
            trainer.args,
            trainer.state,
            trainer.control,
            optimizer=DeepSpeedOptimizerWrapper(ZeroOptimizer()),
        )


# -- max_grad_norm -----------------------------------------------------------------------------


def test_the_default_max_grad_norm_is_switched_off_and_put_back(tmp_path: Path) -> None:
    expected = make_trainer(tmp_path, max_grad_norm=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*max_grad_norm")
        clipper = train(expected)
    trainer = make_trainer(tmp_path, max_grad_norm=1e-3)
    with pytest.warns(UserWarning, match=r"max_grad_norm=0\.001.* would clip the gradients"):
        other = train(trainer)
    assert other.state_dict() == clipper.state_dict()
    assert torch.equal(weights(trainer), weights(expected))
    assert trainer.args.max_grad_norm == 1e-3
    assert TrainingArguments(output_dir=str(tmp_path)).max_grad_norm == 1.0  # so it is the default


class Interrupt(TrainerCallback):
    """Raises in the forward or the backward pass of the third step, as Ctrl-C may."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        if state.global_step == 2:
            model = kwargs["model"]
            if self.where == "forward":
                model.register_forward_hook(interrupt)
            else:
                next(model.parameters()).register_hook(interrupt)


@pytest.mark.filterwarnings("ignore:TrainingArguments")
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupted_training_leaves_the_arguments_as_they_were(
    tmp_path: Path, where: str
) -> None:
    trainer = make_trainer(tmp_path, "neither", callbacks=[Interrupt(where)], max_grad_norm=0.5)
    AutoClipCallback(**SETTINGS).add_to(trainer)
    before = dict(vars(trainer))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.args.max_grad_norm == 0.5
    assert "training_step" not in vars(trainer) and "training_step" not in before


@pytest.mark.filterwarnings("ignore:TrainingArguments")
def test_training_starts_again_with_the_arguments_as_they_were(tmp_path: Path) -> None:
    class Raising(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            raise OSError("the disk is full")  # after AutoClip's callback

    trainer = make_trainer(tmp_path, callbacks=[Raising()], max_grad_norm=0.5)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    trainer.remove_callback(Raising)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.5


@pytest.mark.filterwarnings("ignore:TrainingArguments")
def test_checkpoints_hold_the_arguments_as_they_were(tmp_path: Path) -> None:
    class Raise(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise OSError("the disk is full")

    trainer = make_trainer(
        tmp_path, callbacks=[Raise()], max_grad_norm=0.5, save_strategy="steps", save_steps=3
    )
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    assert trainer.args.max_grad_norm == 0.5
    saved = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert saved.max_grad_norm == 0.5


@pytest.mark.filterwarnings("ignore:TrainingArguments")
def test_a_training_step_of_the_users_own_stays(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_grad_norm=1e-3, gradient_accumulation_steps=2)
    training_step, calls = trainer.training_step, []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(trainer.args.max_grad_norm)
        return training_step(*args, **kwargs)

    trainer.training_step = own  # type: ignore[method-assign]
    clipper = train(trainer)
    assert trainer.training_step is own
    assert calls == [0.0] * 2 * STEPS
    expected = train(make_trainer(tmp_path, max_grad_norm=0, gradient_accumulation_steps=2))
    assert clipper.state_dict() == expected.state_dict()


# -- several models ----------------------------------------------------------------------------


def test_one_callback_keeps_no_model_alive(tmp_path: Path) -> None:
    callback = AutoClipCallback(**SETTINGS)
    models, clippers = [], []
    for fold in range(2):
        trainer = make_trainer(tmp_path / str(fold), "none", [callback], max_steps=1)
        clippers.append(weakref.ref(train(trainer)))
        models.append(weakref.ref(trainer.model))
        assert lengths(clippers[-1]()) == {1}
        del trainer
    gc.collect()
    assert [each() for each in (*models, *clippers)] == [None] * 4


def test_a_new_model_in_the_same_trainer_gets_a_new_history(tmp_path: Path) -> None:
    """As `hyperparameter_search` makes them for its trials."""
    trainer = make_trainer(tmp_path, max_steps=1)
    first, model = weakref.ref(train(trainer)), weakref.ref(trainer.model)
    trainer.accelerator.free_memory()
    trainer.model_wrapped = trainer.model = make_model()
    trainer.optimizer = trainer.lr_scheduler = None
    assert lengths(train(trainer)) == {1}
    gc.collect()
    assert first() is model() is None


def test_a_callback_can_be_pickled(tmp_path: Path) -> None:
    callback = AutoClipCallback(**SETTINGS)
    clipper = train(make_trainer(tmp_path, "none", [callback], max_steps=1))
    copied = pickle.loads(pickle.dumps(callback))
    again = train(make_trainer(tmp_path, "none", [copied], max_steps=1))
    assert again.state_dict() == clipper.state_dict()


def test_as_optimizer_alone_records_what_max_grad_norm_leaves(tmp_path: Path) -> None:
    """The case that the documentation warns of."""
    clipper = train(make_trainer(tmp_path, "optimizers", max_grad_norm=1e-3))
    totals = np.sqrt(np.square(windows(clipper)).sum(axis=0))
    assert totals == pytest.approx([1e-3] * STEPS, rel=1e-2)


# -- resume ------------------------------------------------------------------------------------


@ATTACHED
@pytest.mark.parametrize("where", ["output_dir", "elsewhere"])
def test_resuming_is_as_never_stopping(tmp_path: Path, by: str, where: str) -> None:
    whole = make_trainer(tmp_path, by, save_strategy="steps", save_steps=3)
    expected = train(whole)
    checkpoint = tmp_path / "checkpoint-3"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["autoclip"]["data"]
    folder = tmp_path
    if where == "elsewhere":
        folder = tmp_path / "elsewhere"
        checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "moved"))
    look = Look()
    trainer = make_trainer(folder, "none" if by == "callback" else by)
    if by == "callback":
        given = {} if where == "output_dir" else {"resume_from_checkpoint": checkpoint}
        trainer.add_callback(AutoClipCallback(**given, **SETTINGS))
    trainer.add_callback(look)
    clipper = train(trainer, checkpoint)
    assert look.state == saved
    assert clipper.state_dict() == expected.state_dict()
    assert lengths(clipper) == {STEPS}
    assert torch.equal(weights(trainer), weights(whole))


def test_optimizers_and_callback_read_each_others_checkpoints(tmp_path: Path) -> None:
    saved = train(make_trainer(tmp_path, "optimizers", save_strategy="steps", save_steps=3))
    resumed = train(make_trainer(tmp_path, "callback"), tmp_path / "checkpoint-3")
    assert windows(resumed) == windows(saved)
    resumed = train(make_trainer(tmp_path, "optimizers"), tmp_path / "checkpoint-6")
    assert windows(resumed) == windows(saved)


@pytest.mark.parametrize("by", ["optimizers", "callback"])
def test_checkpoints_and_reports_have_the_models_names(tmp_path: Path, by: str) -> None:
    trainer = make_trainer(tmp_path, by, save_strategy="steps", save_steps=STEPS)
    if by == "optimizers":
        trainer.add_callback(AutoClipCallback())
    clipper = train(trainer)
    expected = {name for name, _ in trainer.model.named_parameters()}
    assert set(clipper.last.names) == expected
    [state] = read_states(tmp_path / f"checkpoint-{STEPS}").values()
    assert {each.name for group in state.groups for each in group.parameters} == expected


def test_the_checkpoint_may_stand_in_the_arguments(tmp_path: Path) -> None:
    expected = train(make_trainer(tmp_path, save_strategy="steps", save_steps=3))
    checkpoint = tmp_path / "checkpoint-3"
    trainer = make_trainer(tmp_path / "elsewhere", resume_from_checkpoint=str(checkpoint))
    assert train(trainer, checkpoint).state_dict() == expected.state_dict()


@pytest.mark.parametrize("other", ["nothing", "another run"])
def test_a_checkpoint_that_cannot_be_found_is_an_error(tmp_path: Path, other: str) -> None:
    """A history of another run's, of the same step, in `output_dir`, is not taken."""
    train(make_trainer(tmp_path, save_strategy="steps", save_steps=3))
    folder = tmp_path / "elsewhere"
    if other == "another run":
        train(make_trainer(folder, save_strategy="steps", save_steps=3, learning_rate=1e-3))
    with pytest.raises(RuntimeError, match=r"AutoClipCallback\(resume_from_checkpoint="):
        train(make_trainer(folder), tmp_path / "checkpoint-3")


def test_a_checkpoint_without_a_history_warns(tmp_path: Path) -> None:
    make_trainer(tmp_path, "none", save_strategy="steps", save_steps=3, max_steps=3).train()
    with pytest.warns(UserWarning, match=r"optimizer\.pt has no 'autoclip' entry") as caught:
        clipper = train(make_trainer(tmp_path), tmp_path / "checkpoint-3")
    assert sum("history" in str(warning.message) for warning in caught) == 1
    assert lengths(clipper) == {STEPS - 3}


def test_a_checkpoint_without_an_optimizer_warns(tmp_path: Path) -> None:
    train(make_trainer(tmp_path, save_strategy="steps", save_steps=3, save_only_model=True))
    with pytest.warns(UserWarning, match=r"There is no .*optimizer\.pt"):
        clipper = train(make_trainer(tmp_path), tmp_path / "checkpoint-3")
    assert lengths(clipper) == {STEPS - 3}


# -- logging -----------------------------------------------------------------------------------


def test_the_values_are_logged_with_the_trainers_own(tmp_path: Path) -> None:
    """In the history that is saved, and to callbacks that come later; of the step itself."""
    look = Look()
    reports: list[dict[str, float]] = []

    class Report(TrainerCallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            last = kwargs["optimizer"].optimizer.clipper.last
            reports.append(
                {
                    "autoclip/total_norm": float(last.norms.norm()),
                    "autoclip/clipped_norm": float((last.norms * last.coefficients).norm()),
                    "autoclip/clipped": float((last.coefficients < 1).float().mean()),
                }
            )

    trainer = make_trainer(
        tmp_path,
        callbacks=[look, Report()],
        logging_steps=3,
        save_strategy="steps",
        save_steps=6,
        eval_strategy="steps",
        eval_steps=3,
    )
    train(trainer)
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    for history in (trainer.state.log_history, look.logs):
        rows = [row for row in history if row.keys() & NAMES]
        assert len(rows) == 2  # steps 3 and 6, no evaluation, and not the summary at the end
        for row, report in zip(rows, (reports[2], reports[5])):
            assert {name: row[name] for name in NAMES} == pytest.approx(report)
            # The trainer computes the norm too, in other steps, before it clips.
            assert row["autoclip/total_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    assert [row for row in saved["log_history"] if row.keys() & NAMES] == [
        row for row in trainer.state.log_history if row.keys() & NAMES
    ]


def test_add_to_puts_the_values_before_what_reports_them(tmp_path: Path) -> None:
    look = Look()
    trainer = make_trainer(tmp_path, "none", [look], max_steps=2)
    AutoClipCallback(**SETTINGS).add_to(trainer)
    train(trainer)
    assert [row.keys() >= NAMES for row in look.logs] == [True, True, False]


def test_nothing_is_read_on_other_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`clipper.last` is what would wait for a device."""
    reads: list[int] = []
    trainer = make_trainer(tmp_path, logging_steps=3)
    last = Clipper.last.fget

    def counted(clipper: Clipper) -> Any:
        reads.append(trainer.state.global_step)
        return last(clipper)

    monkeypatch.setattr(Clipper, "last", property(counted))
    train(trainer)
    assert reads == [3, 6]
