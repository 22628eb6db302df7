"""Text to tokens on disk. `prepare` makes a corpus directory, as `python -m corpus` does.

In the order of what happens to a document:

sources.py      what a source may be, and directories
archives.py, tables.py, git_history.py      the other sources
remote.py       sources at s3://, hf:// and the like
records.py      files, notebooks, issues and commits become documents
languages.py    the language of a file, by its name, extension and text
documents.py    sources to a stream of distinct documents; a document to its text
clean.py        StarCoder's basic filters, and near duplicates
tokenizer.py    byte-level BPE, trained by `tokenizers`, run by `tiktoken`
encode.py       documents to tokens, on all cores
store.py        the files of a corpus directory: their writer and their reader
build.py        `prepare`: all of this together, restartable
jobs.py         the same by many tasks, on one machine or a cluster:
pipeline.py     what the tasks do, as steps of datatrove
executors.py    who runs them: processes here, Ray, or Slurm
report.py       what is in a corpus, for people to read
packages.py     fetches sources: the packages of a list, from PyPI, npm and Debian
"""

from corpus.build import prepare

__all__ = ["prepare"]
