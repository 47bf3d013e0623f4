"""Certificates: a small CA in a directory, and what is to be said of any certificate. Needs the package `cryptography`.

store      the directory's files, each replaced whole; one process at a time
authority  the CA: issue, renew, revoke, and the list of what is revoked
profile    what a certificate is to say
inspect    what a certificate is, and what is wrong or weak about it
"""

from jobrunner.pki.authority import Authority, Issued
from jobrunner.pki.inspect import Described, describe
from jobrunner.pki.profile import Profile

__all__ = ["Authority", "Described", "Issued", "Profile", "describe"]
