"""What a certificate is to say, and how X.509 says it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Self

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from jobrunner.errors import CertificateError

__all__ = ["Profile", "key_usage", "user_of"]

_HOST = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?)*"
)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a certificate is to say. A client has a `unit`, its role; a server has `hosts`, names and addresses."""

    user: str
    unit: str = ""
    hosts: tuple[str, ...] = ()

    def names(self) -> x509.Name:
        units = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, self.unit)] if self.unit else []
        return x509.Name([*units, x509.NameAttribute(NameOID.COMMON_NAME, self.user)])

    def extensions(self) -> list[tuple[x509.ExtensionType, bool]]:
        use = ExtendedKeyUsageOID.SERVER_AUTH if self.hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        found: list[tuple[x509.ExtensionType, bool]] = [(x509.ExtendedKeyUsage([use]), False)]
        if self.hosts:
            found.append((x509.SubjectAlternativeName([_general_name(host) for host in self.hosts]), False))
        return found

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        """What this one says."""
        units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        return cls(user_of(certificate), str(units[0].value) if units else "", _hosts_of(certificate))


def user_of(certificate: x509.Certificate) -> str:
    return "".join(str(one.value) for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME))


def _hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress)))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise CertificateError("issue certificate", f'"{host}" is no host name or address') from None
        return x509.DNSName(host)


def key_usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
