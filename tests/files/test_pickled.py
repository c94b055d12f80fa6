"""Pickled weights: what `torch.save` writes is read; code, and sizes that a stranger chose, are refused unread."""

import collections
import io
import os
import pickle
import zipfile

import pytest
import torch

from rlora_trl.files.pickled import load_pickled, read_pickled_header
from rlora_trl.reading import MIB, AdapterCheckError, TensorEntry


LIMIT = MIB
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def read(path):
    entries = read_pickled_header(path, limit=LIMIT)
    return load_pickled(path, entries)


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict], ids=["dict", "ordered"])
def test_what_torch_saves_is_read(tmp_path, dtype, kind):
    whole = torch.randn(40, 3).to(dtype)
    tensors = kind({f"layer.{i}.weight": torch.randn(i + 1, 30).to(dtype) for i in range(300)})
    tensors |= {"scalar": torch.tensor(2.0, dtype=dtype), "empty": torch.zeros(0, 4, dtype=dtype)}
    tensors |= {"part": whole[3:7], "parameter": torch.nn.Parameter(whole[7:])}
    torch.save(tensors, tmp_path / "x.bin")
    entries = read_pickled_header(tmp_path / "x.bin", limit=64 * MIB)
    assert entries["part"] == TensorEntry(NAMES[dtype], (4, 3))
    loaded = load_pickled(tmp_path / "x.bin", entries)
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert not any(tensor.requires_grad for tensor in loaded.values())


class Runs:
    """What unpickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save_pickle(path, value, protocol=2, **records):
    """An archive as PyTorch writes it, around any pickle."""
    data = value if isinstance(value, bytes) else pickle.dumps(value, protocol)
    with zipfile.ZipFile(path, "w", records.pop("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/version", "3\n")
        for name, content in records.items():
            archive.writestr(f"a/data/{name.lstrip('_')}", content)


def one_tensor(shape, stride, numel, kind=b"FloatStorage", offset=0, key=b"0"):
    """The pickle of one tensor, instruction by instruction."""

    def number(value):
        return pickle.dumps(value, 2)[2:-1]

    def sizes(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value

    storage = b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(key) + text(b"cpu") + number(numel) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = b"(" + storage + number(offset) + sizes(shape) + sizes(stride) + b"\x89" + hooks + b"t"
    return b"\x80\x02}(" + text(b"w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Ru."


def test_one_tensor_by_hand_is_read(tmp_path):
    """The pickles below differ from this one in one thing each."""
    save_pickle(tmp_path / "x.bin", one_tensor([2, 3], [3, 1], 6), _0=bytes(24))
    assert torch.equal(read(tmp_path / "x.bin")["w"], torch.zeros(2, 3))


@pytest.mark.parametrize(
    "value, message",
    [
        (Runs(os.system, "true"), r"imports '(posix|nt)\.system'.*Nothing was executed"),
        ({"w": Runs(eval, "1")}, r"imports '__builtin__\.eval'"),
        ({"w": Runs(getattr, "text", "upper")}, "imports '__builtin__.getattr'"),
        ({"w": Runs(collections.OrderedDict, [("a", 1)])}, "the instruction EMPTY_LIST"),
        ({"w": Runs(collections.Counter, "abc")}, "imports 'collections.Counter'"),
        ({"w": [1, 2]}, "the instruction EMPTY_LIST"),
        ({"w": b"bytes"}, "imports '_codecs.encode'"),
        ({"w": 1}, "'w' is not a tensor"),
        ({("a", ("b",)): 1}, "a key is of type tuple"),
        ({"a\nb": 1}, r"a key is 'a\\nb'"),
        ({}, "it is empty"),
        ("text", "not a dictionary of tensors"),
        (one_tensor([2, 3], [3, 1], 6, b"LongStorage"), "imports 'torch.LongStorage'"),
        (one_tensor([10**12], [0], 6), "not contiguous"),
        (one_tensor([3, 2], [1, 3], 6), "not contiguous"),
        (one_tensor([2, 4], [4, 1], 6), "does not fit its storage of 6 values"),
        (one_tensor([2, 3], [3, 1], 6, offset=1), "does not fit its storage"),
        (one_tensor([2**40, 2**40], [2**40, 1], 2**47), "does not fit its storage"),
        (one_tensor([2, 3], [3, 1], 2**70), "a storage of its pickle is not described"),
        (one_tensor([2, 3], [3, 1], 7), "needs 28 bytes, and its record has 24"),
        (one_tensor([2, 3], [3, 1], 6, key=b"1"), "needs 24 bytes, and its record has 0"),
        (one_tensor([1] * 9, [1] * 9, 6), "calls something with other arguments"),
        (b"\x80\x02}", "damaged, or not a file that `torch.save` wrote"),
        (b"", "damaged"),
        (b"R.", "damaged"),
        (b"h\x05.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"garbage", "damaged|instruction"),
        (b"K\x01" * 1_000_001 + b".", "more than 1000000 instructions"),
    ],
)
def test_other_pickles_are_refused(tmp_path, value, message):
    save_pickle(tmp_path / "x.bin", value, _0=bytes(24))
    with pytest.raises(AdapterCheckError, match=message):
        read_pickled_header(tmp_path / "x.bin", limit=64 * MIB)


def test_a_tuple_that_takes_years_to_hash(tmp_path):
    # The key of a dictionary is a pair of one pair, 200 times.
    pairs = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(200))
    save_pickle(tmp_path / "x.bin", b"\x80\x02})" + pairs + b"K\x01s.")
    with pytest.raises(AdapterCheckError, match="a key is of type tuple"):
        read_pickled_header(tmp_path / "x.bin", limit=LIMIT)


def test_two_tensors_of_one_name(tmp_path):
    pair = one_tensor([2, 3], [3, 1], 6)
    inner = pair[4:-2]
    save_pickle(tmp_path / "x.bin", b"\x80\x02}(" + inner + inner + b"u.", _0=bytes(24))
    with pytest.raises(AdapterCheckError, match="two tensors named 'w'"):
        read_pickled_header(tmp_path / "x.bin", limit=LIMIT)


def test_tensors_that_share_a_storage_can_not_exceed_the_file(tmp_path):
    whole = torch.zeros(10_000)
    torch.save({f"w{i}": whole for i in range(50)}, tmp_path / "x.bin")
    with pytest.raises(AdapterCheckError, match="more than the whole file: they share storages"):
        read_pickled_header(tmp_path / "x.bin", limit=LIMIT)


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    good = one_tensor([2, 3], [3, 1], 6)

    def refused(message):
        with pytest.raises(AdapterCheckError, match=message):
            read_pickled_header(path, limit=LIMIT)

    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    refused("does not begin like a zip archive")
    path.write_bytes(b"PK\3\4")
    refused("does not begin like a zip archive")
    save_pickle(path, good, compression=zipfile.ZIP_DEFLATED, _0=bytes(24))
    refused("compressed or encrypted")
    save_pickle(path, good, _0=bytes(24))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    refused("truncated")
    path.write_bytes(whole + b"more")
    refused("truncated, or has something behind its end")
    torch.save({"w": torch.zeros(2)}, path)
    whole = path.read_bytes()
    assert whole[-42:-38] == b"PK\6\7"  # PyTorch writes the 64-bit form
    path.write_bytes(whole[:-34] + bytes(8) + whole[-26:])
    refused("can be read in two ways")
    path.write_bytes(bytes(2 * LIMIT))
    refused("at most 1048576 are read")
    path.unlink()
    refused("can't be read")
    os.mkfifo(path)
    refused("not a regular file")


def test_a_directory_of_millions_of_records_is_not_read(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", one_tensor([2, 3], [3, 1], 6))
        for index in range(101_000):
            archive.writestr(zipfile.ZipInfo(f"a/data/{index}"), b"")
    (tmp_path / "x.bin").write_bytes(buffer.getvalue())
    with pytest.raises(AdapterCheckError, match="more than 100000 records"):
        read_pickled_header(tmp_path / "x.bin", limit=64 * MIB)


def test_a_file_that_changes_after_the_check(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.bin")
    entries = read_pickled_header(tmp_path / "x.bin", limit=LIMIT)
    torch.save({"w": torch.zeros(3)}, tmp_path / "x.bin")
    with pytest.raises(AdapterCheckError, match="changed while it was read"):
        load_pickled(tmp_path / "x.bin", entries)
    torch.save(Runs(os.system, "true"), tmp_path / "x.bin")
    with pytest.raises(AdapterCheckError, match="can't be loaded"):
        load_pickled(tmp_path / "x.bin", entries)
