"""Files of torch are read without torch, as data. Anything but weights is refused in one line, and nothing is run.

torch_files/ was written by genuine torch (torch_files/make.py).
"""

import copyreg
import os
import pathlib
import pickle
import time
import zipfile

import numpy as np
import pytest
from etils import epath

from sedd_jax.errors import InputError
from sedd_jax.interop import torch_files
from sedd_jax.interop.torch_files import Opaque, Storage, Tensor

FOLDER = pathlib.Path(__file__).parent / "torch_files"
FLOAT = np.dtype("float32")


class Evil:
    """Its pickle asks the reader to call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path, content, *, compression=zipfile.ZIP_STORED, **data):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        for key, value in data.items():
            file.writestr(f"archive/data/{key.removeprefix('_')}", value)
    return path


def test_dtypes_views_and_containers_of_genuine_torch():
    file = torch_files.load(FOLDER / "tensors.pt")
    found = file.read(file.tree)
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "base": base,
        "view": base.T[1:, ::2],
        "scalar": np.float32(2.5),
        "half": np.array([0.1, -2.0], "float16"),
        "bfloat16": np.array([0.1, -2.0], "bfloat16"),
        "int64": np.array([1 << 40, -1]),
        "parameter": np.ones(2, np.float32),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_genuine_training_checkpoint():
    file = torch_files.load(FOLDER / "checkpoint.pth")
    assert file.tree["step"] == 7
    assert file.tree["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert file.tree["ema"]["decay"] == 0.9999
    (average,) = file.read({"": file.tree["ema"]["shadow_params"][0]}).values()
    np.testing.assert_array_equal(average[1], 0.5 + np.arange(4, 8) / 1024)
    np.testing.assert_array_equal(file.read(file.tree["model"])["rotary_emb.inv_freq"], np.float32([1, 0.01]))


def test_written_weights_are_read_back(tmp_path):
    generator = np.random.default_rng(0)
    shapes = {"a.weight": (3, 4), "b": (), "c": (2, 1, 300), "ünï": (1,)}
    weights = {name: np.array(generator.normal(size=shape), np.float32) for name, shape in shapes.items()}
    weights["a.weight"] = weights["a.weight"].T
    torch_files.save(epath.Path(tmp_path / "weights.bin"), weights)
    file = torch_files.load(tmp_path / "weights.bin")
    assert list(file.tree) == list(weights)
    found = file.read(file.tree)
    for name, value in weights.items():
        assert found[name].tobytes() == np.ascontiguousarray(value).tobytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch run",), "posix.system"),
        (eval, ("open('run', 'w')",), "builtins.eval"),
        (getattr, ("run", "upper"), "builtins.getattr"),
        (pathlib.Path("run").touch, (), "builtins.getattr"),
        (np.zeros, (1 << 40,), "numpy.zeros"),
    ],
)
def test_calls_are_refused_by_name_and_not_made(tmp_path, monkeypatch, protocol, function, arguments, name):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"model": Evil(function, *arguments)}, protocol)
    content = content.replace(b"__builtin__", b"builtins")
    with pytest.raises(InputError) as refusal:
        torch_files.load(archive(tmp_path / "evil.bin", content))
    assert f"evil.bin: its pickle names '{name}'" in str(refusal.value)
    assert os.listdir(tmp_path) == ["evil.bin"]


def test_calls_in_files_of_lightning_are_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [Evil(os.system, "touch run"), Evil(eval, "open('run', 'w')"), pathlib.Path("run"), {("a", "b"): 1, "c": 2}]
    content = pickle.dumps({"state_dict": {}, "hyper_parameters": calls, "set": {1}, "bytes": b"\xff"}, 2)
    tree = torch_files.load(archive(tmp_path / "evil.ckpt", content)).tree
    *objects, others = tree["hyper_parameters"]
    assert all(type(value) is Opaque for value in [*objects, tree["set"], tree["bytes"]]) and others == {"c": 2}
    assert os.listdir(tmp_path) == ["evil.ckpt"]
    for content in (b"\x80\x02X\x0a\x00\x00\x00state_dict)\x81.", b"\x80\x02X\x0a\x00\x00\x00state_dict)R."):
        with pytest.raises(InputError, match="its pickle is damaged"):
            torch_files.load(archive(tmp_path / "evil.ckpt", content))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"(S'touch run'\niposix\nsystem\n.", "opcode STRING"),
        (b"\x80\x02(X\x03\x00\x00\x00runiposix\nsystem\n.", "opcode INST"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02(ccollections\nOrderedDict\no.", "opcode OBJ"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02Pkey\n.", "opcode PERSID"),
        (b"\x80\x04\x8c\x05torch\x8c\x0bhub.load_ur\x93.", "'torch.hub.load_ur'"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb.", "damaged"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "damaged"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02))tR.", "damaged"),
        (b"\x80\x02X\x07\x00\x00\x00storageQ.", "damaged"),
        (b"\x80\x02h\x09.", "damaged"),
        (b"\x80\x02}K\x01s.", "damaged"),
        (b"\x80\x020.", "opcode POP"),
        (b"\x80\x02X\xff\xff\xff\x7fshort.", "damaged"),
        (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fshort.", "damaged"),
        (b"\x80\x02]\x94r\xff\xff\xff\x7f", "damaged"),
        (b"\x80\x02" + b"(" * 100 + b".", "damaged"),
        (b"\x80\x02})" + b"\x85" * 50_000 + b"K\x01s.", "damaged"),
        (b"\x80\x02})" + b"q\x00h\x00\x86" * 100 + b"K\x01s.", "damaged"),
        (b"\x80\x02}\x8a\x08" + ((1 << 61) - 1).to_bytes(8, "little") + b"K\x01s.", "damaged"),
        (b"\x80\x02}(K\x01u.", "damaged"),
        (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "damaged"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}b", "damaged"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.", "damaged"),
        (b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00namesNsb.", "damaged"),
        (b"\x80\x02(X\x07\x00\x00\x00storageX\x07\x00\x00\x00float32X\x01\x00\x00\x000NK\x01tQ.", "damaged"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "opcode LONG4"),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "opcode BYTEARRAY8"),
        (b"\x80\x04\x8f(]\x90.", "opcode EMPTY_SET"),
        (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
        (b"", "damaged"),
        (b"\xff\x00", "damaged"),
    ],
)
def test_other_programs_are_refused(tmp_path, content, named):
    with pytest.raises(InputError, match=named) as refusal:
        torch_files.load(archive(tmp_path / "file.bin", content))
    assert "file.bin: its pickle" in str(refusal.value) and "\n" not in str(refusal.value)


def test_deeply_nested_values_are_read(tmp_path):
    depth, content = 0, b"\x80\x02)" + b"\x85" * 50_000 + b"."
    value = torch_files.load(archive(tmp_path / "file.bin", content)).tree
    while value:
        (value,) = value
        depth += 1
    assert depth == 50_000


def test_a_claimed_memo_costs_no_memory(tmp_path):
    assert torch_files.load(archive(tmp_path / "file.bin", b"\x80\x02]r\xff\xff\xff\x7f.")).tree == []


def test_registered_extensions_are_refused(tmp_path):
    copyreg.add_extension("posix", "system", 0x7F)
    try:
        assert pickle.loads(b"\x80\x02\x82\x7f.") is os.system  # and is cached from now on
        with pytest.raises(InputError, match="opcode"):
            torch_files.load(archive(tmp_path / "file.bin", b"\x80\x02\x82\x7f."))
    finally:
        copyreg.remove_extension("posix", "system", 0x7F)


@pytest.mark.parametrize(
    ("storage", "offset", "shape", "strides"),
    [
        ((), 0, (5,), (1,)),
        ((), 1, (4,), (1,)),
        ((), 0, (2, 2), (3, 1)),
        ((), 0, (1 << 40,), (0,)),
        ((), 0, (4,), (0,)),
        ((), 0, (2, 2), (1 << 60, 1 << 60)),
        ((), 0, (1 << 40, 1), (0, 1)),
        ((), 4, (), ()),
        ((), 0, (4,), (1, 1)),
        ((), -1, (4,), (1,)),
        ((), 3, (4,), (-1,)),
        ((), 0, (-2, -2), (1, 1)),
        ((), 0, (0, 1 << 62), (1, 1)),
        ((), 0, (1,) * 100, (1,) * 100),
        ((1 << 40,), 0, (4,), (1,)),
        ((3,), 0, (3,), (1,)),
    ],
)
def test_tensors_that_do_not_fit_their_data_are_refused(tmp_path, storage, offset, shape, strides):
    path = archive(tmp_path / "file.bin", pickle.dumps({}, 2), _0=b"1234" * 4)
    read = lambda tensor: torch_files.load(path).read({"a": tensor})["a"]  # noqa: E731
    assert read(Tensor(Storage("0", FLOAT, 4), 0, (2, 2), (2, 1))).shape == (2, 2)
    assert read(Tensor(Storage("0", FLOAT, 4), 3, (1, 1), (10**30, 1))).shape == (1, 1)
    with pytest.raises(InputError, match=r"file.bin: a tensor does not fit its data, storage '0'"):
        read(Tensor(Storage("0", FLOAT, *(storage or (4,))), offset, shape, strides))
    with pytest.raises(InputError, match="no item named 'archive/data/1'"):
        read(Tensor(Storage("1", FLOAT, 4), 0, (2, 2), (2, 1)))


def test_files_cut_short_are_refused(tmp_path):
    content = (FOLDER / "tensors.pt").read_bytes()
    path = tmp_path / "short.pt"
    for length in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"short\.pt"):
            torch_files.load(path)


def test_flipped_bytes_are_noticed(tmp_path):
    content = (FOLDER / "tensors.pt").read_bytes()
    path = tmp_path / "flipped.pt"
    with zipfile.ZipFile(FOLDER / "tensors.pt") as file:
        places = {info.filename: info.header_offset for info in file.infolist()}
    with_numbers = [name for name in places if "/data/" in name and "serialization" not in name]
    assert len(with_numbers) == 6
    for name in [*with_numbers, "tensors/data.pkl"]:
        # Behind the header and the padding of a member, which end where its bytes begin.
        start = content.index(zipfile.ZipFile(FOLDER / "tensors.pt").read(name), places[name])
        path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
        with pytest.raises(InputError, match=r"flipped\.pt"):
            file = torch_files.load(path)
            file.read(file.tree)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.write_text("<html>404</html>"), "not a file of torch.save"),
        (lambda path: path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2)), "not a file of torch.save"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "0 data.pkl"),
        (lambda path: archive(path, pickle.dumps("0" * 10**6, 2), compression=zipfile.ZIP_DEFLATED), "compressed"),
    ],
)
def test_other_files_are_refused(tmp_path, make, named):
    path = tmp_path / "file.bin"
    make(path)
    with pytest.raises(InputError, match=named) as refusal:
        torch_files.load(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_tied_tensors_are_read_and_a_storage_that_many_share_is_refused(tmp_path):
    numbers = np.arange(1 << 18, dtype=np.float32)
    file = torch_files.load(archive(tmp_path / "file.bin", pickle.dumps({}, 2), _0=numbers.tobytes()))
    one = Tensor(Storage("0", FLOAT, 1 << 18), 0, (1 << 18,), (1,))
    for value in file.read({"embedding": one, "head": one}).values():
        np.testing.assert_array_equal(value, numbers)
    with pytest.raises(InputError, match="share their data too often"):
        file.read({str(i): one for i in range(3000)})


def test_many_members_are_listed_once(tmp_path):
    # Looked up in a list for each tensor, these take minutes.
    many = {f"_{i}": b"1234" for i in range(20_000)}
    file = torch_files.load(archive(tmp_path / "file.bin", pickle.dumps({}, 2), **many))
    start = time.monotonic()
    assert len(file.read({str(i): Tensor(Storage(str(i), FLOAT, 1), 0, (1,), (1,)) for i in range(3000)})) == 3000
    assert time.monotonic() - start < 30


def test_members_that_overlap_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.bin", "w") as file:
        file.writestr("archive/data/0", bytes(10_000))
        file.filelist *= 2
    with pytest.raises(InputError, match="members that are compressed or overlap"):
        torch_files.load(tmp_path / "file.bin")


def test_a_long_pickle_is_refused_unread(tmp_path):
    with pytest.raises(InputError, match="its pickle is longer than 8 MiB"):
        torch_files.load(archive(tmp_path / "file.bin", b"\x80\x02(" + b"}" * (1 << 23) + b"l."))


def test_files_of_big_endian_machines_are_refused(tmp_path):
    path = archive(tmp_path / "file.bin", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "big")
    with pytest.raises(InputError, match="big-endian"):
        torch_files.load(path)
