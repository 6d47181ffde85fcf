"""The command `autoclip` on the files that Keras and TensorFlow write; summaries of clippers."""

from __future__ import annotations

import inspect
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from command import main

from autoclip.core import StateError
from autoclip.core.inspect import plot, read_states
from autoclip.tf import QuantileClip
from autoclip.tf.logging import log_values, summarize


@pytest.fixture(scope="module")
def trained(data):
    """A model whose clipper has made 8 steps; tests only read it."""
    layers = [keras.layers.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(1)]
    made = keras.Sequential(layers)
    optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
    made.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    made.fit(*data, batch_size=16, epochs=2, verbose=0)
    return made


def saved(trained):
    return trained.optimizer.clipper.state_dict()["data"]


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_keras_files(trained, name, tmp_path, capsys):
    path = tmp_path / name
    save = trained.save if name.endswith(".keras") else trained.save_weights
    save(path)
    [(place, state)] = read_states(path).items()
    assert place == "optimizer/autoclip"
    assert state.to_bytes() == saved(trained)
    assert main(["show", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert trained.trainable_variables[0].path in captured.out


SHARDS = pytest.param(
    "shards",
    marks=pytest.mark.skipif(
        "max_shard_size" not in inspect.signature(keras.Model.save_weights).parameters,
        reason="newer than this Keras",
    ),
)


@pytest.mark.parametrize("kind", ["not zipped", SHARDS, "backup", "manager"])
def test_folders_and_shards(trained, kind, tmp_path, capsys):
    path = tmp_path / "saved"
    if kind == "not zipped":
        trained.save(path, zipped=False)
    elif kind == "shards":
        path = tmp_path / "saved.weights.json"
        trained.save_weights(path, max_shard_size=1.2e-6)
        assert len(list(tmp_path.glob("*.h5"))) > 1
    elif kind == "backup":
        backup = keras.callbacks.BackupAndRestore(path, delete_checkpoint=False)
        copied = keras.models.clone_model(trained)
        copied.compile(optimizer=QuantileClip.as_optimizer(keras.optimizers.SGD()), loss="mse")
        copied.fit(np.ones((8, 4)), np.ones((8, 1)), callbacks=[backup], verbose=0)
    else:
        checkpoint = tf.train.Checkpoint(model=trained)
        for _ in range(2):
            tf.train.CheckpointManager(checkpoint, str(path), 5).save()
    [(place, state)] = read_states(path).items()
    assert place == ("model/optimizer/clipper" if kind == "manager" else "optimizer/autoclip")
    if kind != "backup":
        assert state.to_bytes() == saved(trained)
    assert main(["show", str(path)]) == 0
    assert "kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("", "no index of Keras's sharded weights"),
        ("[]", "no index of Keras's sharded weights"),
        ('{"weight_map": 3}', "no index of Keras's sharded weights"),
        ('{"weight_map": {"a": 3}}', "no index of Keras's sharded weights"),
        ('{"weight_map": {"a": "../s.weights.h5"}}', "not a file of the same folder"),
        ('{"weight_map": {"a": ["s.weights.h5"]}}', "which is not in its folder"),
        ("[" * 100_000, "no index of Keras's sharded weights"),
    ],
)
def test_damaged_indices_of_shards(index, words, tmp_path):
    (tmp_path / "s.weights.json").write_text(index)
    with pytest.raises(StateError, match=words):
        read_states(tmp_path / "s.weights.json")


def test_a_tensorflow_checkpoint(trained, tmp_path):
    prefix = tf.train.Checkpoint(model=trained).save(tmp_path / "checkpoint")
    for path in (f"{prefix}.index", prefix):
        [(place, state)] = read_states(path).items()
        assert place == "model/optimizer/clipper"
        assert state.to_bytes() == saved(trained)


def test_several_clippers(trained, tmp_path):
    other = QuantileClip(0.9)
    other([(tf.constant([3.0]), tf.Variable([0.0], name="other"))])
    prefix = tf.train.Checkpoint(a=trained.optimizer.clipper, b=other, empty=QuantileClip()).save(
        tmp_path / "checkpoint"
    )
    states = read_states(f"{prefix}.index")
    assert list(states) == ["a", "b"]
    assert states["b"].groups[0].values.tolist() == [3.0]


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_files_without_a_history(model, name, tmp_path, capsys):
    made = model()
    made.compile(optimizer="sgd", loss="mse")
    (made.save if name.endswith(".keras") else made.save_weights)(tmp_path / name)
    assert main(["check", str(tmp_path / name)]) == 1
    assert "holds no history of AutoClip" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5", "checkpoint.index"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"something else"])
def test_files_that_are_none(name, content, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    assert main(["check", str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / name} is damaged or not a" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/mem is Linux's")
@pytest.mark.parametrize("name", ["s.weights.json", "model.weights.h5", "checkpoint.index"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(name, tmp_path, capsys):
    """A regular file whose reading fails, as on a broken disk."""
    (tmp_path / name).symlink_to("/proc/self/mem")
    assert main(["check", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error
    assert "nput/output error" in error
    assert "damaged" not in error


def test_a_damaged_history(trained, tmp_path):
    trained.save_weights(tmp_path / "model.weights.h5")
    content = bytearray((tmp_path / "model.weights.h5").read_bytes())
    place = bytes(content).find(saved(trained)) + len(saved(trained)) - 40
    content[place] ^= 1
    (tmp_path / "model.weights.h5").write_bytes(content)
    with pytest.raises(StateError, match=r"model\.weights\.h5 at optimizer/autoclip"):
        read_states(tmp_path / "model.weights.h5")


def test_a_summary(trained):
    clipper = trained.optimizer.clipper
    summary = summarize(clipper)
    paths = [variable.path for variable in trained.trainable_variables]
    assert [row.name for row in summary.rows] == paths
    assert [row.recorded for row in summary.rows] == [8] * 4
    assert [row.newest for row in summary.rows] == clipper.last.norms.numpy().tolist()
    np.testing.assert_allclose([row.threshold for row in summary.rows], clipper.thresholds)
    assert summary.last == log_values(clipper)
    assert summary.last_coefficients == dict(zip(paths, clipper.last.coefficients.numpy().tolist()))
    assert "clipped hardest" in str(summary) or min(summary.last_coefficients.values()) == 1
    [ax] = plot.norms(clipper, paths[0]).axes
    assert ax.get_title("left") == paths[0]


def test_shares_are_those_of_the_training(model, fit):
    made = model()
    optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
    made.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    spikes = []

    class Spikes(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            spikes.append(optimizer.clipper.last.spikes.numpy())

    fit(made, epochs=3, callbacks=[Spikes()])
    shares = [row.clipped for row in summarize(optimizer.clipper).rows]
    assert shares == np.mean(spikes, axis=0).tolist()
    assert max(shares) > 0


def test_a_clipper_that_knows_no_variables():
    with pytest.raises(ValueError, match="has no state yet"):
        summarize(QuantileClip())
