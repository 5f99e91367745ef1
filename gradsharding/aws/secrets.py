"""What others wrote, and what is logged, is shown without keys, tokens, passwords and signatures, however many lines it has.

Only the standard library is used: the function's bundle and processes that have no boto3 log, too.
"""

import os
import re

_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")

_SIGNED = re.compile(r"(?:The )?Canonical String.*|The String-to-Sign.*")
"""What S3 says that it signed: the request, with its token."""

_USER = re.compile(r"//[^/\s\"]+@")
"""A name and a password before the host of a URL."""

_QUERY = re.compile(r"\?[^\s\"'<>]+")
"""Where a URL has its signature, and its token; behind "#" our own URLs have headers."""

_BEARER = re.compile(r"(?i)\b(authorization[\"'\\\s]{0,4}[:=][\"'\\\s]{0,4}(?:basic|bearer) )[^\s\"',;<>]+")

_LABELLED = re.compile(
    r"(?i)(\barn:aws[a-z-]*:[^\s\"',;&<>]*)"  # secretsmanager:, and secret:, stand in names
    r"|((?<![\w./-])[\w.-]*"
    r"(?:secret(?: access)?(?: key)?|token|passw(?:or)?d|passphrase|signature|access[ _-]?key[ _-]?id|api_?key|private_?key)"
    r"[\w.-]*[\"'\\ \t\]]{0,4}[=:>][\"'\\ \t]{0,4})[^\s\"',;&<>\\]+"
)

_ACCESS_KEY = re.compile(r"\b(?:A3T|AKIA|ASIA|AROA|AIDA|AGPA|ANPA|ANVA|ABIA|ACCA)[A-Z0-9]{12,}\b")

_RUN = re.compile(r"[A-Za-z0-9+/=]{40,}")


def without_secrets(text: str) -> str:
    """Leave out what may be a key, a token, a password or a signature, and the queries of URLs.

    >>> print(without_secrets("no answer from https://b.s3.amazonaws.com/k?X-Amz-Signature=0a1b, aws_session_token = IQoJ"))
    no answer from https://b.s3.amazonaws.com/k?… aws_session_token = …
    """
    for name in _VARIABLES:
        if len(secret := os.environ.get(name, "")) >= 8:  # a shorter one is a test server's, and a word
            text = text.replace(secret, "…")
    text = _QUERY.sub("?…", _USER.sub("//…@", _SIGNED.sub("", text)))
    text = _LABELLED.sub(lambda found: found[1] or f"{found[2]}…", _BEARER.sub(r"\1…", text))
    return _RUN.sub("…", _ACCESS_KEY.sub("…", text))
