"""Labels behind a budget: the database of questions and answers, which images to ask about, the estimate.

The database is one SQLite file. Training gets the labels that were asked for and never the others. A label
is on disk before it is used, so a program that was killed goes on with the same questions.
"""
import sqlite3
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.special import betaincinv

import evaluate
import features
from device import generator

MIN_AUDITS = 12                                     # below it an interval is too wide to say anything
SCHEMA = ['CREATE TABLE dataset (digest TEXT NOT NULL)', '''
CREATE TABLE queries (
    number INTEGER PRIMARY KEY,                     -- order of the questions
    id INTEGER NOT NULL UNIQUE CHECK (typeof(id) = 'integer' AND id >= 0),
    round INTEGER NOT NULL CHECK (typeof(round) = 'integer' AND round >= 0),
    label INTEGER CHECK (typeof(label) IN ('integer', 'null') AND label >= 0),
    answered INTEGER CHECK (typeof(answered) IN ('integer', 'null')),    -- order of the answers; NULL: open
    guess INTEGER CHECK (typeof(guess) IN ('integer', 'null') AND guess >= 0),
    confidence REAL CHECK (typeof(confidence) IN ('real', 'null')),
    agreed INTEGER CHECK (agreed IN (0, 1)),
    audit INTEGER CHECK (audit IN (0, 1))
)'''.strip(), '''
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    asked INTEGER NOT NULL CHECK (typeof(asked) = 'integer' AND asked >= 0),
    estimate REAL CHECK (typeof(estimate) IN ('real', 'null') AND estimate BETWEEN low AND high),
    low REAL CHECK (typeof(low) IN ('real', 'null') AND low BETWEEN 0 AND 1),
    high REAL CHECK (typeof(high) IN ('real', 'null') AND high BETWEEN 0 AND 1),
    audits INTEGER CHECK (typeof(audits) IN ('integer', 'null'))
)'''.strip()]


class Estimate(NamedTuple):
    """Accuracy 0..1, its 95 % confidence interval, and the number of random answers it comes from."""
    mean: float
    low: float
    high: float
    n: int

    def __str__(self):
        mean, low, high = (f'{100 * share:.1f}' for share in self[:3])
        return f'{mean} % ({low} to {high} %)'


# ------------------------------------------------------------------------------------- the database

class LabelDatabase:
    """The questions of a run, their answers, and how many it may still ask.

    oracle: function from a list of ids to their labels; None where a person answers. budget: labels that may
    be asked for; 0: only to read. digest: of the data set, so that the labels are never used with another
    one. A question is open, or has a label, or was skipped, which costs nothing. ValueError, one sentence,
    when the file is damaged, in use, of other data, or missing though it is to be read, and when a query
    goes beyond the budget.
    """

    def __init__(self, path, oracle, budget, digest):
        self.path = Path(path)
        self.oracle = oracle
        self.budget = budget
        if not budget and not self.path.exists():
            raise ValueError(f'{path} is missing; it holds the labels that were asked for')
        with self._one_sentence():
            self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._rows('PRAGMA synchronous = FULL')
        self._open(digest)

    def _open(self, digest):
        """Create the tables of a new file; check those of an old one."""
        found = self._rows('SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid')
        if not found and self.budget:
            with self._one_sentence(), self.db:     # all or nothing
                self._rows('BEGIN IMMEDIATE')
                for table in SCHEMA:
                    self._rows(table)
                self._rows('INSERT INTO dataset VALUES (?)', digest)
        elif [sql for sql, in found] != SCHEMA:
            raise ValueError(f'{self.path} is not a label database of this version; use another --name')
        if self._rows('PRAGMA integrity_check(1)') != [('ok',)]:
            raise ValueError(f'{self.path} is damaged')
        if self._rows('SELECT digest FROM dataset') != [(digest,)]:
            raise ValueError(f'{self.path} holds the labels of another data set (its digest differs)')

    @contextmanager
    def _one_sentence(self):
        try:
            yield
        except (sqlite3.Error, OverflowError, UnicodeError) as e:
            if 'locked' in str(e):
                raise ValueError(f'{self.path} is in use by another program; try again') from None
            reason = ' '.join(str(e).split())
            raise ValueError(f'{self.path} can not be used as a label database ({reason})') from None

    def _rows(self, sql, *values):
        with self._one_sentence():
            return self.db.execute(sql, values).fetchall()

    @property
    def spent(self):
        """Number of labels that were given."""
        return self._rows('SELECT count(label) FROM queries')[0][0]

    def labels(self, up_to=1 << 62):
        """(ids, labels) of the rounds up to this one, in the order of the questions: int64 (n,) each."""
        rows = self._rows('SELECT id, label FROM queries WHERE round <= ? AND label IS NOT NULL '
                          'ORDER BY number', up_to)
        pairs = torch.tensor(rows, dtype=torch.int64).view(-1, 2)
        return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()

    def asked(self):
        """Ids of all questions, answered or not: int64 (n,)."""
        rows = self._rows('SELECT id FROM queries ORDER BY number')
        return torch.tensor(rows, dtype=torch.int64).view(-1)

    def unanswered(self, round):
        """Ids of this round's open questions, in their order."""
        rows = self._rows('SELECT id FROM queries WHERE round = ? AND answered IS NULL '
                          'ORDER BY number', round)
        return [id for id, in rows]

    def history(self):
        """[(id, label, round, class predicted before or None)] of the labels, in the order asked."""
        return self._rows('SELECT id, label, round, guess FROM queries WHERE label IS NOT NULL '
                          'ORDER BY number')

    def round_counts(self, round):
        """(questions, labels given, skipped, share of the labels predicted wrong or None) of a round."""
        return self._rows('SELECT count(*), count(label), count(answered) - count(label), '
                          'avg(guess != label) FROM queries WHERE round = ?', round)[0]

    def last(self, round):
        """(id, label or None if skipped) of the newest answer of a round that is still open; else None."""
        if not self.unanswered(round):
            return None
        rows = self._rows('SELECT id, label FROM queries WHERE round = ? AND answered IS NOT NULL '
                          'ORDER BY answered DESC LIMIT 1', round)
        return rows[0] if rows else None

    def rounds(self):
        """{round: (number of questions, Estimate of the accuracy before it or None)}."""
        rows = self._rows('SELECT * FROM rounds ORDER BY round')
        return {round: (asked, None if estimate[0] is None else Estimate(*estimate))
                for round, asked, *estimate in rows}

    def audits(self, since):
        """Which predictions at query time were right, of random images since that round: bool (n,)."""
        rows = self._rows('SELECT guess = label FROM queries WHERE round >= ? AND audit = 1 '
                          'AND label IS NOT NULL ORDER BY number', since)
        return torch.tensor(rows, dtype=torch.bool).view(-1)

    def query(self, ids, round=0, predictions=None, estimate=None):
        """Write the questions of a round, and the answers if there is an oracle function; all or nothing.

        predictions: (class, confidence, whether the neighbours agree, whether drawn at random) of each image
        before its label is known. estimate: Estimate before the round, or None. What was asked before is not
        asked again. Open questions count against the budget.
        """
        asked = set(self.asked().tolist())
        predictions = predictions or [(None,) * 4] * len(ids)
        new = {int(id): values for id, values in zip(ids, predictions) if int(id) not in asked}
        promised = self._rows('SELECT count(label) + count(*) - count(answered) FROM queries')[0][0]
        if promised + len(new) > self.budget:
            raise ValueError(f'{len(new)} more labels were asked for, but {promised} of the budget of '
                             f'{self.budget} are spent')
        labels = [None] * len(new)
        if self.oracle and new:
            labels = [int(label) for label in self.oracle(list(new))]
        answered = 1 if self.oracle else None
        with self._one_sentence(), self.db:         # all or nothing
            self._rows('BEGIN IMMEDIATE')
            for (id, values), label in zip(new.items(), labels):
                self._rows('INSERT INTO queries VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)',
                           id, round, label, answered, *values)
            self._rows('INSERT OR IGNORE INTO rounds VALUES (?, ?, ?, ?, ?, ?)', round, len(new),
                       *(estimate or (None,) * 4))

    def answer(self, id, label, round):
        """Write the label of an open question, None to skip it. False, and no change, if it is not open."""
        self._rows('UPDATE queries SET label = ?, answered = '
                   '(SELECT coalesce(max(answered), 0) + 1 FROM queries) '
                   'WHERE id = ? AND round = ? AND answered IS NULL', label, id, round)
        return self._rows('SELECT changes()') == [(1,)]

    def undo(self, id, round):
        """Open the question again that was answered last in this round. False if that was not `id`."""
        last = self.last(round)
        if last is None or last[0] != id:
            return False
        self._rows('UPDATE queries SET label = NULL, answered = NULL WHERE id = ?', id)
        return True


# ------------------------------------------------------------------------------------- which to ask

def pick_random(n, total, seed):
    """n of `total` ids at random: int64 (n,)."""
    return torch.randperm(total, generator=generator('cpu', seed, 'pick'))[:n]


def pick_coverage(n, h, seed):
    """n ids that cover the features h (N, D): of each of n k-means clusters the image nearest its centre."""
    _, centres, _ = evaluate.kmeans(h, n, restarts=1, iterations=20, seed=seed)
    ids = evaluate.medoids(h, centres).cpu()
    if len(ids) < n:                                # a cluster had no image
        others = pick_random(len(h), len(h), seed)
        others = others[~torch.isin(others, ids)]
        ids = torch.cat([ids, others[:n - len(ids)]])
    return ids


def pick_informative(n, probs, h, taken, known, y, seed):
    """(ids (n,), agreed (N,) bool): the images to ask about next, spread over the features.

    Half are those where the prediction and a vote of the 10 nearest labelled images disagree, most confident
    first: errors that self-training would never find by itself. The rest have the smallest margin between
    the two best classes. Either kind starts from 15 times as many and keeps the k-means medoids, so that no
    two ask the same. probs (N, K): predictions; h (N, D): features; taken: ids that may not be asked;
    known (m,): ids that have the labels y (m,).
    """
    vote = features.knn(h[known], y, h, k=10, tau=0.1, classes=probs.shape[1])
    agreed = vote == probs.argmax(1)
    best, second = probs.topk(2, dim=1).values.unbind(1)
    is_open = torch.ones(len(h), dtype=torch.bool, device=h.device)
    is_open[taken] = False

    def spread(m, order, seed):
        ids = order[is_open[order]][:15 * m]
        if len(ids) > m:
            _, centres, _ = evaluate.kmeans(h[ids], m, restarts=1, iterations=20, seed=seed)
            ids = ids[evaluate.medoids(h[ids], centres)]
        is_open[ids] = False
        return ids

    by_confidence = best.argsort(descending=True, stable=True)
    by_margin = (best - second).argsort(stable=True)
    disagreed = spread(n // 2, by_confidence[~agreed[by_confidence]], f'{seed} disagreement')
    unsure = spread(n - len(disagreed), by_margin, f'{seed} margin')
    missing = n - len(disagreed) - len(unsure)      # clusters that had no image
    others = by_margin[is_open[by_margin]][:missing]
    return torch.cat([disagreed, unsure, others]), agreed


# --------------------------------------------------------------------------------- how good it is

def estimate_accuracy(right):
    """Estimate of the accuracy from random answers; None below 12 of them, which are too few to say.

    right (n,): was the prediction right, of images drawn at random (LabelDatabase.audits)? The interval is
    exact (Clopper and Pearson 1934): it contains the accuracy in at least 95 of 100 samples, whatever the
    accuracy is. It is about the predictions at query time, of networks that may have learned more since.
    """
    n = len(right)
    if n < MIN_AUDITS:
        return None
    k = int(right.sum())
    low = betaincinv(k, n - k + 1, 0.025) if k else 0.0
    high = betaincinv(k + 1, n - k, 0.975) if k < n else 1.0
    return Estimate(k / n, float(low), float(high), n)
