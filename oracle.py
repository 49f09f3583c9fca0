"""People who answer: a page on this machine that shows a picture and takes its class, or a CSV file.

Both have collect(round, stop), which returns None once every question of the round is answered in the database, else
one sentence on why not. The page is served to 127.0.0.1 alone, under an address that nobody can guess.
"""
import base64
import csv
import hashlib
import hmac
import io
import json
import re
import secrets
import sqlite3
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import report
import runs

MAX_BODY = 1000                                         # bytes; an answer takes under 50


class File:
    """Answers from a CSV of lines id,class: names or indices, ? for can't tell, nothing for not yet."""

    def __init__(self, paid, x, classes, path, folder):
        self.paid, self.x, self.classes, self.path, self.folder = paid, x, classes, Path(path), Path(folder)

    def collect(self, round, stop):
        """Takes the round's answers if the file has them all; else writes wanted.csv and wanted.png."""
        answers, ids = self.read(), self.paid.unanswered(round)
        missing = [i for i in ids if i not in answers]
        if not missing:
            for i in ids:
                self.paid.answer(i, answers[i], round)
            for name in ('wanted.csv', 'wanted.png'):
                (self.folder / name).unlink(missing_ok=True)
            return None
        wanted = ''.join(f'{i},\n' for i in missing)
        runs.write_atomic(self.folder / 'wanted.csv', f'id,label\n{wanted}'.encode())
        report.write_png(self.folder / 'wanted.png', report.sheet(
            *(report.captioned(self.x[missing], missing) / 255).split(10), gap=6, zoom=1))
        return (f'labels missing: {len(missing)}; the pictures are in {self.folder}/wanted.png; fill in the lines of '
                f'{self.folder}/wanted.csv and add them to {self.path}')

    def read(self):
        """{id: class index, or None for can't tell} of the file; ValueError names the first line that is wrong."""
        index = {name: k for k, name in enumerate(self.classes)}
        if not any(name.isdecimal() for name in self.classes):               # else 1 could mean two things
            index.update((str(k), k) for k in range(len(self.classes)))
        index.setdefault('?', None)
        try:
            rows = list(csv.reader(io.StringIO(self.path.read_text('utf-8-sig')))) if self.path.exists() else []
        except (UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f'{self.path} is not a readable CSV file ({e})') from None
        answers, known = {}, dict(zip(*(t.tolist() for t in self.paid.revealed())))
        for number, row in enumerate(rows, 1):
            row, where = [cell.strip() for cell in row], f'{self.path}, line {number}'
            if not any(row) or row[0].lower() == 'id':                       # wanted.csv may be appended as it is
                continue
            if len(row) != 2:
                raise ValueError(f'{where} has {len(row)} columns; wanted two, id and class')
            if not (row[0].isascii() and row[0].isdecimal() and len(row[0]) < 19 and int(row[0]) < len(self.x)):
                raise ValueError(f'{where} names the picture {row[0][:40]!r}; wanted an id from 0 to {len(self.x) - 1}')
            if row[1] and row[1] not in index:
                raise ValueError(f'{where} has the class {row[1][:40]!r}; wanted one of {", ".join(index)}')
            if row[1]:
                i, k = int(row[0]), index[row[1]]
                if answers.setdefault(i, k) != k or known.get(i, k) != k:
                    raise ValueError(f'{where} gives picture {i} another class than before')
                answers[i] = k
        return answers


class Web:
    """The page. paid: a LabelDatabase of its own, for its threads; x (N, C, H, W) uint8; left: function that returns
    (seconds until the next questions or None, whether there will be any)."""

    def __init__(self, paid, x, classes, rounds, left):
        self.paid, self.x, self.classes, self.rounds, self.left = paid, x, classes, rounds, left
        self.token, self.lock, self.answered = secrets.token_urlsafe(24), threading.Lock(), threading.Event()
        self.round = None                                                    # the one that is open
        self.server = Server(('127.0.0.1', 0), type('Handler', (Handler,), {'web': self}))
        self.hosts = [f'{name}:{self.server.server_port}' for name in ('127.0.0.1', 'localhost')]
        self.address = f'http://{self.hosts[0]}/{self.token}/'
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def collect(self, round, stop):
        """Waits until the person has answered the round, or a signal came."""
        with self.lock:
            self.round, n = round, len(self.paid.unanswered(round))
        print(f'round {round}: {n} to label at {self.address}', flush=True)
        try:
            while self.unanswered(round) and not stop:
                self.answered.wait(0.2)
                self.answered.clear()
        finally:
            with self.lock:
                self.round = None
        return 'stopped before the round was answered' if self.unanswered(round) else None

    def unanswered(self, round):
        with self.lock:
            return self.paid.unanswered(round)

    def state(self):
        """What the page shows, as a dict for JSON. Call it with the lock held."""
        spent = {'spent': self.paid.spent, 'budget': self.paid.budget, 'classes': self.classes, 'rounds': self.rounds}
        open_ = [] if self.round is None else self.paid.unanswered(self.round)
        if not open_:
            seconds, more = self.left()
            return {**spent, 'question': None, 'left': None if seconds is None else runs.clock(seconds), 'more': more}
        asked, given, skipped, _ = self.paid.tally(self.round)
        return {**spent, 'question': open_[0], 'round': self.round + 1, 'done': given + skipped, 'of': asked,
                'estimate': self.paid.rounds()[self.round][1], 'last': self.paid.last(self.round)}

    def change(self, what, id, label):
        """(HTTP status, state) after an answer or an undo; 409 if the question was not open, or not the last."""
        with self.lock:
            act = {'answer': lambda: self.paid.answer(id, label, self.round),
                   'undo': lambda: self.paid.undo(id, self.round)}[what]
            done = self.round is not None and act()
            state = self.state()
        self.answered.set()
        return (200 if done else 409), state


class Server(ThreadingHTTPServer):
    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], OSError):                       # the browser may leave when it likes
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    """One request: it has to name this host and know the token, or it learns nothing."""
    timeout = 10
    server_version = sys_version = ''

    def do_GET(self):
        self.respond(self.get)

    def do_POST(self):
        self.respond(self.post)

    def respond(self, action):
        host, (token, _, path) = self.headers.get('Host', ''), self.path[1:].partition('/')
        if not (max(same(host, wanted) for wanted in self.web.hosts) and same(token, self.web.token)):
            return self.send(403, {'error': 'not for you'})
        try:
            self.send(*action(path))
        except sqlite3.Error as e:
            self.send(500, {'error': f'the answer could not be saved ({e})'})

    def get(self, path):
        if path == '':
            return 200, PAGE, 'text/html; charset=utf-8'
        if path == 'state':
            with self.web.lock:
                return 200, self.web.state()
        if (match := re.fullmatch(r'(\d{1,12})\.png', path, re.ASCII)) and int(match[1]) < len(self.web.x):
            picture = self.web.x[int(match[1])].numpy()
            return 200, report.png(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)), 'image/png'
        return 404, {'error': 'no such page or picture'}

    def post(self, path):
        length = self.headers.get('Content-Length', '')
        if path not in ('answer', 'undo'):
            return 404, {'error': 'no such action'}
        if not re.fullmatch(r'\d{1,12}', length, re.ASCII):
            return 411, {'error': 'how long is the answer?'}
        if int(length) > MAX_BODY:
            return 413, {'error': f'an answer has {MAX_BODY} bytes at most'}
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        keys, K = {'answer': {'id', 'label'}, 'undo': {'id'}}[path], len(self.web.classes)
        if not (isinstance(body, dict) and set(body) == keys and type(body['id']) is int
                and 0 <= body['id'] < len(self.web.x)):
            return 400, {'error': 'the answer is not understood'}
        label = body.get('label')
        if not (label is None or type(label) is int and 0 <= label < K):
            return 400, {'error': f'there is no such class; wanted 0 to {K - 1}, or null'}
        return self.web.change(path, body['id'], label)

    def send(self, code, body, kind='application/json'):
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(code)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self):
        for key, value in HEADERS.items():
            self.send_header(key, value)
        super().end_headers()

    def log_message(self, *_):
        pass


def same(a, b):
    """Are two strings equal? It takes as long whatever they hold."""
    return hmac.compare_digest(a.encode(errors='replace'), b.encode())


STYLE = '''
:root { color-scheme: light dark; --ground: #f4f3f0; --card: #fff; --ink: #1d1c1a; --soft: #67635b; --line: #dcd8d0;
  --accent: #0b6e5f; --hover: #e6f1ee }
@media (prefers-color-scheme: dark) { :root { --ground: #151614; --card: #1f211e; --ink: #eceae4; --soft: #a09c92;
  --line: #363934; --accent: #5cc9b3; --hover: #24332f } }
* { box-sizing: border-box }
[hidden] { display: none !important }
body { margin: 0; min-height: 100vh; background: var(--ground); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 58rem; margin: 0 auto; padding: 1rem; display: grid; gap: 1rem }
h1 { font-size: 1.15rem; font-weight: 650; margin: 0 }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1rem;
  display: grid; place-items: center; position: sticky; top: .5rem; z-index: 1 }
img { width: min(100%, 33vh, 28rem); aspect-ratio: 1; object-fit: contain; image-rendering: pixelated;
  border-radius: 6px }
figure[aria-busy=true] img { opacity: .25 }
progress { width: 100%; height: .55rem; margin: .45rem 0 0; accent-color: var(--accent); display: block }
.hear { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden }
p { margin: 0 } .soft { color: var(--soft); font-size: .9rem }
.panel { display: grid; gap: .9rem; align-content: start }
.grid { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)) }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  min-height: 2.9rem; padding: .35rem .7rem; display: flex; gap: .6rem; align-items: center; text-align: left;
  cursor: pointer; overflow-wrap: anywhere }
button:hover { background: var(--hover); border-color: var(--accent) }
button:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
button:disabled { opacity: .45; cursor: default }
kbd { font: 600 .8rem/1 ui-monospace, monospace; color: var(--accent); border: 1px solid var(--line);
  border-radius: 5px; padding: .25rem .4rem; flex: none }
dl { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: 0 }
dt { color: var(--soft); font-size: .8rem } dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums }
#wait { text-align: center; padding: 22vh 1rem; display: grid; gap: .6rem; justify-items: center }
#wait h1 { font-size: 1.35rem; text-wrap: balance }
#wait p { max-width: 30rem; text-wrap: balance } #wait progress { max-width: 16rem }
#error { background: #b3261e; color: #fff; border-radius: 10px; padding: .6rem .9rem }
@media (min-width: 800px) { main.two { grid-template-columns: 1fr 21rem; align-items: start; padding: 2rem }
  main.two #error { grid-column: 1 / -1 } img { width: min(100%, 76vh, 28rem) } }
@media (pointer: coarse) { kbd { display: none } }
'''

SCRIPT = '''
const $ = id => document.getElementById(id);
let state = null, shown = null, busy = true, turn = 0;

async function call(path, body) {
  const mine = ++turn;
  if (body) busy = true;
  try {
    const reply = await fetch(path, body && {method: 'POST', headers: {'Content-Type': 'application/json'},
                                             body: JSON.stringify(body)});
    const news = await reply.json();
    if (mine !== turn) return;
    if (news.error) throw new Error(news.error);
    $('error').hidden = true;
    show(news);
  } catch (e) {
    if (mine !== turn) return;
    busy = false;
    if (e instanceof TypeError) return wait('The program has ended', 'All earlier answers are saved. If it was not ' +
      'finished, type its command again with --resume and open the address that it prints.', false);
    $('error').textContent = e.message;
    $('error').hidden = false;
  }
}

function wait(status, then, runs) {
  shown = null;
  $('ask').hidden = $('panel').hidden = true;
  $('wait').hidden = false;
  $('runs').hidden = !runs;
  $('main').className = '';
  document.title = runs ? 'Training' : 'Ended';
  text('status', status);
  text('then', then);
  text('live', runs ? 'Training. ' + then : status + '. ' + then);
}

function text(id, value) { if ($(id).textContent !== value) $(id).textContent = value; }

function show(news) {
  state = news;
  const asks = state.question !== null;
  if (!$('classes').children.length) state.classes.forEach((name, k) => {
    const button = document.createElement('button'), key = document.createElement('kbd');
    key.textContent = k < 10 ? (k + 1) % 10 : '';
    if (k < 10) { button.append(key); button.setAttribute('aria-keyshortcuts', (k + 1) % 10); }
    button.append(name);
    button.onclick = () => answer(k);
    $('classes').append(button);
  });
  if (!asks) {
    busy = false;
    return wait('Training' + (state.left === null ? '' : ', about ' + state.left + ' left'),
                state.more ? 'The next pictures appear here by themselves.'
                           : 'All answers are given; you can close this page.', true);
  }
  $('ask').hidden = $('panel').hidden = false;
  $('wait').hidden = true;
  $('main').className = 'two';
  const place = 'Picture ' + (state.done + 1) + ' of ' + state.of;
  text('place', place);
  text('live', place);
  document.title = (state.of - state.done) + ' to label';
  $('bar').max = state.of;
  $('bar').value = state.done;
  text('round', state.round + ' of ' + state.rounds);
  text('budget', (state.budget - state.spent) + ' of ' + state.budget);
  text('estimate', state.estimate === null ? 'not known yet' : (100 * state.estimate).toFixed(1) + ' %');
  $('undo').disabled = !state.last;
  text('last', !state.last ? '' : 'Last answer: ' + (state.last[1] === null ? 'can\\u2019t tell'
                                                                           : state.classes[state.last[1]]));
  if (state.question === shown) { busy = false; return; }
  shown = state.question;
  busy = true;
  $('ask').setAttribute('aria-busy', 'true');
  $('picture').alt = place + ', to be labelled';
  $('picture').src = shown + '.png';
}

$('picture').onload = $('picture').onerror = () => { busy = false; $('ask').setAttribute('aria-busy', 'false'); };
function answer(label) {
  if (!busy && shown !== null && label < state.classes.length) call('answer', {id: shown, label});
}
function undo() { if (!busy && shown !== null && state.last) call('undo', {id: state.last[0]}); }
$('skip').onclick = () => answer(null);
$('undo').onclick = undo;
document.addEventListener('keydown', e => {
  if (e.repeat || e.ctrlKey || e.metaKey || e.altKey) return;
  const digit = /^(?:Digit|Numpad)([0-9])$/.exec(e.code) || /^([0-9])$/.exec(e.key);
  if (digit) answer((+digit[1] + 9) % 10);
  else if (e.key === 's' || e.key === 'S') answer(null);
  else if (e.key === 'u' || e.key === 'U' || e.key === 'Backspace') undo();
  else return;
  e.preventDefault();
});
(async function poll() {
  if (!busy || shown === null) await call('state');
  setTimeout(poll, state && state.question !== null ? 3000 : 1000);
})();
'''

PAGE = f'''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Labels</title><link rel="icon" href="0.png"><style>{STYLE}</style></head><body><main id="main">
<p id="error" role="alert" hidden></p>
<p id="live" class="hear" aria-live="polite"></p>
<section id="wait"><h1 id="status">One moment</h1><progress id="runs" aria-label="Training"></progress>
<p id="then" class="soft"></p></section>
<figure id="ask" aria-busy="true" hidden><img id="picture" alt=""></figure>
<section id="panel" class="panel" aria-label="Your answer" hidden>
<div><h1 id="place"></h1><progress id="bar" aria-label="Progress of this round"></progress></div>
<div id="classes" class="grid" role="group" aria-label="Which class is it?"></div>
<div class="grid"><button id="skip" aria-keyshortcuts="s"><kbd>S</kbd>Can\u2019t tell</button>
<button id="undo" aria-keyshortcuts="u" disabled><kbd>U</kbd>Undo</button></div>
<p id="last" class="soft"></p>
<dl><div><dt>Round</dt><dd id="round"></dd></div><div><dt>Budget left</dt><dd id="budget"></dd></div>
<div><dt>Estimated accuracy</dt><dd id="estimate"></dd></div></dl></section>
</main><noscript>This page needs JavaScript.</noscript><script>{SCRIPT}</script></body></html>
'''.encode()


def _hash(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HEADERS = {'Content-Security-Policy': f"default-src 'none'; img-src 'self'; connect-src 'self'; "
           f"style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'; form-action 'none'; "
           "frame-ancestors 'none'",
           'Cache-Control': 'no-store', 'Referrer-Policy': 'no-referrer', 'X-Content-Type-Options': 'nosniff',
           'X-Frame-Options': 'DENY', 'Cross-Origin-Resource-Policy': 'same-origin'}
