"""The page pool: which pages of the KV cache belong to whom. Pure Python; it never sees a tensor.

With ``prefix_cache`` a full page stays findable by the exact tokens up to its end, also after its last user
left, until the page is needed. An entry is keyed by (parent entry, the page's tokens), so two different
prefixes can never meet, as they could with a hash.
"""

from __future__ import annotations

from collections.abc import Sequence


class OutOfPages(Exception):
    """The pool has fewer free pages than were asked for; nothing was taken."""


class PagePool:
    """
    num_pages, page_size   the cache's P and S
    prefix_cache           keep full pages findable by their tokens
    """

    def __init__(self, num_pages: int, page_size: int, prefix_cache: bool = False) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"PagePool: got {num_pages} pages of {page_size} tokens, wanted at least one of each")
        self.num_pages, self.page_size, self.prefix_cache = num_pages, page_size, prefix_cache
        self._refs = [0] * num_pages
        self._free: dict[int, None] = dict.fromkeys(range(num_pages))  # in order of their last use, oldest first
        self._found: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> (page, entry id)
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> its key in _found
        self._next_entry = 1  # entry 0 is the empty prefix

    @property
    def available(self) -> int:
        """Pages that can be taken now, remembered prefixes that nobody uses included."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """``count`` pages, all or none: raises OutOfPages."""
        if count > len(self._free):
            raise OutOfPages(f"wanted {count} pages, {len(self._free)} of {self.num_pages} are free")
        taken = []
        for _ in range(count):
            page = next(iter(self._free))
            del self._free[page]
            self._forget(page)
            self._refs[page] = 1
            taken.append(page)
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back, each once for every time it was taken or found."""
        for page in reversed(pages):  # a prefix's last page goes first, so what many share lives longest
            if self._refs[page] < 1:
                raise RuntimeError(f"page {page} was given back more often than it was taken")
            self._refs[page] -= 1
            if not self._refs[page]:
                self._free[page] = None

    def find(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """Take the longest remembered run of full pages that ``tokens`` begins with: (pages, their entries).

        At least one token is left over, because a forward pass needs one to give logits.
        """
        pages: list[int] = []
        entries: list[int] = []
        if not self.prefix_cache:
            return pages, entries
        S, parent = self.page_size, 0
        for start in range(0, (len(tokens) - 1) // S * S, S):
            hit = self._found.get((parent, tuple(tokens[start : start + S])))
            if hit is None:
                break
            page, parent = hit
            if not self._refs[page]:
                del self._free[page]
            self._refs[page] += 1
            pages.append(page)
            entries.append(parent)
        return pages, entries

    def remember(self, pages: Sequence[int], entries: list[int], tokens: Sequence[int], written: int) -> None:
        """Make the full pages among the first ``written`` tokens findable. Call it once their KV is in the cache.

        ``entries`` holds the entries of the pages remembered so far and grows along.
        """
        if not self.prefix_cache:
            return
        S = self.page_size
        for i in range(len(entries), written // S):
            key = (entries[-1] if entries else 0, tuple(tokens[i * S : (i + 1) * S]))
            if key not in self._found:  # another request may have written the same prefix meanwhile
                self._found[key] = (pages[i], self._next_entry)
                self._key_of[pages[i]] = key
                self._next_entry += 1
            entries.append(self._found[key][1])

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._found[key]  # longer prefixes lose their parent: unreachable until their pages are taken
