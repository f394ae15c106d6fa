"""Files in and out: checked downloads, readers for safetensors, PyTorch and TensorFlow checkpoints, atomic saves, and
the way from a config.json and weights to an encoder.

Whatever a bad file, archive or server does, the caller sees an `InputError` of one sentence, nothing half-written stays
at a goal, no code from a file is run, and no size that a file only declares is ever allocated.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import mmap
import os
import pickletools
import re
import reprlib
import shutil
import stat
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import requests
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_JSON = 16 << 20     # bytes of a JSON file or header; the largest in use here, RoBERTa's vocab.json, has 0.9 MB
MAX_DOWNLOAD = 4 << 30  # bytes of a download whose size nobody announces
SLOWEST = 1000, 60      # bytes a second, averaged over so many seconds; a server that sends fewer is given up

WHOLE = "get a whole copy of it"
AVOID = "do not use this file"
OTHER = "use the weights of such a model"
MISFIT = "check that config and weights belong together"


class InputError(ValueError):
    """A file, download, argument or row that is not what it should be; the message is one sentence for a user."""


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 1, 120, 80, 80
show = _short.repr  # a name or value from a file, fit for a message: in quotes, escaped, neither deep nor endless


def _expect(good, path, expected, found, remedy=WHOLE):
    """Raises InputError unless `good`."""
    if not good:
        raise InputError(f"{path}: expected {expected}, found {found}; {remedy}")


def _check(good, what):
    """Raises ValueError unless `good`: for where _as_input_error stands around."""
    if not good:
        raise ValueError(what)


@contextlib.contextmanager
def _as_input_error(start, *kinds, end=""):
    """Inside, an error of these kinds becomes an InputError of `start`, its reason, and `end`; an InputError passes."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or show(str(error))[1:-1]
        raise InputError(f"{start}: {reason}{end}") from error


# ---------------------------------------------------------------- plain files

def cache_dir():
    """Where downloads are kept: $PALBERT_CACHE, else ~/.cache/palbert."""
    return Path(os.environ.get("PALBERT_CACHE") or Path("~/.cache/palbert").expanduser())


def _map(path):
    """The whole of a file as a buffer that takes no memory until read; changing it never changes the file."""
    with _as_input_error(f"cannot read {path}", OSError, ValueError):  # ValueError: a NUL in the name, or just emptied
        info = os.stat(path)  # before open, which would wait for ever at a FIFO
        _expect(stat.S_ISREG(info.st_mode), path, "a file", "something else", "name a file")
        if info.st_size == 0:
            return b""
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def sha256_file(path):
    """The SHA-256 of a file in hex."""
    return hashlib.sha256(_map(path)).hexdigest()


def _parse_json(data, path, what, max_bytes):
    """bytes -> dict. Duplicate keys are refused: two readers could disagree about them."""
    def unique(pairs):
        _check(len(dict(pairs)) == len(pairs), "a key twice")
        return dict(pairs)

    with _as_input_error(f"{path}: expected {what} in JSON, found none", ValueError, RecursionError, end=f"; {WHOLE}"):
        _check(len(data) <= max_bytes, f"{len(data):,} bytes, more than {max_bytes:,}")
        value = json.loads(bytes(data).decode("utf-8-sig"), object_pairs_hook=unique,
                           parse_constant=lambda name: _check(False, f"the number {name}"))
        _check(isinstance(value, dict), f"a {type(value).__name__} where an object belongs")
        return value


def read_json(path, what="settings", max_bytes=MAX_JSON):
    """A JSON object from a file of at most max_bytes -> dict; `what` names it in the error."""
    return _parse_json(_map(path), path, what, max_bytes)


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file:` gives a binary file whose content stands at `path` once the block ends without
    an error, whole and on the disk; until then, and on any error, what stood there stays. One writer per path at a
    time. Raises InputError where the system refuses (no such folder, no permission, a full disk)."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # fixed, so that what a killed process left is overwritten
    with _as_input_error(f"cannot write {path}", OSError):
        try:
            with open(temporary, "wb") as file:
                yield file
                _sync(file)
            _move(temporary, path)
        except RuntimeError as error:  # torch.save ends in this one where a write has failed before
            raise error.__context__ if isinstance(error.__context__, OSError) else error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _sync(file):
    file.flush()
    os.fsync(file.fileno())


def _move(source, goal):
    """Renames a file or folder, and makes that last through a power cut where the system can."""
    os.replace(source, goal)
    with contextlib.suppress(OSError):
        handle = os.open(goal.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------- download

class _Failure(Exception):
    """Why a server did not give a file; `again`: asking once more may help."""
    def __init__(self, reason, again=False):
        super().__init__(reason)
        self.again = again


def download(urls, path, sha256=None, size=None, tries=4, wait=1.0, timeout=(10, 30)):
    """Fetches `path` from the first of `urls` (one, or mirrors) that has it, and returns it as a Path.

    A file that is there already is returned as it is, without a check and without the network: its sha256 (hex) and
    size (bytes) were checked before it was put there. Until then the bytes lie in `path`.part, which a later call goes
    on from if a sha256 will judge the result. A broken, stalled (`timeout`, seconds to connect and between bytes), slow
    (SLOWEST) or busy (429, 5xx) server is asked again, `tries` times in all without progress, after `wait`, 2 `wait`,
    ... seconds. Raises InputError that names each URL and why it failed."""
    path, failures = Path(path), []
    with _as_input_error(f"cannot write {path}", OSError, ValueError):
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        file, part = _open_part(path)
        with file:
            if path.is_file():  # another process was faster, and we waited for it
                part.unlink()
                return path
            for url in [urls] if isinstance(urls, str) else urls:
                if sha256 is None:
                    file.truncate(0)  # bytes of two runs or servers are mixed only where a checksum would notice
                try:
                    _fetch(url, file, path.name, sha256, size, tries, wait, timeout)
                except _Failure as failure:
                    failures.append(f"{url} ({failure})")
                else:
                    _sync(file)
                    _move(part, path)
                    return path
            if sha256 is None or os.fstat(file.fileno()).st_size == 0:
                part.unlink()
    raise InputError(f"could not fetch {path.name} from {', nor from '.join(failures)}; try again later, or put it at "
                     f"{path}")


def _open_part(path):
    """The unfinished file and its name, locked: of two processes one downloads, and the other waits and finds it."""
    part = path.with_name(path.name + ".part")
    while True:
        file = open(part, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except (AttributeError, OSError):  # no locks: a name of our own serves, only each process downloads for itself
            file.close()
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            return open(part, "a+b"), part
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file, part
        file.close()  # while we waited, the file we had opened was renamed to its goal or removed: open anew


def _fetch(url, file, name, sha256, size, tries, wait, timeout):
    """Fills `file` from one URL, asking again as `download` says, or raises _Failure."""
    failed, seen = 0, {}
    while True:
        before = file.seek(0, os.SEEK_END)
        if size is not None and before > size:
            before = file.truncate(0)
        try:
            if not before or before != size:
                _request(url, file, name, size, timeout, seen)
            if sha256 is None or sha256_file(file.name) == sha256:
                return
            file.truncate(0)
            # What was there before this call may have been the wrong part, so one more try, from the start.
            raise _Failure("its content has another SHA-256 than the file that was published", again=before > 0)
        except _Failure as failure:
            failed = 1 if file.seek(0, os.SEEK_END) >= before + (1 << 20) else failed + 1
            if not failure.again or failed >= tries:
                raise
        time.sleep(min(wait * 2 ** (failed - 1), 30))


def _request(url, file, name, size, timeout, seen):
    """One GET, appended to `file`; raises _Failure unless that has the whole of it then."""
    start = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}  # else lengths would count compressed bytes
    if start:
        headers |= {"Range": f"bytes={start}-"} | seen
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            status = answer.status_code
            if url.startswith("https:") and not answer.url.startswith("https:"):
                raise _Failure("it leads to an address without TLS")
            part = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if status == 416 and start and part and part[2] == str(start):
                return  # all of it was there
            if status == 416 and start or status == 206 and not (part and part[1] == str(start)):
                file.truncate(0)
                raise _Failure(f"the server did not send the bytes from {start:,} on", again=True)
            if status not in (200, 206):
                raise _Failure(f"the server answered {status}", again=status == 429 or status >= 500)
            if status == 200 and start:  # no range support, or the file has changed: this is the whole of it
                start = file.truncate(0)
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                raise _Failure("the server sent a web page instead of the file")
            announced = "" if "Content-Encoding" in answer.headers else answer.headers.get("Content-Length", "")
            announced = part[2] if status == 206 else announced
            total = int(announced) if re.fullmatch(r"\d{1,15}", announced) else None
            if size is not None and total is not None and total != size:
                raise _Failure(f"the server has {total:,} bytes where {size:,} were published")
            if answer.headers.get("ETag", "W/")[:2] != "W/":
                seen["If-Range"] = answer.headers["ETag"]
            _receive(answer, file, name, start, total if size is None else size)
    except InputError:
        raise
    except (OSError, ValueError, requests.exceptions.BaseHTTPError) as error:  # requests' and urllib3's own
        raise _reason(error, timeout) from error


def _receive(answer, file, name, done, total):
    """The body of an answer, appended to `file` as it comes in; `done` bytes of `total` (or None) are there already."""
    limit = MAX_DOWNLOAD if total is None else total
    # As many bytes as there are: iter_content would wait for a full chunk, through any number of drops.
    read = getattr(answer.raw, "read1", answer.raw.read)  # urllib3 1 has no read1
    progress = _progress(name, done, total)
    (speed, span), mark, then = SLOWEST, done, time.monotonic()
    while chunk := read(1 << 16, decode_content=True):
        if done == 0 and re.match(rb"\s*<(!doctype )?html", chunk[:100], re.IGNORECASE):
            raise _Failure("the server sent a web page instead of the file")
        done += len(chunk)
        if done > limit:  # stop at once: it may never end
            file.truncate(0)
            raise _Failure(f"the server sent more than {limit:,} bytes")
        with _as_input_error(f"cannot write {file.name}", OSError):
            file.write(chunk)
            file.flush()
        progress(done)
        if (now := time.monotonic()) >= then + span:
            if done - mark < speed * (now - then):
                raise _Failure(f"less than {speed:,} bytes a second within {span} s", again=True)
            mark, then = done, now
    progress(done, True)
    if total is not None and done < total:
        raise _Failure(f"the server sent {done:,} of {total:,} bytes", again=True)


def _reason(error, timeout):
    """A network error as a _Failure of a few words, instead of urllib3's chain of reprs."""
    if isinstance(error, ValueError):
        return _Failure("this address is none")
    for pattern, reason, again in (
            ("NameResolution|getaddrinfo|gaierror", "its host name cannot be resolved: is there a network?", False),
            ("^SSLError", "its TLS certificate cannot be verified", False),
            ("^ProxyError", "the proxy does not let it through", False),
            ("^ConnectTimeout", f"no answer within {timeout[0]} s", True),
            ("ReadTimeout|timed out", f"no answer within {timeout[1]} s", True),
            ("refused", "the connection was refused", True),
            ("NewConnectionError", "no connection: is there a network?", True)):
        if re.search(pattern, repr(error)):
            return _Failure(reason, again)
    return _Failure("the connection broke off", again=True)


def _progress(name, start, total, out=None):
    """A function (bytes so far, finished) that tells a terminal how far and how long, and a log start and end."""
    out = out or sys.stderr
    began = shown = time.monotonic()
    live = out is not None and out.isatty()
    of = f" of {total / 1e6:.1f} MB" if total else " MB"
    if not live:
        print(f"fetching {name}", file=out)

    def report(done, finished=False):
        nonlocal shown
        now = time.monotonic()
        if finished or live and now - shown > 0.25:
            shown = now
            left = f", {(total - done) * (now - began) / (done - start):.0f} s to go" if total and not finished else ""
            print("\r" * live + f"{name}: {done / 1e6:.1f}{of}" + (", done" if finished else left).ljust(20 * live),
                  end="\n" if finished else "", file=out, flush=True)
    return report


# ---------------------------------------------------------------- archives

@contextlib.contextmanager
def _new_folder(folder, archive):
    """Gives a temporary folder that becomes `folder` once the block has unpacked `archive` into it without an error."""
    _map(archive)  # says what is wrong with a path that is no file
    with _as_input_error(f"cannot unpack {archive} into {folder}", OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=folder.name + ".", suffix=".tmp", dir=folder.parent) as around:
            temporary = Path(around, "new")  # inside, for mkdtemp's folders are closed to other users
            temporary.mkdir()
            with _as_input_error(f"{archive}: expected a whole archive, found a damaged one", tarfile.TarError,
                                 zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError, RuntimeError,
                                 ValueError, LookupError, ArithmeticError, end=f"; {WHOLE}"):
                yield temporary
            try:
                _move(temporary, folder)
            except OSError:  # another process was faster?
                if not folder.is_dir():
                    raise


def _safe_name(name, archive):
    """A member's name as a relative path that stays inside its folder, else InputError."""
    outside = name.startswith("/") or ".." in name.split("/") or re.search(r"[\\:\x00-\x1f]", name)
    _expect(not outside, archive, "names inside the archive's own folder", show(name), AVOID)
    return str(PurePosixPath(name))


def _copy_out(stream, goal, limit, archive):
    """stream -> the new file `goal`, on the disk; more than `limit` bytes are refused before they are written, whatever
    the archive declares."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with stream, open(goal, "xb") as out:
        while chunk := stream.read(1 << 16):
            written += len(chunk)
            _expect(written <= limit, archive, f"at most {limit:,} bytes in {show(goal.name)}", "more", AVOID)
            out.write(chunk)
        _sync(out)
    return written


class _BoundedGzip(gzip.GzipFile):
    """Refuses what only a bomb would ask for: tarfile reads a member's long name at once, whatever length it has."""
    limit = 0

    def read(self, size=-1):
        bounded = 0 <= size <= 1 << 20 and self.tell() <= self.limit
        _expect(bounded, self.name, f"at most {self.limit:,} bytes", "more", AVOID)
        return super().read(size)


def extract_tar(path, folder, wanted=None, max_bytes=4 << 30):
    """Unpacks a .tar.gz such as Google's albert_base_v2.tar.gz into the new folder `folder`, and returns it.

    wanted: a regular expression for the whole name of the files to take; None takes all. A folder that is there already
    is returned as it is. Raises InputError for a damaged archive, a link, a device, a name that leads outside, more
    than max_bytes unpacked, or no file taken; then nothing is left behind."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    with _new_folder(folder, path) as temporary, _BoundedGzip(path) as unzipped:
        unzipped.limit = max_bytes
        with tarfile.open(fileobj=unzipped, mode="r:") as archive:
            for member in archive:
                name = _safe_name(member.name, path)
                if member.isdir() and member.size == 0:
                    continue
                plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and member.sparse is None
                _expect(plain, path, "plain files", f"a link or device, {show(name)}", AVOID)
                few = member.offset_data + member.size <= max_bytes and len(archive.members) <= 10000
                _expect(few, path, f"at most {max_bytes:,} bytes", "more", AVOID)
                if wanted is None or re.fullmatch(wanted, name):
                    _copy_out(archive.extractfile(member), temporary / name, max_bytes, path)
        while unzipped.read(1 << 16):  # to the end, where gzip's checksum stands
            pass
        _expect(any(temporary.iterdir()), path, "the files of a checkpoint", "none of them")
    return folder


def extract_zip(path, folder, members=None, max_bytes=1 << 30):
    """Unpacks a .zip such as GLUE's CoLA.zip into the new folder `folder`, and returns it.

    members: {name in the archive: the most bytes it may have}, which all must be there; None takes every file. A folder
    that is there already is returned as it is. macOS' `__MACOSX/` entries are passed over. Raises InputError for a
    damaged or encrypted archive, a link, a name that leads outside, a member larger than its bound, or more than
    max_bytes in all, counted as they are written and whatever the archive declares; then nothing is left behind."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    with _new_folder(folder, path) as temporary, zipfile.ZipFile(path) as archive:
        left, missing = max_bytes, set(members or ())
        for member in archive.infolist():
            if member.filename.startswith("__MACOSX/") or (member.is_dir() and not member.file_size):
                continue
            name = _safe_name(member.filename, path)
            if members is not None and name not in missing:
                continue
            stored = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not member.flag_bits & 1
            _expect(stored and not stat.S_ISLNK(member.external_attr >> 16), path, "plain files",
                    f"a link, or encrypted, or of an unknown compression, {show(name)}", AVOID)
            limit = left if members is None else min(left, members[name])
            left -= _copy_out(archive.open(member), temporary / name, limit, path)
            missing.discard(name)
        _expect(not missing, path, f"{show(min(missing, default=''))} inside", "no such member")
    return folder


# ---------------------------------------------------------------- safetensors

SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}


def _count(shape):
    """The number of elements of a declared shape, or ValueError where no tensor can have it: also a 0 leaves the other
    dimensions their strides, and Python's integers are bounded on the way."""
    _check(type(shape) is list and len(shape) <= 16  # True, too, is an int to isinstance
           and all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
           and math.prod(max(n, 1) for n in shape) < 1 << 62, f"the shape {show(shape)}")
    return math.prod(shape)


def _view(buffer, offset, count, dtype, shape):
    """A tensor on part of a buffer, copied only where it would not be aligned."""
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:
        buffer, offset = bytearray(buffer[offset:offset + count * dtype.itemsize]), 0
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(shape)


def _check_tiling(spans, end, path, what):
    """Spans (begin, end) must cover 0..end without a hole and without an overlap."""
    position = 0
    for begin, stop in [*sorted(spans), (end, end)]:
        _expect(begin == position, path, f"{what} one after another", f"a hole or an overlap at byte {position:,}")
        position = stop


def read_safetensors(path):
    """A .safetensors file -> dict name -> tensor, on a memory map; changing a tensor does not change the file.

    The format (github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian; the header, a JSON
    object name -> dtype, shape, data_offsets [begin, end) into what follows; the data, without holes. Raises
    InputError."""
    data = _map(path)
    length = int.from_bytes(data[:8], "little")
    whole = 2 <= length <= min(len(data) - 8, MAX_JSON) and data[8:9] == b"{"
    _expect(whole, path, "a safetensors file", f"{len(data):,} bytes without such a header")
    header = _parse_json(data[8:8 + length], path, "a safetensors header", MAX_JSON)
    start, size = 8 + length, len(data) - 8 - length
    metadata = header.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    _expect(strings, path, "metadata of strings", show(metadata))
    tensors, spans = {}, []
    for name, entry in header.items():
        with _as_input_error(f"{path}: expected a dtype, shape and place in {size:,} bytes that fit together for "
                             f"{show(name)}, found {show(entry)}", TypeError, KeyError, ValueError, end=f"; {WHOLE}"):
            dtype, shape, (begin, end) = SAFETENSORS_TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = _count(shape)
            _check(len(entry) == 3 and type(begin) is type(end) is int and 0 <= begin <= end <= size
                   and count * dtype.itemsize == end - begin, f"the offsets {show([begin, end])}")
        tensors[name] = _view(data, start + begin, count, dtype, shape)
        spans.append((begin, end))
    _check_tiling(spans, size, path, "tensors")
    return tensors


def write_safetensors(path, tensors, metadata=None):
    """dict name -> tensor (any strides, any device) -> a .safetensors file, written atomically; metadata holds strings.

    The same tensors give the same bytes. Raises InputError for a dtype that the format lacks, or if the file cannot be
    written."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    # The widest dtypes first, so that every tensor is aligned when it is mapped.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, position = {"__metadata__": metadata} if metadata else {}, 0
    for name in order:
        tensor = tensors[name]
        _expect(tensor.dtype in names, path, f"a dtype that there is for {show(name)}", tensor.dtype, "convert it")
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ---------------------------------------------------------------- PyTorch

# What a pickle may ask for: the functions and classes of which torch.save makes tensors (names directly in `torch`,
# such as `torch FloatStorage`, are left to torch.load's own list).
PICKLE_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
                  "torch._utils _rebuild_parameter", "torch.storage UntypedStorage"}


def _check_pickle(pickle, path):
    """Reads one pickle (bytes, or a file at its position) without running it: it may ask for tensors only. torch.load
    with weights_only=True judges too; this names what a file with code wants, and stops what that lets pass (a
    bytearray of any length)."""
    for opcode, argument, _ in pickletools.genops(pickle):
        harmless = opcode.name not in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4") or (
            opcode.name == "GLOBAL" and (argument in PICKLE_GLOBALS or re.fullmatch(r"torch \w+", argument)))
        _expect(harmless, path, "tensors only", harmless or
                f"a pickle that asks for {show(argument or opcode.name)}, which was not run", AVOID)


def read_torch(path):
    """A file of torch.save that holds tensors, numbers and strings in dicts, lists and tuples -> that object.

    Reads both of its formats: a zip, whose CRC-32s are checked, and, from before PyTorch 1.6, pickles and data in a
    row. Raises InputError for a damaged file, and for a pickle that asks for anything but tensors; that is not run."""
    data = _map(path)
    zipped = data[:2] == b"PK"
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
                stored = stored and sum(member.file_size for member in members) <= len(data)
                _expect(stored, path, "a file of torch.save", "a compressed archive")
                _expect(archive.testzip() is None, path, "a file of torch.save", "a checksum that is wrong")
                for member in members:
                    if member.filename.endswith(".pkl"):
                        _check_pickle(archive.read(member), path)
        else:
            with open(path, "rb") as file:
                for _ in range(5):  # a magic number, the format's version, the machine, the object, the storages' names
                    _check_pickle(file, path)
        value = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way, and torch.load's reasons tell how to run code
        raise InputError(f"{path}: no file of torch.save, or damaged ({type(error).__name__}); {WHOLE}") from error
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            # A tensor may show more elements than the file has (strides of 0, a storage grown to fit): a bomb.
            plain = item.layout == torch.strided and item.device.type == "cpu" and not item.is_quantized
            _expect(plain and item.nbytes <= len(data), path, "plain tensors no larger than the file",
                    f"one of shape {show(list(item.shape))}")
        elif isinstance(item, (dict, list, tuple)):
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return value


def read_pytorch(path):
    """A state dict of torch.save, such as pytorch_model.bin -> dict name -> tensor. Raises InputError as read_torch
    does, and for anything but one flat dict of tensors."""
    value = read_torch(path)
    for name, tensor in value.items() if isinstance(value, dict) else [(None, value)]:
        _expect(isinstance(name, str) and isinstance(tensor, torch.Tensor), path, "a dict name -> tensor",
                f"{show(name)} -> a {type(tensor).__name__}", "save a model's state_dict()")
    return {name: tensor.detach() for name, tensor in value.items()}


# ---------------------------------------------------------------- TensorFlow: CRC-32C

def _times(columns, states):
    """A linear operator on 32 bits (column b is the image of bit b), applied to each of an array of uint32."""
    return np.bitwise_xor.reduce((states[:, None] >> np.arange(32, dtype=np.uint32) & 1) * columns, axis=1)


@lru_cache
def _zeros(doublings, bits):
    """What 2**doublings zero bits make of a CRC-32C register (polynomial 0x1EDC6F41, reflected): a table for the lowest
    `bits` bits of the register, with a value for each content, one for the next, and so on."""
    columns = np.array([0x82F63B78] + [1 << b for b in range(31)], np.uint32)  # one zero bit
    for _ in range(doublings):
        columns = _times(columns, columns)
    numbers = np.arange(1 << bits, dtype=np.uint32)
    return [_times(columns, numbers << np.uint32(first)) for first in range(0, 32, bits)]


def crc32c(data):
    """CRC-32C (Castagnoli, RFC 3720) of a buffer: crc32c(b"123456789") == 0xE3069283.

    A CRC is the remainder of a polynomial, so a row of words may be added onto the row below it if it is moved up by
    the row's length on the way (a linear operator: two table look-ups a word). So all but the last row fold away, a row
    of 4 KB at a time in numpy; the last bytes go one by one."""
    buffer, register = np.frombuffer(data, np.uint8), 0xFFFFFFFF
    rows = len(buffer) >> 12
    if rows > 1:
        low, high = _zeros(15, 16)
        table = buffer[:rows << 12].view("<u4").reshape(rows, 1024)
        row = table[0].copy()
        row[0] ^= register  # the register's first value is the same as adding it to the first word
        for below in table[1:]:
            row = low[row & 0xFFFF] ^ high[row >> 16] ^ below
        buffer, register = np.concatenate([row.astype("<u4").view(np.uint8), buffer[rows << 12:]]), 0
    table = _zeros(3, 8)[0].tolist()
    for byte in buffer.tobytes():
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


def _masked(crc):
    """The form in which LevelDB and TensorFlow store a CRC: rotated by 15 bits, plus a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---------------------------------------------------------------- TensorFlow: checkpoints
# Damage is a ValueError down here, of which read_tf_checkpoint makes an InputError.

# Numbers of tensorflow/core/framework/types.proto
TF_TYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 5: torch.int16, 6: torch.int8,
            9: torch.int64, 10: torch.bool, 14: torch.bfloat16, 17: torch.uint16, 19: torch.float16, 22: torch.uint32,
            23: torch.uint64}
TF_STRING = 7
TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER, TRAILER = 48, 5  # bytes: two handles padded to 40 and the magic number; a block's type and CRC


def _varints(data, position, count):
    """-> (`count` unsigned 64-bit integers of 7 bits a byte, lowest first; the position after them)."""
    values = []
    for _ in range(count):
        value = 0
        for i, byte in enumerate(data[position:position + 10]):
            value |= (byte & 127) << 7 * i
            if byte < 128:
                break
        else:
            raise ValueError("a number that does not end")
        # Longer forms, which no writer uses, would let a flipped bit pass.
        _check(byte > 0 or i == 0, "a number that is longer than it must be")
        values.append(value & (1 << 64) - 1)
        position += i + 1
    return values, position


def _fields(message, wires):
    """A protobuf message -> dict field number -> [its default, the values in the message ...], for the fields in
    `wires` (number -> wire type)."""
    fields, position = {number: [0 if wire == 0 else b""] for number, wire in wires.items()}, 0
    while position < len(message):
        (key,), position = _varints(message, position, 1)
        number, wire = key >> 3, key & 7
        _check(wire in (0, 1, 2, 5) and wires.get(number, wire) == wire, "a field of another type")
        if wire in (0, 2):
            (value,), position = _varints(message, position, 1)
        if wire != 0:
            length = value if wire == 2 else 8 if wire == 1 else 4
            _check(length <= len(message) - position, "a field that does not end")
            value, position = message[position:position + length], position + length
        if number in wires:
            fields[number].append(value)
    return fields


def _block(data, offset, size):
    """A block of a LevelDB table, its CRC checked -> list of (key, value) in bytes."""
    _check(offset + size + TRAILER <= len(data) - FOOTER, "a block outside the file")
    content, kind, saved = data[offset:offset + size], data[offset + size], data[offset + size + 1:offset + size + 5]
    crc = _masked(crc32c(data[offset:offset + size + 1]))
    _check(crc == int.from_bytes(saved, "little"), "a checksum that is wrong")
    _check(kind == 0, f"compression {kind}, which TensorFlow does not use")
    end = size - 4 - 4 * int.from_bytes(content[-4:], "little")
    _check(size >= 4 and end >= 0, "more restarts than a block has room for")
    pairs, key, position, keys = [], b"", 0, 0
    while position < end:
        (shared, own, length), position = _varints(content, position, 3)
        _check(shared <= len(key) and own + length <= end - position, "an entry that does not end")
        key, value = key[:shared] + content[position:position + own], content[position + own:position + own + length]
        keys += len(key)
        # Keys share their beginnings, so a small block could spell out endless ones.
        _check(keys <= 64 * size, "keys of absurd length")
        _check(not pairs or key > pairs[-1][0], "keys out of order")
        pairs.append((key, value))
        position += own + length
    return pairs


def _read_index(path):
    """A LevelDB table, as TensorFlow's .index files are (leveldb/doc/table_format.md) -> dict key -> value, bytes."""
    data = bytes(_map(path))
    _check(len(data) >= FOOTER and int.from_bytes(data[-8:], "little") == TABLE_MAGIC, "no table's last bytes")
    handles, position = _varints(data[-FOOTER:-8], 0, 4)  # of the meta index, which TensorFlow leaves empty, and index
    _check(not any(data[-FOOTER + position:-8]), "something in the padding")
    _block(data, *handles[:2])
    entries, blocks = {}, [handles[:2], handles[2:]]
    for _, handle in _block(data, *handles[2:]):
        blocks.append(_varints(handle, 0, 2)[0])
        for key, value in _block(data, *blocks[-1]):
            _check(key not in entries, "a key twice")
            entries[key] = value
    # No checksum covers the handles in the footer; that the blocks fill the file without a gap does.
    _check_tiling([(offset, offset + size + TRAILER) for offset, size in blocks], len(data) - FOOTER, path, "blocks")
    return entries


def read_tf_checkpoint(prefix):
    """TensorFlow's checkpoint of the second version (tensor_bundle.proto): PREFIX.index and PREFIX.data-00000-of-00001,
    ... -> dict name -> tensor, on memory maps as in read_safetensors, with the file's own names; kernels are (in, out).

    The index maps each name to a BundleEntryProto (dtype, shape, shard, offset, size, CRC), and "" to a
    BundleHeaderProto; every CRC-32C is checked. Tensors of strings are left out. Raises InputError, also for
    partitioned variables."""
    path, tensors, shards = f"{prefix}.index", {}, {}
    with _as_input_error(f"{path}: expected the index of a TensorFlow checkpoint, found a damaged one", ValueError,
                         end=f"; {WHOLE}"):
        entries = _read_index(path)
        _check(b"" in entries, "no header in it")
        header = _fields(entries.pop(b""), {1: 0, 2: 0})
        _expect(header[2][-1] == 0, path, "little-endian data", "big-endian data", "save it on another machine")
        for key, entry in entries.items():
            name = key.decode()
            fields = _fields(entry, {1: 0, 2: 2, 3: 0, 4: 0, 5: 0, 6: 5, 7: 2})
            kind, shape, shard, offset, size, saved, _ = (values[-1] for values in fields.values())
            _expect(not fields[7][1:] and (kind in TF_TYPES or kind == TF_STRING), path, "whole variables of numbers",
                    f"{show(name)} in slices or of TensorFlow's type {kind}", "save it without")
            shape = [_fields(dimension, {1: 0})[1][-1] for dimension in _fields(shape, {2: 2, 3: 0})[2][1:]]
            count = _count(shape)
            _check(shard < header[1][-1] and (kind == TF_STRING or count * TF_TYPES[kind].itemsize == size),
                   f"no such shard, or a size that does not fit the shape of {show(name)}")
            data_path = f"{prefix}.data-{shard:05d}-of-{header[1][-1]:05d}"
            if data_path not in shards:
                shards[data_path] = _map(data_path)
            data = shards[data_path]
            _expect(offset + size <= len(data), data_path, f"{show(name)} up to byte {offset + size:,}",
                    f"a file of {len(data):,}")
            content, crc = memoryview(data)[offset:offset + size], None
            with contextlib.suppress(ValueError):  # lengths that do not end
                if kind == TF_STRING:  # its CRC: of its lengths as uint32, of their own masked CRC, and of the text
                    lengths, at = _varints(content, 0, count)
                    content = b"".join(n.to_bytes(4 if n < 1 << 32 else 8, "little") for n in lengths) + content[at:]
                crc = _masked(crc32c(content))
            right = crc == int.from_bytes(saved, "little")
            _expect(right, data_path, f"{show(name)} as it was saved", "a checksum that is wrong")
            if kind != TF_STRING:
                tensors[name] = _view(data, offset, count, TF_TYPES[kind], shape)
    return tensors


# ---------------------------------------------------------------- weights into a module

def load_weights(path):
    """Weights from a file of any of the three kinds, a TensorFlow prefix, or a folder with model.safetensors, else
    pytorch_model.bin, else one TensorFlow checkpoint (*.ckpt*.index, also one folder below, where Google's archives
    have it) -> (dict name -> tensor, "safetensors" | "pytorch" | "tensorflow"). Raises InputError where there is none
    or more than one."""
    path = Path(path)
    with _as_input_error(f"cannot read {path}", OSError, ValueError):
        if path.is_dir():
            found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()][:1]
            found = found or sorted([*path.glob("*.ckpt*.index"), *path.glob("*/*.ckpt*.index")])
            _expect(len(found) == 1, path, "model.safetensors, pytorch_model.bin or one TensorFlow checkpoint "
                    "(*.ckpt*.index)", f"{len(found)} checkpoints", "name another folder or one file")
            path = found[0]
        elif not path.is_file() and Path(f"{path}.index").is_file():
            path = Path(f"{path}.index")
    if path.suffix == ".safetensors":
        return read_safetensors(path), "safetensors"
    if path.suffix in (".bin", ".pt", ".pth"):
        return read_pytorch(path), "pytorch"
    if path.suffix == ".index":
        return read_tf_checkpoint(str(path)[:-len(".index")]), "tensorflow"
    _expect(False, path, "a folder with weights, or a file *.safetensors, *.bin, *.pt or *.index",
            "another file" if os.path.isfile(path) else "nothing there", "name one of these")


def assign(module, weights, table, left_out, source, optional=()):
    """Fills every parameter and buffer of `module` from `weights` (dict name -> tensor), and returns the set of those
    that it did not fill (some of `optional`).

    table: own name -> the names in the file whose tensors, joined along their first dimension, it is (mostly one).
    left_out: regular expressions for whole names in the file that are not used, on purpose. optional: own names that a
    file may lack. source: the file's name for messages. Floating types are converted to the module's. Raises
    InputError, before anything is changed, for a name in the file that is neither used nor left out, a name used twice,
    one that is missing, and a tensor of another shape, of integers where floats belong, or with NaN or infinity."""
    own = module.state_dict()
    odd = own.keys() ^ table.keys()
    _expect(not odd, source, "a table that covers the model", f"{show(sorted(odd))} on one side only", "mend the table")
    values, used = {}, set()
    for name, target in own.items():
        parts = [table[name]] if isinstance(table[name], str) else table[name]
        missing = [part for part in parts if part not in weights]
        if len(missing) == len(parts) and name in optional:
            continue
        _expect(not missing, source, f"a tensor {missing and missing[0]!r}", "none of that name", OTHER)
        tensors = [weights[part] for part in parts]
        for part, tensor in zip(parts, tensors):
            _expect(part not in used, source, f"one use of {part!r}", "two", "mend the table")
            used.add(part)
            alike = tensor.is_floating_point() == target.is_floating_point()
            _expect(alike, source, f"{part!r} of a type like {target.dtype}", tensor.dtype)
            finite = not target.is_floating_point() or torch.isfinite(tensor.to(target.dtype)).all()
            _expect(finite, source, f"finite numbers of {target.dtype} in {part!r}", "NaN or infinity")
        fit = len(parts) == 1 or all(t.dim() == target.dim() and t.shape[1:] == target.shape[1:] for t in tensors)
        values[name] = torch.cat(tensors) if fit and len(parts) > 1 else tensors[0]
        fit = fit and values[name].shape == target.shape
        _expect(fit, source, f"{' + '.join(map(repr, parts))} of shape {tuple(target.shape)}",
                " + ".join(str(tuple(t.shape)) for t in tensors), MISFIT)
    for name in weights:
        known = name in used or any(re.fullmatch(pattern, name) for pattern in left_out)
        _expect(known, source, "only names of this kind of model", show(name), OTHER)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return own.keys() - values.keys()


# ---------------------------------------------------------------- encoders

def check_sizes(config):
    """Raises InputError unless each field of an encoder's dataclass is of its type and in its range."""
    for field in dataclasses.fields(config):
        value, wanted = getattr(config, field.name), type(field.default)
        if wanted is int:
            least = 0 if field.name == "pad_token_id" else 1
            good, expected = type(value) is int and least <= value < 2**24, f"a whole number from {least}, below 2**24"
        elif wanted is float:
            good, expected = type(value) is float and 0 < value < 1, "a number with a point between 0 and 1"
        else:  # hidden_act
            good, expected = value in ("gelu", "gelu_new"), "'gelu' or 'gelu_new'"
        _expect(good, type(config).__name__, f"{field.name} to be {expected}", show(value), "correct it")
    _expect(config.hidden_size % config.num_attention_heads == 0, type(config).__name__,
            f"hidden_size to be a multiple of num_attention_heads = {config.num_attention_heads}", config.hidden_size,
            "correct one")


def make_config(cls, values, must_be, source):
    """An encoder's dataclass from the dict of a config.json. must_be: the keys that would change the computation, with
    the one value of each that is computed here; other keys without a field are ignored. Raises InputError."""
    for key, only in must_be.items():
        value = values.get(key, only)
        _expect(value == only, source, f"{key} = {only!r}, the one that is built here", show(value), OTHER)
    known = {field.name for field in dataclasses.fields(cls)}
    try:
        return cls(**{key: value for key, value in values.items() if key in known})
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def fetch_encoder(name_or_path, owner, names, hub, files, sha256):
    """Path of a folder (or TensorFlow prefix) with an encoder's files. One of `names`, also as OWNER/NAME, is fetched
    to the cache from the address `hub`, and judged by the hash of NAME/FILE or FILE in `sha256`. Raises InputError."""
    path, name = Path(name_or_path), str(name_or_path).removeprefix(f"{owner}/")
    if os.path.exists(path) or os.path.exists(f"{path}.index"):
        return path
    if name not in names:
        raise InputError(f"model {show(str(path))} is neither a folder nor a known name; known are {', '.join(names)}")
    folder = cache_dir() / name
    for file in files:
        download(hub.format(name=name, file=file), folder / file, sha256.get(f"{name}/{file}", sha256.get(file)))
    return folder


def load_encoder(cls, config, weights, blocks, name_table, left_out, source):
    """cls(config) with published weights, pairs (name, tensor) whose use name_table(config) and left_out tell, as in
    `assign`. A file without a pooler, as masked language modelling leaves it, leaves ours freshly initialised. blocks:
    how many the config asks for. Raises InputError, and takes no memory for what only the config claims."""
    named = dict(weights)
    twice = "two tensors of the same name, with and without a prefix"
    _expect(len(named) == len(weights), source, "each tensor once", twice, AVOID)
    # Before a table is made of them; each block has more than one tensor.
    _expect(blocks <= len(named), source, f"{blocks} blocks, as in the config", f"{len(named)} tensors", MISFIT)
    table = name_table(config)
    optional = () if any(name.startswith("pooler.") for name in named) else ("pooler.weight", "pooler.bias")
    with torch.device("meta"):  # without memory, to compare the shapes first
        assign(cls(config), named, table, left_out, source, optional)
    model = cls(config)
    if assign(model, named, table, left_out, source, optional):
        print(f"{source}: no pooler among the weights, so it starts freshly initialised", file=sys.stderr)
    return model
