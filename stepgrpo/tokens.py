"""Text and token ids of the policy's own tokenizer, without transformers or torch.

Tokens are the truth and text is for looking at: forced text is encoded once, on its own, and sampled ids are decoded
to find words in them, never encoded again.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from stepgrpo.hub import tokenizer_file

_INCOMPLETE = "�"  # what a decoder shows for bytes that are no whole character (yet)


class Codec:
    """A checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer

    @classmethod
    def from_dir(cls, path: str | Path) -> Self:
        """Read ``tokenizer.json`` of a checkpoint directory.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        file = tokenizer_file(path)
        try:
            return cls(Tokenizer.from_file(str(file)))
        except Exception as e:  # what the library raises
            raise ValueError(f"{file}: not a tokenizer that `tokenizers` can read ({e})") from None

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone: nothing is put before or after it.

        Raises:
            ValueError: the vocabulary cannot spell the text, so ids would say something else.
        """
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as e:  # a vocabulary without an unknown token
            raise ValueError(f"the tokenizer cannot encode {_shown(text)} ({e}); use words of its vocabulary") from None
        spelt = self.decode(ids)
        # Word-level tokenizers are free in blanks, many compose accents, and some drop unknown words without a word.
        if _composed(spelt) != _composed(text):
            raise ValueError(
                f"the tokenizer cannot encode {_shown(text)}: it comes back as {_shown(spelt)}; use words of its "
                "vocabulary"
            )
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text with its special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def single_token(self, text: str) -> int | None:
        """The one token that spells ``text``, if there is one.

        Raises:
            ValueError: the vocabulary cannot spell it at all.
        """
        ids = self.encode(text)
        return ids[0] if len(ids) == 1 else None


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", "".join(text.split()))


def _shown(text: str, most: int = 80) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."


class TextStream:
    """Decodes a growing sequence at constant cost per token, and remembers which token holds which character.

    A token's text begins at the first character that begins in it: of a character whose bytes lie in three tokens,
    the first holds it, and the other two begin where the next character does.
    """

    def __init__(self, codec: Codec) -> None:
        self._tokenizer = codec.tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._num_chars = 0
        self._begun = 0  # characters begun so far, an incomplete one included
        self._held: list[int] = []  # tokens whose text is not out yet
        self.offsets: list[int] = []
        """Per token, the index of its first character in the text of the whole sequence."""

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        step, tokenizer, note, held = self._stream.step, self._tokenizer, self.offsets.append, self._held
        begun, num_chars = self._begun, self._num_chars
        out = []
        for token in token_ids:
            note(begun)
            try:
                text = step(tokenizer, token)
            except Exception as e:  # of no kind of its own: bytes that turned out to be no character
                if "nvalid prefix" not in str(e):
                    raise
                out.append(self._text_held())
                begun = num_chars = num_chars + len(out[-1])
                held.clear()
                self.offsets[-1] = begun
                self._stream = DecodeStream(skip_special_tokens=False)
                step = self._stream.step
                text = step(tokenizer, token)
            if text is None:
                held.append(token)
                incomplete = self._text_held()
                whole = incomplete.rstrip(_INCOMPLETE)
                begun = num_chars + len(whole) + (whole != incomplete)
            else:
                out.append(text)
                begun = num_chars = num_chars + len(text)
                if held:
                    held.clear()
        self._begun, self._num_chars = begun, num_chars
        return "".join(out)

    def finish(self) -> str:
        """The rest of the text, where the sequence ends within a character."""
        return self._text_held()

    def token_at(self, char: int) -> int:
        """Index of the token that holds the first byte of character ``char``."""
        return bisect_right(self.offsets, char) - 1

    def _text_held(self) -> str:
        return self._tokenizer.decode(self._held, skip_special_tokens=False)
