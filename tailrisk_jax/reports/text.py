"""Text that was written by others, made fit to be shown: nothing in it is hidden or acts."""

import unicodedata

# Control and format characters (bidirectional overrides among them), lone surrogates, private,
# unassigned, and separators of lines.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_KEPT = "\n\t\u200c\u200d"  # the joiners are part of how some scripts are written


def visible(text: str) -> str:
    """The text with each character that isn't seen as its escape, such as \\x00 or \\u202e."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in _UNSEEN and c not in _KEPT
        else c
        for c in text
    )


def shorten(text: str, limit: int) -> str:
    """The text's beginning, and how much of it is left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} [{len(text) - limit:,} more characters]"
