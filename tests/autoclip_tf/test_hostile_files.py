"""Files of Keras and TensorFlow that are made to cost much, or name other files, are refused."""

from __future__ import annotations

import sys

import hostile_files
import pytest
import tensorflow as tf
from command import main
from hypothesis import given, settings
from hypothesis import strategies as st

resource = pytest.importorskip("resource", reason="Windows has neither this nor named pipes")
MOST_MEMORY = 150 * 2**10 * (2**10 if sys.platform == "darwin" else 1)  # as getrusage counts it
SLOW_TO_WRITE = {"a_keras_file_that_deflates_to_4_gib", "a_chunk_of_1_gib_with_100_bytes"}

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """The frameworks that reading a file or a folder imports take more memory than it may."""
    folder = tmp_path_factory.mktemp("harmless")
    path = hostile_files.checkpoint(folder, tf.constant(hostile_files.state()))
    assert main(["check", str(path)]) == 0
    assert main(["check", str(folder)]) in (0, 1)


@pytest.mark.parametrize("attack", sorted(hostile_files.KERAS.keys() - SLOW_TO_WRITE))
def test_files(attack, tmp_path, capsys):
    path = hostile_files.KERAS[attack](tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(["check", str(path)])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    captured = capsys.readouterr()
    assert (code in (1, 2), captured.out) == (True, "")
    assert str(tmp_path) in captured.err
    assert captured.err.count("\n") == 1
    assert after - before < MOST_MEMORY


@pytest.mark.timeout(1200)  # of many more examples at night
@settings(max_examples=60)
@given(data=st.data())
def test_no_damage_of_a_checkpoint_ends_in_a_traceback(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    path = hostile_files.checkpoint(folder, tf.constant(hostile_files.state()))
    for file in (path, folder / "model.data-00000-of-00001"):
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(0, 2))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.none())])
    assert main(["check", str(path)]) in (0, 1, 2)
