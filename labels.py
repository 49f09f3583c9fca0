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
                            'time TEXT NOT NULL, guess INTEGER, confidence REAL, agreed INTEGER)')
            self.db.execute('CREATE TABLE IF NOT EXISTS rounds (round INTEGER PRIMARY KEY, asked INTEGER NOT NULL, '
                            'estimate REAL)')
            row = self.db.execute('SELECT digest FROM dataset').fetchone()
            if row is None:
                self.db.execute('INSERT INTO dataset VALUES (?)', (digest,))
            self.asked(), self.rounds()                                      # fails now if it is damaged
        except sqlite3.DatabaseError as e:
            raise ValueError(f'{path} is not a readable label database ({e})') from None
        if row is not None and row[0] != digest:
            raise ValueError(f'{path} holds the labels of another data set (its digest differs)')

    @property
    def spent(self):
        """Number of labels paid for."""
        return self.db.execute('SELECT count(*) FROM queries').fetchone()[0]

    def revealed(self, up_to=1 << 62):
        """(ids, labels) paid for in the rounds up to this one, in the order they were asked: int64 (n,) each."""
        rows = self.db.execute('SELECT id, label FROM queries WHERE round <= ? ORDER BY number', (up_to,)).fetchall()
        ids, labels = zip(*rows) if rows else ((), ())
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)

    def asked(self):
        """[(id, label, round, what had been believed or None)] in the order they were asked."""
        return self.db.execute('SELECT id, label, round, guess FROM queries ORDER BY number').fetchall()

    def rounds(self):
        """{round: (labels asked for, accuracy estimated before)} of the rounds that are on disk."""
        return {r: (asked, estimate) for r, asked, estimate in self.db.execute('SELECT * FROM rounds ORDER BY round')}

    def surprises(self, since):
        """What was believed of the pictures asked for from round `since` on, before their labels came: (n, 3) float32
        of confidence, whether the neighbours agreed, and whether the guess was right."""
        rows = self.db.execute('SELECT confidence, agreed, guess = label FROM queries WHERE round >= ? AND '
                               'guess IS NOT NULL ORDER BY number', (since,)).fetchall()
        return torch.tensor(rows, dtype=torch.float32).view(-1, 3)

    def reveal(self, ids, round=0, beliefs=None, estimate=None):
        """Labels (n,) of pictures `ids`; new ones are charged, those known are free. All or nothing: the
        labels, what was believed of them before, (guess, confidence, agreed) each, and the round."""
        ids = [int(i) for i in ids]
        known = dict(zip(*(t.tolist() for t in self.revealed())))
        new = list(dict.fromkeys(i for i in ids if i not in known))
        if len(known) + len(new) > self.budget:
            raise ValueError(f'{len(new)} more labels were asked for, but {len(known)} of the budget of '
                             f'{self.budget} are spent')
        now = datetime.now(timezone.utc).isoformat(timespec='seconds')
        answers = [int(v) for v in self.oracle(new)] if new else []
        believed = dict(zip(ids, beliefs or [(None, None, None)] * len(ids)))
        self.db.execute('BEGIN IMMEDIATE')
        try:
            self.db.executemany('INSERT INTO queries (id, label, round, time, guess, confidence, agreed) '
                                'VALUES (?, ?, ?, ?, ?, ?, ?)',
                                [(i, label, round, now, *believed[i]) for i, label in zip(new, answers)])
            self.db.execute('INSERT OR IGNORE INTO rounds VALUES (?, ?, ?)', (round, len(new), estimate))
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


def pick_informative(n, probs, h, known, y, seed):
    """(ids (n,), agreed (N,) bool): the pictures to ask about next, spread over the features.

    Half are those where the prediction and a vote of the 10 nearest labelled pictures disagree, most confident
    first: the errors that self-training would never find by itself. The rest have the smallest margin between
    the two best classes. Either kind is thinned from 15 times as many to its k-means medoids, so that no two
    ask the same. probs (N, K) predictions; h (N, D) features; known (m,) ids that have the labels y (m,).
    """
    vote = evaluate.knn(h[known], y, h, k=10, tau=0.1, classes=probs.shape[1])
    agreed = vote == probs.argmax(1)
    best = probs.topk(2, dim=1).values
    open_ = torch.ones(len(h), dtype=torch.bool, device=h.device)
    open_[known] = False
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
    """Accuracy of the predictions over all pictures, without a label but those that were asked for anyway.

    How often guesses turned out right, as a logistic function of the confidence's log odds and of whether the
    neighbours agreed: the queries were chosen by just these two, so given them their answers are a fair sample.
    probs (N, K), agreed (N,), surprises (n, 3) as from LabelDatabase. None before anything was guessed.
    """
    if not len(surprises):
        return None
    def features(confidence, agreed):
        p = confidence.double().clamp(1e-4, 1 - 1e-4)
        return torch.stack([(p / (1 - p)).log(), agreed.double()], 1)
    right = surprises[:, 2].long()
    logits = evaluate.logistic_regression(features(surprises[:, 0], surprises[:, 1]), right, 2, l2=1e-2)
    return logits(features(probs.max(1).values.cpu(), agreed.cpu())).softmax(1)[:, 1].mean().item()
