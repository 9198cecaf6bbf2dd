"""Token ids to text, piece by piece: never half a character, never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from .config import CheckpointError

_UNFINISHED = "\ufffd"  # what decoders put where bytes are missing
#: Prompt tokens that give the first generated ones their context: some tokenizers drop a leading space without it.
_CONTEXT = 6
#: A character has at most 4 bytes, so at most 3 tokens can be an unfinished one.
_LONGEST_UNFINISHED = 3


def load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise CheckpointError(f"{path}: not readable as a tokenizer: {error}") from None


class TextStream:
    """One request's text.

    ``push`` returns what has become certain with a new token; ``finish`` returns the rest. Text is held back
    while it may be part of a character or of a stop string. ``stopped_by`` is the stop string found, if any:
    the text ends before it. ``text`` is all of what was returned.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stop = stop
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._begin, self._read = 0, len(self._ids)  # ids[begin:read] is text already seen, for context
        self._held = ""
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._emit(self._fresh(), final=False)

    def finish(self, tokens: Sequence[int] = ()) -> str:
        """The rest of the text, after ``tokens`` that were not pushed one by one."""
        self._ids += tokens
        seen = self._decode(self._begin, self._read)
        fresh = self._decode(self._begin, len(self._ids))[len(seen) :]
        self._begin = self._read = len(self._ids)
        return self._emit(fresh, final=True)

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True)

    def _fresh(self) -> str:
        """Text of the unread tokens, or "" while it ends inside a character."""
        end = len(self._ids)
        seen, whole = self._decode(self._begin, self._read), self._decode(self._begin, end)
        if whole.endswith(_UNFINISHED):
            return self._all_but_unfinished(seen, whole) if end - self._read > _LONGEST_UNFINISHED + 1 else ""
        if len(whole) > len(seen):
            self._begin = self._read
        self._read = end
        return whole[len(seen) :]

    def _all_but_unfinished(self, seen: str, whole: str) -> str:
        """Bytes that are no text: give them out, but for the last ones, which may yet become a character.

        The place to cut is one where the two parts decode to the same text as the whole.
        """
        end = len(self._ids)
        for cut in range(end - 1, end - 1 - _LONGEST_UNFINISHED, -1):
            before, after = self._decode(self._begin, cut), self._decode(cut, end)
            if before + after == whole and not after.strip(_UNFINISHED):
                self._begin = self._read = cut
                return before[len(seen) :]
        return ""

    def _emit(self, fresh: str, final: bool) -> str:
        if self.stopped_by is not None:
            return ""
        held = self._held + fresh
        hits = [(at, s) for s in self.stop if (at := held.find(s)) >= 0]
        if hits:
            at, self.stopped_by = min(hits)
            out, self._held = held[:at], ""
        else:
            keep = 0 if final else self._overlap(held)
            out, self._held = held[: len(held) - keep], held[len(held) - keep :]
        if out:
            self._parts.append(out)
        return out

    def _overlap(self, held: str) -> int:
        """Length of the longest end of ``held`` that a stop string begins with."""
        longest = min(len(held), max((len(s) for s in self.stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(held[-n:]) for s in self.stop)), 0)
