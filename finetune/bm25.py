"""BM25: how well the words of a document answer a query, without any learning.

    score(q, d) = sum over the words w of q of
        idf(w) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
    idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5))

f: how often w occurs in d; |d|: words of d; n: documents with w, of N. A word that is twice in the
query counts twice. This idf is Lucene's: it is never negative, however common the word.

It is what a learned search has to beat. Reference: Robertson and Zaragoza, The probabilistic
relevance framework: BM25 and beyond, 2009. Left out: stop words (their idf is near 0) and stemming.
"""

import re
from collections import Counter

import numpy as np

# Between camel and Case, and between HTTP and Server; of ASCII letters only.
_SEAM = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W\d_]{2,}")  # letters of any script


def words_of(text):
    """The words of prose or code, in lower case: two letters or more, identifiers taken apart.

    >>> words_of("def parseHTTPHeader(max_size=8): # read utf8")
    ['def', 'parse', 'http', 'header', 'max', 'size', 'read', 'utf']
    """
    return _WORD.findall(_SEAM.sub(" ", text).lower())


class BM25:
    """An index of documents, each a list of words.

    Takes 12 bytes for each distinct word of each document. Raises ValueError for a k1 below 0, or a
    b outside of [0, 1].
    """

    def __init__(self, documents, k1=1.2, b=0.75):
        _check_parameters(k1, b)
        # The postings, document by document: a word, where it is, and how often.
        self._number_of = {}  # word -> its number
        words = []
        counts = []
        distinct = []  # how many different words each document has
        for document in documents:
            frequencies = Counter(document)
            for word, count in frequencies.items():
                words.append(self._number_of.setdefault(word, len(self._number_of)))
                counts.append(count)
            distinct.append(len(frequencies))
        words = np.array(words, np.int64)  # (postings,)
        counts = np.array(counts, np.float64)  # (postings,)
        self._size = len(distinct)
        places = np.repeat(np.arange(self._size, dtype=np.int32), distinct)  # (postings,)

        # Sorted by word, those of word w are at ends[w] : ends[w + 1].
        order = np.argsort(words, kind="stable")
        words = words[order]
        counts = counts[order]
        self._places = places[order]
        documents_with = np.bincount(words, minlength=len(self._number_of))  # (words,)
        self._ends = np.concatenate([[0], np.cumsum(documents_with)])

        # What a word adds to a document's score does not depend on the query.
        lengths = np.bincount(self._places, weights=counts, minlength=self._size)  # (documents,)
        mean_length = lengths.mean() if len(counts) else 1.0
        idf = np.log(1 + (self._size - documents_with + 0.5) / (documents_with + 0.5))
        saturation = k1 * (1 - b + b * lengths[self._places] / mean_length)  # (postings,)
        self._weights = idf[words] * counts * (k1 + 1) / (counts + saturation)

    def scores(self, query):
        """The score of each document for a query, a list of words: (documents,) float64."""
        scores = np.zeros(self._size)
        for word, count in Counter(query).items():
            number = self._number_of.get(word)
            if number is not None:
                postings = slice(self._ends[number], self._ends[number + 1])
                # No document is twice in the postings of a word, so += adds to each.
                scores[self._places[postings]] += count * self._weights[postings]
        return scores


def _check_parameters(k1, b):
    """Raises ValueError unless they make sense."""
    if not k1 >= 0:
        raise ValueError(f"k1 must be 0 or more, got {k1}")
    if not 0 <= b <= 1:
        raise ValueError(f"b must lie in [0, 1], got {b}")
