"""Whether a CPU is faster in bfloat16 than in float32."""

import functools
import math
import time

import torch


@functools.cache
def multiplies_bfloat16():
    """True if this CPU multiplies bfloat16 in at most 3/4 of float32's time.

    Found by trial. A CPU's flags do not say what oneDNN makes of them: without the right
    instructions it multiplies bfloat16 all the same, up to a hundred times slower.
    """
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    matrices = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in seconds}
    begin = time.perf_counter()
    turns = 0
    while turns < 4 or time.perf_counter() - begin < 0.3:  # the first turn warms up
        for dtype, matrix in matrices.items():
            start = time.thread_time()  # on a busy machine perf_counter counts others' work
            matrix @ matrix
            seconds[dtype] = min(seconds[dtype], time.thread_time() - start)
        turns += 1
    return seconds[torch.bfloat16] < 0.75 * seconds[torch.float32]
