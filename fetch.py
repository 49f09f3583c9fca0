"""Downloads over HTTPS, with mirrors, resume and pinned digests; archives unpacked; and where data sets are.

Standard library only. Every connection goes through `open_url`, which the tests replace.
"""
import gzip
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections import namedtuple
from contextlib import closing
from urllib.parse import urlsplit

TIMEOUT = 20          # seconds without a byte before a mirror is given up
CHUNK = 1 << 16       # bytes per read

FASHION_MIRRORS = [   # the data set's own repository, twice, and its authors' bucket
    'https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/',
    'https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/',
    'https://fashion-mnist.s3.eu-central-1.amazonaws.com/',
]
# SHA-256 and bytes. The data set's README publishes only MD5s; the files with these SHA-256s have them:
# 8d4fb7e6c68d591d4c3dfef9ec88bf0d, 25c81989df183df01b3e8a0aad5dffbe,
# bef4ecab320f06d8554ea6380940ec79, bb300cfdad3c16e7a12a480ee83cd310.
FASHION_MNIST = {
    'train-images-idx3-ubyte.gz':
        ('3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84', 26421880),
    'train-labels-idx1-ubyte.gz':
        ('a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845', 29515),
    't10k-images-idx3-ubyte.gz':
        ('346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073', 4422102),
    't10k-labels-idx1-ubyte.gz':
        ('67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5', 5148),
}
TEXT = 1 << 20        # bytes, more than any of the text files in an archive has
# An archive: folder that it makes by itself, files {name: most bytes}. Of these two no SHA-256 is published, and
# none of ours could be vouched for; an MD5 finds damage and a wrong file, if not a forgery by the authors themselves.
Archive = namedtuple('Archive', 'url md5 size folder files')
ARCHIVES = {
    'stl10': Archive('https://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz',
                     '91f7769df0f17e558f3565bffb0c7dfb', 2640397119, 'stl10_binary',
                     {'train_X.bin': 5000 * 27648, 'train_y.bin': 5000, 'test_X.bin': 8000 * 27648, 'test_y.bin': 8000,
                      'unlabeled_X.bin': 100000 * 27648, 'class_names.txt': TEXT, 'fold_indices.txt': TEXT}),
    'cifar10': Archive('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
                       'c32a1d4ab5d03f1284b67883e8d87530', 170052171, 'cifar-10-batches-bin',
                       {**{f'data_batch_{i}.bin': 10000 * 3073 for i in range(1, 6)}, 'test_batch.bin': 10000 * 3073,
                        'batches.meta.txt': TEXT}),
}


class MirrorFailed(Exception):
    """One mirror could not give the file; the text says why in a few words."""


def fashion_mnist(folder):
    """Downloads those of Fashion-MNIST's four files that `folder` lacks. Raises as `download` does."""
    os.makedirs(folder, exist_ok=True)
    for name, (sha256, size) in FASHION_MNIST.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            download([mirror + name for mirror in FASHION_MIRRORS], path, sha256, size)


def unpacked(archive, folder):
    """Downloads an archive into `folder`, unless it lies there, unpacks it and removes it. Raises as `download`
    and `unpack` do."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, os.path.basename(archive.url))
    if size_of(path) != archive.size or digest(path, archive.md5) != archive.md5:
        download([archive.url], path, archive.md5, archive.size)
    unpack(path, folder, archive.files)
    os.remove(path)


def unpack(path, folder, files):
    """Writes into `folder` the plain files of a .tar.gz whose base names are in `files`, {name: most bytes}; all
    else in it, links, devices and folders, is passed over. A file has its name only once it is whole. Raises
    ValueError, one sentence, for an archive that is damaged, too large or without one of the files; OSError."""
    lacking = set(files)
    try:
        with gzip.open(path) as content, tarfile.open(fileobj=Bounded(content, sum(files.values())), mode='r|') as tar:
            for member in tar:
                name = member.name.rpartition('/')[2]
                if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and name in lacking:
                    if member.size > files[name]:
                        raise tarfile.TarError(f'{name} in it has {member.size:,} bytes, more than {files[name]:,}')
                    write_member(tar.extractfile(member), os.path.join(folder, name))
                    lacking.remove(name)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, OverflowError) as e:
        raise ValueError(f'{path} can not be unpacked ({" ".join(str(e).split())}); remove it') from None
    if lacking:
        raise ValueError(f'{path} has no {", ".join(sorted(lacking))} in it; remove it')


def write_member(source, path):
    """Copies a member of an archive to `path`, which exists only afterwards. tarfile raises where it is cut off."""
    try:
        with open(path + '.part', 'wb') as f:
            shutil.copyfileobj(source, f, 1 << 20)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + '.part', path)
    finally:
        if os.path.exists(path + '.part'):
            os.remove(path + '.part')


class Bounded:
    """A stream that refuses to give much more than `most` bytes, which is all that an honest archive unpacks to."""

    def __init__(self, stream, most):
        self.stream, self.left = stream, most + TEXT

    def read(self, n):
        self.left -= n
        if self.left < 0:
            raise tarfile.TarError('it unpacks to more than it should')
        return self.stream.read(n)


def download(urls, path, checksum, size):
    """Writes to `path` the file of `size` bytes with this SHA-256 or MD5 (hex) from the first of `urls` that has it.

    A part that a broken download left in `<path>.part` is continued. Raises ConnectionError (one sentence)
    when every mirror failed, OSError when the file can't be written, ValueError for a URL that isn't https.
    """
    part, failures = path + '.part', []
    for url in urls:
        if urlsplit(url).scheme != 'https':
            raise ValueError(f'{url} is not an https URL, and nothing else is downloaded from')
    for url in urls:
        try:
            complete(url, part, checksum, size)
            return os.replace(part, path)
        except MirrorFailed as e:
            failures.append(f'{urlsplit(url).hostname} ({e})')
    raise ConnectionError(f'{os.path.basename(path)} could not be downloaded: {", ".join(failures)}')


def complete(url, part, checksum, size):
    """Makes `part` the whole, verified file, safe on disk. Raises MirrorFailed; OSError as writing does."""
    first = size_of(part)
    if first > size:
        os.remove(part)
    if first != size:
        first = receive(url, part, size)
    if digest(part, checksum) == checksum:
        return
    os.remove(part)
    if not first:
        raise MirrorFailed('wrong SHA-256' if len(checksum) == 64 else 'wrong MD5')
    complete(url, part, checksum, size)   # the old part may be what was wrong: this mirror again, from zero


def receive(url, part, size):
    """Adds to `part` what it lacks; returns the byte it continued at. Raises MirrorFailed, OSError."""
    body, first = answer(url, size_of(part), size)
    got, show = first, progress(os.path.basename(part)[:-len('.part')], first, size)
    with closing(body), open(part, 'ab' if first else 'wb') as f:
        # one byte more than wanted, at most: enough to see that a file is longer
        while got <= size and (chunk := read(body, min(CHUNK, size + 1 - got))):
            f.write(chunk)
            got += len(chunk)
            show(got)
    if got > size:
        os.remove(part)
        raise MirrorFailed(f'sent more than {size} bytes')
    if got < size:
        raise MirrorFailed(f'ended after {got} of {size} bytes')
    return first


def answer(url, start, size):
    """(response, byte it begins at): `start`, or 0 where the server sends all. Raises MirrorFailed."""
    try:
        body = open_url(url, start)
    except urllib.error.HTTPError as e:
        if e.code == 416 and start:   # range not satisfiable
            return answer(url, 0, size)
        raise MirrorFailed(f'HTTP {e.code}') from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise MirrorFailed(why(e)) from None
    going_on = body.status == 206 and body.headers.get('Content-Range', '').startswith(f'bytes {start}-')
    first, length = start if going_on else 0, body.headers.get('Content-Length')
    if (going_on or body.status == 200) and length in (None, str(size - first)):
        return body, first
    body.close()   # before the part is touched: this may be a hotel's log-in page
    raise MirrorFailed(f'HTTP {body.status} with {length} bytes where {size - first} were wanted')


def read(body, n):
    """At most `n` bytes. Raises MirrorFailed for the network's OSErrors, so that the disk's stand apart."""
    try:
        return body.read(n)
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise MirrorFailed(why(e)) from None


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to an https URL."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(newurl).scheme != 'https':
            raise urllib.error.URLError('redirects away from https')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url, start):
    """The response (.status, .headers, .read, .close) to a request for `url` from byte `start` on."""
    headers = {'Range': f'bytes={start}-'} if start else {}
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.build_opener(HttpsOnly).open(request, timeout=TIMEOUT)


def why(e):
    """A network exception in a few words."""
    e = getattr(e, 'reason', None) or e   # URLError wraps the exception that says more
    return str(getattr(e, 'strerror', None) or e) or type(e).__name__


def size_of(path):
    """Bytes; 0 when there is no such file."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def digest(path, like):
    """SHA-256 (hex) of the whole file, or its MD5 if `like` is one; the file is on disk (fsync) afterwards."""
    with open(path, 'rb+') as f:
        sha = hashlib.sha256() if len(like) == 64 else hashlib.md5(usedforsecurity=False)
        while chunk := f.read(1 << 20):
            sha.update(chunk)
        os.fsync(f.fileno())
    return sha.hexdigest()


def progress(name, first, size):
    """A function of the bytes so far that keeps a line on stderr: live on a terminal, else one at the end."""
    began, shown, live = time.monotonic(), 0, sys.stderr.isatty()

    def show(got):
        nonlocal shown
        now, end = time.monotonic(), got == size
        if got > size or not end and (not live or now - shown < 0.2):
            return
        shown, rate = now, max(got - first, 1) / max(now - began, 1e-3)   # bytes per second
        line = (f'{name} {100 * got // size:3d} %, {got / 1e6:.2f} of {size / 1e6:.2f} MB, '
                f'{rate / 1e6:.2f} MB/s, {(size - got) / rate:.0f} s left')
        print(line.ljust(79 if live else 0), end='\n' if end else '\r', file=sys.stderr, flush=True)
    return show
