"""Every claim of speed or quality, measured beside its peers in one run: `python -m bench`.

    measure        contenders that take turns, and the table and JSON file of a measurement
    model_speed    a training step beside transformers' models
    step_profile   where the time of that step goes
    data_speed     from tokens on disk to batches, beside tokenizing on the fly
    corpus_speed   from text to tokens on disk, beside datatrove's tokenizer
    pii_real       personal data and secrets in real code, beside other detectors; pii_judge
    embed_speed    vectors of source code beside sentence-transformers
    search         finding functions by their docstrings, beside BM25; search_data makes the pairs
    tasks          five tasks, fine-tuned from pretrained and from random weights; task_data
    simulation     simulated runs of several ranks beside real ones
    kernel_speed   each Triton kernel beside its peers, on a GPU; the search for launch settings
    resources      what the compiled kernels take of a chip, without that chip
    machine_code   registers, ptxas's warnings and the hottest loop, read with Triton's tools
    peers          kernels of others, compiled as ours are
    bound          a bound on a kernel's speed from the instructions that it executes
    speedrun       a race to a held-out loss: your recipe beside the record's
    pictures       the two pictures of the front page

results/README.md has the tables. Only figures of one table may be compared: its contenders took
turns on one machine.
"""
