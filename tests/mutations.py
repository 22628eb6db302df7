"""Plants bugs in kernels.py, one at a time: `python tests/mutations.py [WORDS OF A BUG'S NAME]`.

A property suite that lets a forgotten mask through would prove nothing. Each bug has one place in
kernels.py. The properties of tests/test_triton.py that concern its operation must catch it, and
must pass without a bug. Works on copies; exits with status 1 if a bug survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "corpora", "runs", "notebooks", "results")

# {operation: (its tests, as pytest's -k takes them, {bug: (source, what replaces it)})}
MUTATIONS = {
    "attention": (
        "attention_is_as_good or sum_to_one or drop_the_same or huge or saturated",
        {
            "keys outside are not masked, forward": (
                's = tl.where((position < length)[None, :], s, float("-inf"))',
                "s = s + 0.0",
            ),
            "keys outside are not masked, dq": (
                "p = tl.where((position < length)[None, :], p, 0.0)",
                "p = p + 0.0",
            ),
            "one block too many is whole, forward": (
                "o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)\n\n        whole = length",
                "o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)\n\n"
                "        whole = (length + BLOCK_N - 1)",
            ),
            "one block too many is whole, dk_dv": (
                "whole = length // BLOCK_M * BLOCK_M",
                "whole = (length + BLOCK_M - 1) // BLOCK_M * BLOCK_M",
            ),
            "the rest of the keys is left out, forward": (
                "end = length if REST else whole\n            for first_key",
                "end = whole\n            for first_key",
            ),
            "the rest of the keys is left out, dq": (
                "end = whole if PASS == 1 else length",
                "end = length if PASS == 0 else whole",
            ),
            "the rest of the queries is left out, dk_dv": (
                "end = length if REST else whole\n            for first_query",
                "end = whole\n            for first_query",
            ),
            "a program whose last queries are outside does nothing": (
                "if first_query >= length:  # the grid",
                "if first_query + BLOCK_M > length + 40:  # the grid",
            ),
            "the start of the sequence is forgotten, dk_dv": (
                "dout_ptr += (start.to(tl.int64) * N + head) * D",
                "dout_ptr += head * D",
            ),
            "the scale is forgotten": (
                "scale = D**-0.5 * 1.4426950408889634",
                "scale = 1.4426950408889634",
            ),
            "the exponent has base e": ("scale = D**-0.5 * 1.4426950408889634", "scale = D**-0.5"),
            "the running sum does not shrink": (
                "l = l * shrink + tl.sum(p, 1)",
                "l = l + tl.sum(p, 1)",
            ),
            "the running output does not shrink": ("o = o * shrink[:, None]", "o = o + 0.0"),
            "dropout's scale in the sum that normalizes": (
                "l = l * shrink + tl.sum(p, 1)",
                "l = l * shrink + tl.sum(p, 1) / keep_scale",
            ),
            "no dropout scale on the output": (
                "o * (keep_scale / l)[:, None]",
                "o * (1 / l)[:, None]",
            ),
            "no dropout in the forward pass": (
                "    p = tl.where(keep, p, scale * 0.0)",
                "    p = p + 0.0",
            ),
            "delta from the wrong product": (
                "tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)",
                "tl.sum(out.to(tl.float32) * out.to(tl.float32), 1)",
            ),
            "delta without its factor 1 - p": (
                "do.to(tl.float32), 1) / keep_scale",
                "do.to(tl.float32), 1)",
            ),
            "no delta in dk": ("ds = p * (dp - delta[None, :])", "ds = p * dp"),
            "no delta in dq": ("ds = p * (dp - delta[:, None])", "ds = p * dp"),
            "the stream's offset is forgotten": ("c1.to(tl.uint32) + offset", "c1.to(tl.uint32)"),
            "the stream's key is forgotten": (
                "_halves(key, start.to(tl.uint32), c1",
                "_halves(offset, start.to(tl.uint32), c1",
            ),
            "all heads have one mask": (
                "_philox(head.to(tl.uint32),",
                "_philox((head * 0).to(tl.uint32),",
            ),
            "all sequences have one mask": (
                "key, start.to(tl.uint32),",
                "key, (start * 0).to(tl.uint32),",
            ),
            "the seed's upper word is forgotten": (
                "(seed >> 32).to(tl.uint32))",
                "(seed >> 63).to(tl.uint32))",
            ),
            "another head's mask in dq": (
                "threshold)\n\n        # Queries outside are zeros, and",
                "threshold)\n        stream = (key + 1, offset, start, threshold)\n"
                "        # Queries outside are zeros, and",
            ),
            "another head's mask in dk_dv": (
                "threshold)\n\n        # Keys outside are zeros",
                "threshold)\n        stream = (key + 1, offset, start, threshold)\n"
                "        # Keys outside are zeros",
            ),
            "the halves of a word in the other order": (
                "return word_0 << 16 >= least, word_0 >= least,",
                "return word_0 >= least, word_0 << 16 >= least,",
            ),
            "the four halves in another order": (
                "tl.join(tl.join(near, key_8), tl.join(query_8, both_8))",
                "tl.join(tl.join(near, query_8), tl.join(key_8, both_8))",
            ),
            "the transposed tile is permuted as the other": (
                "tl.permute(halves, (0, 4, 1, 2, 5, 3))",
                "tl.permute(halves, (0, 5, 1, 2, 4, 3))",
            ),
            "dk and dv are swapped": (
                "tl.store(dqkv_ptr + place + N * D, dk, mask=inside)\n"
                "        tl.store(dqkv_ptr + place + 2 * N * D, dv, mask=inside)",
                "tl.store(dqkv_ptr + place + N * D, dv, mask=inside)\n"
                "        tl.store(dqkv_ptr + place + 2 * N * D, dk, mask=inside)",
            ),
            "no dropout in dv": (
                "dropped = tl.where(keep, p, scale * 0.0)  # as in the forward pass",
                "dropped = p",
            ),
            "no dropout in dk": (
                "dp = tl.where(keep, dp, 0.0)\n\n                # Accumulate.\n                dv",
                "\n                # Accumulate.\n                dv",
            ),
            "no dropout in dq": (
                "dp = tl.where(keep, dp, 0.0)\n\n                # Accumulate.\n                if",
                "dp = dp * 1.0\n\n                # Accumulate.\n                if",
            ),
            "no factor 1 / (1 - p) on dq": (
                "dq *= scale / LOG2_E * keep_scale",
                "dq *= scale / LOG2_E",
            ),
            "the binary scale on dk": (
                "dk *= scale / LOG2_E * keep_scale",
                "dk *= scale * keep_scale",
            ),
            "no factor 1 / (1 - p) on dv": ("dv *= keep_scale", "dv *= 1.0"),
            "norm is forgotten in dq": (
                "dq *= norm[:, None]",
                "dq *= 1.0",
            ),
            "norm is forgotten in delta": (
                "delta += tl.sum(p * norm[:, None] * dp, 1)",
                "delta += tl.sum(p * dp, 1)",
            ),
            "norm is forgotten in dk_dv": (
                "p *= tl.load(norm_ptr + query, mask=query < length, other=0.0)[None, :]",
                "p *= 1.0",
            ),
            "the sum's logarithm beside a large maximum, fp32": (
                "tl.store(shift_ptr + place, m, mask=query < length)\n"
                "            tl.store(norm_ptr + place, 1 / l,",
                "tl.store(shift_ptr + place, m + tl.log2(l), mask=query < length)\n"
                "            tl.store(norm_ptr + place, l / l,",
            ),
            "the sum is forgotten in shift, half precision": (
                "tl.store(shift_ptr + place, m + tl.log2(l)",
                "tl.store(shift_ptr + place, m",
            ),
        },
    ),
    "layer_norm": (
        "layer_norm and not model",
        {
            "no pivot": ("# First pass: h - pivot, and its sum.", "pivot *= 0.0"),
            "the pivot without dropout": (
                "pivot *= tl.where(kept, keep_scale, 0.0)",
                "pivot *= keep_scale",
            ),
            "the pivot is missing in the mean that is kept": (
                "tl.store(mean_ptr + row, mean + pivot",
                "tl.store(mean_ptr + row, mean",
            ),
            "the mask before the mean is subtracted": (
                "tl.where((column < H)[None, :], chunks[i] - mean[:, None], 0.0)",
                "chunks[i] - mean[:, None]",
            ),
            "the pivot is subtracted outside as well": (
                "h = tl.where(inside, h - pivot[:, None], 0.0)",
                "h = h - pivot[:, None]",
            ),
            "the mean over the tile's width": (
                "mean = tl.sum(total, 1) / H",
                "mean = tl.sum(total, 1) / (len(chunks) * BLOCK_H)",
            ),
            "eps outside of the root": (
                "1 / tl.sqrt(tl.sum(square, 1) / H + eps)",
                "1 / (tl.sqrt(tl.sum(square, 1) / H) + eps)",
            ),
            "the mean of the last chunk alone": ("total += h", "total = h"),
            "the variance of the last chunk alone": (
                "square += centered * centered",
                "square = centered * centered",
            ),
            "every chunk has the first one's mask": (
                "group = first // 4 + tl.arange(0, BLOCK_H // 4)",
                "group = first * 0 + tl.arange(0, BLOCK_H // 4)",
            ),
            "the halves in another order": (
                "tl.join(tl.join(half_0, half_2), tl.join(half_1, half_3))",
                "tl.join(tl.join(half_0, half_1), tl.join(half_2, half_3))",
            ),
            "no mean of g": ("gs[i] - mean_g[:, None] - ns[i]", "gs[i] - ns[i]"),
            "no mean of g n": (" - ns[i] * mean_gn[:, None])", ")"),
            "the mean of g of the last chunk alone": ("sum_g += g\n", "sum_g = g\n"),
            "dx without the mask": (
                "tl.store(dx_ptr + place, dh * factors[i]",
                "tl.store(dx_ptr + place, dh",
            ),
            "dresidual with the mask": (
                "tl.store(dresidual_ptr + place, dh,",
                "tl.store(dresidual_ptr + place, dh * factors[i],",
            ),
            "dweight from g": ("(dweights[i] + dy * n,)", "(dweights[i] + gs[i] * n,)"),
            "dweight of the last block of rows alone": ("(dweights[i] + dy * n,)", "(dy * n,)"),
            "dbias from g": ("(dbiases[i] + dy,)", "(dbiases[i] + g,)"),
        },
    ),
    "cross-entropy": (
        "cross_entropy",
        {
            "columns outside are 0": (
                'mask=column < V, other=float("-inf")',
                "mask=column < V, other=0.0",
            ),
            "the running sum does not shrink": (
                "l = l * tl.exp(m - m_new) + tl.exp(x - m_new)",
                "l = l + tl.exp(x - m_new)",
            ),
            "no running maximum": ("m_new = tl.maximum(m, tl.max(x, 0))", "m_new = m * 0.0"),
            "the maximum begins at -inf": ("tl.full([], -3.0e38,", 'tl.full([], float("-inf"),'),
            "-100 counts, forward": ("tl.where(counted, lse - chosen, 0.0)", "lse - chosen"),
            "-100 counts, backward": (
                "tl.where(label >= 0, tl.load(upstream_ptr), 0.0)",
                "tl.load(upstream_ptr)",
            ),
            "no upstream factor": (
                "tl.where(label >= 0, tl.load(upstream_ptr), 0.0)",
                "tl.where(label >= 0, 1.0, 0.0)",
            ),
            "the label's column in the first block alone": (
                "column == label",
                "column - first == label",
            ),
            "the label's logit of the first row": (
                "tl.load(logits_ptr + label,",
                "tl.load(logits_ptr - row * V + label,",
            ),
        },
    ),
}  # fmt: skip


def survives(tests, source, replaced="", by=""):
    """True if the tests pass with `replaced` by something else in the source of kernels.py."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED, dirs_exist_ok=True)
        with open(os.path.join(copy, "kernels.py"), "w") as f:
            f.write(source.replace(replaced, by, 1))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-m", "not slow", "-k", tests, "tests/test_triton.py"]
        environment = os.environ | {"HYPOTHESIS_PROFILE": "first_failure", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode > 1:  # not a test that failed: no test at all, or a bug that is no Python
        raise SystemExit(f"{replaced!r}: the tests do not run\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main(words):
    """Tries the bugs whose operation and name contain `words`. Returns the exit status."""
    with open(os.path.join(ROOT, "kernels.py")) as f:
        source = f.read()
    trials = {}  # {name: arguments of `survives`}
    for operation, (tests, bugs) in MUTATIONS.items():
        trials[f"{operation}: no bug"] = (tests, source)
        for name, (replaced, by) in bugs.items():
            if source.count(replaced) != 1:
                raise SystemExit(f"not once in kernels.py: {replaced!r}")
            trials[f"{operation}: {name}"] = (tests, source, replaced, by)
    trials = {name: trial for name, trial in trials.items() if words in name}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda trial: survives(*trial), trials.values())
        verdicts = tqdm(verdicts, total=len(trials), unit="bug")
        survived = dict(zip(trials, verdicts))
    sound = [name for name in trials if name.endswith(": no bug")]
    bugs = [name for name in trials if name not in sound]
    survivors = [name for name in bugs if survived[name]]
    failed = [name for name in sound if not survived[name]]
    print(f"{len(bugs) - len(survivors)} of {len(bugs)} bugs caught")
    for name in survivors:
        print(f"survived: {name}")
    for name in failed:
        print(f"{name}, and yet the tests fail")
    return int(bool(survivors or failed))


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
