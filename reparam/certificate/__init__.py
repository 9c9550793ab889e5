"""What `fuse` writes beside a model so that others can check it: hashes, versions, inputs, changes, figures, verdict.

`write.py` makes one, `read.py` reads one without believing it, `repeat.py` does again what it says was done.
"""

from __future__ import annotations

from reparam.certificate.hashes import WEIGHTS_KEY, file_digest, weights_digest
from reparam.certificate.read import Certificate, read_certificate
from reparam.certificate.repeat import Finding, Moved, Repeated, repeat
from reparam.certificate.write import Evidence, versions, write_certificate

__all__ = [
    "WEIGHTS_KEY",
    "Certificate",
    "Evidence",
    "Finding",
    "Moved",
    "Repeated",
    "file_digest",
    "read_certificate",
    "repeat",
    "versions",
    "weights_digest",
    "write_certificate",
]
