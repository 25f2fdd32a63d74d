"""Encodings at work over time: the cache that streams tokens through attention."""

from grape_compile.nn.cache import StreamingCache

__all__ = ["StreamingCache"]
