"""Text from outside, such as names of files and classes, made safe to print, to draw and to write into tables."""

from __future__ import annotations


def printable(text: object) -> str:
    r"""Return the text with escapes in place of characters that are not printable.

    Line breaks could forge a line of a report, terminals obey escape codes, and bytes of a file's name that are not
    UTF-8 can't be encoded.

    Example:
        >>> from mmmae.text import printable
        >>> print(printable("scene\n\x1b[31m"))
        scene\n\x1b[31m
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def figure_text(text: object) -> str:
    r"""Return `printable(text)` for Matplotlib, which takes what stands between two `$` for TeX.

    Example:
        >>> from mmmae.text import figure_text
        >>> print(figure_text("$5 and $10"))
        \$5 and \$10
    """
    return printable(text).replace("$", r"\$")


def cell(text: object) -> str:
    """Return `printable(text)` as a cell of a CSV file that no spreadsheet takes for a formula.

    Example:
        >>> from mmmae.text import cell
        >>> print(cell("=1+1"))
        '=1+1
    """
    shown = printable(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
