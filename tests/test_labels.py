"""labels.py: the label database, which images to ask about, and the accuracy estimate."""
from helpers import close, folder, full_disk, posix, raises, randn

import contextlib
import functools
import sqlite3
from unittest import mock

import scipy.stats
import torch

import evaluate
import features
import labels
from labels import Estimate, LabelDatabase


# ------------------------------------------------------------------------------------- the database

def lists(pair):
    return [t.tolist() for t in pair]


def test_a_label_is_charged_once_within_the_budget_and_written_before_it_is_given():
    oracle = mock.Mock(side_effect=lambda ids: [5 + i for i in ids])
    with folder() as f:
        database = LabelDatabase(f / 'l.sqlite', oracle, 3, 'abc')
        database.query([3, 1, 3])
        assert lists(database.labels()) == [[3, 1], [8, 6]] and database.spent == 2
        database.query(torch.tensor([1, 4]))
        assert [call.args for call in oracle.call_args_list] == [([3, 1],), ([4],)]
        with raises(ValueError, '1 more', 'budget of 3'):
            database.query([0, 1])
        database.query([4, 3])                              # known: it costs nothing
        assert oracle.call_count == 2
        again = LabelDatabase(f / 'l.sqlite', None, 0, 'abc')                  # as after a crash
        assert lists(again.labels()) == [[3, 1, 4], [8, 6, 9]]
        for answers in (lambda ids: 1 / 0), (lambda ids: [2, -1]):
            again = LabelDatabase(f / 'l.sqlite', answers, 5, 'abc')
            with contextlib.suppress(ZeroDivisionError, ValueError):
                again.query([0, 2], 1)
            assert again.spent == 3 and list(again.rounds()) == [0]        # nothing is charged for no answer


def test_rounds_estimates_and_predictions_are_kept_with_the_answers():
    estimate = Estimate(0.75, 0.5, 0.875, 12)
    with folder() as f:
        database = LabelDatabase(f / 'l.sqlite', lambda ids: [i % 3 for i in ids], 9, 'abc')
        database.query([4, 5])
        database.query([7, 8, 3], 1, [(1, 0.9, 1, 0), (0, 0.6, 0, 1), (0, 0.6, 0, 1)])
        database.query([], 2, [], estimate)
        again = LabelDatabase(f / 'l.sqlite', None, 0, 'abc')
        assert again.rounds() == {0: (2, None), 1: (3, None), 2: (0, estimate)}
        assert again.audits(0).tolist() == [False, True] and len(again.audits(2)) == 0
        assert again.labels(up_to=0)[0].tolist() == [4, 5]
        assert again.history() == [(4, 1, 0, None), (5, 2, 0, None), (7, 1, 1, 1), (8, 2, 1, 0), (3, 0, 1, 0)]
        assert again.round_counts(1) == (3, 3, 0, 1 / 3)


def test_a_round_answered_one_by_one_goes_on_after_a_kill_with_the_same_open_questions():
    with folder() as f:
        reopen = functools.partial(LabelDatabase, f / 'l.sqlite', None, 5, 'abc')
        database = reopen()
        database.query([7, 3, 9], 0, [(1, 0.9, 1, 0), (0, 0.6, 0, 1), (2, 0.5, 1, 0)])
        with raises(ValueError, '3 more', 'budget of 5'):
            database.query([1, 2, 4], 1)                    # an open question is as good as spent
        with raises(ValueError, 'l.sqlite'):
            database.query([1, 2], 1, [(1, 0.9, 1, 0), (1, 0.9, 1, 'yes')])    # breaks half-way
        assert list(database.rounds()) == [0] and database.spent == 0
        assert database.unanswered(0) == [7, 3, 9] and database.last(0) is None
        assert database.answer(3, 2, 0) and not database.answer(3, 1, 0) and not database.answer(5, 1, 0)
        assert not database.answer(7, 1, 1)                 # not of this round
        database = reopen()
        assert database.unanswered(0) == [7, 9] and database.spent == 1 and database.last(0) == (3, 2)
        assert database.undo(3, 0) and not database.undo(3, 0)
        database = reopen()
        assert database.unanswered(0) == [7, 3, 9] and database.spent == 0
        assert database.answer(9, 1, 0) and database.answer(7, 1, 0) and database.answer(3, None, 0)
        assert not database.undo(3, 0) and database.last(0) is None            # the round is over
        assert lists(database.labels()) == [[7, 9], [1, 1]]
        assert database.asked().tolist() == [7, 3, 9] and database.round_counts(0) == (3, 2, 1, 0.5)
        database.query([1, 2, 4], 1)                        # the skipped one was not charged
        with raises(ValueError, 'budget'):
            database.query([5], 1)


def test_a_file_that_can_not_be_used_is_one_sentence_that_names_it():
    with folder() as f:
        good, path = f / 'good.sqlite', f / 'l.sqlite'
        LabelDatabase(good, lambda ids: [0] * len(ids), 99, 'abc').query(range(90))
        with raises(ValueError, 'l.sqlite is missing'):
            LabelDatabase(path, None, 0, 'abc')
        with raises(ValueError, 'good.sqlite', 'another data set'):
            LabelDatabase(good, None, 0, 'other')
        for change, said in (("UPDATE queries SET label = 'cat' WHERE id = 5", 'damaged'),
                             ('CREATE VIEW v AS SELECT 1', 'version'),
                             ('DELETE FROM dataset', 'data set')):
            path.write_bytes(good.read_bytes())
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute('PRAGMA ignore_check_constraints = ON')
                other.execute(change)
            with raises(ValueError, 'l.sqlite', said):
                LabelDatabase(path, None, 9, 'abc')


def test_a_full_disk_leaves_the_answers_that_were_there():
    posix()
    with folder() as f:
        database = LabelDatabase(f / 'l.sqlite', lambda ids: [1] * len(ids), 9000, 'abc')
        database.query([1, 2])
        with full_disk(30000), raises(ValueError, 'l.sqlite'):
            database.query(range(3, 8000), 1)
        again = LabelDatabase(f / 'l.sqlite', None, 0, 'abc')
        assert again.asked().tolist() == [1, 2] == database.asked().tolist()


# ------------------------------------------------------------------------------------- which to ask

def test_picks_are_random_or_nearest_to_the_centres_of_clusters():
    a, b, c = (labels.pick_random(5, 50, seed).tolist() for seed in (0, 0, 1))
    assert a == b != c
    assert sorted(labels.pick_random(50, 50, 1).tolist()) == list(range(50))
    blob = torch.arange(60) % 3
    h = 0.1 * randn(60, 2) + torch.tensor([[0.0, 0], [5, 0], [0, 5]])[blob]
    assert sorted(blob[labels.pick_coverage(3, h, 0)].tolist()) == [0, 1, 2]
    ids = labels.pick_coverage(10, torch.cat([h[:1].expand(30, 2), h[:9]]), 0)
    assert len(set(ids.tolist())) == 10                     # more clusters than different points
    centres = torch.cat([randn(3, 2, seed=1) * 5, torch.full((1, 2), 99.0)])       # one without an image
    d = torch.cdist(h, centres)
    nearest = [d[:, k].where(d.argmin(1) == k, torch.inf).argmin().item() for k in range(3)]
    assert sorted(evaluate.medoids(h, centres).tolist()) == sorted(nearest)


def test_informative_queries_are_disagreements_and_small_margins_never_known_and_spread():
    h = torch.nn.functional.normalize(randn(400, 6, seed=2), dim=1)
    probs = (3 * randn(400, 4, seed=3)).softmax(1)
    known = torch.arange(40)

    def picked(n, seed='a', rows=slice(None)):
        ids, agreed = labels.pick_informative(n, probs[rows], h[rows], known, known, known % 4, seed)
        assert len(set(ids.tolist())) == n and not set(ids.tolist()) & set(known.tolist())
        return ids, agreed
    ids, agreed = picked(20)
    vote = features.knn(h[known], known % 4, h, k=10, tau=0.1)
    assert torch.equal(agreed, vote == probs.argmax(1)) and not agreed[ids[:10]].any()
    top = probs.topk(2, 1).values
    margin = (top[:, 0] - top[:, 1]).tolist()
    still_open = sorted(set(range(40, 400)) - set(ids[:10].tolist()), key=margin.__getitem__)
    assert set(ids[10:].tolist()) <= set(still_open[:150])
    assert torch.equal(picked(20)[0], ids) and not torch.equal(picked(20, 'b')[0], ids)
    picked(355)                                             # there are not so many disagreements
    picked(6, rows=torch.cat([known, 40 + torch.arange(0, 360) // 60 % 6]))    # six images, each many times


# --------------------------------------------------------------------------------- how good it is

def test_the_interval_of_an_estimate_is_exact_and_below_twelve_answers_there_is_none():
    for n, k in (12, 0), (12, 11), (12, 12), (50, 33), (200, 199):
        estimate = labels.estimate_accuracy(torch.arange(n) < k)
        wanted = scipy.stats.binomtest(k, n).proportion_ci(method='exact')
        assert close(estimate, [k / n, *wanted, n], 1e-9)
    assert labels.estimate_accuracy(torch.ones(11, dtype=torch.bool)) is None
    assert str(estimate) == '99.5 % (97.2 to 100.0 %)'
