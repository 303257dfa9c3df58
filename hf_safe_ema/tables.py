"""Tables and rates as text, for terminals and Markdown alike.

Knows: padding and per cent. Does not know: what is in a table.
"""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, to be read in a terminal too.

    Args:
        header (list of `str`):
            Names of the columns.
        rows (list of lists of `str`):
            As many cells each.

    Example:

    ```python
    >>> print(markdown_table(["weights", "ASR"], [["live", "16%"]]))
    | weights | ASR |
    |---------|-----|
    | live    | 16% |

    ```
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rendered = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    rendered.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rendered)


def percent(rate: float | None, interval: Sequence[float] | None = None) -> str:
    """A rate in per cent, with its interval where given.

    Args:
        rate (`float`, *optional*):
            In [0, 1]; None where nothing could be judged.
        interval (`tuple[float, float]`, *optional*):
            Its bounds.

    Example:

    ```python
    >>> percent(0.05, (0.02, 0.11))
    '5.0% (2.0% to 11.0%)'

    ```
    """
    if rate is None:
        return "none judged"
    return f"{rate:.1%}" + ("" if interval is None else f" ({interval[0]:.1%} to {interval[1]:.1%})")
