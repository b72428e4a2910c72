"""No credential of a URL is written down."""

import pytest

from data.provenance import _without_secrets
from trainer.errors import UserError
from trainer.urls import holds_credentials, public_source, public_url


@pytest.mark.parametrize(
    ("url", "public", "secret"),
    [
        ("s3://bucket/key.jpg", "s3://bucket/key.jpg", False),
        ("s3://KEY:SECRET@bucket/a?X-Amz-Signature=1#f", "s3://bucket/a", True),
        ("https://me:hush@host.org:8443/a/b.jpg?w=1", "https://host.org:8443/a/b.jpg", True),
        ("https://host/a?sig=abc&sv=1", "https://host/a", True),
        ("https://host/a?AWSAccessKeyId=abc", "https://host/a", True),
        ("https://host/a?Key-Pair-Id=abc", "https://host/a", True),
        ("https://host/a?api_key=", "https://host/a", True),
        ("https://host/a?keyword=cats&page=2", "https://host/a", False),
        ("https://TOKEN@host/a", "https://host/a", True),
        ("HTTPS://TOKEN@host/a", "https://host/a", True),
        ("ftp://me@host/a", "ftp://host/a", True),
        ("filecache::https://TOKEN@host/a", "filecache::https://host/a", True),
        ("hdfs://me@host:8020/a", "hdfs://me@host:8020/a", False),
        ("hdfs://me:@host:8020/a", "hdfs://host:8020/a", True),
        ("abfs://cont@acct.dfs.core.windows.net/in", "abfs://cont@acct.dfs.core.windows.net/in", False),
        ("simplecache::s3://KEY:SECRET@bucket/a", "simplecache::s3://bucket/a", True),
        ("zip://a*.zip::https://me:hush@host/x.zip?token=1", "zip://a*.zip::https://host/x.zip", True),
        ("https://host/a//b@c.jpg", "https://host/a//b@c.jpg", False),
        ("file:///a/b c", "file:///a/b c", False),
        ("/a/b?c#d", "/a/b?c#d", False),
    ],
)
def test_urls(url: str, public: str, secret: bool) -> None:
    assert public_url(url) == public
    assert holds_credentials(url) is secret
    if "://" in url:
        assert public_source(url) == public


@pytest.mark.parametrize("url", ["http://[broken", "s3://KEY:SEC/RET@bucket/a"])
def test_what_is_no_url_is_not_told(url: str) -> None:
    """AWS' secret keys may have a slash, at which a URL's host ends."""
    for function in (public_url, holds_credentials):
        with pytest.raises(UserError, match=r"^(http|s3)://\.\.\.: not a URL; [^\[:]*$"):
            function(url)
    assert public_source(url) == ""
    assert _without_secrets({"told": f"{url}"}) == {"told": "(hidden)"}


def test_what_data_tell_may_lack_a_scheme() -> None:
    assert public_source("host.org/a.jpg?signature=abc") == "host.org/a.jpg"
    assert public_source("//me:hush@host.org/a.jpg#x") == "//host.org/a.jpg"
    assert public_source("photos/1.jpg") == "photos/1.jpg"
