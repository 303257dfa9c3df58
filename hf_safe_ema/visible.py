"""Text from strangers, with nothing in it that acts or hides: control characters, bidi marks, zero-width characters.

Knows: Unicode. Does not know: HTML (page.py escapes), or where a text is from.
"""

import re
import unicodedata
from collections.abc import Iterator

# Letters, marks and symbols that show nothing although their category says otherwise: Unicode's Default_Ignorable_Code_Point
# (DerivedCoreProperties.txt, 16.0) beyond the categories below, the braille blank, and the two variation selectors of emoji.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Control, format (bidi, zero-width, tags), lone surrogates, private, unassigned; line and paragraph separators.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_PLAIN = re.compile(r"[\n\t\x20-\x7e]+")


def split_hidden(text: str) -> Iterator[tuple[str, bool]]:
    """A text in pieces: as it is, or the name of a character that would act or could not be seen.

    Line feeds and tabs stay, a carriage return before a line feed is dropped, and an emoji keeps its variation selector.

    Args:
        text (`str`):
            Anything, lone surrogates included.

    Returns:
        `Iterator[tuple[str, bool]]`: pieces in order, and whether each is a name, such as `"U+202E"`.

    Example:

    ```python
    >>> list(split_hidden("abc\\u202e\\x1b[31m"))
    [('abc', False), ('U+202E', True), ('U+001B', True), ('[31m', False)]

    ```
    """
    text = text.replace("\r\n", "\n")
    shown = 0
    for position, character in enumerate(text):
        if _PLAIN.match(character) or not _is_hidden(text, position):
            continue
        if shown < position:
            yield text[shown:position], False
        yield f"U+{ord(character):04X}", True
        shown = position + 1
    if shown < len(text):
        yield text[shown:], False


def _is_hidden(text: str, position: int) -> bool:
    character = text[position]
    if character in "\ufe0e\ufe0f":
        return not (position and unicodedata.category(text[position - 1]) == "So")
    return unicodedata.category(character) in _HIDDEN_CATEGORIES or _BLANK.match(character) is not None


def visible(text: str) -> str:
    """A text with the names of hidden characters in brackets, and nothing in it that a UTF-8 file could not hold.

    Args:
        text (`str`):
            Anything.

    Example:

    ```python
    >>> visible("a\\x00b\\ud800")
    'a⟦U+0000⟧b⟦U+D800⟧'

    ```
    """
    return "".join(f"⟦{piece}⟧" if named else piece for piece, named in split_hidden(text))
