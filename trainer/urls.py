"""URLs as they may be written down, in receipts, cards, logs: without what is or may be a credential."""

import re
from urllib.parse import SplitResult, parse_qsl, urlsplit, urlunsplit

from trainer.errors import UserError

SECRET = re.compile(r"key(?!word)|secret|token|passw|credential|signature|^sig$", re.IGNORECASE)
"""Names of settings and of a query's fields whose values are kept from whoever reads them."""
_CHAIN = "::"
"""Between the links of fsspec's chains, such as `simplecache::s3://bucket/file`."""
_USER_IS_SECRET = frozenset(("", "http", "https", "ftp", "ftps"))
"""Schemes of which what stands before the @ may be a token alone. Elsewhere it is part of the place, as Azure's containers."""


def public_url(url: str) -> str:
    """A URL that the user has named, without password, query and fragment, and without a user that goes with a password or may
    be one. A path stays as it is.

    Raises:
        UserError: it is no URL.
    """
    if "://" not in url:
        return url
    try:
        return _stripped(url)
    except ValueError:
        # Without its reason, which may quote the URL.
        raise UserError(
            f"{url.partition('://')[0]}://...: not a URL; mend it, and give credentials by the environment"
        ) from None


def public_source(text: str) -> str:
    """Where a sample came from, as the data tell it, stripped like `public_url`; empty where it cannot be read. What has no
    scheme may be a URL all the same, and loses its query and fragment, too."""
    try:
        return _stripped(text)
    except ValueError:
        return ""


def holds_credentials(url: str) -> bool:
    """Whether a URL has a password, or a user that may be one, or a field in its query that is called like a secret.

    Raises:
        UserError: it is no URL.
    """
    if "://" not in url:
        return False
    public_url(url)
    links = [urlsplit(link) for link in url.split(_CHAIN)]
    fields = [name for link in links for name, _ in parse_qsl(link.query, keep_blank_values=True)]
    return any(map(_has_secret_user, links)) or any(SECRET.search(name) for name in fields)


def _stripped(url: str) -> str:
    """
    Raises:
        ValueError: it is no URL.
    """
    return _CHAIN.join(_stripped_link(link) for link in url.split(_CHAIN))


def _stripped_link(url: str) -> str:
    parts = urlsplit(url)
    # Asked for because it raises: a port that is no number is half of a password with a slash in it, as AWS' keys have them.
    _ = parts.port
    netloc = parts.netloc.rpartition("@")[2] if _has_secret_user(parts) else parts.netloc
    return urlunsplit((parts.scheme, netloc, parts.path, "", ""))


def _has_secret_user(parts: SplitResult) -> bool:
    return parts.password is not None or (bool(parts.username) and parts.scheme in _USER_IS_SECRET)
