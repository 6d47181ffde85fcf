"""Small files that cost much to read, or that name other files; one function writes each.

Tests read them, and `tests/benchmarks/hostile_files.py` measures what that costs.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoclip.core import History, Quantile

Attack = Callable[[Path], Path]
"""A function that writes a file into a folder and returns the path that is to be read."""

TORCH: dict[str, Attack] = {}
KERAS: dict[str, Attack] = {}


def pipe(path: Path) -> None:
    """Make a pipe that no process writes to."""
    if not hasattr(os, "mkfifo"):
        import pytest

        pytest.skip("Windows has no such pipes")
    os.mkfifo(path)


def attack(kind: dict[str, Attack]) -> Callable[[Attack], Attack]:
    def add(function: Attack) -> Attack:
        kind[function.__name__] = function
        return function

    return add


def state(norms: int = 1) -> bytes:
    """A state of a few hundred bytes, and four for each norm."""
    history = History(rows=1, rule=Quantile(0.5), history_length=norms)
    history.write([0], [[1.0] * norms], [norms])
    return history.state_dict()["data"]


# -- PyTorch -----------------------------------------------------------------------------------

LATIN1 = b"X\x06\x00\x00\x00latin1"
MEBIBYTE = 2**20


def archive(path: Path, pickled: bytes, **entries: bytes) -> Path:
    """A file as torch.save writes it, with a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        file.writestr("archive/version", "3\n")
        for name, data in entries.items():
            file.writestr(f"archive/data/{name.removeprefix('_')}", data)
    return path


def text(value: bytes) -> bytes:
    """The instruction that makes a string."""
    return b"X" + struct.pack("<I", len(value)) + value


def torch_save(value: Any, path: Path) -> Path:
    import torch

    torch.save(value, path)
    return path


@attack(TORCH)
def lists_that_share_lists(folder: Path) -> Path:
    shared: Any = {}
    for _ in range(18):
        shared = [shared] * 10
    return torch_save({"m": shared}, folder / "run.pt")


@attack(TORCH)
def dicts_that_share_dicts(folder: Path) -> Path:
    shared: Any = {}
    for _ in range(18):
        shared = dict.fromkeys(range(10), shared)
    return torch_save({"m": shared}, folder / "run.pth")


@attack(TORCH)
def a_list_in_itself(folder: Path) -> Path:
    shared: Any = []
    shared += [shared, {"again": shared}] * 10
    return torch_save(shared, folder / "run.ckpt")


@attack(TORCH)
def one_damaged_state_100_000_times(folder: Path) -> Path:
    entry = {"format": "autoclip", "version": 1, "data": state()[:-1] + b"!"}
    return torch_save([entry] * 100_000, folder / "run.pt")


@attack(TORCH)
def one_large_text_as_the_bytes_of_20_000_states(folder: Path) -> Path:
    entry = b"}(h\x01h\x02h\x03K\x01h\x04c_codecs\nencode\nh\x05h\x06\x86Ru"
    names = b"".join(
        text(each) + b"q" + bytes([i])
        for i, each in enumerate([b"format", b"autoclip", b"version", b"data"], 1)
    )
    data = text(b"x" * MEBIBYTE) + b"q\x05" + LATIN1 + b"q\x06"
    return archive(folder / "run.pt", b"](" + names + data + entry * 20_000 + b"e")


@attack(TORCH)
def tuples_of_tuples_as_a_key(folder: Path) -> Path:
    return archive(
        folder / "run.pt", b"K\x01\x85q\x00" + b"0h\x00h\x00\x86q\x00" * 100 + b"0}h\x00K\x01s"
    )


@attack(TORCH)
def tuples_of_tuples_as_a_key_that_torch_loads(folder: Path) -> Path:
    pairs = b"K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 40
    return archive(folder / "run.pt", b"(" + pairs + b"}h\x00K\x01st")


@attack(TORCH)
def a_bytearray_of_4_gib(folder: Path) -> Path:
    size = b"\x8a\x05" + (2**32).to_bytes(5, "little")
    return archive(folder / "run.pt", b"cbuiltins\nbytearray\n" + size + b"\x85R")


@attack(TORCH)
def a_mebibyte_encoded_20_000_times(folder: Path) -> Path:
    encode = b"c_codecs\nencode\nh\x00h\x01\x86R"
    data = text(b"x" * MEBIBYTE) + b"q\x00" + LATIN1 + b"q\x01"
    return archive(folder / "run.pt", b"](" + data + encode * 20_000 + b"e")


@attack(TORCH)
def a_dict_copied_20_000_times(folder: Path) -> Path:
    items = b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(20_000))
    copy = b"ccollections\nCounter\nh\x00\x85R"
    return archive(folder / "run.pt", b"](}q\x00(" + items + b"u" + copy * 20_000 + b"e")


@attack(TORCH)
def keys_that_collide(folder: Path) -> Path:
    modulus = 2**61 - 1  # of Python's hash of an integer
    keys = (i * modulus for i in range(1, 60_000))
    items = b"".join(b"\x8a\x0b" + key.to_bytes(11, "little") + b"N" for key in keys)
    return archive(folder / "run.pt", b"}(" + items + b"u")


@attack(TORCH)
def long_keys_above_many_dicts(folder: Path) -> Path:
    dicts = b"](" + b"}" * 100_000 + b"e"
    for _ in range(10):
        dicts = b"}" + text(b"k" * MEBIBYTE) + dicts + b"s"
    return archive(folder / "run.pt", dicts)


@attack(TORCH)
def empty_dicts_300_000(folder: Path) -> Path:
    return archive(folder / "run.pt", b"](" + b"}" * 300_000 + b"e")


@attack(TORCH)
def lists_30_000_deep(folder: Path) -> Path:
    return archive(folder / "run.pt", b"]" * 30_000 + b"a" * 29_999)


@attack(TORCH)
def text_that_claims_4_gib(folder: Path) -> Path:
    return archive(folder / "run.pt", b"X\xff\xff\xff\xffshort")


@attack(TORCH)
def old_text_that_claims_4_gib(folder: Path) -> Path:
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    (folder / "run.pt").write_bytes(magic + b"\x80\x02M\xe9\x03." + b"\x80\x02X\xff\xff\xff\xffs")
    return folder / "run.pt"


@attack(TORCH)
def an_old_storage_that_claims_4_gib(folder: Path) -> Path:
    import torch

    path = folder / "run.pt"
    torch.save({"t": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    claimed = data.replace(b"K\x03N", b"J\xff\xff\xff\x3fN")
    claimed = claimed.replace((3).to_bytes(8, "little"), (2**30 - 1).to_bytes(8, "little"))
    assert claimed != data
    path.write_bytes(claimed)
    return path


@attack(TORCH)
def a_memo_index_of_4_billion(folder: Path) -> Path:
    return archive(folder / "run.pt", b"}r\xff\xff\xff\xff")


@attack(TORCH)
def an_archive_that_deflates_to_4_gib(folder: Path) -> Path:
    path = folder / "run.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("archive/data.pkl", "w", force_zip64=True) as entry,
    ):
        zeros = bytes(64 * MEBIBYTE)
        for _ in range(64):
            entry.write(zeros)
    return path


@attack(TORCH)
def a_tar_archive_that_runs_code(folder: Path) -> Path:
    """PyTorch up to 2.5 unpickles these even with weights_only=True."""

    class Explosive:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(folder / "unpickled"), "w"))

    path = folder / "run.pt"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            data = pickle.dumps(Explosive(), 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@attack(TORCH)
def a_call(folder: Path) -> Path:
    target = text(os.fsencode(folder / "unpickled"))
    return archive(folder / "run.pt", b"cbuiltins\nopen\n" + target + text(b"w") + b"\x86R")


@attack(TORCH)
def a_pipe(folder: Path) -> Path:
    pipe(folder / "run.pt")
    return folder / "run.pt"


@attack(TORCH)
def a_folder_whose_checkpoint_is_a_pipe(folder: Path) -> Path:
    pipe(folder / "run.pt")
    return folder


@attack(TORCH)
def a_folder_whose_checkpoint_is_the_folder(folder: Path) -> Path:
    (folder / "checkpoint-1").symlink_to(folder, target_is_directory=True)
    return folder


@attack(TORCH)
def a_distributed_checkpoint(folder: Path) -> Path:
    pipe(folder / ".metadata")
    return folder


# Checkpoints of autoclip 0.2.1, for the command `autoclip convert`.

LEGACY: dict[str, Attack] = {}


def legacy(folder: Path, state: Any, groups: Any) -> Path:
    return torch_save({"state": state, "param_groups": groups}, folder / "old.pth")


def legacy_group(*params: Any) -> dict[str, Any]:
    return {"quantile": 0.5, "history_length": 10, "params": list(params)}


@attack(LEGACY)
def no_groups(folder: Path) -> Path:
    return legacy(folder, {}, [])


@attack(LEGACY)
def params_that_are_a_number(folder: Path) -> Path:
    import torch

    return legacy(folder, {1: {"history": torch.ones(1)}}, [{**legacy_group(), "params": 5}])


@attack(LEGACY)
def a_state_that_is_a_list(folder: Path) -> Path:
    return legacy(folder, [1], [legacy_group(1)])


@attack(LEGACY)
def a_history_that_is_text(folder: Path) -> Path:
    return legacy(folder, {1: {"history": "text"}}, [legacy_group(1)])


@attack(LEGACY)
def a_history_of_integers_in_words(folder: Path) -> Path:
    return legacy(folder, {1: {"history": ["one"]}}, [legacy_group(1)])


@attack(LEGACY)
def settings_that_are_text(folder: Path) -> Path:
    import torch

    group = {**legacy_group(1), "quantile": "half"}
    return legacy(folder, {1: {"history": torch.ones(1)}}, [group])


@attack(LEGACY)
def a_history_length_that_is_text(folder: Path) -> Path:
    import torch

    group = {**legacy_group(1), "history_length": "long"}
    return legacy(folder, {1: {"history": torch.ones(1)}}, [group])


@attack(LEGACY)
def an_expanded_history(folder: Path) -> Path:
    import torch

    return legacy(folder, {1: {"history": torch.ones(1).expand(2**32)}}, [legacy_group(1)])


@attack(LEGACY)
def an_expanded_global_history(folder: Path) -> Path:
    import torch

    return legacy(folder, {"global_history": torch.ones(1).expand(2**32)}, [legacy_group(1)])


@attack(LEGACY)
def an_expanded_quantile(folder: Path) -> Path:
    import torch

    group = {**legacy_group(1), "quantile": torch.ones(1).expand(2**32)}
    return legacy(folder, {1: {"history": torch.ones(1)}}, [group])


@attack(LEGACY)
def one_history_of_20_000_parameters(folder: Path) -> Path:
    import torch

    entry = {"history": torch.ones(2**18)}
    ids = range(20_000)
    return legacy(folder, dict.fromkeys(ids, entry), [legacy_group(*ids)])


@attack(LEGACY)
def one_group_100_000_times(folder: Path) -> Path:
    import torch

    group = legacy_group(*range(100_000))
    return legacy(folder, {1: {"history": torch.ones(1)}}, [group] * 100_000)


@attack(LEGACY)
def one_list_of_parameters_100_000_times(folder: Path) -> Path:
    import torch

    params = list(range(100_000))
    groups = [{**legacy_group(), "params": params} for _ in range(10_000)]
    return legacy(folder, {1: {"history": torch.ones(1)}}, groups)


@attack(LEGACY)
def a_parameter_that_takes_long_to_hash(folder: Path) -> Path:
    import torch

    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    return legacy(folder, {1: {"history": torch.ones(1)}}, [legacy_group(nested)])


@attack(LEGACY)
def parameters_with_equal_hashes(folder: Path) -> Path:
    import torch

    ids = [i * (2**61 - 1) for i in range(200_000)]
    return legacy(folder, {1: {"history": torch.ones(1)}}, [legacy_group(*ids)])


@attack(LEGACY)
def a_history_beyond_its_storage(folder: Path) -> Path:
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu")
    tensor = rebuild + b"(" + storage + b"K\x01tQK\x00J\xff\xff\xff\x7f\x85K\x01\x85\x89}tR"
    group = b"}(" + text(b"quantile") + b"G?\xe0\x00\x00\x00\x00\x00\x00"
    group += text(b"history_length") + b"K\x0a" + text(b"params") + b"](K\x01eu"
    pickled = b"}(" + text(b"state") + b"}K\x01}" + text(b"history") + tensor + b"ss"
    pickled += text(b"param_groups") + b"](" + group + b"eu"
    return archive(folder / "old.pth", pickled, _0=struct.pack("<f", 1.0))


# -- Keras and TensorFlow ----------------------------------------------------------------------

PLACE = "optimizer/autoclip/vars/state"


def hdf5(folder: Path, **dataset: Any) -> Path:
    """A file of weights with a dataset where a clipper's state would be."""
    import h5py

    path = folder / "model.weights.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(PLACE, dtype="u1", **dataset)
    return path


@attack(KERAS)
def chunks_that_claim_6_gib(folder: Path) -> Path:
    return hdf5(folder, shape=(6 << 30,), chunks=(1 << 20,))


@attack(KERAS)
def a_dataset_that_claims_6_gib(folder: Path) -> Path:
    return hdf5(folder, shape=(6 << 30,))


@attack(KERAS)
def a_dataset_that_deflates_to_256_mib(folder: Path) -> Path:
    import numpy as np

    return hdf5(folder, data=np.zeros(256 << 20, np.uint8), compression="gzip", chunks=(1 << 20,))


@attack(KERAS)
def a_chunk_of_1_gib_with_100_bytes(folder: Path) -> Path:
    import numpy as np

    return hdf5(
        folder,
        data=np.zeros(100, np.uint8),
        maxshape=(None,),
        chunks=(1 << 30,),
        compression="gzip",
    )


@attack(KERAS)
def external_storage(folder: Path) -> Path:
    (folder / "secret").write_bytes(bytes(100))
    return hdf5(folder, shape=(100,), external=[(str(folder / "secret"), 0, 100)])


@attack(KERAS)
def a_pipe_as_external_storage(folder: Path) -> Path:
    pipe(folder / "pipe")
    return hdf5(folder, shape=(100,), external=[(str(folder / "pipe"), 0, 100)])


@attack(KERAS)
def a_virtual_dataset(folder: Path) -> Path:
    import h5py

    path = folder / "model.weights.h5"
    pipe(folder / "pipe")
    layout = h5py.VirtualLayout(shape=(100,), dtype="u1")
    layout[:] = h5py.VirtualSource(str(folder / "pipe"), "state", shape=(100,))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset(PLACE, layout)
    return path


@attack(KERAS)
def a_link_to_another_file(folder: Path) -> Path:
    import h5py

    path = folder / "model.weights.h5"
    pipe(folder / "pipe")
    with h5py.File(path, "w") as file:
        file[PLACE] = h5py.ExternalLink(str(folder / "pipe"), "/state")
    return path


@attack(KERAS)
def groups_in_themselves(folder: Path) -> Path:
    import h5py

    path = folder / "model.weights.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("optimizer")
        for i in range(100):
            group[f"again{i}"] = group
    return path


@attack(KERAS)
def one_dataset_under_10_000_names(folder: Path) -> Path:
    import h5py
    import numpy as np

    path = folder / "model.weights.h5"
    with h5py.File(path, "w") as file:
        found = file.create_dataset("0/vars/state", data=np.frombuffer(state()[:-1] + b"!", "u1"))
        for i in range(1, 10_000):
            file[f"{i}/vars/state"] = found
    return path


@attack(KERAS)
def the_same_bytes_in_100_datasets(folder: Path) -> Path:
    import h5py
    import numpy as np

    path = folder / "model.weights.h5"
    whole = np.frombuffer(state(norms=100_000), "u1")
    size = len(whole)
    with h5py.File(path, "w") as file:
        file.create_dataset("0/vars/state", data=whole)
        address = file["0/vars/state"].id.get_offset()
    # The others say where their own bytes are, which is changed to the address of the first.
    with h5py.File(path, "r+") as file:
        addresses = []
        for i in range(1, 100):
            file.create_dataset(f"{i}/vars/state", data=np.zeros(11 + i, np.uint8))
            found = file[f"{i}/vars/state"].id.get_offset()
            addresses.append((found, 11 + i))
    data = path.read_bytes()
    for found, length in addresses:
        old = struct.pack("<QQ", found, length)
        assert data.count(old) == 1
        at = data.index(old)
        # The dataspace, before it, names the length as well, as the least and the most.
        space = data.rindex(struct.pack("<QQ", length, length), 0, at)
        data = data[:space] + struct.pack("<QQ", size, size) + data[space + 16 :]
        data = data[:at] + struct.pack("<QQ", address, size) + data[at + 16 :]
    path.write_bytes(data)
    return path


@attack(KERAS)
def a_keras_file_that_deflates_to_4_gib(folder: Path) -> Path:
    path = folder / "model.keras"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("model.weights.h5", "w", force_zip64=True) as entry,
    ):
        zeros = bytes(64 * MEBIBYTE)
        for _ in range(64):
            entry.write(zeros)
    return path


@attack(KERAS)
def a_keras_file_whose_dataset_claims_6_gib(folder: Path) -> Path:
    path = folder / "model.keras"
    with zipfile.ZipFile(path, "w") as file:
        file.write(chunks_that_claim_6_gib(folder), "model.weights.h5")
    return path


@attack(KERAS)
def a_keras_file_with_external_storage(folder: Path) -> Path:
    path = folder / "model.keras"
    with zipfile.ZipFile(path, "w") as file:
        file.write(external_storage(folder), "model.weights.h5")
    return path


@attack(KERAS)
def a_keras_file_that_is_a_pipe(folder: Path) -> Path:
    pipe(folder / "model.keras")
    return folder / "model.keras"


@attack(KERAS)
def an_index_whose_shard_is_a_pipe(folder: Path) -> Path:
    pipe(folder / "a.weights.h5")
    (folder / "s.weights.json").write_text('{"weight_map": {"a": "a.weights.h5"}}')
    return folder / "s.weights.json"


@attack(KERAS)
def an_index_of_300_000_lists(folder: Path) -> Path:
    (folder / "s.weights.json").write_text("[" + "[]," * 300_000 + "[]]")
    return folder / "s.weights.json"


def checkpoint(folder: Path, value: Any) -> Path:
    """A TensorFlow checkpoint that holds `value` as a clipper's state."""
    import tensorflow as tf

    prefix = str(folder / "model")
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=["clipper/.ATTRIBUTES/state"],
        shape_and_slices=[""],
        tensors=[value],
    )
    return folder / "model.index"


@attack(KERAS)
def a_checkpoint_whose_data_is_a_pipe(folder: Path) -> Path:
    import tensorflow as tf

    path = checkpoint(folder, tf.constant(state()))
    data = folder / "model.data-00000-of-00001"
    data.unlink()
    pipe(data)
    return path


@attack(KERAS)
def a_checkpoint_without_data(folder: Path) -> Path:
    import tensorflow as tf

    path = checkpoint(folder, tf.constant(state()))
    (folder / "model.data-00000-of-00001").unlink()
    return path


@attack(KERAS)
def a_checkpoint_with_a_million_states(folder: Path) -> Path:
    import tensorflow as tf

    return checkpoint(folder, tf.fill([1_000_000], ""))


@attack(KERAS)
def a_checkpoint_whose_text_claims_64_gib(folder: Path) -> Path:
    import tensorflow as tf

    path = checkpoint(folder, tf.constant(bytes(200)))
    data = folder / "model.data-00000-of-00001"
    found = data.read_bytes()
    assert found.startswith(b"\xc8\x01")
    length = b"\xff\xff\xff\xff\xff\x01"  # 64 GiB as a varint
    checksum = struct.pack("<I", masked_crc32c(struct.pack("<Q", 2**36 - 1)))
    data.write_bytes(length + checksum + found[6:])
    return path


@attack(KERAS)
def a_list_of_checkpoints_that_names_another_folder(folder: Path) -> Path:
    (folder / "elsewhere").mkdir()
    pipe(folder / "elsewhere" / "model.index")
    inner = folder / "checkpoints"
    inner.mkdir()
    (inner / "checkpoint").write_text(f'model_checkpoint_path: "{folder}/elsewhere/model"')
    return inner


def masked_crc32c(data: bytes) -> int:
    """The checksum that TensorFlow writes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
