"""oracle.py and label.html: a person on the page, over HTTP, in node, in a browser; answers from a CSV."""
from helpers import folder, images, pixels, raises

import _thread
import contextlib
import http.client
import io
import json
import shutil
import subprocess
import threading
import unittest
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import oracle
from labels import Estimate, LabelDatabase

CLASSES = ['cat', 'dog', 'other']


# ------------------------------------------------------------------------------------------ the page

@contextlib.contextmanager
def labelling_page(n=6, budget=9):
    """(web, another connection to its database) of a page that asks about images 0..n-1 in round 0."""
    with folder() as f, contextlib.redirect_stdout(io.StringIO()):
        database = LabelDatabase(f / 'l.sqlite', None, budget, 'abc')
        database.query(range(n))
        web = oracle.Web(LabelDatabase(f / 'l.sqlite', None, budget, 'abc'),
                         torch.from_numpy(images(20)[0])[:, None], CLASSES, 2, lambda: (75, True))
        waiting = threading.Thread(target=web.collect, args=(0,), daemon=True)
        waiting.start()
        web.news.wait(20)
        try:
            yield web, database
        finally:
            web.close()


def asked(web, path, body=None, token=None, **headers):
    """(status, JSON or bytes) of a request to the page; with a body, a POST."""
    connection = http.client.HTTPConnection('127.0.0.1', web.server.server_port, timeout=20)
    blob = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    method = 'GET' if body is None else 'POST'
    with contextlib.closing(connection):
        connection.request(method, f'/{token or web.token}/{path}', blob, headers)
        reply = connection.getresponse()
        blob = reply.read()
    return reply.status, json.loads(blob) if 'json' in reply.headers['Content-Type'] else blob


def test_the_page_answers_only_this_machine_by_its_names_at_any_port_and_who_knows_the_token():
    with labelling_page() as (web, database):
        assert web.server.server_address[0] == '127.0.0.1'
        for host in '127.0.0.1:1', 'localhost:9000', 'localhost':          # a port of its own has ssh -L
            assert asked(web, 'state', Host=host)[0] == 200
        tokens = 'x' * 32, web.token[:-1], web.token + 'x', urllib.parse.quote('é')
        hosts = 'evil.example', 'evil.example:80', '', '127.0.0.1.example'
        for token, headers in [(token, {}) for token in tokens] + [(None, {'Host': host}) for host in hosts]:
            for path, body in ('', None), ('state', None), ('0.png', None), ('answer', {'id': 0, 'label': 1}):
                status, reply = asked(web, path, body, token, **headers)
                assert status == 403 and 'not for you' in reply['error'], (token, headers)
        assert database.spent == 0


def test_the_page_needs_nothing_from_elsewhere_and_without_a_slash_redirects():
    with labelling_page() as (web, _), urllib.request.urlopen(web.address[:-1], timeout=20) as reply:
        page = reply.read().decode()
        assert reply.url == web.address
        assert "default-src 'none'" in page and 'http:' not in page and web.token not in page


def test_the_page_refuses_what_is_malformed_and_goes_on():
    with labelling_page() as (web, database):
        for body in (b'', b'[]', b'\xff', {'label': 0}, {'id': 0, 'label': 0, 'more': 1},
                     {'id': [0], 'label': 0}, {'id': 10 ** 30, 'label': 0}, {'id': 0, 'label': -1},
                     {'id': 0, 'label': 3}, {'id': 0, 'label': '1'}):
            status, reply = asked(web, 'answer', body)
            assert status == 400 and set(reply) == {'error'}, body
        for i in -1, 9, 'x', None:
            assert asked(web, 'answer', {'id': i, 'label': 0})[0] == 409   # not one that is asked
        for path in 'x', '20.png', '../0.png', 'answer':
            assert asked(web, path)[0] == 400, path
        assert database.spent == 0 and asked(web, 'answer', {'id': 0, 'label': 2})[0] == 200
        assert database.spent == 1
        assert np.array_equal(pixels(asked(web, '13.png')[1]), images(20)[0][13])


def test_of_eight_tabs_that_answer_at_once_one_counts_and_the_others_are_told():
    with labelling_page() as (web, database), ThreadPoolExecutor(8) as pool:
        together = threading.Barrier(8)

        def tab(k):
            together.wait()
            return *asked(web, 'answer', {'id': 0, 'label': k % 3}), k % 3

        replies = list(pool.map(tab, range(8)))
        won = [k for status, _, k in replies if status == 200]
        assert sorted(status for status, _, _ in replies) == [200] + [409] * 7
        assert [t.tolist() for t in database.labels()] == [[0], won]
        assert all(state['question'] == 1 for _, state, _ in replies)


def test_an_answer_is_saved_at_once_and_can_be_skipped_and_taken_back_until_the_end_is_told():
    with labelling_page() as (web, database):
        _, first = asked(web, 'state')
        assert first == {'question': 0, 'last': None, 'round': 0, 'rounds': 2, 'done': 0, 'of': 6, 'spent': 0,
                         'budget': 9, 'estimate': None, 'classes': CLASSES, 'left': 75, 'more': True,
                         'finished': None}
        assert asked(web, 'undo', {'id': 0}) == (409, first)
        for i, k in (0, 1), (1, None):
            status, state = asked(web, 'answer', {'id': i, 'label': k})
            assert status == 200 and state['last'] == [i, k] and state['question'] == state['done'] == i + 1
        assert database.history() == [(0, 1, 0, None)] and state['spent'] == 1
        assert asked(web, 'undo', {'id': 0})[0] == 409      # not the last
        for i in 1, 0:
            status, state = asked(web, 'undo', {'id': i})
            assert status == 200 and state['question'] == i
        assert state == first
        for i in range(6):
            _, state = asked(web, 'answer', {'id': i, 'label': i % 3})
        assert state['question'] is None and state['spent'] == 6
        assert asked(web, 'undo', {'id': 5})[0] == 409 and database.spent == 6
        database.query([9], 1, [(0, 0.5, 1, 1)], Estimate(0.75, 0.5, 0.875, 12))
        threading.Thread(target=web.collect, args=(1,), daemon=True).start()
        while (state := asked(web, 'state')[1])['question'] is None:
            pass
        assert state['round'] == 1 and state['estimate'] == [0.75, 0.5, 0.875, 12]
        asked(web, 'answer', {'id': 9, 'label': 0})
        web.done(Path('runs/query/predictions.csv'))
        assert asked(web, 'state')[1]['finished'] == str(Path('runs/query/predictions.csv'))


def test_control_c_passes_through_and_a_port_that_is_taken_is_one_sentence():
    with labelling_page() as (web, database):
        database.query([7], 1)
        threading.Timer(0.3, _thread.interrupt_main).start()
        with contextlib.suppress(KeyboardInterrupt):
            web.collect(1)
            raise AssertionError('it went on')
        assert web.round is None and database.unanswered(1) == [7]
        port = web.server.server_port
        with raises(ValueError, f'--port {port}', 'try another'):
            oracle.Web(None, None, CLASSES, 2, None, port=port)


STAND_IN = '''
const made = {}, sent = [], seen = [];
const make = id => made[id] ??= {
  id, children: [], append(...a) { this.children.push(...a); }, setAttribute() {}};
let pressed, status = 200;
let news = {question: 5, round: 1, rounds: 2, done: 1, of: 6, spent: 1, budget: 6, estimate: null,
            last: [4, 0], classes: ['a', 'b'], left: null, more: true, finished: null};
globalThis.document = {getElementById: make, createElement: () => make(Math.random()),
                       addEventListener: (_, f) => pressed = f};
globalThis.setTimeout = () => {};
globalThis.fetch = async (path, options) => {
  if (options) sent.push([path, JSON.parse(options.body)]);
  return {status, json: async () => news};
};
const settle = async () => { for (let i = 0; i < 9; i++) await new Promise(setImmediate); };
const key = async (key, code, more) => {
  sent.length = 0;
  made.picture.onload();
  pressed({key, code, preventDefault() {}, ...more});
  await settle();
  seen.push(sent.length ? sent[0] : null);
};
const later = async () => {
  for (const [typed, code] of [['s', 'KeyS'], ['ы', 'KeyS'], ['σ', 'KeyS'], ['s', 'Semicolon'], ['o', 'KeyS'],
       ['г', 'KeyU'], ['U', 'KeyU'], ['Backspace', 'Backspace'], ['&', 'Digit1'], ['2', ''], ['3', 'Digit3']])
    await key(typed, code);
  await key('s', 'KeyS', {ctrlKey: true});
  const told = [made.place.textContent, made.round.textContent, made.estimate.textContent];
  status = 409;
  news = {...news, question: 6, estimate: [0.75, 0.5, 0.875, 12]};
  await key('1', 'Digit1');
  told.push(made.error.hidden, made.error.textContent, made.picture.src, made.estimate.textContent);
  status = 200;
  news = {...news, question: null, left: 3725, last: null};
  await key('1', 'Digit1');
  told.push(made.error.hidden, made.status.textContent);
  news = {...news, question: 7};
  await call('state');
  news = {...news, question: null, spent: 4, finished: 'runs/query/predictions.csv'};
  await key('1', 'Digit1');
  told.push(made.status.textContent, made.then.textContent);
  await call('state');
  console.log(JSON.stringify([seen, told]));
};
'''


def test_keys_work_on_any_layout_and_the_page_tells_of_late_answers_of_the_time_left_and_of_the_end():
    if not shutil.which('node'):
        raise unittest.SkipTest('there is no node in the PATH')
    script = oracle.PAGE.read_text('utf-8').split('<script>')[1].split('</script>')[0]
    program = f'{STAND_IN}{script}\nsettle().then(later);'
    done = subprocess.run(['node', '-'], input=program, capture_output=True, encoding='utf-8', timeout=60)
    assert done.returncode == 0, done.stderr
    seen, told = json.loads(done.stdout)
    skip, undo = ['answer', {'id': 5, 'label': None}], ['undo', {'id': 4}]
    first, second = (['answer', {'id': 5, 'label': k}] for k in (0, 1))
    assert seen[:12] == [skip] * 4 + [None] + [undo] * 3 + [first, second, None, None], seen
    assert told[:4] == ['Image 2 of 6', '2 of 2', 'too few random answers to say', False]
    assert 'answered already' in told[4] and told[5] == '6.png'
    assert told[6] == '75 % (50 to 88 %, from 12 random answers)'
    assert told[7:10] == [True, 'Training, about 1:02:05 left', 'Done']
    assert '4 images labelled' in told[10] and 'runs/query/predictions.csv' in told[10]


def test_a_browser_shows_the_question_under_the_policy():
    program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not program:
        raise unittest.SkipTest('there is no chromium in the PATH')
    with labelling_page() as (web, _), folder() as f:
        done = subprocess.run([
            program, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
            '--enable-logging=stderr', f'--user-data-dir={f}', '--virtual-time-budget=3000', '--dump-dom',
            web.address], capture_output=True, text=True, timeout=120)
    assert 'Image 1 of 6' in done.stdout and '<kbd>3</kbd>other</button>' in done.stdout, done.stderr
    assert 'src="0.png"' in done.stdout and 'aria-busy="false"' in done.stdout
    assert 'CONSOLE' not in done.stderr, done.stderr        # where breaches of the policy would stand


# ---------------------------------------------------------------------------------------- a CSV file

def answers_in(f, content, classes=('cat', 'dog'), names=None, **options):
    """What File reads from a file with this content; the database asks about images 1 and 2 of 20."""
    path = f / 'a.csv'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    database = LabelDatabase(f / 'l.sqlite', None, 9, 'abc')
    database.query([1, 2])
    return oracle.File(database, torch.zeros(20, 1, 10, 12), classes, path, f, names, **options).read()


def test_a_csv_is_read_as_spreadsheets_and_other_runs_write_it():
    names = [f'cats/{i}, café.jpg' for i in range(20)]
    plain = {1: 0, 2: 1}
    with folder() as f:
        for content, wanted, options in (
                ('1,cat\r\n2,1\n\n,\n 3 , ?\n"4","dog"\n5,\n1,0', {1: 0, 2: 1, 3: None, 4: 1}, {}),
                ('', {}, {}),
                ('id,label\n1,cat\nid,class\n2,dog\n', plain, {}),             # a wanted.csv added as it is
                ('id\tclass\t\n1\tcat\t\n2\tdog\t\n', plain, {}),
                ('\ufeffID,Class\n1,cat\n2,dog\n'.encode(), plain, {}),
                (b'\xfe\xff' + 'id;class\n1;cat\n2;dog\n'.encode('utf-16-be'), plain, {}),
                ('1.0,cat\n2.0,1.0\n', plain, {}),
                ('class,id\ncat,1\ndog,2\ncat\n', plain, {}),
                ('id,label,class,confidence,given\n1,7,cat,0.9,1\n2,8,dog,0.5,0\n', plain, {}),
                ('id;label\n1;7\n2;8\n', plain, {'class_ids': [7, 8]}),
                ('1,5\n2,3', {1: 1, 2: 0}, {'classes': ('3', '5')}),
                ('file,class\n"cats/1, café.jpg",cat\n"cats/2, café.jpg",dog', plain, {'names': names}),
                ('cats/1, café.jpg;cat\n2;1\n5;\n', plain, {'names': names})):
            assert answers_in(f, content, **options) == wanted, content


def test_a_mistake_in_a_csv_is_one_sentence_that_names_the_line():
    with folder() as f:
        for content, said in (
                ('1,cat\nx,cat', "line 2 has 'x'"), ('20,cat', "'20'"), ('1.5,cat', "'1.5'"),
                ('1,cow', 'cat, dog'), ('1,2', "'2'"), ('1,Cat', "'Cat'"),
                ('1,cat\n1,dog', 'line 2 gives image 1 another class'),
                (b'1,caf\xe9', 'UTF-8'), (b'1,"' + b'x' * 200000, 'readable')):
            with raises(ValueError, 'a.csv', said):
                answers_in(f, content)
        with raises(ValueError, "'0'"):
            answers_in(f, '1,0', ('3', '5'))                # not an index where names are numbers
        with raises(ValueError, "'1'"):
            answers_in(f, '1,cat', names=[f'{i}.png' for i in range(1, 21)])
        LabelDatabase(f / 'l.sqlite', None, 9, 'abc').answer(1, 0, 0)
        assert answers_in(f, '') == {1: 0}
        with raises(ValueError, 'image 1 another class'):
            answers_in(f, '1,dog')


def test_what_a_csv_lacks_is_written_down_and_taken_once_it_is_there():
    with folder() as f:
        database = LabelDatabase(f / 'l.sqlite', None, 9, 'abc')
        database.query([3, 11, 5])
        x, names = torch.from_numpy(images(20)[0])[:, None], [f'{i}.jpg' for i in range(20)]
        file = oracle.File(database, x, CLASSES, f / 'a.csv', f, names)
        assert 'labels missing: 3;' in file.collect(0)
        assert (f / 'wanted.csv').read_text() == 'file,class\n3.jpg,\n11.jpg,\n5.jpg,\n'
        assert (f / 'wanted.png').exists()
        (f / 'a.csv').write_text('file,class\n11.jpg,?\n3.jpg,dog\n5.jpg,\n')
        assert 'labels missing: 1;' in file.collect(0) and database.spent == 0
        (f / 'a.csv').write_text('file,class\n11.jpg,?\n3.jpg,dog\n5.jpg,2\n')
        assert file.collect(0) is None and not list(f.glob('wanted.*'))
        assert database.history() == [(3, 1, 0, None), (5, 2, 0, None)]
        assert database.round_counts(0) == (3, 2, 1, None)
