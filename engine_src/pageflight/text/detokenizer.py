"""Incremental detokenizing of one sequence: ids in, the text they complete out.

The deltas of a sequence, joined, equal what decoding prompt and output together gives after the prompt's text. A delta
never holds part of a character: its bytes wait for the rest, and at the end an incomplete rest becomes U+FFFD exactly
as in the full decode. A character that the prompt left incomplete belongs to the output.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pageflight.text.pieces import BytePieces, StringPieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer

REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes of UTF-8


class Detokenizer(Protocol):
    """State of one sequence."""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids`, following all ids fed before, complete. Ids unknown to the tokenizer leave no trace."""

    def flush(self) -> str:
        """What is still held back, as the full decode ends. The sequence is over afterwards."""


class ByteDetokenizer:
    """For byte-level tokenizers: a table of bytes and the unfinished character."""

    __slots__ = ("_pending", "_pieces", "_size", "_texts")

    def __init__(self, table: BytePieces, prompt_ids: Sequence[int] = ()) -> None:
        self._pieces, self._texts, self._size = table.pieces, table.texts, len(table.pieces)
        self._pending = b""
        tail = b""
        for index in reversed(prompt_ids):
            piece = self._pieces[index] if index < self._size else None
            tail = (piece or b"") + tail
            if len(tail) >= _LONGEST_CHARACTER:
                break
        # A cut through the tail's first character can only leave continuation bytes, which a decoder skips at once.
        _, used = codecs.utf_8_decode(tail, "replace", False)
        self._pending = tail[used:]

    def feed(self, ids: Sequence[int]) -> str:
        if len(ids) == 1 and not self._pending:
            index = ids[0]
            if index >= self._size:
                return ""
            text = self._texts[index]
            if text is not None:
                return text
        pieces, size = self._pieces, self._size
        data = self._pending + b"".join([pieces[index] or b"" for index in ids if index < size])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text


class StringDetokenizer:
    """For SentencePiece-like tokenizers: a table of strings and the current run of byte tokens.

    A run of byte tokens is text only as a whole: when it is not valid UTF-8, the library turns *every* byte of it into
    U+FFFD. So the run waits for its end; shown earlier, characters would have to be taken back.
    """

    __slots__ = ("_first", "_run", "_size", "_strip_left", "_table")

    def __init__(self, table: StringPieces, prompt_ids: Sequence[int] = ()) -> None:
        self._table, self._size = table, len(table.pieces)
        self._run = bytearray()
        self._first = True
        self._strip_left = table.num_strip
        # The start of the prompt settles what the start of the text loses; its end, which character is unfinished.
        for index in prompt_ids:
            if self._piece(index) is None:
                continue
            self.feed((index,))
            if not self._strip_left:
                break
        self.flush()
        run = bytearray()
        for index in reversed(prompt_ids):
            piece = self._piece(index)
            if isinstance(piece, str):
                break
            if piece is not None:
                run.insert(0, piece)
        self._run.extend(_unfinished(bytes(run)))

    def feed(self, ids: Sequence[int]) -> str:
        table, parts = self._table, []
        for index in ids:
            piece = self._piece(index)
            if piece is None:
                continue
            if isinstance(piece, int):
                self._first = False
                self._run.append(piece)
                continue
            if self._first:
                first = table.first_pieces[index]
                assert isinstance(first, str)
                piece, self._first = first, False
            if self._run:
                parts.append(self._end_run())
            parts.append(piece)
        text = parts[0] if len(parts) == 1 else "".join(parts)
        return self._stripped(text) if self._strip_left and text else text

    def flush(self) -> str:
        text = self._end_run()
        return self._stripped(text) if self._strip_left else text

    def _piece(self, index: int) -> str | int | None:
        return self._table.pieces[index] if index < self._size else None

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        cut = 0
        while cut < len(text) and self._strip_left and text[cut] == self._table.strip_char:
            cut += 1
            self._strip_left -= 1
        if cut < len(text):
            self._strip_left = 0
        return text[cut:]


class WindowDetokenizer:
    """For any other decoder: decode a short window with and without the new ids, and take the difference.

    Three to ten times the cost of the tables, and exact where the decoder looks at most a few tokens back.
    """

    __slots__ = ("_decode_window", "_ids", "_num_shown", "_skip")

    MAX_HELD = 64
    """Ids that may wait for the end of a character: broken bytes alone must not grow the window for ever."""
    CONTEXT = 6

    def __init__(self, tokenizer: HFTokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool) -> None:
        self._decode_window = tokenizer.decode
        self._skip = skip_special_tokens
        self._ids: list[int] = list(prompt_ids[-self.CONTEXT :])
        self._num_shown = len(self._ids)

    def feed(self, ids: Sequence[int]) -> str:
        self._ids.extend(ids)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._ids) - self._num_shown < self.MAX_HELD:
            return ""
        if text or len(self._ids) - self._num_shown >= self.MAX_HELD:
            self._ids = self._ids[-self.CONTEXT :]
            self._num_shown = len(self._ids)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._num_shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        shown: str = self._decode_window(self._ids[: self._num_shown], skip_special_tokens=self._skip)
        whole: str = self._decode_window(self._ids, skip_special_tokens=self._skip)
        return whole[len(shown) :]


def _unfinished(run: bytes) -> bytes:
    """The bytes at the end of `run` that begin a character; empty when the run is whole, or broken before its end."""
    try:
        _, used = codecs.utf_8_decode(run, "strict", False)
    except UnicodeDecodeError:
        return b""
    return run[used:]
