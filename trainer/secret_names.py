"""What looks like a secret, and so is never written down or shown. One place for all. No torch."""

import re

SECRET_NAMES = re.compile(
    r"SECRET|PASSWORD|PASSWD|_PWD$|_AUTH$|_PAT$|TOKEN|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE|CONNECTION_STRING|_KEY$|(^|_)(PASS|PASSPHRASE|SAS|DSN)(_|$)",
    re.IGNORECASE,
)
"""A variable whose name has one of these."""
SECRET_VALUES = re.compile(
    r"://[^/\s]*@|AccountKey=|SharedAccessKey=|[?&](sig|X-Amz-Signature|X-Goog-Signature)=", re.IGNORECASE
)
"""A value with one of these: a URL with a user in it, or one that is signed, and what storage accounts connect with."""


def looks_secret(name: str, value: str) -> bool:
    return bool(SECRET_NAMES.search(name) or SECRET_VALUES.search(value))
