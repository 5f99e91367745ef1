"""What each option of ``deploy`` makes of the template, as SAM's translator and CloudFormation's conditions leave it."""

import io
import json
import os
import re
import subprocess
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import click
import pytest
from click.testing import CliRunner

from gradsharding.aws.demands import demanded
from gradsharding.aws.deploy.account import Account, Stack
from gradsharding.aws.deploy.code import Code, code_of_template
from gradsharding.aws.deploy.options import LOG_DAYS, OPTIONS, Chosen, chosen, deploy_options, require_consistent
from gradsharding.aws.deploy.stack import TEMPLATES, Order, defaults, put_up, template
from gradsharding.aws.deploy.template import filled
from gradsharding.errors import UserError
from gradsharding.planning.platform import RUNTIMES
from rigs.stack import as_account
from rigs.template import PSEUDO, read_template, resolved, translated

REGION = PSEUDO["AWS::Region"]
KEY = f"arn:aws:kms:{REGION}:123456789012:key/0a1b2c3d-0000-4000-8000-0123456789ab"
ROLE, BOUNDARY = "arn:aws:iam::123456789012:role/mine", "arn:aws:iam::123456789012:policy/bounds"
TOPIC = f"arn:aws:sns:{REGION}:123456789012:told"
TEMPLATE = next(path for path in TEMPLATES if path.exists())

SETTINGS: Mapping[str, tuple[str, ...]] = {
    "nothing": (),
    "everything made": (
        "--kms-key", KEY, "--subnets", "subnet-01234567,subnet-01234568", "--security-groups", "sg-01234567",
        "--permissions-boundary", BOUNDARY, "--versioning", "--access-log-bucket", "logs", "--prefix", "fl",
        "--log-days", "365", "--log-format", "json", "--alarm-topic", TOPIC,
        "--dashboard", "--tracing", "--concurrency", "20",
    ),
    "nothing made": ("--bucket", "theirs", "--bucket-owner", "210987654321", "--role", ROLE, "--kms-key", KEY),
}  # fmt: skip
"""Options that go together, and between them set every parameter."""


def asked(*words: str) -> Chosen:
    """Read options as ``deploy`` does."""

    @click.command()
    @deploy_options
    def command(**given: Any) -> Chosen:
        return chosen(given)

    ended = CliRunner().invoke(command, words, standalone_mode=False)
    if ended.exception:
        raise ended.exception
    assert isinstance(ended.return_value, Chosen)
    return ended.return_value


@cache
def plain(*words: str) -> Any:
    """Give what SAM's translator makes of the template for options, with their conditions decided."""
    parameters = asked(*words).parameters
    text = filled(template(), "s3://code/one/1.zip", parameters)
    return resolved(translated(read_template(text), parameters), **parameters)


def made(*words: str) -> Any:
    """Give the resources that options make, by their names."""
    return plain(*words)["Resources"]


def sids(role: Any) -> set[str]:
    """Names of a role's statements."""
    return {statement["Sid"] for policy in role["Properties"]["Policies"] for statement in policy["PolicyDocument"]["Statement"]}


def statement(role: Any, sid: str) -> Any:
    """One statement of a role."""
    (found,) = (one for policy in role["Properties"]["Policies"] for one in policy["PolicyDocument"]["Statement"] if one["Sid"] == sid)
    return found


def test_table_and_template_agree() -> None:
    """Each parameter of the template has one option, each option that names a parameter finds it, and both allow the same."""
    parameters = read_template(template())["Parameters"]
    rows = {row.parameter: row for row in OPTIONS if row.parameter}

    assert {name: str(one["Default"]) for name, one in parameters.items() if name != "Release"} == defaults(template())
    assert rows.keys() == defaults(template()).keys()
    assert len(rows) == sum(bool(row.parameter) for row in OPTIONS)
    assert [*LOG_DAYS] == parameters["LogDays"]["AllowedValues"]
    assert [*RUNTIMES] == parameters["Runtime"]["AllowedValues"]
    for name, row in rows.items():
        if row.values:
            assert {*row.values} == {*parameters[name]["AllowedValues"]}
        assert "Default" in parameters[name]


def test_nothing_given_says_nothing() -> None:
    """Without options, no parameter is sent, so that what a stack has stays as it is."""
    assert Chosen({}, {}, None, None, None, locked=False, adopt=False, yes=False) == asked()


@pytest.mark.usefixtures("sam")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_taken(name: str) -> None:
    """Options that go together pass their own checks and the template's, and leave a template without open conditions."""
    parameters = asked(*SETTINGS[name]).parameters
    require_consistent({**defaults(template()), **parameters}, parameters, None, REGION)
    text = json.dumps(made(*SETTINGS[name]))

    assert not [mark for mark in ("Fn::", '"Ref"', '"Condition": "') if mark in text]
    assert "${AWS" not in text


def test_settings_cover_all_options() -> None:
    """Between them, the settings of these tests use each option that the template has, but for those that it always had."""
    used = {name for words in SETTINGS.values() for name in asked(*words).parameters}
    old = {"Architecture", "Memory", "Timeout", "Runtime", "ExpireDays", "AccessLogPrefix"}

    assert defaults(template()).keys() - old == used - old


@pytest.mark.usefixtures("sam")
def test_nothing_changes_for_who_asks_for_nothing() -> None:
    """By default there is one bucket, its policy, a role, a log, a function with one published version and its alias, and two alarms."""
    resources = made()
    kinds = sorted(one["Type"] for one in resources.values())
    bucket, function = (resources[name]["Properties"] for name in ("Bucket", "Function"))

    assert [
        "AWS::CloudWatch::Alarm", "AWS::CloudWatch::Alarm", "AWS::IAM::Role", "AWS::Lambda::Alias", "AWS::Lambda::Function",
        "AWS::Lambda::Version", "AWS::Logs::LogGroup", "AWS::S3::Bucket", "AWS::S3::BucketPolicy",
    ] == kinds  # fmt: skip
    assert {"ReadUpdates", "WriteResults", "LeaveUpdates", "Log"} == sids(resources["Role"])
    assert not {"VersioningConfiguration", "LoggingConfiguration"} & bucket.keys()
    assert not {"VpcConfig", "KmsKeyArn", "ReservedConcurrentExecutions"} & function.keys()
    assert "PermissionsBoundary" not in resources["Role"]["Properties"]
    assert "KmsKeyId" not in resources["Log"]["Properties"]
    assert "PassThrough" == function["TracingConfig"]["Mode"]


@pytest.mark.usefixtures("sam")
def test_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KMS key encrypts bucket and log; the function may use that key, through S3 alone, and its variables are demands that we know."""
    resources = made("--kms-key", KEY)
    (rule,) = resources["Bucket"]["Properties"]["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    use = statement(resources["Role"], "UseKey")

    assert {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": KEY} == rule["ServerSideEncryptionByDefault"]
    assert rule["BucketKeyEnabled"] is True
    assert KEY == resources["Log"]["Properties"]["KmsKeyId"]
    assert ("Allow", ["kms:Decrypt", "kms:GenerateDataKey"], KEY) == (use["Effect"], use["Action"], use["Resource"])
    assert {"StringEquals": {"kms:ViaService": f"s3.{REGION}.amazonaws.com"}} == use["Condition"]
    for name, value in resources["Function"]["Properties"]["Environment"]["Variables"].items():
        monkeypatch.setenv(name, value)
    owner = PSEUDO["AWS::AccountId"]
    assert {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": KEY, "ExpectedBucketOwner": owner} == demanded()


@pytest.mark.usefixtures("sam")
def test_vpc() -> None:
    """In a VPC, Lambda may make the function's interfaces in its role's name, and the function's own code may not."""
    resources = made("--subnets", "subnet-01234567,subnet-01234568", "--security-groups", "sg-01234567")
    join, leave = (statement(resources["Role"], sid) for sid in ("JoinVpc", "LeaveVpc"))

    assert {"SubnetIds": ["subnet-01234567", "subnet-01234568"], "SecurityGroupIds": ["sg-01234567"]} == resources["Function"][
        "Properties"
    ]["VpcConfig"]
    assert ("Allow", "Deny") == (join["Effect"], leave["Effect"])
    assert join["Action"] == leave["Action"]
    assert {"ArnEquals": {"lambda:SourceFunctionArn": f"arn:aws:lambda:{REGION}:123456789012:function:one"}} == leave["Condition"]


@pytest.mark.usefixtures("sam")
def test_existing_bucket() -> None:
    """With a bucket of one's own none is made and none is named as ours; the function's rights are on that one, below the prefix."""
    options = "--bucket", "theirs", "--bucket-owner", "210987654321", "--prefix", "fl"
    resources, outputs = made(*options), plain(*options)["Outputs"]
    variables = resources["Function"]["Properties"]["Environment"]["Variables"]

    assert not {"Bucket", "BucketPolicy"} & resources.keys()
    assert {"Store", "Executor"} == outputs.keys()
    assert "s3://theirs/fl" == outputs["Store"]["Value"]
    assert "arn:aws:s3:::theirs/fl/*" == statement(resources["Role"], "ReadUpdates")["Resource"]
    assert all(place.startswith("arn:aws:s3:::theirs/fl/") for place in statement(resources["Role"], "WriteResults")["Resource"])
    assert "210987654321" == variables["GRADSHARDING_S3_EXPECTED_BUCKET_OWNER"]


@pytest.mark.usefixtures("sam")
def test_existing_role() -> None:
    """With a role of one's own none is made, and the function takes that one."""
    resources = made("--role", ROLE)

    assert "Role" not in resources
    assert ROLE == resources["Function"]["Properties"]["Role"]
    assert "Role" not in json.dumps([one.get("DependsOn", []) for one in resources.values()])


@pytest.mark.usefixtures("sam")
def test_smaller_options() -> None:
    """The other options arrive, each where it belongs."""
    resources = made(*SETTINGS["everything made"])
    bucket, role, log, function = (resources[name]["Properties"] for name in ("Bucket", "Role", "Log", "Function"))

    assert BOUNDARY == role["PermissionsBoundary"]
    assert {"Status": "Enabled"} == bucket["VersioningConfiguration"]
    assert {"DestinationBucketName": "logs", "LogFilePrefix": "gradsharding/"} == bucket["LoggingConfiguration"]
    assert "365" == str(log["RetentionInDays"])
    assert "JSON" == function["LoggingConfig"]["LogFormat"]
    assert "Active" == function["TracingConfig"]["Mode"]
    assert ["xray:PutTelemetryRecords", "xray:PutTraceSegments"] == statement(resources["Role"], "Trace")["Action"]
    assert "20" == str(function["ReservedConcurrentExecutions"])
    assert [[TOPIC]] * 2 == [one["Properties"]["AlarmActions"] for one in resources.values() if one["Type"] == "AWS::CloudWatch::Alarm"]
    assert "fl/rounds/" in {rule.get("Prefix") for rule in bucket["LifecycleConfiguration"]["Rules"]}


@pytest.mark.usefixtures("sam")
def test_dashboard() -> None:
    """The dashboard is JSON that CloudWatch reads; it shows the function's metrics, of all its versions, and the memory from its log."""
    assert "Board" not in made()
    widgets = json.loads(made("--dashboard")["Board"]["Properties"]["DashboardBody"])["widgets"]
    shown = {row[1]: row[2:4] for one in widgets for row in one["properties"].get("metrics", []) if isinstance(row[0], str)}

    assert {"Invocations", "ConcurrentExecutions", "Duration", "Errors", "Throttles"} == shown.keys()
    assert all(dimension == ["FunctionName", "${Function}"] for dimension in shown.values())
    assert [f"SOURCE '{name}'" for name in ("${Log}",)] == [one["properties"]["query"][:15] for one in widgets if one["type"] == "log"]
    assert {REGION} == {one["properties"]["region"] for one in widgets}


@pytest.mark.usefixtures("sam")
def test_code_is_pinned_to_its_version() -> None:
    """Where the bucket of the code keeps versions, the function is made of the very version that was compared, and that is read back."""
    code = Code("code-bucket", "one", "0" * 64, "3sL4kqtJlcpXroDTDmJ.rmSpXd3dIbrHY-MTRCxf3vjVBH40_Nr8X8gdRQBpUMLUo")
    text = filled(template(), code.uri, {})
    made = translated(read_template(text))["Resources"]["Function"]["Properties"]["Code"]
    assert {"S3Bucket": code.bucket, "S3Key": code.key, "S3ObjectVersion": code.version} == made
    assert (code, code) == (
        code_of_template(text),
        code_of_template({"CodeUri": read_template(text)["Resources"]["Function"]["Properties"]["CodeUri"]}),
    )


@pytest.mark.usefixtures("sam")
def test_alias_leads_to_a_version_that_stays() -> None:
    """The executor is an alias; it leads to a version that outlives the next one, so that a round that runs goes on with it."""
    resources = made()
    ((name, version),) = ((name, one) for name, one in resources.items() if one["Type"] == "AWS::Lambda::Version")
    (alias,) = (one["Properties"] for one in resources.values() if one["Type"] == "AWS::Lambda::Alias")

    assert "lambda:${Function}:live" == plain()["Outputs"]["Executor"]["Value"]
    assert ("live", f"${{{name}.Version}}") == (alias["Name"], alias["FunctionVersion"])
    assert "Retain" == version["DeletionPolicy"]
    dimensions = [one["Properties"]["Dimensions"] for one in resources.values() if one["Type"] == "AWS::CloudWatch::Alarm"]
    assert [[{"Name": "FunctionName", "Value": "${Function}"}]] * 2 == dimensions  # an alarm for an alias would miss its versions


@pytest.mark.usefixtures("sam")
def test_whatever_changes_publishes_a_version() -> None:
    """Another code, another value of any parameter or another template makes another version, which the function's description names."""

    def version(text: str, code: str = "s3://code/1.zip", **parameters: str) -> tuple[str, str]:
        resources = translated(read_template(filled(text, code, parameters)))["Resources"]
        (name,) = (name for name, one in resources.items() if one["Type"] == "AWS::Lambda::Version")
        return name, resources["Function"]["Properties"]["Description"]

    text = template()
    first = version(text)
    others = [
        version(text, "s3://code/2.zip"),
        version(text, Tracing="Active"),
        version(text.replace("see gradsharding", "read gradsharding")),
    ]

    assert 4 == len({first, *others}) == len({name for name, _ in (first, *others)}) == len({said for _, said in (first, *others)})
    assert all(len(said) <= 256 for _, said in (first, *others))  # Lambda takes no more


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kms-key", "alias/mine"], "--kms-key takes the ARN of a key, arn:aws:kms:REGION:ACCOUNT:key/ID, not 'alias/mine'"),
        (["--subnets", "subnet-01234567,vpc-1"], "--subnets takes ids of subnets, such as .*, not 'vpc-1'"),
        (["--security-groups", "sg-01234567,"], "--security-groups takes ids of security groups, such as .*, not ''"),
        (["--permissions-boundary", ROLE], "--permissions-boundary takes the ARN of a policy, .*, not '.*role/mine'"),
        (["--bucket", "My_Bucket"], "--bucket takes the name of a bucket: 3 to 63 small letters, .*, not 'My_Bucket'"),
        (["--bucket-owner", "me"], "--bucket-owner takes the 12 digits of an account, not 'me'"),
        (["--role", "mine"], "--role takes the ARN of a role, arn:aws:iam::ACCOUNT:role/NAME, not 'mine'"),
        (["--service-role", "mine"], "--service-role takes the ARN of a role, .*, not 'mine'"),
        (["--access-log-bucket", "x"], "--access-log-bucket takes the name of a bucket: .*, not 'x'"),
        (["--access-log-prefix", "a b"], "--access-log-prefix takes up to 512 letters.*, not 'a b'"),
        (["--code-bucket", "x/y"], "--code-bucket takes the name of a bucket: .*, not 'x/y'"),
        (["--prefix", "a/b"], "--prefix takes up to 64 letters, digits, hyphens and underscores, not 'a/b'"),
        (["--alarm-topic", "told"], "--alarm-topic takes the ARN of a topic, arn:aws:sns:REGION:ACCOUNT:NAME, not 'told'"),
        (["--tag", "team"], "--tag takes KEY=VALUE, .*, not 'team'"),
        (["--tag", "aws:x=1"], "--tag 'aws:x=1': the key gradsharding, and those that begin with aws:, are reserved; use another key"),
        (["--tag", "gradsharding=x"], "--tag 'gradsharding=x': the key gradsharding, .* are reserved; use another key"),
        (["--tag", "a=1", "--tag", "a=2"], "--tag gives 'a' twice, as '1' and '2'; give it once"),
        ([word for i in range(50) for word in ("--tag", f"k{i}=")], "50 tags are given with --tag; a stack takes 49: leave out 1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(words: list[str], says: str) -> None:
    """A text that its option cannot take is refused with the option's name, what it takes, and the text."""
    with pytest.raises(UserError, match=f"^{says}"):
        asked(*words)


@pytest.mark.parametrize(
    ("words", "was", "says"),
    [
        (["--subnets", "subnet-01234567"], None, "--subnets needs --security-groups: .*; give both"),
        (["--security-groups", "sg-01234567"], None, "--security-groups needs --subnets: .*; give both"),
        (["--role", ROLE, "--permissions-boundary", BOUNDARY], None, "--role and --permissions-boundary exclude each other: .*; give one"),
        (["--bucket-owner", "123456789012"], None, "--bucket-owner needs --bucket: .*; give both"),
        (["--bucket", "theirs", "--versioning"], None, "--bucket and --versioning exclude each other: .*"),
        (["--bucket", "theirs", "--access-log-bucket", "logs"], None, "--bucket and --access-log-bucket exclude each other: .*"),
        (["--bucket", "theirs", "--expire-days", "3"], None, "--expire-days is a rule of the bucket that is made; .*"),
        (["--access-log-prefix", "x/"], None, "--access-log-prefix needs --access-log-bucket: .*; give both"),
        (["--kms-key", KEY.replace(REGION, "us-east-1")], None, ".* is in us-east-1, and the stack in eu-central-1; name one"),
        (["--bucket", "theirs"], {}, "the stack's bucket is its own, .*; deploy another stack with --name for theirs"),
        (["--bucket", ""], {"ExistingBucket": "theirs"}, "the stack's bucket is theirs, and cannot be changed, .* --name for a new one"),
        (["--prefix", "fl"], {"Prefix": "gradsharding"}, "the stack's prefix is gradsharding, and cannot be changed, .* --name for fl"),
        (["--permissions-boundary", BOUNDARY], {"ExistingRole": ROLE}, "--role and --permissions-boundary exclude each other"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(words: list[str], was: Mapping[str, str] | None, says: str) -> None:
    """Options that clash with each other, or with what the stack has, are refused in one sentence that says what to do."""
    given = asked(*words).parameters
    with pytest.raises(UserError, match=f"^{says}"):
        require_consistent({**(was or {}), **given}, given, was, REGION)


def test_an_empty_text_takes_an_option_back() -> None:
    """An option of a stack is taken back by an empty text, and what it excluded is free again."""
    given = asked("--role", "", "--permissions-boundary", BOUNDARY).parameters
    was = {"ExistingRole": ROLE}
    require_consistent({**was, **given}, given, was, REGION)

    assert {"ExistingRole": "", "PermissionsBoundary": BOUNDARY} == given


def test_what_goes_to_cloudformation_itself() -> None:
    """Tags, the service role, termination protection, the code's bucket and lock are no parameters; a tag's value may hold "="."""
    words = "--tag team=fl --tag note=a=b --no-termination-protection --code-bucket code --locked --yes"
    found = asked(*words.split(), "--service-role", ROLE)

    assert Chosen({}, {"team": "fl", "note": "a=b"}, ROLE, False, "code", locked=True, adopt=False, yes=True) == found


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true", "SAM_CLI_TELEMETRY": "0"}
    return subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What each setting makes of the template, as files."""
    directory = tmp_path_factory.mktemp("templates")
    for name, words in SETTINGS.items():
        (directory / f"{name}.json").write_text(json.dumps(_with_references(plain(*words))))
    return [directory / f"{name}.json" for name in SETTINGS]


@pytest.mark.usefixtures("sam")
def test_checkov(checkov: Path, templates: list[Path]) -> None:
    """Checkov finds nothing, in the text and in what each setting makes of it; each exception stands in the template with its reason."""
    files = [word for path in (TEMPLATE, *templates) for word in ("--file", path)]
    ended = _run(checkov, "--framework", "cloudformation", "--skip-download", "--output", "json", *files)
    found = json.loads(ended.stdout)["results"]
    checked = {Path(one["file_path"]).name for one in found["passed_checks"]}

    assert [] == [(one["file_path"], one["check_id"], one["resource"], one["check_name"]) for one in found["failed_checks"]]
    assert {path.name for path in (TEMPLATE, *templates)} == checked
    assert all(one["check_result"]["suppress_comment"] for one in found["skipped_checks"])
    excepted = {one["check_id"] for one in found["skipped_checks"]}
    assert {*re.findall(r"\{id: (CKV_\w+), comment: '\w", template())} == excepted  # each still has something to except


def test_each_setting_is_sound(sam: Path, templates: list[Path]) -> None:
    """CloudFormation's linter finds nothing in what each setting makes of the template, against the schemas of its resources."""
    ended = _run(sam.with_name("cfn-lint"), *templates)

    assert 0 == ended.returncode, ended.stdout + ended.stderr


def _with_references(one: Any) -> Any:
    """Put back CloudFormation's own words for what only AWS knows."""
    if isinstance(one, dict):
        return {name: _with_references(value) for name, value in one.items()}
    if isinstance(one, list):
        return [*map(_with_references, one)]
    return {"Fn::Sub": one} if isinstance(one, str) and "${" in one else one


def _empty_zip(*_: Any) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo("empty.py"), "")
    return data.getvalue()


def test_options_arrive_on_an_account(ministack: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An account that executes the template has what options ask for; a change publishes a version, to which the alias then leads.

    Ministack's CloudFormation knows no boundaries, no reserved concurrency, and of a bucket its versioning: for those, see above.
    """
    for name, value in as_account(ministack, "200000000000").items():
        monkeypatch.setenv(name, value)
    account = Account()

    def up(*words: str) -> Stack:
        one = asked(*words)
        order = Order("one", one.parameters, one.tags, one.service_role, one.termination_protection, one.code_bucket)
        stack = put_up(account, order, lambda _: True, lambda _: None, _empty_zip)
        assert stack
        return stack

    key, region = KEY.replace(REGION, account.region), account.region
    functions = account.functions
    cloudwatch: Any = boto3.client("cloudwatch")
    up()
    first = functions.get_function_configuration(FunctionName="one:live")
    assert [] == cloudwatch.list_dashboards()["DashboardEntries"]
    stack = up(
        "--kms-key", key, "--versioning", "--log-days", "365", "--log-format", "json",
        "--dashboard", "--tracing", "--memory", "1024", "--tag", "team=fl", "--tag", "note=a b", "--termination-protection",
        "--alarm-topic", TOPIC.replace(REGION, region),
    )  # fmt: skip
    now = functions.get_function_configuration(FunctionName="one:live")
    (group,) = account.logs.describe_log_groups(logGroupNamePrefix="/aws/lambda/one")["logGroups"]

    assert ("1", "2") == (first["Version"], now["Version"])
    assert (512, 1024) == (first["MemorySize"], now["MemorySize"])
    assert ("Active", "JSON") == (now["TracingConfig"]["Mode"], now["LoggingConfig"]["LogFormat"])
    assert key == now["Environment"]["Variables"]["GRADSHARDING_S3_SSE_KMS_KEY_ID"]
    assert 365 == group["retentionInDays"]
    assert ["one-us-east-1"] == [one["DashboardName"] for one in cloudwatch.list_dashboards()["DashboardEntries"]]
    assert [[TOPIC.replace(REGION, region)]] * 2 == [one["AlarmActions"] for one in cloudwatch.describe_alarms()["MetricAlarms"]]
    assert "Enabled" == account.s3.get_bucket_versioning(Bucket=stack.outputs["Bucket"])["Status"]
    assert {"team": "fl", "note": "a b"}.items() <= stack.tags.items()
    assert stack.protected

    up("--kms-key", "", "--no-dashboard", "--no-termination-protection")
    taken_back = functions.get_function_configuration(FunctionName="one:live")
    assert "GRADSHARDING_S3_SSE" not in taken_back["Environment"]["Variables"]
    assert (1024, "3") == (taken_back["MemorySize"], taken_back["Version"])  # what is not given stays
    assert [] == cloudwatch.list_dashboards()["DashboardEntries"]
    with pytest.raises(UserError, match="the stack's bucket is its own, and cannot be changed"):
        up("--bucket", "theirs")
    assert "3" == functions.get_function_configuration(FunctionName="one:live")["Version"]
