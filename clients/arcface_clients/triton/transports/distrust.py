"""Why TLS failed, in a sentence: the words of gRPC and of OpenSSL in, what is wrong and the way out of it."""

from __future__ import annotations

from arcface_clients.triton.address import Address

_EXPIRED = ("certificate has expired",)
_EARLY = ("certificate is not yet valid",)
_NAME = (
    "hostname verification check failed",  # gRPC since 1.6x, before that the next
    "is not in peer certificate",
    "hostname mismatch",
    "ip address mismatch",
)
_STRANGER = ("unable to get local issuer", "unable to get issuer", "self signed", "self-signed", "signature failure")
_PLAIN = ("wrong version number", "wrong_version_number", "http_request", "record layer failure")


def tls_reason(address: Address, words: str) -> str | None:
    """What follows the address in a message; None: TLS is not the reason.

    Args:
        address: whom we asked.
        words: what the library said.
    """
    text = words.lower()
    if not address.tls:
        return None
    if any(part in text for part in _EXPIRED):
        return "presents a certificate that has expired. Renew it there and start the server again: arcface doctor"
    if any(part in text for part in _EARLY):
        return "presents a certificate that is not valid yet. Compare the clocks of both hosts: date -u"
    if any(part in text for part in _NAME):
        return (
            f"presents a certificate that is not for {address.host}. Ask for a name that is in it (arcface doctor "
            "lists them), or have one made for this name; it may also be another server"
        )
    if address.protocol == "grpc" and any(part in text for part in _PLAIN):
        return (
            "is asked for TLS and answers without; nothing was sent. Start that server with --tls-cert and --tls-key; "
            f"only if it is meant to be readable on the way: grpc://{address.target}"
        )
    if any(part in text for part in _PLAIN):
        return (
            "is asked for TLS and answers without; nothing was sent. Triton's HTTP has no TLS of its own: use "
            "grpcs://, or a proxy that adds it"
        )
    if "certificate_verify_failed" in text or any(part in text for part in _STRANGER):
        return (
            "presents a certificate whose signer is not trusted here. Give the signer's certificate as "
            "triton.tls.ca_file (ARCFACE_TRITON__TLS__CA_FILE)"
        )
    return None
