"""Which setting of this machine keeps the hub's client from working, and what mends it?

The client raises errors of many kinds for these, some of which look like a broken network. They are looked up once it
has failed, and not before: a setting that does no harm is not complained of. No message quotes an address, which may
hold a password.
"""

from __future__ import annotations

import os
import ssl
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

_PROXIES = ("all_proxy", "http_proxy", "https_proxy")
_SOCKS = ("socks5", "socks5h")
# httpx reads the first, requests the others.
_CERTIFICATES = {"httpx": ("SSL_CERT_FILE",), "requests": ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")}


def faulty_setting(transport: str) -> str | None:
    """Find the first setting that cannot work.

    Args:
        transport: the package that sends its requests: "requests", "httpx", …

    Returns:
        What is wrong and what mends it, with the variable's name; None where nothing is found.
    """
    for name, value in os.environ.items():
        if name.lower() in _PROXIES and value:
            address = value if "://" in value else f"http://{value}"
            if not _is_address(address):
                return f"{name} is no address of a proxy: set it to one like http://host:port, or unset it."
            module, package = ("socks", "pysocks") if transport == "requests" else ("socksio", "socksio")
            if urlsplit(address).scheme in _SOCKS and find_spec(module) is None:
                return (
                    f"{name} names a SOCKS proxy, for which the package {package} is missing: install it, or set "
                    f"{name} to an http:// proxy."
                )
    for name in _CERTIFICATES["requests" if transport == "requests" else "httpx"]:
        value = os.environ.get(name, "")
        if value and not _holds_certificates(Path(value)):
            return f"{name} names {value}, which is no file of certificates: correct it, or unset it."
    return None


def _is_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https", *_SOCKS) and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        return False


def _holds_certificates(path: Path) -> bool:
    try:
        ssl.create_default_context(cafile=path)
    except OSError:  # not there, or nothing that ssl reads
        return path.is_dir()
    return True
