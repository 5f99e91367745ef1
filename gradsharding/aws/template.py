"""A template has two places to fill: where the function's code lies, and the release, a digest of all that the stack is made of."""

import hashlib
import json
from collections.abc import Mapping

RELEASE = "Release"
"""The parameter that nobody sets."""


def filled(text: str, code: str, parameters: Mapping[str, str]) -> str:
    """Give the template for code that lies at ``code``, an ``s3://`` URL, and for these parameters.

    Whatever changes makes another release, and each release is published as a version. SAM alone would publish one for other code, but
    none for other parameters, and the alias would go on with the old ones. It also puts the release into the function's description, as
    Lambda publishes no version of a function that has not changed. The release is a default, and no parameter's value, because not
    every translator of SAM is given the values.
    """
    release = hashlib.sha256(json.dumps([text, code, sorted(parameters.items())]).encode()).hexdigest()
    return text.replace("CodeUri: function/", f"CodeUri: {code}").replace("Default: local", f"Default: {release}")
