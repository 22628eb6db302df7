"""A pretrained encoder, fine-tuned on a task of yours: `python -m finetune TRAIN.jsonl`.

records     training data: JSON lines, whose keys say what kind of task it is
loop        the training loop of all tasks, and its arguments
task        what the loop asks of a task
classes     tasks on whole texts: one class, several, or a number
tokens      tasks on pieces of a text: which tokens are a name, a key, ...
search      vectors of texts, such that a query is close to the code that it asks for
batches     sequences end to end; texts through a model
scores      figures on held-out examples
bm25        the baseline of search: words in common
functions   the functions of source files, which search looks through
export      what transformers and sentence-transformers need to open a model
use         predict and search with what was trained

A new kind of task is a new kind of line in `records`, and a subclass of `task.Task`.
"""
