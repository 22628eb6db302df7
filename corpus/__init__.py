"""Text to tokens on disk. `prepare` makes a corpus directory, as `python -m corpus` does.

build.py        prepare: sources to a corpus directory, restartable and divisible
documents.py    sources to a stream of distinct documents; a document to its text
clean.py        StarCoder's basic filters, and near duplicates
report.py       what is in a corpus, as a table and as a picture

sources.py      what a source may be; directories
archives.py, tables.py, git_history.py      the other sources
records.py      files, notebooks, issues and commits to documents
languages.py    the languages of The Stack, by name, extension and content

tokenizer.py    byte-level BPE, trained by `tokenizers`, run by `tiktoken`
store.py        the files of a corpus directory: their writer and their reader
"""

from corpus.build import prepare

__all__ = ["prepare"]
