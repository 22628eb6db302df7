"""What any training run needs, pretraining and fine-tuning alike.

ranks           the processes of a run: what they agree on, and how they end together
run_directory   what a run leaves on disk: arguments, lock, checkpoints; resuming
metrics         metrics.jsonl, without waiting for the GPU
step            one optimizer step, over micro-batches and ranks
muon            the optimizer of the matrices between embeddings and outputs
head_start      initial weights that know frequencies, positions and neighbours
report          what a pretraining run says
curves          curves.png
plan            what a run costs, before it is paid for
simulate        a run of many ranks in a second: slow ranks, failures, checkpoints
"""
