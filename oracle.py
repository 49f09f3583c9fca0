"""Who answers: a person on a page that shows an image and takes its class, or a CSV file.

Both have collect(round): None once every question of the round is answered in the database, else one sentence
on why not. The page, label.html, is served to this machine alone, at an address that nobody can guess.
"""
import csv
import json
import math
import secrets
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import report
import runs
from data import normal

PAGE = Path(__file__).with_name('label.html')


# ---------------------------------------------------------------------------------------- a CSV file

class File:
    """Answers from a CSV file: an id or file name, and a class; ? for can't tell, nothing for not yet.

    database: LabelDatabase, or None to read only the file; images: index to uint8 (C, H, W); classes: K
    names; path: of the CSV, which need not exist yet; folder: for wanted.csv and wanted.png; names: of the
    images, if they are files; class_ids: K numbers that stand for the classes too, 0..K-1 by default.
    """

    def __init__(self, database, images, classes, path, folder, names=None, class_ids=None):
        self.database = database
        self.images = images
        self.path = Path(path)
        self.table = Path(folder, 'wanted.csv')
        self.sheet = Path(folder, 'wanted.png')
        self.key = 'file' if names else 'id'
        self.names = names or range(len(images))
        self.ids = index_of(names or [], range(len(images)))
        self.labels = {'?': None, **index_of(classes, class_ids or range(len(classes)))}

    def collect(self, round):
        """Take the round's answers if the file has them all; else write wanted.csv and wanted.png."""
        answers = self.read()
        ids = self.database.unanswered(round)
        missing = [i for i in ids if i not in answers]
        if missing:
            runs.write_csv(self.table, [self.key, 'class'], [(self.names[i], '') for i in missing])
            x = self.images[missing] / 255
            zoom = math.ceil(84 / x.shape[3])
            report.write_png(self.sheet, report.sheet(*x.split(10), gap=4, zoom=zoom))
            return (f'labels missing: {len(missing)}; {self.sheet} shows the images, ten a row, in the order '
                    f'of {self.table}; fill in its lines and add them to {self.path}')
        for i in ids:
            self.database.answer(i, answers[i], round)
        self.table.unlink(missing_ok=True)
        self.sheet.unlink(missing_ok=True)

    def read(self):
        """{id: class index, or None for can't tell}; ValueError names the first line that is wrong.

        A line with `class` or `label` in it names the columns; without one they are image and class.
        """
        answers = {}
        if self.database:
            ids, labels = self.database.labels()
            answers.update(zip(ids.tolist(), labels.tolist()))
        image, label = 0, 1
        for number, row in enumerate(read_csv(self.path), 1):
            column = {cell.lower(): k for k, cell in enumerate(row)}
            where = f'{self.path}, line {number}'
            if 'class' in column or 'label' in column:
                image = column.get('file', column.get('id', 0))
                label = column.get('class', column.get('label'))
            elif len(row) > max(image, label) and row[label]:              # else there is no answer yet
                i = look_up(self.ids, row[image], where)
                k = look_up(self.labels, row[label], where)
                if answers.setdefault(i, k) != k:
                    raise ValueError(f'{where} gives image {row[image]} another class than before')
        return answers


def index_of(names, ids):
    """{name or id: index}; no ids where some name is a number, which could mean two things."""
    index = {normal(name): i for i, name in enumerate(names)}
    if not any(Path(name).stem.isdecimal() for name in names):          # 17 could be 17.png
        index.update((str(id), i) for i, id in enumerate(ids))
    return index


def look_up(index, name, where):
    key = name if name in index else name.removesuffix('.0')       # a spreadsheet may write 28 as 28.0
    if key not in index:
        known = ', '.join([*index][:20])
        raise ValueError(f'{where} has {name[:40]!r}; wanted one of the {len(index):,} names {known}')
    return index[key]


def read_csv(path):
    """Rows of a CSV file, [] if there is none. As spreadsheets write it: separated by commas, semicolons or
    tabs, in UTF-8 or in UTF-16 with a byte order mark."""
    blob = path.read_bytes() if path.exists() else b''
    encoding = 'utf-16' if blob[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig'
    try:
        text = blob.decode(encoding)
        lines = text.splitlines()
        delimiter = max('\t;,', key=lambda mark: sum(mark in line for line in lines))
        rows = list(csv.reader(lines, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f'{path} is not a readable CSV file ({e}); save it as CSV UTF-8') from None
    return [[normal(cell) for cell in row] for row in rows]


# ------------------------------------------------------------------------------------------ the page

class Web:
    """The page. database: a LabelDatabase of its own, for the threads that serve; images: index to uint8
    (C, H, W); classes: K names; left: function that returns (seconds until the next questions or None,
    whether there will be any); port: 0 for any that is free."""

    def __init__(self, database, images, classes, rounds, left, port=0):
        self.database = database
        self.images = images
        self.classes = classes
        self.rounds = rounds
        self.left = left
        self.round = None                                   # the one that is open
        self.finished = None                                # at the end: where the predictions are
        self.lock = threading.Lock()
        self.news = threading.Event()                       # what a page without a question waits for
        self.token = secrets.token_urlsafe(24)
        try:
            self.server = ThreadingHTTPServer(('127.0.0.1', port), Handler)
        except OSError as e:
            raise ValueError(f'--port {port} can not be used ({e}); try another, or 0 for any') from None
        self.server.web = self
        self.address = f'http://127.0.0.1:{self.server.server_port}/{self.token}/'
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def collect(self, round):
        """Wait until the person has answered the round."""
        n = len(self.database.unanswered(round))
        print(f'round {round + 1}: {n} images to label at {self.address}', flush=True)
        self.round = round
        self.news.set()
        try:
            while self.database.unanswered(round):
                time.sleep(0.1)
        finally:
            self.round = None
            self.news.clear()

    def done(self, path):
        """Have the page say that all is done and where the predictions are."""
        self.finished = str(path)
        self.news.set()
        time.sleep(1)                                       # until the page knows

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def state(self):
        """What the page shows, as a dict for JSON."""
        round = self.round                                  # another thread sets it
        ids = self.database.unanswered(round)
        asked, given, skipped, _ = self.database.round_counts(round)
        _, estimate = self.database.rounds().get(round, (0, None))
        seconds, more = self.left()
        return {'question': ids[0] if ids else None, 'last': self.database.last(round),
                'round': round, 'rounds': self.rounds, 'done': given + skipped, 'of': asked,
                'spent': self.database.spent, 'budget': self.database.budget, 'estimate': estimate,
                'classes': self.classes, 'left': seconds, 'more': more, 'finished': self.finished}

    def change(self, action, id, label=None):
        """(409 if the question is not open, or not the last to undo, else 200; state)."""
        if label is not None and label not in range(len(self.classes)):
            raise ValueError('there is no such class')
        with self.lock:
            if action == 'undo':
                changed = self.database.undo(id, self.round)
            else:
                changed = self.database.answer(id, label, self.round)
            return 200 if changed else 409, self.state()


class Handler(BaseHTTPRequestHandler):
    """One request: it has to name this machine and know the token, or it learns nothing."""

    def handle(self):
        with suppress(OSError):                             # the browser may leave when it likes
            super().handle()

    def do_GET(self):
        host = self.headers.get('Host', '').partition(':')[0]      # at any port: ssh -L has its own
        token, slash, path = self.path[1:].partition('/')
        known = secrets.compare_digest(token.encode(), self.server.web.token.encode())
        if host not in ('127.0.0.1', 'localhost') or not known:
            self.send(403, {'error': 'not for you; open the address that the program has printed'})
        elif not slash:
            self.send(301, {}, Location=f'/{token}/')
        else:
            try:
                self.reply(path)
            except (ValueError, TypeError, LookupError) as e:
                self.send(400, {'error': f'not understood, or not saved: {e}'})

    do_POST = do_GET

    def reply(self, path):
        web = self.server.web
        if path == '':
            self.send(200, PAGE.read_bytes(), 'text/html; charset=utf-8')
        elif path in ('state', 'news'):
            if path == 'news':
                web.news.wait(2)
            self.send(200, web.state())
        elif path in ('answer', 'undo'):
            body = self.rfile.read(int(self.headers['Content-Length']))
            self.send(*web.change(path, **json.loads(body)))
        else:
            image = web.images[int(path.removesuffix('.png'))].numpy()
            image = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            self.send(200, report.png(image), 'image/png')

    def send(self, code, body, kind='application/json', **headers):
        blob = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers.update({'Content-Type': kind, 'Content-Length': len(blob), 'Cache-Control': 'no-store'})
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(blob)

    def log_message(self, *_):
        pass
