"""How are the zarr.json files of a store written, and read so that no damage to them goes unseen?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from features.fingerprint import fingerprint
from features.layout import group_metadata
from features.storage import METADATA, DamageError, Storage

_DIGEST = "attributes_digest"


def read_attributes(storage: Storage, key: str) -> dict[str, Any]:
    """Read the attributes of a group and check them against their digest, which stores of older versions lack.

    Raises:
        DamageError: if they cannot be read or do not match.
    """
    remedy = "restore it from a copy, or remove this folder and compute it again"
    document = _read_json(storage, key, remedy)
    attributes = document.get("attributes", {})
    if document.get("zarr_format") != 3 or document.get("node_type") != "group" or not isinstance(attributes, dict):
        raise damage(storage.path(key), "this is not a Zarr v3 group", "restore it from a copy, or use another `store`")
    recorded = attributes.pop(_DIGEST, None)
    if recorded not in (None, fingerprint(attributes)):
        raise damage(storage.path(key), "its attributes do not match their digest", remedy)
    return attributes


def write_attributes(storage: Storage, key: str, attributes: dict[str, Any]) -> None:
    """Write the zarr.json of a group; this makes the group if it is not there."""
    storage.write(_metadata_key(key), [encode_group(attributes)])


def encode_group(attributes: dict[str, Any]) -> bytes:
    """Encode the zarr.json of a group with a digest, which shows that a bit of, say, a label's name has flipped."""
    return encode_json(group_metadata(attributes | {_DIGEST: fingerprint(attributes)}))


def check_array(storage: Storage, key: str, expected: dict[str, Any], *, remedy: str) -> dict[str, Any]:
    """Read an array's zarr.json and compare the values that format 1 fixes; there may be others.

    Raises:
        DamageError: if it cannot be read or says something else.
    """
    document = _read_json(storage, key, remedy)
    for name, value in expected.items():
        if document.get(name) != value:
            difference = f"{name} is {json.dumps(document.get(name))}, expected {json.dumps(value)}"
            raise damage(storage.path(key), difference, remedy)
    return document


def encode_json(document: Mapping[str, Any]) -> bytes:
    """Encode a zarr.json as format 1 writes it."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()


def damage(path: Path | str, what: str, remedy: str) -> DamageError:
    """Make the error that says where the damage is, what it is, and what to do."""
    return DamageError(f"{path} is damaged: {what}. To mend it, {remedy}.")


def _read_json(storage: Storage, key: str, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(storage.read(_metadata_key(key)))
    except (ValueError, RecursionError) as error:
        raise damage(storage.path(key), f"zarr.json is not JSON ({error})", remedy) from error
    except OSError as error:
        raise damage(storage.path(key), f"zarr.json cannot be read ({error.strerror})", remedy) from error
    if not isinstance(document, dict):
        raise damage(storage.path(key), "zarr.json is not a JSON object", remedy)
    return document


def _metadata_key(key: str) -> str:
    return f"{key}/{METADATA}" if key else METADATA
