"""What decides the numbers of an embedding, and are two such records the same?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Compute the SHA-256 (hex) over the canonical JSON of everything that decides an embedding's numbers."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Compare two records and yield (name, old, new) of every value that differs, values as JSON.

    Names of nested records are joined by dots.
    """
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, "(none)"), new.get(key, "(none)")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{key}.")
        elif json.dumps(before) != json.dumps(after):
            yield prefix.removeprefix("parts.") + key, json.dumps(before), json.dumps(after)
