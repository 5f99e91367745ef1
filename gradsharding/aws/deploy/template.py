"""Two values are filled into the template: the address of the function's code, and the release, a digest of the whole stack."""

import hashlib
import json
from collections.abc import Mapping

RELEASE = "Release"
"""The parameter that no option sets."""


def filled(text: str, code: str, parameters: Mapping[str, str], role: str = "") -> str:
    """Give the template for code, for these parameters, and for CloudFormation's role, if any.

    ``code`` is its address: an ``s3://`` URL, or bucket, key and version in braces.

    Whatever changes makes another release, and each release is published as a version. SAM alone would publish one for other code, but
    none for other parameters, and the alias would go on with the old ones. It also puts the release into the function's description, as
    Lambda publishes no version of a function that has not changed. The release is a default, and no parameter's value, because not
    every translator of SAM is given the values. The role counts, as CloudFormation takes another one only together with another change.
    """
    release = hashlib.sha256(json.dumps([text, code, sorted(parameters.items()), *([role] if role else [])]).encode()).hexdigest()
    return text.replace("CodeUri: function/", f"CodeUri: {code}").replace("Default: local", f"Default: {release}")
