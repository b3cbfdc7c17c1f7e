"""Who may reach an endpoint: the key that clients have to send, and the address that it listens on."""

from __future__ import annotations

import ipaddress
import logging

from compress.errors import UsageError

log = logging.getLogger("halve.serve")
KEY_VARIABLE = "HALVE_API_KEY"  # a key on the command line would be seen by everyone on the machine


def check_access(host: str, api_key: str | None) -> None:
    """Warns where other machines reach an endpoint that asks for no key.

    Raises:
        UsageError: the key is one that no client can send. An empty one is most likely a variable that was not set, and
            taking it for no key would open the endpoint to everyone.
    """
    if api_key is not None and (not api_key or api_key != api_key.strip()):
        what = "is empty" if not api_key.strip() else "begins or ends with white space"
        raise UsageError(
            f"The API key {what} (--api-key, or {KEY_VARIABLE}). Give one that is not, or leave out the flag and unset "
            f"{KEY_VARIABLE} to serve without a key."
        )
    if api_key is None and not _is_local(host):
        log.warning(
            "Anyone who reaches %s can use this endpoint: it asks for no key. Set %s.", host or "it", KEY_VARIABLE
        )


def _is_local(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name; others may be anything
        return host == "localhost"
