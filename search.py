"""Search of settings: a Sobol sequence over ranges of flags, hopeless trials stopped by the median rule."""
import math
from statistics import median

from scipy.stats import qmc


def settings(ranges, n, seed):
    """n settings [{key: value}] that cover the ranges (key, low, high) evenly: the first n points of a scrambled
    Sobol sequence (Owen 1998). Between positive ends a factor of 8 or more apart it steps in logarithms; between
    whole ends, given as int, it takes whole numbers."""
    points = qmc.Sobol(len(ranges), seed=seed).random_base2(max(0, math.ceil(math.log2(n))))[:n]
    def value(u, low, high):
        v = low * (high / low) ** u if low > 0 and high / low >= 8 else low + (high - low) * u
        return round(v) if isinstance(low, int) else float(f'{v:.4g}')                # as it can be typed again
    return [{key: value(float(u), low, high) for u, (key, low, high) in zip(point, ranges)} for point in points]


def hopeless(curve, others):
    """True if a trial whose scores so far are `curve`, one an epoch, more is better, has not once been as good as the
    median of what the others, finished ones, had on average up to that epoch (Golovin et al. 2017, section 3.2).
    Judged from the third finished trial on."""
    means = [sum(other[:len(curve)]) / len(other[:len(curve)]) for other in others if len(other) >= len(curve)]
    return len(means) >= 3 and max(curve) < median(means)


def table(trials):
    """Ranked trials, each {'setting', 'curve', 'stopped'}, as a Markdown table."""
    keys = list(trials[0]['setting'])
    rows = ['| ' + ' | '.join([*keys, 'score', 'epochs']) + ' |', '|' + '---|' * (len(keys) + 2)]
    for t in trials:
        cells = [f'{t["setting"][k]:.4g}' for k in keys]
        cells += [f'{t["curve"][-1]:.4f}', f'{len(t["curve"])}{", stopped" if t["stopped"] else ""}']
        rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)
