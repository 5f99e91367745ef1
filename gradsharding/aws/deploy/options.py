"""Each option of ``deploy`` is one row: its name, the template's parameter that it sets, and the form of its value."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import click

from gradsharding.aws.deploy.account import TAG
from gradsharding.aws.deploy.wheels import MACHINES
from gradsharding.errors import UserError
from gradsharding.planning.platform import DEPLOYED_RUNTIME, DEPLOYED_TIMEOUT, MEMORY, RUNTIMES, TIMEOUT

LOG_DAYS = (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653)
"""Days that CloudWatch keeps a log
(https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutRetentionPolicy.html)."""

NAMED = 40
"""Characters of a new stack's name, at most. CloudFormation makes names of it, such as NAME-bucket-x and NAME-Role-x with 12 or 13
characters for x, and shortens those beyond what S3 (63) and IAM (64) take; the policies of deploy/policies/ would not match them."""

TAGS = 49
"""Tags that a stack may have beside ours: AWS allows 50."""

_F = TypeVar("_F", bound=Callable[..., Any])


class Form(NamedTuple):
    """The form of an option's value."""

    pattern: str
    description: str
    several: bool = False
    """Whether it is a list with commas."""

    def __call__(self, _: click.Context, option: click.Parameter, text: str | None) -> str | None:
        """Return a text that has this form, or "", which resets the option; raise UserError for any other."""
        for item in (text or "").split(",") if self.several else [text or ""]:
            if text and not re.fullmatch(self.pattern, item):
                raise UserError(f"{option.opts[0]} takes {self.description}, not {item!r}")
        return text


class Row(NamedTuple):
    """One option."""

    flag: str
    parameter: str
    """Parameter of the template; "" for a setting of CloudFormation itself."""
    help: str
    form: Form | None = None
    metavar: str | None = None
    kind: Any = None
    """The type that click reads."""
    values: tuple[str, str] | None = None
    """The parameter's values for a switch that is on, and off."""
    default: Any = None
    several: bool = False
    is_flag: bool = False

    @property
    def name(self) -> str:
        """Its name as a keyword argument."""
        return self.flag.partition("/")[0].removeprefix("--").replace("-", "_")

    def option(self) -> Callable[[_F], _F]:
        """Return click's decorator."""
        kind: dict[str, Any] = {} if self.kind is None else {"type": self.kind}
        if self.is_flag:
            kind["is_flag"] = True
        else:
            kind["default"] = self.default
        return click.option(self.flag, self.name, help=self.help, metavar=self.metavar, callback=self.form, multiple=self.several, **kind)


_ARN, _BUCKET = "arn:aws[a-z-]*", "[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_NAME_OF_BUCKET = Form(_BUCKET, "the name of a bucket: 3 to 63 small letters, digits, hyphens and dots")
_ROLE = Form(f"{_ARN}:iam::[0-9]{{12}}:role/.+", "the ARN of a role, arn:aws:iam::ACCOUNT:role/NAME")

SERVICE_ROLE = Row("--service-role", "", "Role that CloudFormation uses in place of your rights.", metavar="ARN", form=_ROLE)
"""Also an option of ``destroy``: the role that deployed a stack may be gone."""

OPTIONS = (
    Row("--architecture", "Architecture", "Processor of the function.  [default: arm64]", kind=click.Choice([*MACHINES])),
    Row("--memory", "Memory", "Memory of one function.  [default: 512]", kind=click.IntRange(192, MEMORY[-1] >> 20), metavar="MIB"),
    Row(
        "--timeout", "Timeout", f"Time of one invocation, at most {TIMEOUT}.  [default: {DEPLOYED_TIMEOUT}]",
        kind=click.IntRange(3, TIMEOUT), metavar="SECONDS",
    ),
    Row(
        "--concurrency", "Concurrency", "Invocations reserved for the function; -1 reserves none.  [default: -1]",
        kind=click.IntRange(-1), metavar="N",
    ),
    Row("--expire-days", "ExpireDays", "Days after which rounds are deleted.  [default: 7]", kind=click.IntRange(1), metavar="DAYS"),
    Row("--runtime", "Runtime", f"Python of the function.  [default: {DEPLOYED_RUNTIME}]", kind=click.Choice([*RUNTIMES])),
    Row(
        "--prefix", "Prefix", "Prefix of all objects in the bucket.  [default: gradsharding]", metavar="NAME",
        form=Form("[A-Za-z0-9_-]{1,64}", "up to 64 letters, digits, hyphens and underscores"),
    ),
    Row(
        "--bucket", "ExistingBucket", "An existing bucket; its policy, rules and encryption stay yours.  [default: a new one]",
        metavar="NAME", form=_NAME_OF_BUCKET,
    ),
    Row(
        "--bucket-owner", "BucketOwner", "Account that owns --bucket, if it is not this one.", metavar="ACCOUNT",
        form=Form("[0-9]{12}", "the 12 digits of an account"),
    ),
    Row("--versioning/--no-versioning", "Versioning", "Keep what is overwritten or deleted, for --expire-days.", values=("true", "false")),
    Row("--access-log-bucket", "AccessLogBucket", "A bucket of this region for S3's access log.", metavar="NAME", form=_NAME_OF_BUCKET),
    Row(
        "--access-log-prefix", "AccessLogPrefix", "Prefix of the access log's objects.  [default: gradsharding/]", metavar="TEXT",
        form=Form("[A-Za-z0-9!_.*'()/-]{1,512}", "up to 512 letters, digits and !_.*'()/-"),
    ),
    Row(
        "--kms-key", "KmsKey", "Encrypt bucket and log with a KMS key.", metavar="ARN",
        form=Form(f"{_ARN}:kms:[a-z0-9-]+:[0-9]{{12}}:key/[A-Za-z0-9-]+", "the ARN of a key, arn:aws:kms:REGION:ACCOUNT:key/ID"),
    ),
    Row(
        "--subnets", "Subnets", "Run the function in these subnets of a VPC; see deploy/README.md for its way to S3.", metavar="ID,ID",
        form=Form("subnet-[0-9a-f]{8,17}", "ids of subnets, such as subnet-0123456789abcdef0, with commas between them", several=True),
    ),
    Row(
        "--security-groups", "SecurityGroups", "Security groups of the function in the VPC.", metavar="ID,ID",
        form=Form("sg-[0-9a-f]{8,17}", "ids of security groups, such as sg-0123456789abcdef0, with commas between them", several=True),
    ),
    Row("--role", "ExistingRole", "An existing role for the function.  [default: a new one]", metavar="ARN", form=_ROLE),
    Row(
        "--permissions-boundary", "PermissionsBoundary", "Permissions boundary of the new role.", metavar="ARN",
        form=Form(f"{_ARN}:iam::([0-9]{{12}}|aws):policy/.+", "the ARN of a policy, arn:aws:iam::ACCOUNT:policy/NAME"),
    ),
    Row("--log-days", "LogDays", "Days that the log is kept.  [default: 14]", metavar="DAYS", kind=click.Choice([*map(str, LOG_DAYS)])),
    Row("--log-format", "LogFormat", "Format of the log.  [default: text]", kind=click.Choice(["Text", "JSON"], case_sensitive=False)),
    Row(
        "--alarm-topic", "AlarmTopic", "SNS topic for alarms.", metavar="ARN",
        form=Form(f"{_ARN}:sns:[a-z0-9-]+:[0-9]{{12}}:.+", "the ARN of a topic, arn:aws:sns:REGION:ACCOUNT:NAME"),
    ),
    Row("--tracing/--no-tracing", "Tracing", "Trace invocations with X-Ray, which bills each trace.", values=("Active", "PassThrough")),
    Row(
        "--dashboard/--no-dashboard", "Dashboard", "Create a CloudWatch dashboard; $3 a month beyond an account's first three.",
        values=("true", "false"),
    ),
    Row("--tag", "", "Tag of the stack and its resources; may be given several times.", metavar="KEY=VALUE", several=True, default=()),
    SERVICE_ROLE,
    Row("--termination-protection/--no-termination-protection", "", "Have CloudFormation refuse to delete the stack."),
    Row(
        "--code-bucket", "", "An existing bucket for the function's code.  [default: a new one]",
        metavar="NAME", form=_NAME_OF_BUCKET,
    ),
    Row("--locked", "", "Give the function the packages that this release lists, whatever is installed here.", is_flag=True),
    Row("--adopt", "", "Take over a stack of an older gradsharding.", is_flag=True),
    Row("--yes", "", "Do not ask.", is_flag=True),
)  # fmt: skip
"""The options of ``deploy``, except the stack's name."""


class Chosen(NamedTuple):
    """The values of the options; settings that are not given stay unchanged."""

    parameters: Mapping[str, str]
    """The template's parameters that were given."""
    tags: Mapping[str, str]
    service_role: str | None
    termination_protection: bool | None
    code_bucket: str | None
    locked: bool
    adopt: bool
    yes: bool


def deploy_options(command: _F) -> _F:
    """Give a command the options of the table, in its order."""
    for row in reversed(OPTIONS):
        command = row.option()(command)
    return command


def chosen(given: Mapping[str, Any]) -> Chosen:
    """Read the options from click; raise UserError for tags that AWS does not accept."""
    parameters = {
        row.parameter: (row.values[not given[row.name]] if row.values else str(given[row.name]))
        for row in OPTIONS
        if row.parameter and given[row.name] is not None
    }
    return Chosen(
        parameters,
        _tags(given["tag"]),
        given["service_role"],
        given["termination_protection"],
        given["code_bucket"],
        given["locked"],
        given["adopt"],
        given["yes"],
    )


def _tags(texts: tuple[str, ...]) -> dict[str, str]:
    tags = dict[str, str]()
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w .:/=+@-]{1,128}", key) or not re.fullmatch(r"[\w .:/=+@-]{0,256}", value):
            raise UserError(f"--tag takes KEY=VALUE, up to 128 and 256 letters, digits, spaces and .:/=+@-_, not {text!r}")
        if key.lower().startswith("aws:") or key == TAG:
            raise UserError(f"--tag {text!r}: the key {TAG}, and those that begin with aws:, are reserved; use another key")
        if key in tags:
            raise UserError(f"--tag gives {key!r} twice, as {tags[key]!r} and {value!r}; give it once")
        tags[key] = value
    if len(tags) > TAGS:
        raise UserError(f"{len(tags)} tags are given with --tag; a stack takes {TAGS}: leave out {len(tags) - TAGS}")
    return tags


_CLASHES = (
    (("Subnets", "!SecurityGroups"), "--subnets needs --security-groups: a function in a VPC has both"),
    (("SecurityGroups", "!Subnets"), "--security-groups needs --subnets: a function outside a VPC has no security group"),
    (("ExistingRole", "PermissionsBoundary"),
     "--role and --permissions-boundary exclude each other: the boundary is for a role that is made"),
    (("BucketOwner", "!ExistingBucket"), "--bucket-owner needs --bucket: what is made belongs to this account"),
    (("ExistingBucket", "Versioning"), "--bucket and --versioning exclude each other: versioning is a setting of the bucket that is made"),
    (("ExistingBucket", "AccessLogBucket"), "--bucket and --access-log-bucket exclude each other: set the log of your bucket yourself"),
)  # fmt: skip
"""Parameters that exclude each other or, with "!", need each other."""

_LASTING = {"ExistingBucket": "bucket", "Prefix": "prefix"}
"""Parameters that a stack keeps for life: otherwise its data would no longer be found."""


def require_consistent(parameters: Mapping[str, str], given: Mapping[str, str], was: Mapping[str, str] | None, region: str) -> None:
    """Raise UserError, before anything is created, for parameters of the template that contradict each other.

    ``parameters`` are all that the stack will have, ``given`` those that are given now, ``was`` those of an existing stack.
    """
    for name, kind in _LASTING.items():
        if was is not None and name in given and given[name] != was.get(name, ""):
            raise UserError(
                f"the stack's {kind} is {was.get(name) or 'its own'}, and cannot be changed, as its data would no longer be found; "
                f"deploy another stack with --name for {given[name] or 'a new one'}"
            )
    is_set = {name for name, value in parameters.items() if value not in ("", "false")}
    for names, why in _CLASHES:
        if all((name.lstrip("!") in is_set) != name.startswith("!") for name in names):
            raise UserError(f"{why}; give one without the other" if "exclude" in why else f"{why}; give both")
    if "ExistingBucket" in is_set and "ExpireDays" in given:
        raise UserError("--expire-days is a rule of the bucket that is made; with --bucket, put the rules of deploy/README.md on yours")
    if "AccessLogPrefix" in given and "AccessLogBucket" not in is_set:
        raise UserError("--access-log-prefix needs --access-log-bucket: there is no access log; give both")
    for name in ("KmsKey", "AlarmTopic"):
        if name in is_set and (where := parameters[name].split(":")[3]) != region:
            raise UserError(f"{parameters[name]} is in {where}, and the stack in {region}; name one of {region}")
