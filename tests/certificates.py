"""Certificates for tests: an authority of their own that signs whatever a test needs, expired ones too."""

from __future__ import annotations

import datetime
from ipaddress import ip_address
from pathlib import Path

HERE = ("localhost", "127.0.0.1")


class Authority:
    """ca.pem and ca.key in a folder, and what they sign beside them: WHO.pem and WHO.key."""

    def __init__(self, folder: Path, days: tuple[float, float] = (-1, 365)) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = self._write("ca", None, (), days)

    def sign(self, who: str, names: tuple[str, ...] = HERE, days: tuple[float, float] = (-1, 90)) -> Path:
        """A certificate for these names, valid from and until so many days from now; returns its file."""
        self._write(who, self._key, names, days)
        return self.folder / f"{who}.pem"

    def self_signed(self, who: str, names: tuple[str, ...] = HERE) -> Path:
        """One that nobody else vouches for."""
        self._write(who, None, names, (-1, 90), authority=False)
        return self.folder / f"{who}.pem"

    def _write(self, who, signer, names, days, authority=None):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        def called(name: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

        now = datetime.datetime.now(datetime.timezone.utc)
        key = ec.generate_private_key(ec.SECP256R1())
        authority = signer is None if authority is None else authority
        own_name = called(f"{who} of {self.folder.name}")
        certificate = (
            x509.CertificateBuilder()
            .subject_name(own_name)
            .issuer_name(own_name if signer is None else called(f"ca of {self.folder.name}"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=days[0]))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if names:
            listed = [x509.IPAddress(ip_address(n)) if n[-1].isdigit() else x509.DNSName(n) for n in names]
            certificate = certificate.add_extension(x509.SubjectAlternativeName(listed), critical=False)
        signed = certificate.sign(signer or key, hashes.SHA256())
        (self.folder / f"{who}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        private = self.folder / f"{who}.key"
        private.touch(mode=0o600)
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return key
