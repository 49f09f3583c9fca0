"""The machine: device, precision, random generators, memory, and the line that shows progress."""
import ctypes
import functools
import hashlib
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn as nn

import distributed


# ----------------------------------------------------------------------------- device and precision

def pick_device(name=None):
    """torch.device by its name; None: CUDA if there is a card, else the CPU.

    Under torchrun each process gets a card of its own. ValueError if it can't be used.
    """
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    if name.split(':')[0] not in ('cuda', 'mps', 'cpu'):
        raise ValueError(f'--device {name} is not one that training runs on; try cuda, mps or cpu')
    try:
        device = distributed.own_device(torch.device(name))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:                # torch raises either where there is no card
        reason = str(e).split('\n')[0]
        raise ValueError(f'--device {name} can not be used here ({reason}); try cuda, mps or cpu') from None
    return device


def set_deterministic(on):
    """Allow only algorithms that give the same bits each time. Call it before CUDA starts."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if on != torch.are_deterministic_algorithms_enabled():      # the call takes seconds
        torch.use_deterministic_algorithms(on)


def limit_threads(quota='/sys/fs/cgroup/cpu.max'):
    """No more threads than a container may keep busy (cgroup v2): torch counts the machine's cores."""
    try:
        allowed, period = map(int, Path(quota).read_text().split())
    except (OSError, ValueError):                              # no cgroup, or 'max': no limit
        return
    torch.set_num_threads(max(1, min(torch.get_num_threads(), allowed // period)))


def autocast(device, amp):
    """Context in which matrix products and convolutions run in bfloat16, if amp."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if amp else nullcontext()


def in_float32(function):
    """Decorator: autocast is off inside, and float tensors among the positional arguments are float32."""
    def as_float32(a):
        return a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        device = x.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            return function(as_float32(x), *map(as_float32, args), **kwargs)
    return wrapped


def bfloat16_speedup(device):
    """How many times as fast two convolutions learn in bfloat16 as in float32.

    By processor time of one thread, the least of several turns: other work on the machine counts little.
    """
    convs = nn.Sequential(nn.Conv2d(64, 128, 3, 2, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, 1, 1))
    convs = convs.to(device, memory_format=torch.channels_last)
    x = torch.ones(64, 64, 14, 14, device=device)

    def seconds(amp):
        began = time.thread_time()
        with autocast(device, amp):
            loss = convs(x).float().square().mean()
        loss.backward()
        return time.thread_time() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    turns = [(seconds(False), seconds(True)) for _ in range(6)]
    torch.set_num_threads(threads)
    float32, bfloat16 = map(min, zip(*turns))
    return float32 / bfloat16


def amp_by_default(device):
    """Is bfloat16 worth it here? On CUDA cards that have it; on a CPU where it is measured to be faster."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == 'cpu' and bfloat16_speedup(device) > 1.2


def generator(device, *key):
    """Generator on `device` whose state is a function of the key alone, for instance (seed, epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'little') >> 1)


# ------------------------------------------------------------------------------------------- memory

def free_memory(device, limit='/sys/fs/cgroup/memory.max'):
    """Free bytes of a CUDA card, else of the RAM within a container's limit (8 GiB where nothing tells)."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return 8 << 30
    try:
        return min(free, int(Path(limit).read_text()))
    except (OSError, ValueError):                              # no cgroup, or 'max': no limit
        return free


def keep_memory():
    """Have glibc keep the memory of a step for the next one: taking it anew costs a page fault a page."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):               # another C library
        return
    mallopt(-3, 1 << 25)                                       # M_MMAP_THRESHOLD: the largest there is
    mallopt(-1, (1 << 31) - 1)                                 # M_TRIM_THRESHOLD


def prepare_cpu():
    """Threads, memory, and numbers under 1e-38 as 0: with them a step of ae soon takes 1.4 times as long."""
    limit_threads()
    keep_memory()
    torch.set_flush_denormal(True)


# ----------------------------------------------------------------------------------------- progress

class Progress:
    """A line on a terminal that is updated in place; where output is redirected only say() prints."""

    def __init__(self):
        self.quiet = distributed.rank() > 0
        self.live = sys.stdout.isatty() and not self.quiet
        self.last, self.width = 0.0, 0

    def due(self):
        """True when the line wants an update: ask before computing what it shows."""
        return self.live and time.monotonic() - self.last >= 0.5

    def show(self, text):
        text = text[:shutil.get_terminal_size().columns - 1]   # a longer line would wrap and stay
        padding = ' ' * (self.width - len(text))
        print(f'\r{text}{padding}', end='', flush=True)
        self.last, self.width = time.monotonic(), len(text)

    def say(self, text):
        """Print a line that stays."""
        if not self.quiet:
            self.clear()
            print(text, flush=True)

    def clear(self):
        if self.live and self.width:
            print('\r' + ' ' * self.width + '\r', end='', flush=True)
            self.width = 0


def progress(what, total):
    """Function to call with how much of `total` is done: shows the share and the time left on a terminal."""
    line, began = Progress(), time.monotonic()

    def update(done):
        took = time.monotonic() - began
        if done >= total:
            line.clear()
        elif done and took > 1 and line.due():
            line.show(f'{what}: {done / total:.0%}, {clock(took / done * (total - done))} left')
    return update


def clock(seconds):
    """75 -> '1:15', 4000 -> '1:06:40'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
