"""The one error a user can cause, and how it points at the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a recipe, a file or a command line: the message is one line and says what to change.

    The command line prints it without a traceback and exits with status 2.
    """


def nearest(value: object, choices: Iterable[object]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest choice, followed by all of them when they are few."""
    choices = list(choices)
    known = sorted(str(c) for c in choices)
    close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    numbers = [c for c in choices if isinstance(c, int | float)]
    if numbers and isinstance(value, int | float):
        close = [str(min(numbers, key=lambda number: abs(number - value)))]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if len(known) <= 24 else hint
