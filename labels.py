"""A database that reveals a label per query, at a price, and remembers what was paid for.

SQLite from the standard library. Training holds a LabelDatabase, never the labels: reveal() is the only
way to one, and every label it gives was written to disk first. Where a person answers, ask() writes the questions of a
round down and answer() each answer, so that a program killed in between goes on with the same questions.
"""
import sqlite3
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

import data
import evaluate


class LabelDatabase:
    """Labels of the training pictures behind a budget.

    oracle: function from a list of ids to their labels, asked only for ids that are paid for. digest: of
    the data set, so that a database is never used with another one. budget 0: to read what is there. ValueError, one
    sentence, when the file is damaged, of other data, missing though it is to be read, or a query goes beyond the
    budget. A row of `queries` is a question; without a time it is open, with a time and no label it was skipped.
    `undone` keeps answers that were taken back.
    """

    def __init__(self, path, oracle, budget, digest, pictures=1 << 40, classes=1 << 40):
        self.path, self.oracle, self.budget = path, oracle, budget
        if not budget and not Path(path).exists():                           # to be read alone
            raise ValueError(f'{path} is missing: the labels that were paid for')
        try:
            self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self.db.execute('PRAGMA synchronous = FULL')                     # on disk before it is used
            if self.db.execute("SELECT 1 FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone():
                raise sqlite3.DatabaseError('it holds more than tables')     # which could run anything, without end
            self.db.execute('CREATE TABLE IF NOT EXISTS dataset (digest TEXT NOT NULL)')
            self.db.execute('CREATE TABLE IF NOT EXISTS queries (number INTEGER PRIMARY KEY AUTOINCREMENT, '
                            'id INTEGER NOT NULL UNIQUE, label INTEGER, round INTEGER NOT NULL, '
                            'time TEXT, guess INTEGER, confidence REAL, agreed INTEGER, '
                            'audit INTEGER)')
            self.db.execute('CREATE TABLE IF NOT EXISTS undone (id INTEGER NOT NULL, label INTEGER, '
                            'answered TEXT NOT NULL, time TEXT NOT NULL)')
            self.db.execute('CREATE TABLE IF NOT EXISTS rounds (round INTEGER PRIMARY KEY, asked INTEGER NOT NULL, '
                            'estimate REAL)')
            row = self.db.execute('SELECT digest FROM dataset').fetchone()
            if row is None:
                self.db.execute('INSERT INTO dataset VALUES (?)', (digest,))
            self._check(pictures, classes)
        except (sqlite3.Error, MemoryError, OverflowError, UnicodeDecodeError) as e:
            if hasattr(self, 'db'):
                self.db.close()                                              # and with it what it keeps beside the file
            raise ValueError(f'{path} is not a readable label database ({" ".join(str(e).split())})') from None
        if row is not None and row[0] != digest:
            raise ValueError(f'{path} holds the labels of another data set (its digest differs)')

    def _check(self, pictures, classes):
        """sqlite3.DatabaseError for a damaged file: SQLite itself has no checksums, and takes any type anywhere."""
        def whole(most):
            return f"{{0}} IS NULL OR typeof({{0}}) = 'integer' AND {{0}} BETWEEN 0 AND {most - 1}"
        share = "{0} IS NULL OR typeof({0}) IN ('real', 'integer') AND {0} BETWEEN 0 AND 1"
        def believed(rule):                                                  # what was believed is there whole or not
            return f'({rule}) AND ({{0}} IS NULL) = (guess IS NULL)'
        text = "{0} IS NULL OR typeof({0}) = 'text'"
        wanted = {'queries': {'id': whole(pictures), 'label': whole(classes), 'round': whole(1 << 40),
                              'guess': whole(classes), 'confidence': believed(share), 'agreed': believed(whole(2)),
                              'audit': believed(whole(2)), 'number': whole(1 << 40), 'time': text},
                  'undone': {'id': whole(pictures), 'label': whole(classes), 'answered': text, 'time': text},
                  'rounds': {'round': whole(1 << 40), 'asked': whole(1 << 40), 'estimate': share}}
        if (found := self.db.execute('PRAGMA integrity_check(1)').fetchone()[0]) != 'ok':
            raise sqlite3.DatabaseError(found)
        for table, columns in wanted.items():
            for column, rule in columns.items():
                if self.db.execute(f'SELECT 1 FROM {table} WHERE NOT ({rule.format(column)})').fetchone():
                    raise sqlite3.DatabaseError(f'{table}.{column} holds what it can not')

    @property
    def spent(self):
        """Number of labels paid for."""
        return self.db.execute('SELECT count(label) FROM queries').fetchone()[0]

    def revealed(self, up_to=1 << 62):
        """(ids, labels) paid for in the rounds up to this one, in the order they were asked: int64 (n,) each."""
        rows = self.db.execute('SELECT id, label FROM queries WHERE round <= ? AND label IS NOT NULL ORDER BY number',
                               (up_to,)).fetchall()
        ids, labels = zip(*rows) if rows else ((), ())
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)

    def asked(self):
        """Ids that were ever asked about, answered or not: int64 (n,)."""
        rows = self.db.execute('SELECT id FROM queries ORDER BY number').fetchall()
        return torch.tensor(rows, dtype=torch.int64).view(-1)

    def unanswered(self, round):
        """Ids of this round's questions that are open, in the order they were asked."""
        return [i for i, in self.db.execute('SELECT id FROM queries WHERE round = ? AND time IS NULL ORDER BY number',
                                            (round,))]

    def history(self):
        """[(id, label, round, what had been believed or None)] of the answered questions, in their order."""
        return self.db.execute('SELECT id, label, round, guess FROM queries WHERE label IS NOT NULL '
                               'ORDER BY number').fetchall()

    def tally(self, round):
        """(questions, labels given, skipped, share of the labels that had been guessed wrong or None) of a round."""
        return self.db.execute('SELECT count(*), count(label), count(time) - count(label), avg(guess != label) '
                               'FROM queries WHERE round = ?', (round,)).fetchone()

    def last(self, round):
        """(id, label or None if skipped) of the newest answer, as long as the round is open; else None."""
        return self.db.execute('SELECT id, label FROM queries WHERE round = ? AND time IS NOT NULL ORDER BY time DESC, '
                               'number DESC', (round,)).fetchone() if self.unanswered(round) else None

    def rounds(self):
        """{round: (labels asked for, accuracy estimated before)} of the rounds that are on disk."""
        return {r: (asked, estimate) for r, asked, estimate in self.db.execute('SELECT * FROM rounds ORDER BY round')}

    def surprises(self, since):
        """What was believed of the pictures asked for from round `since` on, before their labels came: (n, 4) float32
        of confidence, whether the neighbours agreed, whether it was drawn at random, whether the guess was right."""
        rows = self.db.execute('SELECT confidence, agreed, audit, guess = label FROM queries WHERE round >= ? AND '
                               'guess IS NOT NULL AND label IS NOT NULL ORDER BY number', (since,)).fetchall()
        return torch.tensor(rows, dtype=torch.float32).view(-1, 4)

    def reveal(self, ids, round=0, beliefs=None, estimate=None):
        """Labels (n,) of pictures `ids`, from the oracle; new ones are charged, those known are free. All or nothing:
        the labels, what was believed of them before, (guess, confidence, agreed, audit) each, and the round."""
        ids = [int(i) for i in ids]
        known = dict(zip(*(t.tolist() for t in self.revealed())))
        believed = dict(zip(ids, beliefs or [(None,) * 4] * len(ids)))
        new = [i for i in believed if i not in known]
        known.update(zip(new, self.ask(new, round, [believed[i] for i in new], estimate, self.oracle)))
        return torch.tensor([known[i] for i in ids], dtype=torch.int64)

    def ask(self, ids, round=0, beliefs=None, estimate=None, oracle=None):
        """Write down the questions of a round, each with its (guess, confidence, agreed, audit), and the answers if an
        oracle knows them at once; returns those. All or nothing; an open question is counted against the budget."""
        ids, now = [int(i) for i in ids], _now() if oracle else None
        pending = self.db.execute('SELECT count(*) FROM queries WHERE time IS NULL').fetchone()[0]
        if self.spent + pending + len(ids) > self.budget:
            raise ValueError(f'{len(ids)} more labels were asked for, but {self.spent + pending} of the budget of '
                             f'{self.budget} are spent')
        answers = [int(v) for v in oracle(ids)] if oracle and ids else [None] * len(ids)
        if missing := [i for i, label in zip(ids, answers) if label is not None and label < 0]:
            raise ValueError(f'picture {missing[0]} has no label to reveal')
        with self.transaction():
            self.db.executemany('INSERT INTO queries (id, label, round, time, guess, confidence, agreed, '
                                'audit) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
                                [(i, label, round, now, *belief) for i, label, belief
                                 in zip(ids, answers, beliefs or [(None,) * 4] * len(ids))])
            self.db.execute('INSERT OR IGNORE INTO rounds VALUES (?, ?, ?)', (round, len(ids), estimate))
        return answers

    def answer(self, id, label, round):
        """Write down the label of an open question of this round, or with None that it can't be told, which costs
        nothing. False, and nothing changes, if the question is not open."""
        with self.transaction():                                             # a clock may be set back: not before any
            return self.db.execute("UPDATE queries SET label = ?, time = max(?, (SELECT coalesce(max(time), '') FROM "
                                   'queries)) WHERE id = ? AND round = ? AND time IS NULL',
                                   (label, _now(), id, round)).rowcount == 1

    def undo(self, id, round):
        """Open the question again whose answer was the last of this round. False if that was not `id`."""
        with self.transaction():
            if (last := self.last(round)) is None or last[0] != id:
                return False
            self.db.execute('INSERT INTO undone SELECT id, label, time, ? FROM queries WHERE id = ?', (_now(), id))
            return self.db.execute('UPDATE queries SET label = NULL, time = NULL WHERE id = ?', (id,)).rowcount == 1

    @contextmanager
    def transaction(self):
        """What is written in the block is written whole or not at all."""
        self.db.execute('BEGIN IMMEDIATE')
        try:
            yield
            self.db.execute('COMMIT')
        except BaseException:
            self.db.execute('ROLLBACK')
            raise


def _now():
    return datetime.now(timezone.utc).isoformat(timespec='microseconds')


def pick_random(n, total, seed):
    """n of `total` ids at random: int64 (n,)."""
    return torch.randperm(total, generator=data.generator('cpu', seed, 'pick'))[:n]


def pick_balanced(n, y, seed):
    """n ids, as many of each class as can be. It looks at labels that nobody has paid for, as published
    benchmarks do when they draw labelled sets: for comparison with them, not for use."""
    order = pick_random(len(y), len(y), seed)
    shuffled = y[order]
    place = torch.empty_like(shuffled)                                       # how many of its class came before
    for k in shuffled.unique():
        mine = shuffled == k
        place[mine] = torch.arange(int(mine.sum()))
    return order[place.argsort(stable=True)[:n]]


def pick_coverage(n, h, seed):
    """n ids that cover the features h (N, D): of each of n k-means clusters the picture nearest its centre."""
    _, centres, _ = evaluate.kmeans(h, n, restarts=1, iterations=20, seed=seed)
    ids = evaluate.medoids(h, centres).cpu()
    if len(ids) < n:                                                         # a cluster had no picture
        others = pick_random(len(h), len(h), seed)
        ids = torch.cat([ids, others[~torch.isin(others, ids)][:n - len(ids)]])
    return ids


def pick_informative(n, probs, h, taken, known, y, seed):
    """(ids (n,), agreed (N,) bool): the pictures to ask about next, spread over the features.

    Half are those where the prediction and a vote of the 10 nearest labelled pictures disagree, most confident
    first: the errors that self-training would never find by itself. The rest have the smallest margin between
    the two best classes. Either kind is thinned from 15 times as many to its k-means medoids, so that no two
    ask the same. probs (N, K) predictions; h (N, D) features; taken: ids that are not to be asked about; known (m,):
    those that have the labels y (m,).
    """
    vote = evaluate.knn(h[known], y, h, k=10, tau=0.1, classes=probs.shape[1])
    agreed = vote == probs.argmax(1)
    best = probs.topk(2, dim=1).values
    open_ = torch.ones(len(h), dtype=torch.bool, device=h.device)
    open_[taken] = False
    def spread(m, order, seed):
        ids = order[open_[order]][:15 * m]
        if len(ids) > m:
            _, centres, _ = evaluate.kmeans(h[ids], m, restarts=1, iterations=20, seed=seed)
            ids = ids[evaluate.medoids(h[ids], centres)]
        open_[ids] = False
        return ids
    order = best[:, 0].argsort(descending=True, stable=True)
    first = spread(n // 2, order[~agreed[order]], f'{seed} disagreement')
    order = (best[:, 0] - best[:, 1]).argsort(stable=True)
    ids = [first, spread(n - len(first), order, f'{seed} margin')]
    missing = n - len(torch.cat(ids))                                        # clusters that had no picture
    return torch.cat([*ids, order[open_[order]][:missing]]), agreed


def estimate_accuracy(probs, agreed, surprises):
    """(accuracy of the predictions over all pictures, its standard error), without a label but those that were asked
    for anyway.

    A difference estimator (Saerndal et al. 1992, section 6.3): how often a guess is right is modelled as a logistic
    function of the log odds of its confidence and of whether the neighbours agreed, fitted on all answers; the
    mean of the model over all pictures is then corrected by its mean error on the audits, the pictures drawn at
    random, however wrong the model is. What bias is left comes of the older ones, which met other networks: it is low
    where guesses of equal confidence have become better since, and high where they have become worse. probs (N, K),
    agreed (N,), surprises (n, 4) as from LabelDatabase, the newest rounds'. None without audits.
    """
    audit, right = surprises[:, 2] > 0, surprises[:, 3].long()
    if not audit.any():
        return None, None
    def features(confidence, agreed):
        p = confidence.double().clamp(1e-4, 1 - 1e-4)
        odds, agreed = (p / (1 - p)).log(), agreed.double()
        return torch.stack([odds, agreed, odds * agreed], 1)
    asked = features(surprises[:, 0], surprises[:, 1])
    model = evaluate.logistic_regression(asked, right, 2, l2=1e-2)
    off, n = (right - model(asked).softmax(1)[:, 1])[audit], int(audit.sum())
    error = ((off - off.mean()).square().sum() + 2 * 0.25) / (n + 1) / n
    mean = model(features(probs.max(1).values.cpu(), agreed.cpu())).softmax(1)[:, 1].mean()
    return (mean + off.mean()).clamp(0, 1).item(), error.sqrt().item()
