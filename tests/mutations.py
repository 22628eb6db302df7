"""Plants bugs in kernels.py, one at a time, and checks that the properties of tests/test_triton.py catch each: `python tests/mutations.py`.

A property suite that lets a forgotten mask through would prove nothing. Works on a copy; exits with status 1 where a bug survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MUTATIONS = {
    "keys outside the sequence are not masked, forward": ('s = tl.where(key_in[None, :], s, float("-inf"))', "s = s + 0.0"),
    "keys outside the sequence are not masked, dq": ('tl.where(key_in[None, :], s - lse[:, None], float("-inf"))', "s - lse[:, None]"),
    "scale forgotten": ("D**-0.5 * LOG2_E", "LOG2_E"),
    "natural for binary exponent": ("D**-0.5 * LOG2_E", "D**-0.5"),
    "the running sum is not shrunk": ("l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)"),
    "the running output is not shrunk": ("o = o * shrink[:, None] + ", "o = o + "),
    "dropout scale in the sum that normalizes": ("l = l * shrink + tl.sum(p, 1)", "l = l * shrink + tl.sum(p, 1) / keep_scale"),
    "wrong delta": ("tl.sum(o * do, 1), mask=row < T", "tl.sum(o * o, 1), mask=row < T"),
    "delta left out of dk": ("(p * (dp - delta[None, :]))", "(p * dp)"),
    "stale seed in the backward": (
        "keep = _keep_tile(seed, threshold, group[:, None], (start + query)[None, :], head)",
        "keep = _keep_tile(seed + 1, threshold, group[:, None], (start + query)[None, :], head)",
    ),
    "lanes of the mask in another order": ("tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))"),
    "dk and dv swapped": ("tl.store(dqkv_ptr + place + N * D, dk, mask=inside)", "tl.store(dqkv_ptr + place + N * D, dv, mask=inside)"),
    "dv from weights without dropout": ("dropped = tl.where(keep, p * keep_scale, 0.0)", "dropped = p"),
    "no scale on dq": ("dq *= scale * LN_2", "dq *= 1.0"),
    "the start of the sequence is forgotten": ("base_ptr = qkv_ptr + start.to(tl.int64) * stride_t", "base_ptr = qkv_ptr + 0 * stride_t"),
    "the last block of queries is left out": ("if first >= length:", "if first + BLOCK_M > length + 40:"),
    "LayerNorm masks before it subtracts the mean": (
        "centered = tl.where((column < H)[None, :], h - mean[:, None], 0.0)", "centered = h - mean[:, None]",
    ),
    "LayerNorm divides by the tile's width": ("mean = tl.sum(h, 1) / H", "mean = tl.sum(h, 1) / BLOCK_H"),
    "LayerNorm's eps outside of the root": (
        "1 / tl.sqrt(tl.sum(centered * centered, 1) / H + eps)", "1 / (tl.sqrt(tl.sum(centered * centered, 1) / H) + eps)",
    ),
    "LayerNorm's gradient lacks its mean": ("dh = (g - (tl.sum(g, 1) / H)[:, None] - ", "dh = (g - "),
    "LayerNorm's dx without the mask": ("tl.store(dx_ptr + place, dh * factor", "tl.store(dx_ptr + place, dh"),
    "LayerNorm's dweight from the wrong factor": ("dweight += tl.sum(dy * n, 0)", "dweight += tl.sum(g * n, 0)"),
}  # fmt: skip


def survives(old, new):
    """Whether the tests pass with `old` replaced by `new` everywhere in kernels.py."""
    with open(os.path.join(ROOT, "kernels.py")) as f:
        source = f.read()
    if old not in source:
        raise SystemExit(f"not in kernels.py any more: {old!r}")
    with tempfile.TemporaryDirectory() as copy:
        for name in os.listdir(ROOT):
            if name.endswith((".py", ".toml")):
                shutil.copy(os.path.join(ROOT, name), copy)
        shutil.copytree(os.path.join(ROOT, "tests"), os.path.join(copy, "tests"))
        with open(os.path.join(copy, "kernels.py"), "w") as f:
            f.write(source.replace(old, new))
        arguments = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests/test_triton.py"]
        environment = os.environ | {"HYPOTHESIS_PROFILE": "first_failure", "OMP_NUM_THREADS": "1"}
        return subprocess.run(arguments, cwd=copy, env=environment, capture_output=True).returncode == 0


if __name__ == "__main__":
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = tqdm(pool.map(lambda change: survives(*change), MUTATIONS.values()), total=len(MUTATIONS), unit="bug")
        survivors = [name for name, survived in zip(MUTATIONS, verdicts) if survived]
    print(f"{len(MUTATIONS) - len(survivors)} of {len(MUTATIONS)} bugs caught")
    for name in survivors:
        print(f"survived: {name}")
    sys.exit(bool(survivors))
