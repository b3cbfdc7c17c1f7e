"""Requests to this machine itself, which go to no proxy: what HTTP_PROXY names is for others and cannot reach it."""

from __future__ import annotations

import ipaddress
import urllib.request
from typing import Any
from urllib.parse import urlsplit


def is_loopback(url: str) -> bool:
    """Whether the address is one of this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def open_url(url: str, *, timeout: float) -> Any:
    """`urllib.request.urlopen`, past the proxies of the environment where the address is this machine's own."""
    if is_loopback(url):
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=timeout)
    return urllib.request.urlopen(url, timeout=timeout)
