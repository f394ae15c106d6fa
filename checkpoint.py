"""Files in and out: checked downloads, readers for safetensors, PyTorch and TensorFlow checkpoints, atomic saves.

Whatever a bad file, archive or server does, the caller sees an `InputError` of one sentence, nothing half-written stays
at a goal, no code from a file is run, and no size that a file only declares is ever allocated.
"""

import contextlib
import gzip
import hashlib
import json
import mmap
import os
import pickletools
import re
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
AVOID = "do not use this file"


class InputError(ValueError):
    """A file, download, argument or row that is not what it should be; the message is one sentence for a user."""


def _show(text, length=80):
    """A name or value from a file, fit for a message: quoted, escaped, not endless."""
    text = text if isinstance(text, str) else repr(text)
    return repr(text if len(text) <= length else text[:length] + "...")


def _bad(path, expected, found, remedy="get a whole copy of it"):
    return InputError(f"{path}: expected {expected}, found {found}; {remedy}")


def _no_access(action, path, error):
    return InputError(f"cannot {action} {path}: {getattr(error, 'strerror', None) or error}")


def cache_dir():
    """Where downloads are kept: $PALBERT_CACHE, else ~/.cache/palbert."""
    return Path(os.environ.get("PALBERT_CACHE") or Path("~/.cache/palbert").expanduser())


# ---------------------------------------------------------------- plain files

def _map(path):
    """The whole of a file as a buffer that takes no memory until read; changing it never changes the file."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # opening a FIFO would wait for ever
            raise _bad(path, "a file", "something else", "name a file")
        if info.st_size == 0:
            return b""
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, or the file emptied in between
        raise _no_access("read", path, error) from error


def sha256_file(path):
    """The SHA-256 of a file in hex."""
    return hashlib.sha256(_map(path)).hexdigest()


def _parse_json(data, path, what):
    """bytes -> dict. Duplicate keys are refused: two readers could disagree about them."""
    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def constant(name):
        raise ValueError(f"the number {name}")

    try:
        value = json.loads(bytes(data).decode("utf-8-sig"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise _bad(path, f"{what} in UTF-8", f"other bytes at {error.start}") from error
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        found = "too many levels" if isinstance(error, RecursionError) else f"no JSON ({_show(str(error))})"
        raise _bad(path, f"{what} in JSON", found) from error
    if not isinstance(value, dict):
        raise _bad(path, f"{what}, a JSON object", f"a {type(value).__name__}")
    return value


def read_json(path, what="settings", max_bytes=MAX_JSON):
    """A JSON object from a file of at most max_bytes -> dict; `what` names it in the error."""
    data = _map(path)
    if len(data) > max_bytes:
        raise _bad(path, f"{what} of at most {max_bytes:,} bytes", f"{len(data):,}", "check the file")
    return _parse_json(data, path, what)


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as file:` gives a binary file whose content stands at `path` once the block ends without
    an error, whole and on the disk; until then, and on any error, what stood there stays. One writer per path at a
    time.

    Raises InputError where the system refuses (no such folder, no permission, a full disk)."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # fixed, so that what a killed process left is overwritten
    done = opened = False
    try:
        with open(temporary, "wb") as file:
            opened = True
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        done = True
        _sync_folder(path.parent)
    except InputError:
        raise
    except OSError as error:
        raise _no_access("write", path, error) from error
    except RuntimeError as error:  # torch.save ends in this one where a write has failed before
        if not isinstance(error.__context__, OSError):
            raise
        raise _no_access("write", path, error.__context__) from error
    finally:
        if opened and not done:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _sync_folder(folder):
    """Makes a rename last through a power cut. Not every system can; the rename itself has happened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------- download

def download(urls, path, sha256=None, size=None, tries=4, wait=1.0, timeout=(10, 30)):
    """Fetches `path` from the first of `urls` (one, or mirrors) that has it, and returns it as a Path.

    A file that is there already is returned as it is, without a check and without the network: its sha256 (hex) and
    size (bytes) were checked before it was put there. Until then the bytes lie in `path`.part, which a later call goes
    on from if a sha256 will judge the result. A broken, stalled (`timeout`, seconds to connect and between bytes) or
    busy (429, 5xx) server is asked again, `tries` times in all without progress, after `wait`, 2 `wait`, ... seconds.

    Raises InputError that names each URL and why it failed."""
    path = Path(path)
    try:
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        file, part = _open_part(path)
        with file:
            if path.is_file():  # another process was faster, and we waited for it
                part.unlink()
                return path
            if sha256 is None:
                file.truncate(0)
            failures = []
            for url in [urls] if isinstance(urls, str) else urls:
                failure = _fetch(url, file, path, sha256, size, tries, wait, timeout)
                if failure is None:
                    os.fsync(file.fileno())
                    os.replace(part, path)
                    _sync_folder(path.parent)
                    return path
                failures.append(f"{url} ({failure})")
                if sha256 is None:
                    file.truncate(0)  # bytes of two servers are mixed only where a checksum would notice
            if os.fstat(file.fileno()).st_size == 0:
                part.unlink()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _no_access("write", path, error) from error
    raise InputError(f"could not fetch {path.name} from {', nor from '.join(failures)}; try again later, or put it at "
                     f"{path}")


def _open_part(path):
    """The unfinished file and its name, locked: of two processes one downloads, and the other waits and finds it."""
    part = path.with_name(path.name + ".part")
    while True:
        file = open(part, "a+b")
        try:
            if fcntl is None:
                raise OSError("no locks here")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: a name of our own serves, only each process downloads for itself
            file.close()
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            return open(part, "a+b"), part
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file, part
        except FileNotFoundError:
            pass
        file.close()  # while we waited, the file we had opened was renamed to its goal or removed: open anew


def _fetch(url, file, path, sha256, size, tries, wait, timeout):
    """Fills `file` from one URL, asking again as `download` says -> None, or why not."""
    failed, seen = 0, {}
    while True:
        before = file.seek(0, os.SEEK_END)
        if size is not None and before > size:
            before = file.truncate(0)
        if before and before == size:
            failure, again = None, False
        else:
            failure, again = _request(url, file, path, size, timeout, seen)
        if failure is None and sha256 is not None and sha256_file(file.name) != sha256:
            file.truncate(0)
            # What was there before this call may have been the wrong part, so one more try, from the start.
            failure, again = "its content has another SHA-256 than the file that was published", before > 0
        if failure is None:
            return None
        failed = 1 if file.seek(0, os.SEEK_END) >= before + (1 << 20) else failed + 1
        if not again or failed >= tries:
            return failure
        time.sleep(min(wait * 2 ** (failed - 1), 30))


def _request(url, file, path, size, timeout, seen):
    """One GET, appended to `file` -> (None, _) when the body came whole, else (why not, whether to ask again)."""
    start = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}  # else lengths would count compressed bytes
    if start:
        headers["Range"] = f"bytes={start}-"
        if "etag" in seen:
            headers["If-Range"] = seen["etag"]
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            status = answer.status_code
            if url.startswith("https:") and not answer.url.startswith("https:"):
                return "it leads to an address without TLS", False
            length = re.fullmatch(r"\d{1,15}", answer.headers.get("Content-Length", ""))
            part = re.fullmatch(r"bytes (?:(\d{1,15})-\d{1,15}|\*)/(\d{1,15}|\*)",
                                answer.headers.get("Content-Range", ""))
            if status == 416 and start:
                if part and part[2] == str(start):
                    return None, False  # all of it was there
                file.truncate(0)
                return "the server has fewer bytes than were fetched before", True
            if status == 429 or status >= 500:
                return f"the server answered {status}", True
            if status not in (200, 206):
                return f"the server answered {status}", False
            if status == 206 and not (part and part[1] == str(start)):
                file.truncate(0)
                return "the server sent another part than was asked for", True
            if status == 200 and start:  # no range support, or the file has changed: this is the whole of it
                start = file.truncate(0)
            total = None
            if status == 206:
                total = None if part[2] == "*" else int(part[2])
            elif length and not answer.headers.get("Content-Encoding"):
                total = int(length[0])
            if answer.headers.get("Content-Type", "").startswith("text/html"):
                return "the server sent a web page instead of the file", False
            if size is not None and total is not None and total != size:
                return f"the server has {total:,} bytes where {size:,} were published", False
            etag = answer.headers.get("ETag", "W/")
            if not etag.startswith("W/"):
                seen["etag"] = etag
            limit = size if size is not None else total if total is not None else MAX_DOWNLOAD
            progress = _progress(path.name, start, total if size is None else size)
            done = start
            for chunk in answer.iter_content(1 << 16):
                if done == 0 and re.match(rb"\s*<(!doctype )?html", chunk[:100], re.IGNORECASE):
                    return "the server sent a web page instead of the file", False
                done += len(chunk)
                if done > limit:  # stop at once: it may never end
                    file.truncate(0)
                    return f"the server sent more than {limit:,} bytes", False
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    raise _no_access("write", path, error) from error
                progress(done)
            progress(done, True)
            expected = size if size is not None else total
            if expected is not None and done < expected:
                return f"the server sent {done:,} of {expected:,} bytes", True
            return None, False
    except InputError:
        raise
    except (OSError, ValueError) as error:  # all of requests' errors are OSErrors; ValueError: an impossible address
        return _network_reason(error, timeout)


def _network_reason(error, timeout):
    """(a few words instead of urllib3's chain of reprs, whether asking again may help)"""
    text = repr(error)
    if "NameResolution" in text or "getaddrinfo" in text or "gaierror" in text:
        return "its host name cannot be resolved: is there a network?", False
    if isinstance(error, requests.exceptions.SSLError):
        return "its TLS certificate cannot be verified", False
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy does not let it through", False
    if isinstance(error, ValueError):
        return "this address is none", False
    if isinstance(error, requests.exceptions.Timeout) or "ReadTimeout" in text or "timed out" in text:
        seconds = timeout[0 if isinstance(error, requests.exceptions.ConnectTimeout) else 1]
        return f"no answer within {seconds} s", True
    if "refused" in text:
        return "the connection was refused", True
    if "NewConnectionError" in text:
        return "no connection: is there a network?", True
    return "the connection broke off", True


def _progress(name, start, total, out=None):
    """A function (bytes so far, finished) that tells a terminal how far and how long, and a log start and end."""
    out = out or sys.stderr
    began = shown = time.monotonic()
    live = out is not None and out.isatty()
    of = f" of {total / 1e6:.1f} MB" if total else " MB"

    def show(done, finished=False):
        nonlocal shown
        now, line = time.monotonic(), f"{name}: {done / 1e6:.1f}{of}"
        if finished:
            print(f"\r{line}, done{' ' * 12}" if live else f"{line}, done", file=out)
        elif live and now - shown > 0.25:
            shown = now
            left = f", {(total - done) * (now - began) / (done - start):.0f} s to go" if total else ""
            print(f"\r{line}{left}{' ' * 8}", end="", file=out, flush=True)

    if not live:
        print(f"fetching {name}{f', {total / 1e6:.1f} MB' if total else ''}", file=out)
    return show


# ---------------------------------------------------------------- archives

@contextlib.contextmanager
def _new_folder(folder, archive):
    """Gives a temporary folder beside `folder` that takes its name once the block ends without an error."""
    folder = Path(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".tmp", dir=folder.parent))
        temporary.chmod(0o755)
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        _sync_folder(folder.parent)
    except InputError:
        raise
    except OSError as error:
        raise _no_access("unpack", f"{archive} into {folder}", error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _safe_name(name, archive):
    """A member's name as a relative path that stays inside its folder, else InputError."""
    if name.startswith("/") or ".." in name.split("/") or re.search(r"[\\:\x00-\x1f]", name):
        raise _bad(archive, "names inside the archive's own folder", _show(name), AVOID)
    return str(PurePosixPath(name))


def _copy_out(stream, goal, limit, archive, name):
    """stream -> the new file `goal`, on the disk; more than `limit` bytes are refused before they are written."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with open(goal, "xb") as out:
        while chunk := stream.read(1 << 16):
            written += len(chunk)
            if written > limit:
                raise _bad(archive, f"at most {limit:,} bytes in {_show(name)}", "more", AVOID)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return written


class _BoundedGzip(gzip.GzipFile):
    """Refuses what only a bomb would ask for: tarfile reads a member's long name at once, whatever length it has."""
    limit = 0

    def read(self, size=-1):
        if not 0 <= size <= 1 << 20 or self.tell() > self.limit:
            raise InputError(f"{self.name}: expected at most {self.limit:,} bytes, found more; do not use this archive")
        return super().read(size)


def extract_tar(path, folder, wanted=None, max_bytes=4 << 30):
    """Unpacks a .tar.gz such as Google's albert_base_v2.tar.gz into the new folder `folder`, and returns it.

    wanted: a regular expression for the whole name of the files to take; None takes all. A folder that is there already
    is returned as it is. Raises InputError for a damaged archive, a link, a device, a name that leads outside, more
    than max_bytes unpacked, or no file taken; then nothing is left behind."""
    folder = Path(folder)
    if folder.is_dir():
        return folder
    _map(path)  # says what is wrong with a path that is no file
    taken = 0
    with _new_folder(folder, path) as temporary:
        try:
            with _BoundedGzip(path) as unzipped:
                unzipped.limit = max_bytes
                with tarfile.open(fileobj=unzipped, mode="r:") as archive:
                    while (member := archive.next()) is not None:
                        name = _safe_name(member.name, path)
                        if member.isdir() and member.size == 0:
                            continue
                        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                            raise _bad(path, "plain files", f"a link or device, {_show(name)}", AVOID)
                        if member.offset_data + member.size > max_bytes or len(archive.members) > 10000:
                            raise _bad(path, f"at most {max_bytes:,} bytes", "more", AVOID)
                        if wanted is None or re.fullmatch(wanted, name):
                            _copy_out(archive.extractfile(member), temporary / name, max_bytes, path, name)
                            taken += 1
                while unzipped.read(1 << 16):  # to the end, where gzip's checksum stands
                    pass
        except InputError:
            raise
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, LookupError,
                ArithmeticError) as error:
            raise _bad(path, "a whole .tar.gz archive", f"a damaged one ({_show(str(error))})") from error
        if not taken:
            raise _bad(path, "the files of a checkpoint", "none of them")
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
    _map(path)
    with _new_folder(folder, path) as temporary:
        try:
            with zipfile.ZipFile(path) as archive:
                left, missing = max_bytes, set(members or ())
                for member in archive.infolist():
                    if member.filename.startswith("__MACOSX/") or (member.is_dir() and not member.file_size):
                        continue
                    name = _safe_name(member.filename, path)
                    if members is not None and name not in missing:
                        continue
                    limit = left if members is None else min(left, members[name])
                    if stat.S_ISLNK(member.external_attr >> 16):
                        raise _bad(path, "plain files", f"a link, {_show(name)}", AVOID)
                    if member.file_size > limit:
                        raise _bad(path, f"at most {limit:,} bytes in {_show(name)}", f"{member.file_size:,}",
                                   AVOID)
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
                        raise _bad(path, "members stored or deflated", f"{_show(name)} encrypted or in another format")
                    with archive.open(member) as stream:
                        left -= _copy_out(stream, temporary / name, limit, path, name)
                    missing.discard(name)
        except InputError:
            raise
        except (zipfile.BadZipFile, EOFError, zlib.error, struct.error, NotImplementedError, RuntimeError, ValueError,
                LookupError, ArithmeticError) as error:
            raise _bad(path, "a whole .zip archive", f"a damaged one ({_show(str(error))})") from error
        if missing:
            raise _bad(path, f"{_show(sorted(missing)[0])} inside", "no such member")
    return folder


# ---------------------------------------------------------------- safetensors

SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}


def _count(shape):
    """The number of elements of a declared shape, or None where no tensor can have it (the size of Python's integers is
    bounded on the way, and so is that of strides where another dimension is 0)."""
    if len(shape) > 16 or any(type(n) is not int or n < 0 for n in shape):  # True is an int to isinstance
        return None
    count = 1
    for n in shape:
        count *= max(n, 1)
        if count >= 1 << 62:
            return None
    return 0 if 0 in shape else count


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
    for begin, stop in sorted(spans):
        if begin != position:
            raise _bad(path, f"{what} one after another", "a hole or an overlap")
        position = stop
    if position != end:
        raise _bad(path, f"{what} of {position:,} bytes in all", f"{end:,}")


def read_safetensors(path):
    """A .safetensors file -> dict name -> tensor, on a memory map; changing a tensor does not change the file.

    The format (github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian; the header, a JSON
    object name -> dtype, shape, data_offsets [begin, end) into what follows; the data, without holes. Raises
    InputError."""
    data = _map(path)
    if len(data) < 10:
        raise _bad(path, "a safetensors file", f"{len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_JSON):
        raise _bad(path, "a safetensors file", f"a header of {length:,} bytes in a file of {len(data):,}")
    if data[8:9] != b"{":
        raise _bad(path, "a safetensors file", "no header")
    header = _parse_json(data[8:8 + length], path, "a safetensors header")
    start, size = 8 + length, len(data) - 8 - length
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "metadata of strings", _show(metadata))
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            if len(entry) != 3:
                raise ValueError
            dtype, (begin, end) = SAFETENSORS_TYPES[entry["dtype"]], entry["data_offsets"]
            shape = tuple(entry["shape"])
            if type(entry["shape"]) is not list or type(begin) is not int or type(end) is not int:
                raise ValueError
        except (TypeError, KeyError, ValueError) as error:
            raise _bad(path, f"a dtype, a shape and two offsets for {_show(name)}", _show(entry)) from error
        count = _count(shape)
        if not 0 <= begin <= end <= size or count is None or count * dtype.itemsize != end - begin:
            raise _bad(path, f"{_show(name)}, {entry['dtype']} of shape {_show(list(shape))}, in {size:,} bytes",
                       f"the offsets {_show([begin, end])}")
        tensors[name] = _view(data, start + begin, count, dtype, shape)
        spans.append((begin, end))
    _check_tiling(spans, size, path, "tensors")
    return tensors


def write_safetensors(path, tensors, metadata=None):
    """dict name -> tensor (any strides, any device) -> a .safetensors file, written atomically; metadata holds strings.

    The same tensors give the same bytes. Raises InputError for a dtype that the format lacks, or if the file cannot be
    written."""
    names = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise _bad(path, f"a dtype that safetensors has for {_show(name)}", str(tensor.dtype), "convert it first")
    # The widest dtypes first, so that every tensor is aligned when it is mapped.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, position = {"__metadata__": metadata} if metadata else {}, 0
    for name in order:
        end = position + tensors[name].numel() * tensors[name].dtype.itemsize
        header[name] = {"dtype": names[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [position, end]}
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
        if opcode.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4") or opcode.name == "GLOBAL" and not (
                argument in PICKLE_GLOBALS or re.fullmatch(r"torch \w+", argument)):
            raise _bad(path, "tensors only",
                       f"a pickle that asks for {_show(argument or opcode.name)}, which was not run", AVOID)


def read_torch(path):
    """A file of torch.save that holds tensors, numbers and strings in dicts, lists and tuples -> that object.

    Reads both of its formats: a zip, whose CRC-32s are checked, and, from before PyTorch 1.6, pickles and data in a
    row. Raises InputError for a damaged file, and for a pickle that asks for anything but tensors; that is not run."""
    data = _map(path)
    try:
        zipped = data[:2] == b"PK"
        if zipped:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
                if not stored or sum(member.file_size for member in members) > len(data):
                    raise _bad(path, "a file of torch.save", "a compressed archive")
                if archive.testzip() is not None:
                    raise _bad(path, "a file of torch.save", "a checksum that is wrong")
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
    except Exception as error:  # a damaged pickle may fail in any way at all
        raise _bad(path, "a file of torch.save", f"a damaged one ({type(error).__name__})") from error
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            # A tensor may show more elements than the file has (strides of 0, a storage grown to fit): a bomb.
            plain = item.layout == torch.strided and item.device.type == "cpu" and not item.is_quantized
            if not plain or item.nbytes > len(data):
                raise _bad(path, "plain tensors no larger than the file", f"one of shape {_show(list(item.shape))}",
                           "get another copy")
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
    return value


def read_pytorch(path):
    """A state dict of torch.save, such as pytorch_model.bin -> dict name -> tensor. Raises InputError as read_torch
    does, and for anything but one flat dict of tensors."""
    value = read_torch(path)
    if not isinstance(value, dict):
        raise _bad(path, "a dict of tensors", f"a {type(value).__name__}", "save a model's state_dict()")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _bad(path, "a dict name -> tensor", f"{_show(name)} -> a {type(tensor).__name__}",
                       "save a model's state_dict()")
    return {name: tensor.detach() for name, tensor in value.items()}


# ---------------------------------------------------------------- CRC-32C

def _apply(columns, state):
    """A linear operator on 32 bits (column b is the image of bit b) on one value."""
    result = 0
    for b, column in enumerate(columns):
        if state >> b & 1:
            result ^= column
    return result


@lru_cache(maxsize=None)
def _zero_bits(doublings):
    """The operator that feeds 2**doublings zero bits to a CRC-32C register (polynomial 0x1EDC6F41, reflected)."""
    if doublings == 0:
        return [0x82F63B78] + [1 << b for b in range(31)]
    half = _zero_bits(doublings - 1)
    return [_apply(half, column) for column in half]


@lru_cache(maxsize=None)
def _table(doublings, first, bits):
    """The operator's values on all numbers of `bits` bits that start at bit `first`, as uint32."""
    table = np.zeros(1, np.uint32)
    for column in _zero_bits(doublings)[first:first + bits]:
        table = np.concatenate([table, table ^ np.uint32(column)])
    return table


def crc32c(data):
    """CRC-32C (Castagnoli, RFC 3720) of a buffer: crc32c(b"123456789") == 0xE3069283.

    A CRC is the remainder of a polynomial, so a row of words may be added onto the row below it if it is moved up by
    the row's length on the way (a linear operator: two table look-ups a word). So all but the last rows fold away, a
    whole row at a time in numpy, first rows of 64 KB and then of 512 bytes; the last bytes go one by one."""
    buffer = np.frombuffer(data, np.uint8)
    start = 0xFFFFFFFF  # the register's first value is the same as adding it to the first word
    for doublings in (19, 12):  # bits of a row, as a power of two
        words = 1 << doublings - 5
        rows = len(buffer) // (4 * words)
        if rows < 2:
            continue
        low, high = _table(doublings, 0, 16), _table(doublings, 16, 16)
        table = buffer[:4 * words * rows].view("<u4").reshape(rows, words)
        row = table[0].copy()
        row[0] ^= start
        start = 0
        for below in table[1:]:
            row = low[row & 0xFFFF] ^ high[row >> 16] ^ below
        buffer = np.concatenate([row.astype("<u4").view(np.uint8), buffer[4 * words * rows:]])
    register, byte_table = start, _table(3, 0, 8).tolist()
    for byte in buffer.tobytes():
        register = byte_table[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


def _masked(crc):
    """The form in which LevelDB and TensorFlow store a CRC: rotated by 15 bits, plus a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---------------------------------------------------------------- TensorFlow

# Numbers of tensorflow/core/framework/types.proto
TF_TYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 5: torch.int16, 6: torch.int8,
            9: torch.int64, 10: torch.bool, 14: torch.bfloat16, 17: torch.uint16, 19: torch.float16, 22: torch.uint32,
            23: torch.uint64}
TF_STRING = 7
TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER, TRAILER = 48, 5  # bytes: two handles padded to 40 and the magic number; a block's type and CRC


def _varint(data, position):
    """-> (an unsigned 64-bit integer of 7 bits a byte, lowest first, the position after it), or ValueError."""
    value = 0
    for i, byte in enumerate(data[position:position + 10]):
        value |= (byte & 127) << 7 * i
        if byte == 0 and i > 0:
            break  # a longer form of the same number, which no writer uses, would let a flipped bit pass
        if byte < 128:
            return value & (1 << 64) - 1, position + i + 1
    raise ValueError("a number that does not end")


def _fields(message, wires):
    """A protobuf message -> dict field number -> list of values, for the fields in `wires` (number -> wire type)."""
    fields, position = {number: [] for number in wires}, 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(message, position)
        else:
            if wire == 2:
                length, position = _varint(message, position)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise ValueError("a field of unknown type")
            if length > len(message) - position:
                raise ValueError("a field that does not end")
            value, position = message[position:position + length], position + length
        if number in wires:
            if wire != wires[number]:
                raise ValueError("a field of the wrong type")
            fields[number].append(value)
    return fields


def _block(data, offset, size, path):
    """A block of a LevelDB table, its CRC checked -> list of (key, value) in bytes."""
    if offset + size + TRAILER > len(data) - FOOTER:
        raise ValueError("a block outside the file")
    content, kind = data[offset:offset + size], data[offset + size]
    saved = int.from_bytes(data[offset + size + 1:offset + size + 5], "little")
    if _masked(crc32c(data[offset:offset + size + 1])) != saved:
        raise ValueError("a checksum that is wrong")
    if kind != 0:
        raise _bad(path, "blocks as TensorFlow writes them", f"compression {kind}", "save it without")
    restarts = int.from_bytes(content[-4:], "little")
    end = size - 4 - 4 * restarts
    if size < 4 or end < 0:
        raise ValueError("more restarts than a block has room for")
    pairs, key, position, keys = [], b"", 0, 0
    while position < end:
        shared, position = _varint(content, position)
        own, position = _varint(content, position)
        length, position = _varint(content, position)
        if shared > len(key) or own + length > end - position:
            raise ValueError("an entry that does not end")
        key, value = key[:shared] + content[position:position + own], content[position + own:position + own + length]
        keys += len(key)
        if keys > 64 * size:  # keys share their beginnings, so a small block could spell out endless ones
            raise ValueError("keys of absurd length")
        if pairs and key <= pairs[-1][0]:
            raise ValueError("keys out of order")
        pairs.append((key, value))
        position += own + length
    return pairs


def _read_index(path):
    """A LevelDB table, as TensorFlow's .index files are (leveldb/doc/table_format.md) -> dict key -> value, bytes."""
    data = bytes(_map(path))
    try:
        if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != TABLE_MAGIC:
            raise ValueError("no table's last bytes")
        footer, position, handles = data[-FOOTER:-8], 0, []
        for _ in range(2):  # of the meta index, which TensorFlow leaves empty, and of the index
            offset, position = _varint(footer, position)
            size, position = _varint(footer, position)
            handles.append((offset, size))
        if any(footer[position:]):
            raise ValueError("something in the padding")
        _block(data, *handles[0], path)
        entries = {}
        for _, handle in _block(data, *handles[1], path):
            offset, position = _varint(handle, 0)
            size, position = _varint(handle, position)
            handles.append((offset, size))
            for key, value in _block(data, offset, size, path):
                if key in entries:
                    raise ValueError("a key twice")
                entries[key] = value
    except InputError:
        raise
    except ValueError as error:
        raise _bad(path, "the index of a TensorFlow checkpoint", str(error)) from error
    # No checksum covers the handles in the footer; that the blocks fill the file without a gap does.
    _check_tiling([(offset, offset + size + TRAILER) for offset, size in handles], len(data) - FOOTER, path, "blocks")
    return entries


def _string_crc(data, count):
    """The CRC of a string tensor: of its lengths as uint32, their own masked CRC, and the strings; None if damaged."""
    lengths, position = [], 0
    try:
        for _ in range(count):
            length, position = _varint(data, position)
            lengths.append(length.to_bytes(4 if length < 1 << 32 else 8, "little"))
    except ValueError:
        return None
    return crc32c(b"".join(lengths) + data[position:])


def read_tf_checkpoint(prefix):
    """TensorFlow's checkpoint of the second version (tensor_bundle.proto): PREFIX.index and PREFIX.data-00000-of-00001,
    ... -> dict name -> tensor, on memory maps as in read_safetensors, with the file's own names; kernels are (in, out).

    The index maps each name to a BundleEntryProto (dtype, shape, shard, offset, size, CRC), and "" to a
    BundleHeaderProto; every CRC-32C is checked. Tensors of strings are left out. Raises InputError, also for
    partitioned variables."""
    prefix = str(prefix)
    path = prefix + ".index"
    entries = _read_index(path)
    if b"" not in entries:
        raise _bad(path, "the index of a TensorFlow checkpoint", "no header in it")
    tensors, shards, spans = {}, {}, {}
    name = ""
    try:
        header = _fields(entries.pop(b""), {1: 0, 2: 0})
        shard_count = (header[1] or [0])[-1]
        if (header[2] or [0])[-1] != 0:
            raise _bad(path, "little-endian data", "big-endian data", "save it on another machine")
        for key, entry in entries.items():
            name = key.decode()
            fields = _fields(entry, {1: 0, 2: 2, 3: 0, 4: 0, 5: 0, 6: 5, 7: 2})
            kind, shard, offset, size = ((fields[number] or [0])[-1] for number in (1, 3, 4, 5))
            if fields[7]:
                raise _bad(path, "whole variables", f"{_show(name)} in slices", "save it without a partitioner")
            dimensions = _fields((fields[2] or [b""])[-1], {2: 2, 3: 0})[2]
            shape = tuple((_fields(dimension, {1: 0})[1] or [0])[-1] for dimension in dimensions)
            count = _count(shape)
            if kind != TF_STRING and kind not in TF_TYPES:
                raise _bad(path, "numbers", f"{_show(name)} of TensorFlow's type {kind}", "leave it out when saving")
            if count is None or kind != TF_STRING and count * TF_TYPES[kind].itemsize != size or shard >= shard_count:
                raise ValueError("a size that does not fit its shape, or no such shard")
            data_path = f"{prefix}.data-{shard:05d}-of-{shard_count:05d}"
            if data_path not in shards:
                shards[data_path], spans[data_path] = _map(data_path), []
            data = shards[data_path]
            if offset + size > len(data):
                raise _bad(data_path, f"{_show(name)} up to byte {offset + size:,}", f"a file of {len(data):,}")
            spans[data_path].append((offset, offset + size))
            content = memoryview(data)[offset:offset + size]
            if kind == TF_STRING:
                crc = _string_crc(bytes(content), count)
            else:
                crc = crc32c(content)
            if crc is None or _masked(crc) != int.from_bytes((fields[6] or [b""])[-1], "little"):
                raise _bad(data_path, f"{_show(name)} as it was saved", "a checksum that is wrong")
            if kind != TF_STRING:
                tensors[name] = _view(data, offset, count, TF_TYPES[kind], shape)
    except InputError:
        raise
    except ValueError as error:
        raise _bad(path, "the index of a TensorFlow checkpoint", f"{error} in {_show(name)}") from error
    return tensors


# ---------------------------------------------------------------- weights into a module

def load_weights(path):
    """Weights from a file of any of the three kinds, a TensorFlow prefix, or a folder with model.safetensors, else
    pytorch_model.bin, else one TensorFlow checkpoint (*.ckpt*.index, also one folder below, where Google's archives
    have it) -> (dict name -> tensor, "safetensors" | "pytorch" | "tensorflow"). Raises InputError where there is none
    or more than one."""
    path = Path(path)
    try:
        if path.is_dir():
            names = ("model.safetensors", "pytorch_model.bin")
            found = [path / name for name in names if (path / name).is_file()][:1]
            found = found or sorted([*path.glob("*.ckpt*.index"), *path.glob("*/*.ckpt*.index")])
            if len(found) != 1:
                raise _bad(path, "model.safetensors, pytorch_model.bin or one TensorFlow checkpoint (*.ckpt*.index)",
                           f"{len(found)} checkpoints" if found else "none of them", "name another folder or one file")
            path = found[0]
        elif not path.is_file() and Path(f"{path}.index").is_file():
            path = Path(f"{path}.index")
    except (OSError, ValueError) as error:
        raise _no_access("read", path, error) from error
    if path.suffix == ".safetensors":
        return read_safetensors(path), "safetensors"
    if path.suffix in (".bin", ".pt", ".pth"):
        return read_pytorch(path), "pytorch"
    if path.suffix == ".index":
        return read_tf_checkpoint(str(path)[:-len(".index")]), "tensorflow"
    raise _bad(path, "a folder with weights, or a file *.safetensors, *.bin, *.pt or *.index",
               "another file" if path.is_file() else "nothing there", "name one of these")


def assign(module, weights, table, left_out, source, optional=()):
    """Fills every parameter and buffer of `module` from `weights` (dict name -> tensor), and returns the set of those
    that it did not fill (some of `optional`).

    table: own name -> the names in the file whose tensors, joined along their first dimension, it is (mostly one).
    left_out: regular expressions for whole names in the file that are not used, on purpose. optional: own names that a
    file may lack. source: the file's name for messages. Floating types are converted to the module's. Raises
    InputError, before anything is changed, for a name in the file that is neither used nor left out, a name used twice,
    one that is missing, and a tensor of another shape, of integers where floats belong, or with NaN or infinity."""
    own = module.state_dict()
    if own.keys() != table.keys():
        odd = sorted(own.keys() ^ table.keys())[0]
        raise _bad(source, "a table of names that covers the model", f"{odd!r} on one side only", "mend the table")
    values, used, unfilled = {}, set(), set()
    for name, target in own.items():
        parts = (table[name],) if isinstance(table[name], str) else table[name]
        missing = [part for part in parts if part not in weights]
        if len(missing) == len(parts) and name in optional:
            unfilled.add(name)
            continue
        if missing:
            raise _bad(source, f"a tensor {missing[0]!r}", "none of that name", "use the weights of such a model")
        for part in parts:
            if part in used:
                raise _bad(source, f"one use of {part!r}", "two", "mend the table")
            used.add(part)
            if weights[part].is_floating_point() != target.is_floating_point():
                raise _bad(source, f"{part!r} of a type like {target.dtype}", str(weights[part].dtype))
            if target.is_floating_point() and not torch.isfinite(weights[part].to(target.dtype)).all():
                raise _bad(source, f"finite numbers of {target.dtype} in {part!r}", "NaN or infinity")
            if len(parts) > 1 and (weights[part].dim() != target.dim() or weights[part].shape[1:] != target.shape[1:]):
                raise _bad(source, f"{part!r} to fit {name!r} of shape {tuple(target.shape)}",
                           f"shape {tuple(weights[part].shape)}", "check that config and weights belong together")
        value = torch.cat([weights[part] for part in parts]) if len(parts) > 1 else weights[parts[0]]
        if value.shape != target.shape:
            raise _bad(source, f"{' + '.join(map(repr, parts))} of shape {tuple(target.shape)}",
                       f"shape {tuple(value.shape)}", "check that config and weights belong together")
        values[name] = value
    for name in weights:
        if name not in used and not any(re.fullmatch(pattern, name) for pattern in left_out):
            raise _bad(source, "only names of this kind of model", _show(name), "use the weights of such a model")
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    return unfilled
