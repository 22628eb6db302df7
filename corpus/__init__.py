"""Text to tokens on disk."""

from corpus.build import prepare

__all__ = ["prepare"]
