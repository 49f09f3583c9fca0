"""Training: one loop, and per method the objective that it minimises.

An objective is a function (model, x, g) -> (loss, parts): x (B, C, H, W) float 0..1 on the device, g the
generator of this step, parts a dict of 0-d tensors to log. Learning without labels sees pictures only.
The classifier's objective is (model, x, y, g): y (B,) are labels that were paid for.
"""
import ctypes
import math
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

import data
import distributed
import evaluate
import losses
from runs import Progress, clock


class Diverged(ValueError):
    """The loss, a weight or a feature is not finite."""


class Stopped(Exception):
    """Training was asked to stop by a signal, after it saved a checkpoint."""


# ------------------------------------------------------------------------------------- objectives

def autoencoding(model, x, g, noise=0.0):
    """Squared error of the reconstruction; with noise, from a noisy picture back to the clean one."""
    return losses.mse(model(data.add_noise(x, noise, g) if noise else x), x), {}


def variational(model, x, g, beta=1.0, likelihood='bernoulli'):
    """Negative ELBO in nats."""
    logits, mu, logvar = model(x, g)
    loss, recon, kl = losses.elbo(logits, x, mu, logvar, beta=beta, likelihood=likelihood)
    return loss, {'recon': recon, 'kl': kl}


def contrastive(model, x, g, tau=0.2, views=None, other=None):
    """NT-Xent of two views of each picture, or of one of it and one of its `other` (B, C, H, W); one forward pass for
    both. Anchors are the pictures of this process, negatives those of all."""
    pairs = torch.cat([x, x if other is None else other])
    z1, z2 = map(distributed.gather, model(data.augment(pairs, views, g)).chunk(2))
    own = torch.arange(len(x), device=x.device) + (len(x) * distributed.rank() if len(z1) > len(x) else 0)
    return losses.nt_xent(z1, z2, tau, own), {'chance': x.new_tensor(math.log(max(1, 2 * len(z1) - 1)))}


def neighbouring(model, x, near, g, pictures, contrast):
    """`contrast` (contrastive with its flags) of each picture and a neighbour, drawn from near (B, k), its ids: the
    positives of NNCLR (arXiv 2104.14548), but found beforehand. pictures: function from ids (B,) to uint8 pictures."""
    pick = torch.randint(near.shape[1], (len(x), 1), generator=g, device=x.device)
    return contrast(model, x, g, other=data.to_float(pictures(near.gather(1, pick).squeeze(1))))


def classification(model, x, y, g, views=None, mixup=0.0):
    """Cross-entropy of a random view; with mixup (arXiv 1710.09412) of pairs of views, mixed by a share
    drawn from Beta(mixup, mixup) for the whole batch."""
    x = data.augment(x, views, g)
    if not mixup:
        return losses.cross_entropy(model(x), y), {}
    share = float(np.random.default_rng(g.initial_seed()).beta(mixup, mixup))
    other = torch.randperm(len(x), generator=g, device=x.device)
    logits = model(torch.lerp(x[other], x, share))
    return share * losses.cross_entropy(logits, y) + (1 - share) * losses.cross_entropy(logits, y[other]), {}


def consistency(model, x, g, labelled, views, threshold=0.95):
    """FixMatch (arXiv 2001.07685) with a mean teacher, on unlabelled pictures x and a quarter as many labelled
    ones: cross-entropy of the labelled, plus that of the student's prediction for a strong view against the class
    that the teacher sees in a weak view, where it is surer than `threshold`.

    model: nets.MeanTeacher. labelled: function that returns (x, y) of those paid for so far. views: the strong ones.
    """
    x_l, y_l = labelled()
    ids = torch.randint(len(y_l), (-(-len(x) // 4),), generator=g, device=x.device)
    weak = data.augment(x, data.Views(crop=0.9, flip=views.flip, rotate=0, jitter=0), g)
    with torch.no_grad():
        sure, guess = model.teacher(weak).float().softmax(1).max(1)
    logits = model.student(data.augment(torch.cat([data.to_float(x_l[ids]), x]), views, g))
    accepted = (sure > threshold).float()
    supervised = losses.cross_entropy(logits[:len(ids)], y_l[ids])
    unsupervised = losses.cross_entropy(logits[len(ids):], guess, accepted)
    return supervised + unsupervised, {'accepted': accepted.mean()}


# ------------------------------------------------------------------------------------- precision

def amp_by_default(device, path='/proc/cpuinfo'):
    """bfloat16 where networks train faster with it: CUDA cards that have it and don't emulate it, CPUs with AMX; with
    AVX512-BF16 alone they were slower."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open(path) as f:
            flags = f.read(1 << 14)
    except OSError:
        return False
    return device.type == 'cpu' and 'amx_bf16' in flags


def heed_quota(path='/sys/fs/cgroup/cpu.max'):
    """Use no more threads than a container's quota of processor time keeps busy (cgroup v2): torch counts the cores of
    the machine."""
    try:
        quota, period = map(int, Path(path).read_text().split())
        torch.set_num_threads(max(1, min(torch.get_num_threads(), quota // period)))
    except (OSError, ValueError):                     # no cgroup, or 'max': no quota
        pass


def keep_memory():
    """Have glibc keep the memory of a step for the next one: given back and taken again, it costs a fault a page."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)                          # M_MMAP_THRESHOLD: the most that it takes
        mallopt(-1, (1 << 31) - 1)                    # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):      # another C library
        pass


def autocast(device, amp):
    """Context in which the network's matrix work runs in bfloat16, if amp."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if amp else nullcontext()


# ----------------------------------------------------------------------------------- optimisation

def optimizer(model, lr, weight_decay):
    """AdamW; weight decay spares biases and the scales of norms (arXiv 2002.05709, appendix B)."""
    learned = [p for p in model.parameters() if p.requires_grad]
    decay, spare = [p for p in learned if p.ndim > 1], [p for p in learned if p.ndim <= 1]
    fused = decay[0].device.type in ('cuda', 'cpu')
    return torch.optim.AdamW([{'params': decay, 'weight_decay': weight_decay},
                              {'params': spare, 'weight_decay': 0.0}], lr=lr, fused=fused)


@contextmanager
def climbed(model, rho):
    """The weights moved by rho along their gradient, and back at the end: where sharpness-aware minimisation takes
    the gradient that it descends by (arXiv 2010.01412, eq. 2). BatchNorm's statistics stay as they are."""
    moved = [p for p in model.parameters() if p.grad is not None]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    held = [*moved, *(b for m in norms for b in m.buffers())]
    before = [t.detach().clone() for t in held]
    length = torch.stack([p.grad.norm() for p in moved]).norm().clamp(min=1e-12)
    with torch.no_grad():
        for p in moved:
            p.add_(p.grad * (rho / length))
        with torch.enable_grad():
            yield
        for t, old in zip(held, before):
            t.copy_(old)


def lr_scale(step, steps, warmup, closing):
    """Learning rate of a step as a share of its peak: linear warm-up, constant, then over the last `closing` of
    all steps, as far as warm-up leaves them, a half cosine to 0."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    closing = min(closing, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * max(0, step - steps + closing) / max(1, closing)))


@contextmanager
def signals():
    """Yields a list that fills with the first SIGINT or SIGTERM; the second acts at once."""
    seen, old = [], {}
    def note(number, frame):
        seen.append(number)
        signal.signal(number, old[number])
    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------- the loop

def fit(model, objective, x, run, *, y=None, check=None, epochs, batch_size, lr, weight_decay=0.0, warmup=0.0,
        closing=math.inf, sam=0.0, plan=None, after_step=None, patience=0, min_delta=0.0, seed=0, amp=False,
        save_every=60.0):
    """Train model on x, data.Pictures, and labels y (N,) if the objective takes them; returns the
    seconds it took, over all its parts. warmup and closing are in epochs: the learning rate rises over the first
    and falls over the last (inf: as soon as it is up). check() is called after each epoch; what it returns, a
    dict with val_loss, is logged and decides about the early stop.

    plan(epoch, seconds so far, pause), if given, is called before each epoch, and again where one is resumed in its
    middle; it returns how many epochs there will be, as far as is known. `with pause() as stop` is for what takes
    long there and is no training, such as waiting for a person: the state is saved before, the time is not counted,
    and the list `stop` is no longer empty once a signal came. after_step() is called after each step.
    sam: radius of sharpness-aware minimisation, 0 for none.

    Continues from the run's checkpoint, to the bit, if it has one. Stops early when the validation loss
    has not fallen by min_delta for `patience` epochs (0: never). Raises Stopped after a signal, once
    the state is saved, and ValueError when the loss is no longer finite; then the last good checkpoint
    stays.
    """
    opt = optimizer(model, lr, weight_decay)
    own = [distributed.rank()] if distributed.rank() else []                 # processes draw different views
    steps = data.steps_per_epoch(len(x), batch_size)
    state = {'epoch': 1, 'step': 0, 'total': torch.zeros((), device=x.device), 'best': math.inf, 'bad': 0,
             'seconds': 0.0}
    if saved := distributed.from_first(run.load()):
        state = _restore(saved, model, opt, run)
    run.trim_log(state['epoch'] - 1)
    progress, began, saved_at = Progress(), time.monotonic() - state['seconds'], time.monotonic()

    def rate():
        """Learning rate of the step that state['step'] is after."""
        done = (state['epoch'] - 1) * steps + state['step'] - 1
        return lr * lr_scale(done, epochs * steps, warmup * steps, closing * steps)

    def backward(batch, epoch, step):
        """Loss of a batch over all processes; leaves its gradients in place. A step draws the same views again."""
        with autocast(x.device, amp):
            loss, _ = objective(model, *batch, data.generator(x.device, seed, epoch, step, *own))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        return distributed.average_gradients(model, loss)

    def save():
        if not all(v.isfinite().all() for v in model.state_dict().values()):   # a gradient overflowed
            raise Diverged(_not_finite('a weight', state, rate(), run))
        state['seconds'] = time.monotonic() - began
        run.save({**state, 'model': model.state_dict(), 'optimizer': opt.state_dict()})

    with signals() as stop:
        @contextmanager
        def pause():
            nonlocal began
            save()
            paused = time.monotonic()
            yield stop
            began += time.monotonic() - paused

        while True:
            epoch = state['epoch']
            if plan:
                progress.clear()
                epochs = plan(epoch, time.monotonic() - began, pause)
            if epoch > epochs or (patience and state['bad'] >= patience):
                break
            model.train()
            started, first = time.monotonic(), state['step']
            order = data.batches(len(x), batch_size, seed, epoch, first, x.device)
            for step, ids, pictures in x.read((step, distributed.share(ids)) for step, ids in order):
                batch = (data.to_float(pictures),) if y is None else (data.to_float(pictures), y[ids])
                state['step'] = step + 1
                for group in opt.param_groups:
                    group['lr'] = rate()
                loss = backward(batch, epoch, step)
                if sam:
                    with climbed(model, sam):
                        backward(batch, epoch, step)
                opt.step()
                if after_step:
                    after_step()
                state['total'] += loss
                if x.device.type == 'cpu' or step % 50 == 0 or step + 1 == steps:   # elsewhere each costs a sync
                    if not state['total'].isfinite():
                        raise Diverged(_not_finite('the loss', state, rate(), run))
                if progress.due():
                    progress.show(_live(state, epochs, steps, first, len(x), started))
                if stop or time.monotonic() - saved_at > save_every:
                    save()
                    saved_at = time.monotonic()
                if stop:
                    raise Stopped(f'stopped at epoch {epoch}, step {step + 1} of {steps}')
            progress.clear()
            row = {'epoch': epoch, 'loss': state['total'].item() / steps, 'lr': rate(), **(check() if check else {}),
                   'images_per_s': round((steps - first) / steps * len(x) / (time.monotonic() - started), 1),
                   'seconds': round(time.monotonic() - began, 2)}
            row = distributed.from_first(row)                              # it decides about an early stop for all
            if math.isnan(row.get('rank', 0.0)):
                raise Diverged(_not_finite('a feature of the validation pictures', state, rate(), run))
            state.update(epoch=epoch + 1, step=0, total=torch.zeros_like(state['total']), bad=state['bad'] + 1)
            if row.get('val_loss', row['loss']) < state['best'] - min_delta:
                state.update(best=row.get('val_loss', row['loss']), bad=0)
            run.log(row)
            progress.say(describe(row, epochs))
        save()
        if stop:
            raise Stopped('stopped after the last epoch, before measuring')
    return state['seconds']


def _restore(saved, model, opt, run):
    """Fill model and optimizer from a checkpoint; returns the rest of it, the loop's state."""
    try:
        model.load_state_dict(saved.pop('model'))
        opt.load_state_dict(saved.pop('optimizer'))
        device = next(model.parameters()).device
        return {**{key: saved[key] for key in ('epoch', 'step', 'best', 'bad', 'seconds')},
                'total': saved['total'].to(device)}
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError):
        raise ValueError(f'{run.folder} holds a checkpoint of another network or version; use another --name or '
                         '--overwrite') from None


def _not_finite(what, state, lr, run):
    return (f'{what} is not finite at epoch {state["epoch"]}, step {state["step"]}, learning rate {lr:.2g}; try a '
            f'lower --lr or --no-amp (the last good checkpoint, if there is one, stays in {run.folder})')


@torch.no_grad()
def validate(model, objective, x_val, batch_size, seed, amp):
    """{'val_loss', 'std', 'rank', 'collapsed', ...} on pictures kept out of training: the objective and its
    parts, and the health of the features: mean standard deviation, effective rank, and whether they have
    collapsed, to one point (deviations under a thousandth of their size) or one line (told from 10 up)."""
    model.eval()
    means, h = {}, []
    for i, part in enumerate(x_val.chunk(data.steps_per_epoch(len(x_val), batch_size))):
        part = data.to_float(part)
        with autocast(x_val.device, amp):
            loss, parts = objective(model, part, data.generator(x_val.device, seed, 'val', i))
            h.append(model.encode(part).float())
        for key, value in {'val_loss': loss, **parts}.items():
            means[key] = means.get(key, 0.0) + value.item() * len(part) / len(x_val)
    h = torch.cat(h)
    std, rank = h.std(0, unbiased=False).mean().item(), evaluate.effective_rank(h)
    point, line = std < 1e-3 * h.abs().mean().item(), rank < 1.5 and h.shape[1] > 1
    return {**means, 'std': std, 'rank': rank, 'collapsed': len(h) >= 10 and (point or line)}


def _live(state, epochs, steps, first, n, started):
    done, took = state['step'] - first, time.monotonic() - started
    left = (steps - state['step'] + (epochs - state['epoch']) * steps) * took / done
    return (f'epoch {state["epoch"]}/{epochs} step {state["step"]}/{steps}  '
            f'loss {state["total"].item() / state["step"]:.4f}  {done * n / steps / took:,.0f} images/s  '
            f'{clock(left)} left')


def describe(row, epochs):
    """One epoch as a line; the loss stands beside what chance would give, where that is known."""
    known = {'recon': 'recon {:.1f}', 'kl': 'KL {:.1f}', 'chance': 'chance {:.3f}'}
    extra = ''.join(f'  {form.format(row[key])}' for key, form in known.items() if key in row)
    line = f'epoch {row["epoch"]}/{epochs}  loss {row["loss"]:.4f}'
    if 'val_loss' in row:
        line += f'  val {row["val_loss"]:.4f}{extra}  feature std {row["std"]:.3f}, rank {row["rank"]:.1f}'
    line += f'  {row["images_per_s"]:,.0f} images/s'
    if row.get('collapsed'):
        line += '\nWARNING: the features have collapsed: all pictures look the same to the encoder'
    return line
