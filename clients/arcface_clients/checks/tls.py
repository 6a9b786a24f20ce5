"""Doctor's look at encryption: whether the configured server is encrypted, and what its certificate says."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from arcface_clients.checks.report import Check

if TYPE_CHECKING:
    from arcface_clients.config.schema import EmbeddingConfig

NAME = "encryption"


def check_tls(settings: EmbeddingConfig, timeout_s: float = 3.0) -> Check:
    """Whether faces travel encrypted to triton.url; a certificate's names and end, from 30 days before it."""
    from arcface_clients.triton.certificate import RENEW_DAYS, presented_certificate, presented_sha256

    address, tls = settings.triton.address, settings.triton.tls
    try:
        if not address.tls:
            if address.protocol == "grpc" and presented_sha256(address, timeout_s):
                return Check(NAME, "problem", f"{address} wants TLS", f"set triton.url: grpcs://{address.target}")
            if address.loopback:
                return Check(NAME, "ok", f"off: {address} is this host")
            return Check(
                NAME,
                "absent",
                f"off: whoever is on the way to {address} can read faces and embeddings",
                "arcface serve --host … --tls-cert FILE --tls-key FILE, then grpcs:// here",
            )
        certificate = presented_certificate(address, tls, timeout_s)
    except ssl.SSLError as exc:
        from arcface_clients.triton.transports.refusals import unreachable

        fact, _, fix = str(unreachable(address, exc)).partition(". ")
        return Check(NAME, "problem", fact, fix)
    except OSError as exc:
        return Check(NAME, "absent", f"not asked: nothing answers at {address} ({exc.strerror or exc})")
    names = ", ".join(certificate.names) or "no name"
    found = f"on: certificate for {names}, valid until {certificate.expires:%Y-%m-%d}"
    if not certificate.is_for(address.host):
        fix = f"ask for one of its names, or have one made for {address.host}"
        return Check(NAME, "problem", f"{found}; not for {address.host}", fix)
    if fault := certificate.fault():
        return Check(NAME, "problem", f"certificate for {names} {fault}", "renew it, then start the server again")
    if (days := certificate.days_left()) < RENEW_DAYS:
        return Check(NAME, "problem", f"{found}: {days:.0f} days left", "renew it, then start the server again")
    return Check(NAME, "ok", found)
