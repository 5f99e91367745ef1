"""Foreign text, and all that is logged, is shown without keys, tokens, passwords and signatures.

This module imports the standard library only, as processes without boto3 log too.
"""

import os
import re

_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")

_SIGNED = re.compile(r"(?:The )?Canonical String.*|The String-to-Sign.*")
"""What S3 quotes as the text to sign: the request, with its token."""

_USER = re.compile(r"//[^/\s\"]+@")
"""A name and a password before the host of a URL."""

_QUERY = re.compile(r"\?[^\s\"'<>]+")
"""The part of a URL with its signature and its token; our own URLs have headers behind "#"."""

_BEARER = re.compile(r"(?i)\b(authorization[\"'\\\s]{0,4}[:=][\"'\\\s]{0,4}(?:basic|bearer) )[^\s\"',;<>]+")

_LABELLED = re.compile(
    r"(?i)(\barn:aws[a-z-]*:[^\s\"',;&<>]*)"  # a name has secretsmanager: and secret: in it
    r"|((?<![\w./-])[\w.-]{0,64}"
    r"(?:secret(?: access)?(?: key)?|token|passw(?:or)?d|passphrase|signature|access[ _-]?key[ _-]?id|api_?key|private_?key)"
    r"[\w.-]{0,64}[\"'\\ \t\]]{0,4}[=:>][\"'\\ \t]{0,4})[^\s\"',;&<>\\]+"
)

_ACCESS_KEY = re.compile(r"\b(?:A3T|AKIA|ASIA|AROA|AIDA|AGPA|ANPA|ANVA|ABIA|ACCA)[A-Z0-9]{12,}\b")

_RUN = re.compile(r"[A-Za-z0-9+/_%-]{40,}={0,2}")
"""Text that may be an AWS secret key, which has 40 letters, or a token; or a path or a name."""

_KEY = re.compile(r"[A-Za-z0-9+/]{40}")
_PIECE = re.compile(r"[A-Za-z0-9]+")
_ESCAPED = re.compile(r"%[0-9A-Fa-f]{2}")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def _random(run: str) -> bool:
    """Whether upper case, lower case and digits alternate as often as in random letters; in a path or a name they do so only between words.

    It counts words in 40 letters. Pieces in a single case have none: hexadecimal digests, CloudFormation's ids, paths in lower case.
    A secret key has fewer than 9 words in one of 10,000 cases, and fewer than 12 in one of 1,000. As names of exactly 40 letters are
    rare, 9 words are enough there; a longer run, which may be a path, needs 12.
    """
    plain = _ESCAPED.sub("///", run)
    pieces = [piece for piece in _PIECE.finditer(plain) if any(map(str.isupper, piece[0])) and any(map(str.islower, piece[0]))]
    starts = [piece.start() + word.start() for piece in pieces for word in _WORD.finditer(piece[0])]
    few = 9 if _KEY.fullmatch(run) else 12
    return any(last - first < 40 for first, last in zip(starts, starts[few - 1 :], strict=False))


def without_secrets(text: str) -> str:
    """Replace what may be a key, a token, a password or a signature, and the queries of URLs, by "…".

    >>> print(without_secrets("no answer from https://b.s3.amazonaws.com/k?X-Amz-Signature=0a1b, aws_session_token = IQoJ"))
    no answer from https://b.s3.amazonaws.com/k?… aws_session_token = …
    """
    for name in _VARIABLES:
        if len(secret := os.environ.get(name, "")) >= 8:  # a shorter one is an ordinary word, as test servers use
            text = text.replace(secret, "…")
    text = _QUERY.sub("?…", _USER.sub("//…@", _SIGNED.sub("", text)))
    text = _LABELLED.sub(lambda found: found[1] or f"{found[2]}…", _BEARER.sub(r"\1…", text))
    return _RUN.sub(lambda found: "…" if _random(found[0]) else found[0], _ACCESS_KEY.sub("…", text))
