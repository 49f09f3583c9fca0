"""A database that reveals a label per query, at a price, and remembers what was paid for.

SQLite from the standard library. Training holds a LabelDatabase, never the labels: reveal() is the only
way to one, and every label it gives was written to disk first.
"""
import sqlite3
from datetime import datetime, timezone

import torch

import data
import evaluate


class LabelDatabase:
    """Labels of the training pictures behind a budget.

    oracle: function from a list of ids to their labels, asked only for ids that are paid for. digest: of
    the data set, so that a database is never used with another one. ValueError, one sentence, when the
    file is damaged, of other data, or a query goes beyond the budget.
    """

    def __init__(self, path, oracle, budget, digest):
        self.path, self.oracle, self.budget = path, oracle, budget
        try:
            self.db = sqlite3.connect(path, isolation_level=None)
            self.db.execute('PRAGMA synchronous = FULL')                     # on disk before it is used
            self.db.execute('CREATE TABLE IF NOT EXISTS dataset (digest TEXT NOT NULL)')
            self.db.execute('CREATE TABLE IF NOT EXISTS queries (number INTEGER PRIMARY KEY AUTOINCREMENT, '
                            'id INTEGER NOT NULL UNIQUE, label INTEGER NOT NULL, round INTEGER NOT NULL, '
                            'time TEXT NOT NULL)')
            row = self.db.execute('SELECT digest FROM dataset').fetchone()
            if row is None:
                self.db.execute('INSERT INTO dataset VALUES (?)', (digest,))
            self.revealed()                                                  # fails now if it is damaged
        except sqlite3.DatabaseError as e:
            raise ValueError(f'{path} is not a readable label database ({e})') from None
        if row is not None and row[0] != digest:
            raise ValueError(f'{path} holds the labels of another data set (its digest differs)')

    @property
    def spent(self):
        """Number of labels paid for."""
        return self.db.execute('SELECT count(*) FROM queries').fetchone()[0]

    def revealed(self):
        """(ids, labels) paid for so far, in the order they were asked: int64 (n,) each."""
        rows = self.db.execute('SELECT id, label FROM queries ORDER BY number').fetchall()
        ids, labels = zip(*rows) if rows else ((), ())
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)

    def reveal(self, ids, round=0):
        """Labels (n,) of pictures `ids`; new ones are charged, those known are free. All or nothing."""
        ids = [int(i) for i in ids]
        known = dict(zip(*(t.tolist() for t in self.revealed())))
        new = list(dict.fromkeys(i for i in ids if i not in known))
        if len(known) + len(new) > self.budget:
            raise ValueError(f'{len(new)} more labels were asked for, but {len(known)} of the budget of '
                             f'{self.budget} are spent')
        now = datetime.now(timezone.utc).isoformat(timespec='seconds')
        answers = [int(v) for v in self.oracle(new)] if new else []
        self.db.execute('BEGIN IMMEDIATE')
        try:
            self.db.executemany('INSERT INTO queries (id, label, round, time) VALUES (?, ?, ?, ?)',
                                [(i, label, round, now) for i, label in zip(new, answers)])
            self.db.execute('COMMIT')
        except BaseException:
            self.db.execute('ROLLBACK')
            raise
        known.update(zip(new, answers))
        return torch.tensor([known[i] for i in ids], dtype=torch.int64)


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
