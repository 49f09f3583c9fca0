"""The optimizer and the loop: schedules, signals, and runs that are stopped in every way and resumed."""
from helpers import (HERE, Killed, TRAINED, assert_same_run, close, finished, flat, full_disk, images, logged,
                     ok, place, posix, python, raises, refused, run, stopping, tiny)
import contextlib
import itertools
import math
import os
import signal
import time
from unittest import mock

import torch

import data
import nets
import pretrain
import train


def test_the_learning_rate_warms_up_to_its_peak_and_comes_down_to_zero_step_by_step():
    curve = [train.lr_scale(s, 100, 10, 20) for s in range(100)]
    falling = [(1 + math.cos(math.pi * s / 20)) / 2 for s in range(20)]
    assert close(curve, [(s + 1) / 10 for s in range(10)] + [1] * 70 + falling)
    assert train.lr_scale(55, 100, 10, math.inf) == train.lr_scale(55, 100, 10, 90) == 0.5
    for steps, warmup, decay in itertools.product((1, 3, 10), (0, 0.5, 3.5, 50), (0, 2, math.inf)):
        assert all(0 < train.lr_scale(s, steps, warmup, decay) <= 1 for s in range(steps))
    rates = [row['lr'] for row in logged(finished('conv'))]   # at the ends of two epochs of three steps
    assert close(rates, [0.002 * train.lr_scale(s, 6, 1.5, math.inf) for s in (2, 5)])


def test_weight_decay_spares_norms_and_biases():
    model = nets.build('simclr', 'resnet', (1, 8, 8), 0.1)
    norms = {f'{name}.weight' for name, m in model.named_modules() if 'BatchNorm' in type(m).__name__}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = train.optimizer(model, 0.1, 0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()                                                # no gradient: only the decay acts
    for name, p in model.named_parameters():
        spared = name in norms or name.endswith('bias')
        assert close(p, before[name] * (1 if spared else 1 - 0.1 * 0.5), 1e-6), name


def test_sam_takes_the_gradient_where_the_loss_is_highest_nearby_and_goes_back():
    model = torch.nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[3.0, 4.0]]).double()
    (model.weight.square().sum() / 2).backward()              # its gradient is the weight itself
    with train.sam_perturbation(model, 0.5):
        assert close(model.weight, [[3.3, 4.4]])
    assert model.weight.tolist() == [[3.0, 4.0]]


def test_the_first_signal_is_noted_the_second_acts_and_an_ignored_one_stays_ignored():
    posix()
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with raises(KeyboardInterrupt), train.signals() as seen:
            os.kill(os.getpid(), signal.SIGINT)
            assert seen == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)          # as under nohup
        with train.signals() as seen:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        assert not seen and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_validation_leaves_the_model_as_it_is_and_weighs_images_equally():
    model = nets.build('conv', 'resnet', (1, 10, 12), 0.1, 4).train()
    x = torch.from_numpy(images(23)[0])[:, None]
    before = dict(flat(model.state_dict()))
    row = train.validate(model, pretrain.autoencoding, x, 10, 0, False)
    assert dict(flat(model.state_dict())) == before
    v = x.float() / 255
    assert close(row['val_loss'], ((model(v) - v) ** 2).mean()) and not row['collapsed']
    model.encode = lambda x: torch.full((len(x), 4), 7.0) + 1e-3 * x[:, 0, 0, :4]
    row = train.validate(model, lambda *_: (torch.tensor(1.0), {}), x, 10, 0, False)
    assert 'collapsed' in train.epoch_line({'epoch': 1, 'loss': 0.1, 'images_per_s': 1, **row}, 2)


def test_the_same_seed_twice_is_bit_identical_also_if_images_are_read_batch_by_batch():
    with place() as cwd, mock.patch.object(data, 'MAX_RESIDENT_BYTES', 0):
        for method in TRAINED:
            ok(*tiny(method))
            assert_same_run(cwd / 'runs' / method, finished(method))


def test_a_run_stopped_at_every_single_step_ends_as_if_left_alone():
    posix()
    for how, starts, stopped in (signal.SIGTERM, 7, 130), (Killed, 6, None):
        with place() as cwd:
            for method in TRAINED:
                for start in range(1, starts + 1):
                    code, out = None, ''
                    with stopping(how), contextlib.suppress(Killed):
                        code, out, _ = run(*tiny(method), '--resume')
                    assert code == (0 if start == starts else stopped), (method, how, start, code)
                    assert code != 130 or '--resume' in out
                assert_same_run(cwd / 'runs' / method, finished(method))


SLOWLY = f'''
import runpy, sys, time
sys.path.insert(0, {str(HERE)!r})
import train
update, train.SAVE_EVERY = train.Trainer._update, 0.01
def slow(*given):
    time.sleep(2)
    return update(*given)
train.Trainer._update = slow
runpy.run_path({str(HERE / 'ssl.py')!r}, run_name='__main__')
'''


def test_real_processes_killed_or_stopped_are_resumed_and_guarded_while_alive():
    posix()
    ends = {'simclr': signal.SIGKILL, 'vae': signal.SIGTERM, 'ae': signal.SIGINT}
    for method in ends:
        finished(method)                                      # what comes after the start has to be quick
    with place() as cwd:
        processes = {method: python('-c', SLOWLY, *tiny(method), cwd=cwd) for method in ends}
        for method, process in processes.items():
            while not (cwd / 'runs' / method / 'checkpoint.pt').exists() and process.poll() is None:
                time.sleep(0.01)
            refused(*tiny(method), '--resume', said=['in use by another process'])
            process.send_signal(ends[method])
        for method, process in processes.items():
            out, err = process.communicate(timeout=60)
            code = -signal.SIGKILL if method == 'simclr' else 130
            assert process.returncode == code and not err, (method, process.returncode, err)
            assert code < 0 or '--resume to continue' in out
            assert not (cwd / 'runs' / method / 'metrics.json').exists()
            ok(*tiny(method), '--resume')
            assert_same_run(cwd / 'runs' / method, finished(method))


def test_every_method_can_do_with_deterministic_algorithms_alone_and_resumes_with_them():
    posix()
    seen, update, _ = [], train.Trainer._update, [finished(method) for method in TRAINED]

    def spy(*given):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return update(*given)
    with place() as cwd, mock.patch.object(train.Trainer, '_update', spy):
        for method in TRAINED:
            with stopping(signal.SIGTERM):
                assert run(*tiny(method), '--deterministic')[0] == 130
            ok(*tiny(method), '--resume')                     # it is kept
            assert_same_run(cwd / 'runs' / method, finished(method))
        assert all(seen)
        ok(*tiny('ae'), '--overwrite')                        # and is off in the next run
        assert not seen[-1]


def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_the_last_good_checkpoint_stays():
    backward = train.Trainer._backward

    def exploding(trainer, *given):
        return backward(trainer, *given) * (math.nan if (trainer.epoch, trainer.step) == (2, 0) else 1)
    with place() as cwd:
        for method in TRAINED:
            with mock.patch.object(train.Trainer, '_backward', exploding), \
                    mock.patch.object(train, 'SAVE_EVERY', 0):
                said = ['the loss is not finite at epoch 2, step 1', 'lower --lr']
                refused(*tiny(method), said=said)
            ok(*tiny(method), '--resume')
            assert_same_run(cwd / 'runs' / method, finished(method))
            run(*tiny(method), '--overwrite --lr 1e9')
            for path in (cwd / 'runs' / method).glob('checkpoint.pt'):
                state = torch.load(path, weights_only=True)
                assert all(v.isfinite().all() for v in state['model'].values()), method


def test_too_little_memory_is_one_sentence_of_advice():
    allocator = RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 4000 bytes")
    other = RuntimeError('CUDA error: an illegal memory access was encountered')
    with place():
        for e in torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB'), allocator, MemoryError():
            with mock.patch.object(train.Trainer, '_update', side_effect=e):
                said = ['out of memory', '--batch-size']
                refused(*tiny('simclr'), '--name', type(e).__name__, said=said)
        with mock.patch.object(train.Trainer, '_update', side_effect=other), raises(RuntimeError, 'illegal'):
            run(*tiny('ae'))                                  # what is no lack of memory is not called one


def test_a_folder_that_can_not_be_written_is_one_sentence():
    posix()
    with place() as cwd:
        for path in cwd, cwd / 'tiny.npz', cwd.parent:
            os.chmod(path, path.stat().st_mode | 0o055)
        os.chmod(cwd, 0o555)
        was = os.geteuid()
        try:
            if was == 0:
                os.seteuid(65534)                             # root may write anywhere
            refused(*tiny('ae'), said=['Permission denied', 'runs'])
        finally:
            os.seteuid(was)
            os.chmod(cwd, 0o755)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room():
    posix()
    with place() as cwd:
        for method, size in itertools.product((*TRAINED, 'scan'), (300, 3000)):       # bytes of a file
            name = f'{method}{size}'
            with full_disk(size):
                said = [name] + ['make room'] * (method == 'ae')
                refused(*tiny(method), '--name', name, said=said)
            assert not list((cwd / 'runs').glob('*/*.tmp'))
            ok(*tiny(method), '--resume --name', name)
            assert_same_run(cwd / 'runs' / name, finished(method))
