"""What a person looks at: pictures as PNG and tables as text. Standard library, numpy and torch tensors only."""
import statistics
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

import runs


def png(picture):
    """(H, W) or (H, W, 3) uint8 as the bytes of a PNG: one chunk of zlib-compressed rows (RFC 2083)."""
    picture = np.ascontiguousarray(picture)
    H, W = picture.shape[:2]
    rows = np.zeros((H, 1 + picture[0].size), np.uint8)                     # each row: filter type 0, its bytes
    rows[:, 1:] = picture.reshape(H, -1)
    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    header = struct.pack('>IIBBBBB', W, H, 8, 2 if picture.ndim == 3 else 0, 0, 0, 0)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows.tobytes(), 9))
            + chunk(b'IEND', b''))


def read_png(path):
    """The picture that write_png wrote."""
    blob = Path(path).read_bytes()
    W, H, _, kind = struct.unpack('>IIBB', blob[16:26])
    rows = np.frombuffer(zlib.decompress(blob[41:-16]), np.uint8).reshape(H, -1)[:, 1:]    # one chunk, filter type 0
    return rows.reshape(H, W, 3) if kind == 2 else rows


def write_png(path, picture):
    """Write (H, W) or (H, W, 3) uint8 as a PNG file."""
    runs.write_atomic(path, png(picture))


def sheet(*rows, gap=2, zoom=2):
    """Rows of pictures, each (n, C, H, W) float 0..1, as one picture (H', W') or (H', W', 3) uint8."""
    C, H, W = rows[0].shape[1:]
    n = max(len(row) for row in rows)
    out = np.full((C, len(rows) * (H + gap) + gap, n * (W + gap) + gap), 128, np.uint8)
    for r, row in enumerate(rows):
        for i, picture in enumerate((row.detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy()):
            top, left = gap + r * (H + gap), gap + i * (W + gap)
            out[:, top:top + H, left:left + W] = picture
    out = out.repeat(zoom, 1).repeat(zoom, 2)
    return out[0] if C == 1 else out.transpose(1, 2, 0)


def iteration(row):
    """One iteration of clustering as lines of text, loud when clusters have died."""
    line = (f'iteration {row["iteration"]}: {row["stable"]:.1%} assigned as before, {row["relied_on"]:,} relied on, '
            f'criterion {row["criterion"]:.3f}, sizes {row["sizes"]}')
    if 'acc' in row:
        line += f'; ACC {row["acc"]:.3f}, NMI {row["nmi"]:.3f}, ARI {row["ari"]:.3f}, purity {row["purity"]:.3f}'
    if row['held']:
        line += '\nWARNING: the new clusters are worse by the criterion and not learned from; those before are kept'
    if row['live_clusters'] < len(row['sizes']):
        line += f'\nWARNING: only {row["live_clusters"]} of {len(row["sizes"])} clusters are alive'
    return line


DIGITS = '75557 26227 71747 71717 55711 74717 74757 71111 75757 75717'.split()   # 3x5 dots: an octal digit is a row


def captioned(x, numbers):
    """Pictures (n, C, H, W) uint8, enlarged to 84 pixels or more, each above its number: (n, C, H', W') uint8."""
    zoom = -(-84 // x.shape[3])
    x = x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    band = x.new_zeros(*x.shape[:2], 14, x.shape[3])
    for caption, number in zip(band, numbers):
        rows = [''.join(f'{int(DIGITS[int(d)][r]):03b}0' for d in str(int(number))) for r in range(5)]
        dots = x.new_tensor([[255 * int(c) for c in row] for row in rows])
        dots = dots.repeat_interleave(2, 0).repeat_interleave(2, 1)
        caption[:, 2:12, 2:2 + dots.shape[1]] = dots[:, :x.shape[3] - 2]
    return torch.cat([x, band], 2)


# ---------------------------------------------------------------------------------------- as text

# key in metrics.json, name, digits in a report and in a table of runs ('': not there), the convention it follows
MEASURES = [
    ('accuracy', 'accuracy', '.2%', '.1%', 'from {labels:,} labels'),
    ('estimate', 'estimate', '.2%', '', 'of the accuracy at the last round, from the answers'),
    ('mse', 'MSE', '.4f', '.4f', 'of reconstructions, pixels 0..1'),
    ('ssim', 'SSIM', '.3f', '.3f', '11 taps, sigma 1.5, no padding'),
    ('psnr', 'PSNR', '.1f', '', 'dB, mean over pictures'),
    ('active_units', 'active units', 'd', '', 'latent units whose mean has a variance over 0.01'),
    ('knn', 'kNN', '.2%', '.1%', 'cosine, k 20, weighted; {knn_labels:,} labels'),
    ('probe', 'linear probe', '.2%', '.1%', '{probe_labels:,} labels, l2 {probe_l2:g}'),
    ('kmeans_acc', 'k-means ACC', '.3f', '.3f', 'mapping from {kmeans_mapping} labels, k {clusters}'),
    ('kmeans_nmi', 'k-means NMI', '.3f', '.3f', 'arithmetic mean of the entropies'),
    ('kmeans_ari', 'k-means ARI', '.3f', '', '0 by chance'),
    ('kmeans_purity', 'k-means purity', '.3f', '', 'rises with k'),
    ('features', 'features', 'd', '', 'effective rank {effective_rank:.1f}, mean standard deviation {feature_std:.3f}'),
    ('live_clusters', 'live clusters', 'd', '', 'of {clusters}, by {by}, of sizes {sizes}'),
    ('acc', 'ACC', '.3f', '.3f', 'Hungarian, on the {mapping} labels'),
    ('nmi', 'NMI', '.3f', '.3f', 'arithmetic mean of the entropies'),
    ('ari', 'ARI', '.3f', '.3f', '0 by chance'),
    ('purity', 'purity', '.3f', '.3f', 'rises with the number of clusters'),
    ('mean_f1', 'F1', '.3f', '', 'mean over classes{each}')]


def measures(m):
    """metrics.json as rows (what, value, convention)."""
    m = {**m, 'by': 'a vote of neighbours' if m.get('voted') else 'the network'}
    if 'accuracy' in m or 'acc' in m:                                      # else it is the probe's, told by the page
        each = ' '.join(f'{v:.2f}' for v in m['f1'])
        m.update(mean_f1=statistics.mean(m['f1']), each=f', of the matched clusters: {each}' if 'acc' in m else '')
    return [(what, f'{m[key]:{form}}', convention.format(**m)) for key, what, form, _, convention in MEASURES
            if key in m]


def describe(metrics):
    """metrics.json as lines of text."""
    lines = [f'measured on {metrics["n"]:,} {metrics["split"]} pictures'] if 'n' in metrics else []
    lines += [f'  {what:<15} {value:<9} {convention}' for what, value, convention in measures(metrics)]
    if metrics['left_out']:
        lines.append(f'  left out for want of labels: {", ".join(metrics["left_out"])}')
    return '\n'.join(lines)


COLUMNS = [(key, key, '.0f') for key in ('epochs', 'seconds', 'labels')] + [
    (key, what, form) for key, what, _, form, _ in MEASURES if form]


def kind(config, *but):
    """What runs that differ only by seed, or in the flags `but`, have in common: also of runs on one another's
    encoders, whose names hold the seed."""
    args = config['args']
    return repr([(k, v) for k, v in sorted(args.items()) if k not in runs.HERE | {'seed', *but}]).replace(
        f'-seed={args["seed"]}', '')


def compare(folders):
    """Table of finished runs: those that differ only by seed are one row, mean +- spread over seeds."""
    groups = {}
    for folder in map(Path, folders):
        config = runs.read_config(folder)
        metrics = runs.read_json(folder / 'metrics.json') if (folder / 'metrics.json').exists() else None
        for key, _, _ in COLUMNS if metrics else ():
            if not isinstance(metrics.get(key, 0), (int, float, type(None))):
                raise ValueError(f'{folder / "metrics.json"} has {metrics[key]!r} for {key}; wanted a number')
        key = kind(config)
        if config['args']['seed'] in [c['args']['seed'] for c, _, _ in groups.get(key, [])]:
            key += str(folder)                                              # the same run twice is no spread
        groups.setdefault(key, []).append((config, metrics, folder.name))
    columns = [c for c in COLUMNS if any(m and m.get(c[0]) is not None for g in groups.values() for _, m, _ in g)]
    lines = [['method', 'seeds'] + [title for _, title, _ in columns]]
    for group in groups.values():
        done = [m for _, m, _ in group if m]
        name = group[0][2] if len(group) == 1 else group[0][2].replace(f'-seed={group[0][0]["args"]["seed"]}', '')
        lines.append([name, str(len(done))] + [_cell([m.get(key) for m in done], form) for key, _, form in columns])
    return lines


def table(lines):
    """Rows of cells as aligned text: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(line, widths))) for line in lines)


def _cell(values, form):
    """'-' without a value, the value itself, or mean±standard deviation of several seeds."""
    values = [v for v in values if v is not None]
    if not values:
        return '-'
    mean = f'{statistics.mean(values):{form}}'
    if len(values) == 1 or form == '.0f':
        return mean
    return f'{mean}±{format(statistics.stdev(values), form).rstrip("%")}'
