"""How long a server asks us to wait, by the headers of its reply."""

import contextlib
import email.utils
import re
import time
from collections.abc import Mapping

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


def wait_asked(headers: Mapping[str, str], *, failed: bool) -> float:
    """Seconds until the server wants the next request; 0 where it doesn't say.

    A failed request's Retry-After counts first, in seconds, milliseconds (retry-after-ms) or as a
    date. Of any reply, a rate limit with nothing left counts until it is reset.
    """
    if failed:
        for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
            with contextlib.suppress(KeyError, ValueError):
                return max(0.0, float(headers[name]) * unit)
        with contextlib.suppress(KeyError, TypeError, ValueError):
            date = email.utils.parsedate_to_datetime(headers["retry-after"])
            return max(0.0, date.timestamp() - time.time())
    waits = [
        _seconds(headers.get(f"x-ratelimit-reset-{what}", ""))
        for what in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{what}") == "0"
    ]
    return max(waits, default=0.0)


def _seconds(duration: str) -> float:
    """Of "6m0s", "20ms" or a number of seconds."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)", duration)
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
