"""A CloudFormation template with its conditions and parameters resolved; values that only AWS knows stay as ``${Name}``."""

import json
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from rigs.stack import tool

PSEUDO = {
    "AWS::AccountId": "123456789012",
    "AWS::Partition": "aws",
    "AWS::Region": "eu-central-1",
    "AWS::StackName": "one",
    "AWS::URLSuffix": "amazonaws.com",
}
"""Values of the pseudo parameters."""

_NOTHING = object()
"""AWS::NoValue: the key or list item with this value is dropped."""

_TRANSLATE = """
import json, sys
from samtranslator.translator.transform import transform
class Loader:
    def load(self): return {}
template, parameters = json.load(sys.stdin)
print(json.dumps(transform(template, parameters, Loader())))
"""


def read_template(text: str) -> Any:
    """Parse a template's YAML; short forms such as ``!Ref`` become the long ones."""
    import yaml  # noqa: PLC0415 - few tests need it

    class Loader(yaml.SafeLoader):
        pass

    def construct(loader: Any, tag: str, node: Any) -> Any:
        if isinstance(node, yaml.ScalarNode):
            value: Any = loader.construct_scalar(node)
            value = value.split(".", 1) if tag == "GetAtt" else value
        else:
            value = loader.construct_sequence(node, deep=True)
        return {tag if tag == "Ref" else f"Fn::{tag}": value}

    Loader.add_multi_constructor("!", construct)
    return yaml.load(text, Loader)  # noqa: S506 - a loader of safe values


def translated(template: Any, parameters: Mapping[str, str] = {}) -> Any:
    """Translate a SAM template to plain CloudFormation by SAM's own translator, which ``make rig`` installs."""
    sam = tool("sam")
    assert sam
    asked = json.dumps([template, dict(parameters)])
    environment = {"AWS_DEFAULT_REGION": PSEUDO["AWS::Region"]}
    done = subprocess.run(
        [sam.with_name("python"), "-c", _TRANSLATE], input=asked, capture_output=True, text=True, check=False, env=environment
    )
    assert 0 == done.returncode, done.stderr
    return json.loads(done.stdout)


def resolved(template: Any, **parameters: str) -> Any:
    """Return the template for these parameters and the defaults of the others, without what its conditions exclude.

    A reference to a resource becomes ``${Name}``, to an attribute ``${Name.Attribute}``. Raise ValueError for a parameter that the
    template does not accept.
    """
    given = {name: _taken(name, rules, parameters.get(name)) for name, rules in template["Parameters"].items()}
    if unknown := parameters.keys() - given.keys():
        raise ValueError(f"the template has no parameter {', '.join(sorted(unknown))}")
    reader = _Reader(PSEUDO | given, template.get("Conditions", {}))
    sections = {name: _kept(template.get(name, {}), reader) for name in ("Resources", "Outputs")}
    return {"AWSTemplateFormatVersion": "2010-09-09", **sections}


def _kept(section: Mapping[str, Any], reader: "_Reader") -> dict[str, Any]:
    """Return a section without the entries that their conditions exclude."""
    left = {name: entry for name, entry in section.items() if "Condition" not in entry or reader.holds(entry["Condition"])}
    return {name: reader.value({key: value for key, value in entry.items() if key != "Condition"}) for name, entry in left.items()}


def _taken(name: str, rules: Mapping[str, Any], value: str | None) -> Any:
    text = str(rules["Default"] if value is None else value)
    pattern, allowed = rules.get("AllowedPattern", ".*"), [str(choice) for choice in rules.get("AllowedValues", [text])]
    bounds = float(rules.get("MinValue", "-inf")), float(rules.get("MaxValue", "inf"))
    if not re.fullmatch(pattern, text) or text not in allowed or (rules["Type"] == "Number" and not bounds[0] <= float(text) <= bounds[1]):
        raise ValueError(f"the template does not accept {text!r} for {name}")
    return text.split(",") if rules["Type"] == "CommaDelimitedList" else text


class _Reader:
    def __init__(self, known: Mapping[str, Any], conditions: Mapping[str, Any]) -> None:
        self._known = known
        self._conditions = conditions

    def holds(self, name: str) -> bool:
        return bool(self.value(self._conditions[name]))

    def value(self, given: Any) -> Any:
        """Resolve a value; return _NOTHING for AWS::NoValue."""
        if isinstance(given, list):
            return [value for value in map(self.value, given) if value is not _NOTHING]
        if not isinstance(given, dict):
            return given
        if len(given) == 1 and (function := next(iter(given))) in self._FUNCTIONS:
            return self._FUNCTIONS[function](self, given[function])
        return {name: value for name, value in ((name, self.value(value)) for name, value in given.items()) if value is not _NOTHING}

    def _ref(self, name: str) -> Any:
        return _NOTHING if name == "AWS::NoValue" else self._known.get(name, f"${{{name}}}")

    def _if(self, value: list[Any]) -> Any:
        return self.value(value[1] if self.holds(value[0]) else value[2])

    def _sub(self, value: str | list[Any]) -> str:
        text, given = (value, {}) if isinstance(value, str) else (value[0], self.value(value[1]))
        known = {**self._known, **given}
        return re.sub(r"\$\{([^}]+)\}", lambda found: str(known.get(found[1], found[0])), text)

    _FUNCTIONS: Mapping[str, Any] = {
        "Ref": _ref,
        "Fn::If": _if,
        "Fn::Sub": _sub,
        "Fn::GetAtt": lambda _, value: f"${{{'.'.join(value)}}}",
        "Fn::Join": lambda self, value: value[0].join(map(str, self.value(value[1]))),
        "Fn::Equals": lambda self, value: str(self.value(value[0])) == str(self.value(value[1])),
        "Fn::Not": lambda self, value: not self.value(value[0]),
    }
