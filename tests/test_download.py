import contextlib
import hashlib
import http.client
import io
import os
import tarfile
import urllib.error
from unittest import mock

from helpers import folder, inside, raises

import data
import download

FILE = bytes(range(256)) * 1000                               # what the mirrors of these tests hold


class Response(io.BytesIO):
    """What `download.open_url` returns: `content`, at most 10,000 bytes a read, then `error`, if any."""

    def __init__(self, content=FILE, status=200, error=None):
        super().__init__(content)
        self.status, self.error = status, error

    def read(self, n):
        chunk = super().read(min(n, 10_000))
        if not chunk and self.error:
            raise self.error
        return chunk


def whole(start):
    return Response()


def rest(start, content=FILE):
    return Response(content[start:], 206 if start else 200)


def wrong(start):
    return Response(bytes(len(FILE)))


def http_error(start):
    raise urllib.error.HTTPError('https://a/images.gz', 503, 'no', {}, None)


def broken(error):
    """A mirror whose answer stops after 70,000 bytes; with an error, if one is given."""
    return lambda start: Response(FILE[:70_000], error=error)


def downloaded(part=None, **mirrors):
    """Download FILE from mirrors {host: function of start}: (file, part or None, requests, error)."""
    requests, error = [], None

    def open_url(url, start):
        host = url.split('/')[2]
        requests.append((host, start))
        return mirrors[host](start)

    with folder() as f, mock.patch.object(download, 'open_url', open_url):
        if part is not None:
            (f / 'images.gz.part').write_bytes(part)
        urls = [f'https://{host}/images.gz' for host in mirrors]
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                download.download(urls, str(f / 'images.gz'), hashlib.sha256(FILE).hexdigest(), len(FILE))
        except OSError as e:
            error = e
        left = {path.name: path.read_bytes() for path in f.iterdir()}
    return left.get('images.gz'), left.get('images.gz.part'), requests, error


def test_a_download_ends_with_the_whole_file_or_goes_on_where_it_broke_off():
    reset = broken(ConnectionResetError('reset'))
    for part, mirrors, requests in (
            (None, {'a': whole}, [('a', 0)]),
            (None, {'a': reset, 'b': rest}, [('a', 0), ('b', 70_000)]),
            (None, {'a': broken(None), 'b': rest}, [('a', 0), ('b', 70_000)]),     # it just ends
            (None, {'a': lambda start: Response(FILE * 2)}, [('a', 0)]),           # it does not end
            (FILE, {'a': rest}, []),                          # killed just before the rename
            (b'junk', {'a': whole}, [('a', 4)]),              # a server that ignores the range
            (FILE + b'x', {'a': rest}, [('a', 0)]),
            (b'not these', {'a': rest}, [('a', 9), ('a', 0)]),          # the part was wrong: again, from zero
            (None, {'a': wrong, 'b': rest}, [('a', 0), ('b', 0)]),
            (None, {'a': http_error, 'b': rest}, [('a', 0), ('b', 0)])):
        assert downloaded(part, **mirrors) == (FILE, None, requests, None), (part, mirrors)


def test_a_download_that_fails_says_in_one_sentence_why_and_keeps_what_is_right():
    def unknown(start):
        raise urllib.error.URLError(OSError(-2, 'Name or service not known'))

    for part, mirrors, left, said in (
            (None, {'a': broken(TimeoutError('timed out'))}, FILE[:70_000], 'a (timed out)'),
            (None, {'a': broken(None)}, FILE[:70_000], 'a (ended after 70000 of 256000 bytes)'),
            (None, {'a': broken(http.client.IncompleteRead(b''))}, FILE[:70_000], 'a (IncompleteRead'),
            (None, {'a': wrong}, None, 'a (wrong checksum)'),
            (FILE[:9], {'a': unknown, 'b': http_error}, FILE[:9], 'known>), b (HTTP Error 503: no)')):
        file, kept, _, error = downloaded(part, **mirrors)
        assert file is None and kept == left and isinstance(error, ConnectionError), said
        assert str(error).startswith('images.gz could not be downloaded: a (') and said in str(error)


def test_fashion_mnist_downloads_only_the_files_that_are_missing():
    names = list(download.FASHION_MNIST)
    with folder() as f, mock.patch.object(download, 'download') as fetch:
        (f / names[0]).touch()
        download.fashion_mnist(f)
    for name, call in zip(names[1:], fetch.call_args_list, strict=True):
        urls, path, *expected = call.args
        assert (os.path.basename(path), *expected) == (name, *download.FASHION_MNIST[name]) and len(urls) == 3


def targz(**files):
    """A .tar.gz of a folder `set` with these files, '_' for '.', and of one outside."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as tar:
        for name, content in {'../evil': b'no', 'set/readme': b'no', **files}.items():
            info = tarfile.TarInfo(name if '/' in name else 'set/' + name.replace('_', '.'))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def files_below(f):
    paths = [path for path in f.rglob('*') if path.is_file()]
    return {path.relative_to(f).as_posix(): path.read_bytes() for path in paths}


def test_an_archive_is_downloaded_checked_unpacked_and_removed_and_not_asked_for_again():
    blob = targz(x_bin=FILE, y_txt=b'names')
    archive = download.Archive('https://a.org/set.tar.gz', hashlib.md5(blob).hexdigest(), len(blob),
                               ['x.bin', 'y.txt'])
    answer = mock.Mock(side_effect=lambda url, start: rest(start, blob))
    with folder() as f, inside(f), contextlib.redirect_stderr(io.StringIO()), \
            mock.patch.object(download, 'open_url', answer), \
            mock.patch.dict(download.ARCHIVES, stl10=archive):
        there = data.Path('data/stl10')
        there.mkdir(parents=True)
        (there / 'set.tar.gz.part').write_bytes(blob[:99])
        for _ in range(2):
            assert data.find('stl10') == there
            answer.assert_called_once_with(archive.url, 99)
            assert files_below(f) == {'data/stl10/x.bin': FILE, 'data/stl10/y.txt': b'names'}
        (there / 'y.txt').unlink()
        (there / 'set.tar.gz').write_bytes(blob)              # brought by hand
        assert data.find('stl10') == there and answer.call_count == 1 and len(files_below(f)) == 2
        (there / 'x.bin').unlink()
        blob = bytes(len(blob))
        with raises(ConnectionError, 'a.org (wrong checksum)'):
            data.find('stl10')
