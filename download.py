"""Fashion-MNIST, STL-10 and CIFAR-10 over HTTPS: mirrors, resume, pinned checksums; archives unpacked.

Standard library only. Every connection goes through `open_url`, which the tests replace.
"""
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import urllib.request
from collections import namedtuple
from contextlib import closing

from device import progress

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

# No SHA-256 of these two is published; an MD5 finds damage and a wrong file.
Archive = namedtuple('Archive', 'url md5 size files')
ARCHIVES = {
    'stl10': Archive(
        'https://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz',
        '91f7769df0f17e558f3565bffb0c7dfb', 2640397119,
        ['train_X.bin', 'train_y.bin', 'test_X.bin', 'test_y.bin', 'unlabeled_X.bin', 'class_names.txt']),
    'cifar10': Archive(
        'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
        'c32a1d4ab5d03f1284b67883e8d87530', 170052171,
        [*(f'data_batch_{i}.bin' for i in range(1, 6)), 'test_batch.bin', 'batches.meta.txt']),
}


def fashion_mnist(folder):
    """Download those of Fashion-MNIST's four files that `folder` lacks. Raises as `download` does."""
    os.makedirs(folder, exist_ok=True)
    for name, (sha256, size) in FASHION_MNIST.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            download([mirror + name for mirror in FASHION_MIRRORS], path, sha256, size)


def unpacked(archive, folder):
    """Download an archive into `folder`, unless it lies there, unpack it and remove it.

    Raises as `download` does.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, os.path.basename(archive.url))
    if size_of(path) != archive.size or digest(path, archive.md5) != archive.md5:
        download([archive.url], path, archive.md5, archive.size)
    unpack(path, folder, archive.files)
    os.remove(path)


def unpack(path, folder, names):
    """Write into `folder` the files of a .tar.gz that have these base names, each once it is whole."""
    with tarfile.open(path, 'r|gz') as tar:
        for member in tar:
            name = os.path.basename(member.name)
            if name in names:
                part = os.path.join(folder, f'{name}.part')
                with open(part, 'wb') as f:
                    shutil.copyfileobj(tar.extractfile(member), f)
                os.replace(part, os.path.join(folder, name))


def download(urls, path, checksum, size):
    """Write to `path` the file of `size` bytes and this SHA-256 or MD5 (hex) from the first URL that has it.

    A part that a broken download left in `<path>.part` is continued. ConnectionError, one sentence, when
    every URL failed.
    """
    part = path + '.part'
    failures = []
    for url in urls:
        try:
            complete(url, part, checksum, size)
            return os.replace(part, path)
        except (OSError, http.client.HTTPException) as e:
            failures.append(f'{url.split("/")[2]} ({e})')
    raise ConnectionError(f'{os.path.basename(path)} could not be downloaded: {", ".join(failures)}')


def complete(url, part, checksum, size):
    """Make `part` the whole file, with the right checksum; OSError or HTTPException where that fails."""
    start = size_of(part)
    if start < size:
        start = receive(url, part, start, size)
    if digest(part, checksum) == checksum:
        return
    os.remove(part)
    if start == 0:
        raise OSError('wrong checksum')
    complete(url, part, checksum, size)        # the old part may be what was wrong: once more, from zero


def receive(url, part, start, size):
    """Add to `part` what it lacks from byte `start` on; returns the byte at which the server began."""
    name = os.path.basename(part).removesuffix('.part')
    print(f'{name}: downloading {size / 1e6:.1f} MB', file=sys.stderr)
    show = progress(name, size)
    with closing(open_url(url, start)) as body:
        if body.status != 206:                 # the server sends all
            start = 0
        with open(part, 'ab' if start else 'wb') as f:
            while f.tell() < size:
                chunk = body.read(min(CHUNK, size - f.tell()))
                if not chunk:
                    raise OSError(f'ended after {f.tell()} of {size} bytes')
                f.write(chunk)
                show(f.tell())
    return start


def open_url(url, start):
    """The response (.status, .read, .close) to a request for `url` from byte `start` on."""
    headers = {'Range': f'bytes={start}-'} if start else {}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def size_of(path):
    """Bytes; 0 where there is no such file."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def digest(path, like):
    """SHA-256 (hex) of the file, or its MD5 if `like` is one."""
    sha = hashlib.sha256() if len(like) == 64 else hashlib.md5(usedforsecurity=False)
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
