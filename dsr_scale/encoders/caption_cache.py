"""Caption tokens in host memory, bounded by bytes; what was used least recently is put out.

Tokens are kept without their padding. The null caption is pinned: guidance asks for it with every
batch, and it is the one entry that a limit of 0 leaves.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

NULL_CAPTION = ""

ENTRY_BYTES = 512
"""What an entry takes besides its tokens and text: two Python objects, a storage, a place in the table."""


class CaptionCache:
    """Captions → tokens [n,C] on the host, n ≥ 0."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def __contains__(self, caption: str) -> bool:
        return caption in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, caption: str) -> Tensor:
        """The tokens of a caption that is there, which is then the one used last."""
        self._entries.move_to_end(caption)
        return self._entries[caption]

    def put(self, caption: str, tokens: Tensor) -> None:
        """Keeps a copy of `tokens` of a caption that is not there, and puts others out for it."""
        assert caption not in self._entries
        size = _size(caption, tokens)
        if caption != NULL_CAPTION and size > self._limit_bytes:
            return
        self._entries[caption] = tokens.clone()
        self._bytes += size
        if NULL_CAPTION in self._entries:
            self._entries.move_to_end(NULL_CAPTION)
        while self._bytes > self._limit_bytes and len(self._entries) > 1:
            self._bytes -= _size(*self._entries.popitem(last=False))

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self._bytes = 0


def _size(caption: str, tokens: Tensor) -> int:
    return tokens.nbytes + len(caption) + ENTRY_BYTES
