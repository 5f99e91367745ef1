"""A stack is put up, changed and taken down in an account that holds other people's things, and only what is ours is touched."""

import contextlib
import hashlib
import io
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import numpy as np
import pytest

from gradsharding.aws.deploy import stack as stacks
from gradsharding.aws.deploy.account import TAG, Account, Stack, is_marked, remedy
from gradsharding.aws.deploy.code import own_bucket
from gradsharding.aws.deploy.code import zipped as build_zip
from gradsharding.aws.deploy.drift import checked, drift, missing
from gradsharding.aws.deploy.options import NAMED
from gradsharding.aws.deploy.stack import Change, Order, put_up, template
from gradsharding.aws.deploy.teardown import doomed, take_down
from gradsharding.errors import GradShardingError, StackFailed, StoreRefused, UserError
from gradsharding.format.encode import encode
from gradsharding.stores.updates import load
from gradsharding.stores.urls import open_store
from gradsharding.testing import assert_same, reference_mean
from rigs.frontdoor import FrontDoor, Stop, front_door
from rigs.policies import recorded

OTHERS = {
    "Description": "somebody else's",
    "Resources": {
        "Table": {
            "Type": "AWS::DynamoDB::Table",
            "Properties": {
                "BillingMode": "PAY_PER_REQUEST",
                "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "S"}],
                "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
            },
        },
        "Bucket": {"Type": "AWS::S3::Bucket"},
    },
    "Outputs": {"Bucket": {"Value": {"Ref": "Bucket"}}, "Store": {"Value": {"Fn::Sub": "s3://${Bucket}/x"}}},
}
"""A template that is not ours, with outputs that are called as ours are."""

COMMAND = """
import pathlib, sys
from gradsharding.aws.deploy import commands
from gradsharding.cli.main import main
data = pathlib.Path(sys.argv[1]).read_bytes()
commands.zipped = lambda *_, **__: data
sys.exit(main(sys.argv[2:]))
"""
"""The command line, with code that was built before: all else is as it is."""


def zipped(text: str = "def handler(event, context): pass") -> bytes:
    """Make the zip of a function that does nothing: these tests never call it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("gradsharding/aws/functions/handler.py"), text)
    return buffer.getvalue()


CODE = zipped()


next_account = [100_000_000_000]
"""Number of the account that is entered next; all modules share the accounts, and each is entered once."""


@pytest.fixture(scope="module")
def door(ministack: Mapping[str, str]) -> Iterator[FrontDoor]:
    """Give the door to accounts that have nothing in them."""
    with front_door(ministack) as opened:
        yield opened


@pytest.fixture
def enter(door: FrontDoor, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Account]:
    """Enter a new account, as this process and all that it starts."""

    def enter() -> Account:
        number = f"{next_account[0]:012}"
        next_account[0] += 1
        for name, value in door.environment(number).items():
            monkeypatch.setenv(name, value)
        return Account()

    return enter


@pytest.fixture
def account(enter: Callable[[], Account]) -> Account:
    """Enter one account."""
    return enter()


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line; ``answer`` is typed at a terminal."""
    code = tmp_path / "code.zip"
    code.write_bytes(CODE)

    def run(*words: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        if not answer:
            return subprocess.run(
                [sys.executable, "-c", COMMAND, code, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
            )
        ours, theirs = pty.openpty()
        try:
            os.write(ours, answer.encode())
            return subprocess.run([sys.executable, "-c", COMMAND, code, *words], capture_output=True, text=True, check=False, stdin=theirs)
        finally:
            os.close(ours)
            os.close(theirs)

    return run


def yes(_: list[Change]) -> bool:
    """Agree to all."""
    return True


def up(account: Account, name: str = "one", agree: Callable[[list[Change]], bool] = yes, code: bytes = CODE, **order: Any) -> Stack | None:
    """Put a stack up."""
    return put_up(account, Order(name, **order), agree, lambda _: None, lambda *_: code)


def put(account: Account, name: str = "one", **more: Any) -> Stack:
    """Put a stack up that is agreed to."""
    stack = up(account, name, **more)
    assert stack
    return stack


def down(account: Account, name: str = "one", *, data: bool = False) -> int:
    """Take a stack down."""
    return take_down(account, name, doomed(account, name, lambda _: None), data=data, tell=lambda _: None).objects


def foreign(account: Account, name: str, body: Mapping[str, Any] = OTHERS, tags: Mapping[str, str] = {}) -> None:
    """Make a stack as others do."""
    account.formation.create_stack(
        StackName=name, TemplateBody=json.dumps(body), Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
        Capabilities=["CAPABILITY_IAM"],
    )  # fmt: skip
    account.formation.get_waiter("stack_create_complete").wait(StackName=name, WaiterConfig={"Delay": 1})


def everything(account: Account) -> dict[str, Any]:
    """Write down all that is in an account, byte by byte, by a name for each thing."""
    found: dict[str, Any] = {}
    for bucket in account.s3.list_buckets()["Buckets"]:
        name = bucket["Name"]
        listed = account.s3.list_object_versions(Bucket=name)
        for one in listed.get("Versions", []):
            body = account.s3.get_object(Bucket=name, Key=one["Key"], VersionId=one["VersionId"])["Body"].read()
            found[f"object {name}/{one['Key']} {one['VersionId']}"] = body
        found[f"bucket {name}"] = [one["Key"] for one in listed.get("DeleteMarkers", [])]
        for what in (account.s3.get_bucket_tagging, account.s3.get_bucket_policy):
            with contextlib.suppress(account.s3.exceptions.ClientError):
                found[f"{what.__name__} {name}"] = {key: value for key, value in what(Bucket=name).items() if key != "ResponseMetadata"}
    for stack in account.formation.describe_stacks()["Stacks"]:
        if stack["StackStatus"] != "DELETE_COMPLETE":
            text = account.formation.get_template(StackName=stack["StackId"])["TemplateBody"]
            sets = account.formation.list_change_sets(StackName=stack["StackName"])["Summaries"]
            found[f"stack {stack['StackId']}"] = (stack["StackStatus"], stack.get("Tags"), text, [one["ChangeSetId"] for one in sets])
    for function in account.functions.list_functions()["Functions"]:
        found[f"function {function['FunctionName']}"] = {key: function[key] for key in ("CodeSha256", "Handler", "Role", "MemorySize")}
    for group in account.logs.describe_log_groups()["logGroups"]:
        events = account.logs.filter_log_events(logGroupName=group["logGroupName"])["events"]
        found[f"log {group['logGroupName']}"] = (group.get("retentionInDays"), [event["message"] for event in events])
    tables: Any = boto3.session.Session().client("dynamodb")
    for table in tables.list_tables()["TableNames"]:
        found[f"table {table}"] = tables.scan(TableName=table)["Items"]
    for role in account.roles.list_roles()["Roles"]:
        found[f"role {role['RoleName']}"] = role["AssumeRolePolicyDocument"]
    return found


# --- what will happen is shown, and agreed to -------------------------------------------------------------------------------------------


def test_changes_are_shown_and_refused(account: Account) -> None:
    """What will be made is shown first; if it is not agreed to, nothing is left, and of a stack that is there nothing is changed."""
    shown = list[Change]()

    def note(changes: list[Change]) -> bool:
        shown[:] = changes
        return False

    assert up(account, agree=note) is None
    assert {"Bucket", "Function", "Log", "Role"} <= {one.logical for one in shown if one.action == "make"}
    assert {} == everything(account)

    put(account, parameters={"Memory": "512"})
    before = everything(account)
    assert up(account, agree=note, code=zipped("other"), parameters={"Memory": "1024"}) is None
    assert ("change", "AWS::Lambda::Function") in {(one.action, one.type) for one in shown}
    assert before == everything(account)


def test_interrupt_at_the_question(account: Account) -> None:
    """An interrupt that comes instead of an answer leaves no stack, and no change set."""

    def interrupt(_: list[Change]) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        up(account, agree=interrupt)
    assert [] == [name for name in everything(account) if name.startswith("stack")]
    assert put(account).works


def test_nothing_to_change(account: Account) -> None:
    """A stack that is as it should be asks for nothing; what an order leaves out, parameters and tags, stays as it is."""
    put(account, parameters={"Memory": "1024"}, tags={"team": "blue"}, protected=True)
    put(account, parameters={"Timeout": "60"}, tags={"cost": "7"})

    def ask(changes: list[Change]) -> bool:
        raise AssertionError(changes)

    stack = put(account, agree=ask)
    assert ("1024", "60") == (stack.parameters["Memory"], stack.parameters["Timeout"])
    assert {"team": "blue", "cost": "7", TAG: "one"} == stack.tags
    assert stack.protected
    assert not put(account, protected=False).protected


def test_service_role(account: Account, command: Any) -> None:
    """Another service role alone is a change, shown and agreed to; the stack keeps it, and destroy may name yet another one."""
    first, second, third = (f"arn:aws:iam::{account.number}:role/{name}" for name in ("first", "second", "third"))
    assert "" == put(account).role
    assert first == put(account, role=first).role

    def ask(changes: list[Change]) -> bool:
        raise AssertionError(changes)

    for same in (None, first):
        assert first == put(account, agree=ask, role=same).role
    shown = list[Change]()

    def refuse(changes: list[Change]) -> bool:
        shown.extend(changes)
        return False

    assert up(account, agree=refuse, role=second) is None
    assert ("change", "Function") in {(one.action, one.logical) for one in shown}
    assert second == put(account, role=second).role
    with recorded() as sent:
        take_down(account, "one", doomed(account, "one", lambda _: None), data=True, tell=lambda _: None, role=third)
    assert [third] == [one.parameters.get("RoleARN") for one in sent if one.operation == "DeleteStack"]
    wrong = command("destroy", "--name", "one", "--service-role", "mine", "--yes")
    assert (2, True) == (wrong.returncode, "--service-role takes the ARN of a role" in wrong.stderr)


def test_long_name(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that CloudFormation would shorten is refused to a new stack; one that an older release put up is changed and taken down."""
    longest = "n" * NAMED
    with pytest.raises(UserError, match=rf"^{longest}n has 41 characters, and a new stack's name 40 at most, .* --name$"):
        put(account, f"{longest}n")
    assert {} == everything(account)

    put(account, longest)
    buckets, roles = (f"{longest}-{kind}-" for kind in ("bucket", "Role"))
    assert all(len(f"{start}{'x' * 13}") <= most for start, most in ((buckets, 63), (roles, 64)))
    down(account, longest, data=True)

    with monkeypatch.context() as patch:
        patch.setattr(stacks, "NAMED", 48)
        put(account, "o" * 48)
    assert "1024" == put(account, "o" * 48, parameters={"Memory": "1024"}).parameters["Memory"]
    down(account, "o" * 48, data=True)
    assert {} == everything(account)


def test_nobody_to_ask(account: Account, command: Any) -> None:
    """Without a terminal and without --yes, deploy and destroy show what they would do, refuse, and leave nothing."""
    refused = command("deploy", "--name", "one")
    assert 2 == refused.returncode
    assert "there is no terminal to ask at; run it again with --yes" in refused.stderr
    assert "make  Bucket " in refused.stdout
    assert {} == everything(account)

    put(account)
    before = everything(account)
    refused = command("destroy", "--name", "one", "--delete-data")
    assert 2 == refused.returncode
    assert "delete  bucket one-bucket-" in refused.stdout
    assert before == everything(account)


def test_asking_at_a_terminal(account: Account, command: Any) -> None:
    """At a terminal, no ends with 1 and changes nothing, and yes goes on; the account and its region are named in the question."""
    no = command("deploy", "--name", "one", answer="n\n")
    assert 1 == no.returncode, no.stderr
    assert f"Make these changes to stack one in account {account.number}, region us-east-1? [y/N]" in no.stdout
    assert "nothing was changed" in no.stdout
    assert {} == everything(account)
    assert 0 == command("deploy", "--name", "one", answer="y\n").returncode
    kept = command("destroy", "--name", "one", answer="n\n")
    assert (1, True) == (kept.returncode, "nothing was deleted" in kept.stdout)
    assert account.find("one")
    gone = command("destroy", "--name", "one", answer="y\n")
    assert 0 == gone.returncode, gone.stderr
    assert "Delete it with: gradsharding destroy --name one --delete-data" in gone.stdout


# --- what is not ours ------------------------------------------------------------------------------------------------------------------


def test_marker() -> None:
    """Our template is marked, as text and as JSON; a mention elsewhere is no marker."""
    assert is_marked(template())
    assert is_marked({"Metadata": {"Gradsharding": {"Format": 1}}})
    assert not is_marked({"Metadata": {"Other": "Gradsharding"}})
    assert not is_marked("# Metadata:\n#   Gradsharding: {}\nResources:\n  Metadata:\n    Gradsharding: {}\n")
    assert not is_marked("Description: |\n  Metadata:\n  Gradsharding:\n")


def test_stack_of_others(account: Account, command: Any) -> None:
    """Every command refuses a stack that is not ours, in one sentence, and touches nothing of it."""
    foreign(account, "one", tags={TAG: "one"})
    account.s3.put_object(Bucket=account.buckets(account.look_up("one") or pytest.fail("there is no stack"))[0], Key="x", Body=b"precious")
    before = everything(account)

    for words in (["deploy", "--yes"], ["deploy", "--yes", "--adopt"], ["destroy", "--yes", "--delete-data"], ["smoke"], ["status"]):
        refused = command(*words, "--name", "one")
        assert 2 == refused.returncode, refused
        assert f"stack one in account {account.number}, region us-east-1 " in refused.stderr
        assert 1 == refused.stderr.count("\n")
    assert before == everything(account)


def test_change_set_of_others(account: Account) -> None:
    """A stack that others have prepared is theirs; one that we have prepared is ours, and goes on."""
    prepared: list[tuple[str, str, Any]] = [("one", "theirs", []), ("two", f"gradsharding-{'0123' * 8}", [{"Key": TAG, "Value": "two"}])]
    for name, change, tags in prepared:
        account.formation.create_change_set(
            StackName=name, ChangeSetName=change, ChangeSetType="CREATE", TemplateBody=json.dumps(OTHERS), Tags=tags
        )  # fmt: skip
    before = everything(account)
    with pytest.raises(UserError, match=r"stack one in .* is not one of ours \(others have prepared it\)"):
        up(account)
    assert before == everything(account)
    assert put(account, "two").works


@pytest.mark.parametrize("make", ["function", "log group"])
def test_names_of_others(account: Account, make: str) -> None:
    """A function or a log group that has the name already is somebody's: nothing is made, and destroy leaves it alone."""
    if make == "function":
        account.functions.create_function(
            FunctionName="one", Role=f"arn:aws:iam::{account.number}:role/x", Runtime="python3.13", Handler="a.b", Code={"ZipFile": CODE}
        )
    account.logs.create_log_group(logGroupName="/aws/lambda/one")
    before = everything(account)
    with pytest.raises(UserError, match=f"a {make} .*one is in account {account.number}, region us-east-1 already"):
        up(account)
    assert 0 == down(account, data=True)
    assert before == everything(account)


def test_older_release(account: Account) -> None:
    """A stack that an older release put up, without tag and marker, is taken over if that is asked for; its data stays."""
    body = template().replace("Metadata:\n  Gradsharding: {Format: 1}", "", 1).replace("RetainExceptOnCreate", "Delete")
    assert not is_marked(body)
    account.s3.create_bucket(Bucket="old-code")
    account.s3.put_object(Bucket="old-code", Key="code.zip", Body=CODE)
    account.formation.create_stack(
        StackName="one", TemplateBody=body.replace("CodeUri: function/", "CodeUri: s3://old-code/code.zip"), Capabilities=["CAPABILITY_IAM"]
    )
    account.formation.get_waiter("stack_create_complete").wait(StackName="one", WaiterConfig={"Delay": 1})
    (bucket,) = account.buckets(account.look_up("one") or pytest.fail("there is no stack"))
    account.s3.put_object(Bucket=bucket, Key="x", Body=b"precious")

    with pytest.raises(UserError, match="gradsharding deploy --name one --adopt"):
        up(account)
    stack = put(account, adopt=True)
    assert {TAG: "one"} == stack.tags
    assert is_marked(account.template(stack))
    assert bucket == stack.outputs["Bucket"]
    down(account)
    assert b"precious" == account.s3.get_object(Bucket=bucket, Key="x")["Body"].read()


# --- taking down -----------------------------------------------------------------------------------------------------------------------


def test_data_goes_last(account: Account) -> None:
    """While CloudFormation refuses to delete a stack, its data stays, whatever was asked for."""
    bucket = put(account, protected=True).outputs["Bucket"]
    account.s3.put_object(Bucket=bucket, Key="x", Body=b"precious")
    before = everything(account)

    with pytest.raises(UserError, match=r"has termination protection, and nothing was deleted; .*--no-enable-termination-protection"):
        down(account, data=True)
    assert before == everything(account)
    what = doomed(account, "one", lambda _: None) if put(account, protected=False) else pytest.fail("there is no stack")
    account.formation.update_termination_protection(StackName="one", EnableTerminationProtection=True)  # after it was looked at
    with pytest.raises(GradShardingError, match="TerminationProtection"):
        take_down(account, "one", what, data=True, tell=lambda _: None)
    assert b"precious" == account.s3.get_object(Bucket=bucket, Key="x")["Body"].read()


def test_data_stays_until_it_is_asked_for(account: Account) -> None:
    """The bucket outlives its stack, and the next one of that name; without a stack, --delete-data finds it by its tag."""
    first = put(account).outputs["Bucket"]
    for i in range(3):
        account.s3.put_object(Bucket=first, Key="x", Body=b"%d" % i)
    account.s3.create_multipart_upload(Bucket=first, Key="y")
    down(account)
    assert [first] == [bucket["Name"] for bucket in account.s3.list_buckets()["Buckets"]]
    assert [(first, 1, 1)] == [one[:3] for one in doomed(account, "one", lambda _: None).buckets]

    second = put(account).outputs["Bucket"]
    what = doomed(account, "one", lambda _: None)
    assert ([second], [first]) == ([one.name for one in what.buckets], [one.name for one in what.earlier])
    down(account, data=True)
    assert [first] == [bucket["Name"] for bucket in account.s3.list_buckets()["Buckets"]]
    down(account, data=True)
    assert {} == everything(account)


@pytest.mark.slow
def test_bucket_with_versions(account: Account) -> None:
    """All versions and delete markers go with a bucket, more than S3 lists or deletes at once."""
    bucket = put(account).outputs["Bucket"]
    account.s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for i in range(1100):
        account.s3.put_object(Bucket=bucket, Key=f"{i % 550}", Body=b"x")
    account.s3.delete_object(Bucket=bucket, Key="7")
    assert (bucket, 1101, 1100) == doomed(account, "one", lambda _: None).buckets[0][:3]
    down(account, data=True)
    assert {} == everything(account)


def test_gone_or_never_there(account: Account, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack that was destroyed is told from one that never was there, as in another region, which is named."""
    put(account)
    assert 0 == command("destroy", "--name", "one", "--yes", "--delete-data").returncode
    again = command("destroy", "--name", "one", "--yes")
    assert 0 == again.returncode, again.stderr
    assert f"stack one in account {account.number}, region us-east-1 is gone already" in again.stdout

    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    elsewhere = command("destroy", "--name", "one", "--yes")
    assert 2 == elsewhere.returncode
    assert f"there is no stack one in account {account.number}, region eu-central-1" in elsewhere.stderr
    assert "If it is in another region, set AWS_DEFAULT_REGION" in elsewhere.stderr


# --- the function's code ---------------------------------------------------------------------------------------------------------------


def test_bucket_for_code(account: Account) -> None:
    """The bucket that is made for code is closed, holds the code that is deployed and no other, and goes with the last stack."""
    put(account)
    put(account, code=zipped("newer"))
    put(account, "two")
    bucket = own_bucket(account)
    digests = [hashlib.sha256(code).hexdigest() for code in (zipped("newer"), CODE)]
    assert [f"one/{digests[0]}.zip", f"two/{digests[1]}.zip"] == [
        one["Key"] for one in account.s3.list_objects_v2(Bucket=bucket)["Contents"]
    ]
    assert {True} == {*account.s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values()}
    (said,) = json.loads(account.s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
    assert ("Deny", "*", {"Bool": {"aws:SecureTransport": "false"}}) == (said["Effect"], said["Principal"], said["Condition"])

    down(account, data=True)
    assert {f"two/{digests[1]}.zip"} == {one["Key"] for one in account.s3.list_objects_v2(Bucket=bucket)["Contents"]}
    down(account, "two", data=True)
    assert {} == everything(account)


def test_bucket_of_ones_own_for_code(account: Account) -> None:
    """A bucket that is brought for code keeps all that is not ours, and later changes use it unasked."""
    account.s3.create_bucket(Bucket=f"mine-{account.number}")
    for key in ("x", "one/notes.txt", f"two/{'0' * 64}.zip"):
        account.s3.put_object(Bucket=f"mine-{account.number}", Key=key, Body=b"precious")
    before = everything(account)
    put(account, code_bucket=f"mine-{account.number}")
    put(account, code=zipped("newer"))
    keys = {one["Key"] for one in account.s3.list_objects_v2(Bucket=f"mine-{account.number}")["Contents"]}
    assert {"x", "one/notes.txt", f"two/{'0' * 64}.zip", f"one/{hashlib.sha256(zipped('newer')).hexdigest()}.zip"} == keys
    down(account, data=True)
    assert before == everything(account)


def test_bucket_that_another_account_has_made(enter: Callable[[], Account], door: FrontDoor) -> None:
    """Code goes into no bucket of another account, however open that is, and every request to S3 says whose the bucket must be."""
    name = f"gradsharding-code-{next_account[0] + 1:012}-us-east-1"
    thief = enter()
    everybody = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]}
    thief.s3.create_bucket(Bucket=name)
    thief.s3.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [everybody]}))
    before = everything(thief)
    account = enter()
    assert name == own_bucket(account)
    door.seen.clear()

    for bucket in (None, name):
        with pytest.raises(StoreRefused, match=f"bucket {name}: it is not account {account.number}'s.*--code-bucket"):
            up(account, code_bucket=bucket)
    account.s3.create_bucket(Bucket=f"mine-{account.number}")
    put(account, code_bucket=f"mine-{account.number}")
    checked(account, put(account, code_bucket=f"mine-{account.number}"))
    down(account, data=True)
    asked = [one for one in door.seen if one.service == "s3" and one.account == account.number]
    unnamed = {one.action for one in asked if one.owner != account.number}
    assert {f"PUT /mine-{account.number}", "GET /"} == unnamed  # makes a bucket, lists buckets: S3 takes no owner there
    assert len(asked) > 20
    monkey = everything(enter_again(thief))
    assert before == monkey


def enter_again(account: Account) -> Account:
    """Give the clients that an account has; those that are made by the way take its number from the environment."""
    os.environ["AWS_ACCESS_KEY_ID"] = account.number
    return account


def test_code_that_was_changed(account: Account) -> None:
    """Code is pinned: other bytes in its place are refused, and a function that runs other code is found out."""
    stack = put(account)
    bucket, key = own_bucket(account), f"one/{hashlib.sha256(zipped('newer')).hexdigest()}.zip"
    account.s3.put_object(Bucket=bucket, Key=key, Body=zipped("evil"))
    with pytest.raises(
        UserError, match=f"s3://{bucket}/{key} holds other code: its SHA-256 is {hashlib.sha256(zipped('evil')).hexdigest()}"
    ):
        up(account, code=zipped("newer"))
    assert [] == drift(account, stack)
    account.functions.update_function_code(FunctionName="one", ZipFile=zipped("evil"))
    (found,) = missing(account, stack)
    assert found.problem.startswith("Function (AWS::Lambda::Function one) runs other code (SHA-256 ")


# --- what is there, and what went wrong --------------------------------------------------------------------------------------------------


def test_status(account: Account, command: Any) -> None:
    """Status shows where a stack is, its state, outputs and parameters, and ends with 0 only if all of it is there."""
    assert "deploy it with: gradsharding deploy --name one" in command("status", "--name", "one").stderr
    stack = put(account, parameters={"Memory": "1024"})
    well = command("status", "--name", "one")
    assert 0 == well.returncode, well
    assert f"stack one in account {account.number}, region us-east-1: CREATE_COMPLETE" in well.stdout
    assert f"Bucket               {stack.outputs['Bucket']}" in well.stdout
    assert "Memory               1024" in well.stdout
    assert "all of it is there, and as it was deployed" in well.stdout

    account.s3.delete_bucket(Bucket=stack.outputs["Bucket"])
    account.alarms.delete_alarms(AlarmNames=[one.physical for one in account.resources(stack) if one.logical == "ErrorsAlarm"])
    ill = command("status", "--name", "one")
    assert 1 == ill.returncode
    wrong = [line for line in ill.stdout.splitlines() if line.startswith("wrong: ")]
    assert ["Bucket", "ErrorsAlarm"] == sorted(line.split()[1] for line in wrong if "is gone" in line)
    assert all("gradsharding destroy --name one" in line for line in wrong)
    for words in (["deploy", "--yes"], ["smoke"]):
        said = command(*words, "--name", "one")
        assert 1 == said.returncode
        assert f"Bucket (AWS::S3::Bucket {stack.outputs['Bucket']}) is gone" in said.stderr
        assert "Try it" not in said.stdout
    assert 0 == command("destroy", "--name", "one", "--yes", "--delete-data").returncode
    assert {} == everything(account)


def test_bucket_that_another_account_has_now(enter: Callable[[], Account]) -> None:
    """A bucket that was deleted, and made again by another account, counts as gone, and is not deleted with the stack."""
    account = enter()
    stack = put(account)
    bucket = stack.outputs["Bucket"]
    account.s3.delete_bucket(Bucket=bucket)
    thief = enter()
    everybody = {"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]}
    thief.s3.create_bucket(Bucket=bucket)
    thief.s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [everybody]}))
    before = everything(thief)
    enter_again(account)

    said = f"Bucket (AWS::S3::Bucket {bucket}) is another account's, or closed to these credentials"
    assert [said] == [one.problem for one in missing(account, stack)]
    down(account, data=True)
    assert {} == everything(account)
    assert before == everything(enter_again(thief))


def test_bucket_that_was_brought(account: Account) -> None:
    """A bucket that was brought is never deleted, whatever is asked for; if it is gone, that is said."""
    account.s3.create_bucket(Bucket=f"mine-{account.number}")
    account.s3.put_object(Bucket=f"mine-{account.number}", Key="x", Body=b"precious")
    before = everything(account)
    checked(account, put(account, parameters={"ExistingBucket": f"mine-{account.number}"}))
    assert ([], []) == doomed(account, "one", lambda _: None)[2:4]
    down(account, data=True)
    down(account, data=True)
    assert before == everything(account)

    stack = put(account, parameters={"ExistingBucket": f"mine-{account.number}"})
    account.s3.delete_object(Bucket=f"mine-{account.number}", Key="x")
    account.s3.delete_bucket(Bucket=f"mine-{account.number}")
    assert [f"bucket mine-{account.number}, which the stack was given, is gone"] == [one.problem for one in missing(account, stack)]


def test_what_is_deleted_is_said(account: Account, command: Any) -> None:
    """After deploy it is said when rounds are deleted: by the template's rule; of a bucket that was brought, only its own rules say."""
    account.s3.create_bucket(Bucket=f"mine-{account.number}")
    made = command("deploy", "--name", "one", "--expire-days", "3", "--yes")
    brought = command("deploy", "--name", "two", "--bucket", f"mine-{account.number}", "--yes")

    assert (0, 0) == (made.returncode, brought.returncode)
    assert " ".join(made.stdout.split()).endswith("; rounds are deleted after 3 days, results stay.")
    told = f"; objects in mine-{account.number} are deleted by its own rules; deploy/README.md has the rules that rounds need."
    assert " ".join(brought.stdout.split()).endswith(told)
    assert "rounds are deleted" not in brought.stdout


def test_reason_of_this_failure(account: Account) -> None:
    """A failed change gives the reason of this change, not of an earlier one, and the stack is as it was before."""
    reasons = []
    for text in ("first", "second"):
        put(account)

        def lose(_: list[Change]) -> bool:
            for one in account.s3.list_object_versions(Bucket=own_bucket(account))["Versions"]:
                account.s3.delete_object(Bucket=own_bucket(account), Key=one["Key"], VersionId=one["VersionId"])
            return True

        with pytest.raises(
            StackFailed, match=r"stack one in .* is UPDATE_ROLLBACK_COMPLETE: Function: .*; it is as it was before"
        ) as failed:
            up(account, agree=lose, code=zipped(text))
        reasons.append(failed.value.message)
    assert hashlib.sha256(zipped("second")).hexdigest() in reasons[1]
    assert hashlib.sha256(zipped("first")).hexdigest() not in reasons[1]


def test_stack_that_could_not_be_made(enter: Callable[[], Account], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack whose making failed leaves no bucket; the same command makes it, once the reason is gone."""
    other = enter()
    other.s3.create_bucket(Bucket=f"taken-{other.number}")
    account = enter()
    blocked = (
        f"\nResources:\n  Taken:\n    Type: AWS::S3::Bucket\n    DependsOn: Bucket\n    Properties: {{BucketName: taken-{other.number}}}\n"
    )
    (tmp_path / "template.yaml").write_text(template().replace("\nResources:\n", blocked, 1))
    with monkeypatch.context() as patch:
        patch.setattr("gradsharding.aws.deploy.stack.TEMPLATES", (tmp_path / "template.yaml",))
        with pytest.raises(StackFailed, match=r"stack one in .* is ROLLBACK_COMPLETE: Taken: .*; nothing of it is left"):
            up(account)
    assert [own_bucket(account)] == [bucket["Name"] for bucket in account.s3.list_buckets()["Buckets"]]
    assert put(account).works


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("UPDATE_ROLLBACK_FAILED", "aws cloudformation continue-update-rollback --stack-name one"),
        ("UPDATE_FAILED", "aws cloudformation rollback-stack --stack-name one"),
        ("DELETE_FAILED", "gradsharding destroy --name one"),
        ("ROLLBACK_FAILED", "gradsharding destroy --name one"),
        ("ROLLBACK_COMPLETE", "gradsharding deploy --name one"),
        ("UPDATE_IN_PROGRESS", "wait until that has ended"),
    ],
)
def test_remedies(state: str, said: str) -> None:
    """Each state that a stack can be stuck in has its remedy, and none that would delete data."""
    told = remedy(Stack("one", "arn", state, {}, {}, {}, protected=False))
    assert said in told
    assert "--delete-data" not in told


# --- at random -------------------------------------------------------------------------------------------------------------------------

CASES = 100
"""Names that are tried."""

ADDED = "added-to-ours-"
"""What the names of buckets begin with that are added to stacks of ours."""


def _stack(account: Account, name: str, draw: random.Random, **tags: str) -> None:
    """Make a foreign stack with things in it, in one of several states, perhaps marked as ours are."""
    body = json.loads(json.dumps(OTHERS))
    if TAG not in tags and draw.random() < 0.5:
        body["Metadata"] = {"Gradsharding": {"Format": 1}}  # the marker without the tag
    if draw.random() < 0.3:
        body["Outputs"]["Bucket"]["Value"] = body["Outputs"]["Store"]["Value"] = f"precious-{account.number}"  # outside the stack
    foreign(account, name, body, tags)
    stack = account.look_up(name)
    assert stack
    for bucket in account.buckets(stack):
        account.s3.put_object(Bucket=bucket, Key=f"{name}/{'0' * 64}.zip", Body=draw.randbytes(50))
    for one in account.resources(stack):
        if one.type == "AWS::DynamoDB::Table":
            boto3.session.Session().client("dynamodb").put_item(TableName=one.physical, Item={"id": {"S": str(draw.random())}})
    if draw.random() < 0.3:  # a change that fails, and is rolled back
        body["Resources"]["Taken"] = {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": "taken-by-another"}}
        account.formation.update_stack(StackName=name, TemplateBody=json.dumps(body))
        account.settled(account.look_up(name) or stack, lambda _: None)


def _failed(account: Account, name: str, draw: random.Random) -> None:
    """Make a foreign stack that could not be made: what it has of resources, it keeps."""
    body = {"Resources": {**OTHERS["Resources"], "Taken": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": "taken-by-another"}}}}  # type: ignore[dict-item]
    made = account.formation.create_stack(StackName=name, TemplateBody=json.dumps(body), OnFailure=draw.choice(["ROLLBACK", "DO_NOTHING"]))
    assert not account.settled(account.look_up(made["StackId"]) or pytest.fail("there is no stack"), lambda _: None).works


def _prepared(account: Account, name: str, _: random.Random) -> None:
    account.formation.create_change_set(StackName=name, ChangeSetName="theirs", ChangeSetType="CREATE", TemplateBody=json.dumps(OTHERS))


def _function(account: Account, name: str, draw: random.Random) -> None:
    role = f"arn:aws:iam::{account.number}:role/x"
    account.functions.create_function(
        FunctionName=name, Role=role, Runtime="python3.13", Handler="a.b", Code={"ZipFile": zipped(str(draw.random()))}
    )


def _log(account: Account, name: str, draw: random.Random) -> None:
    group = f"/aws/lambda/{name}"
    account.logs.create_log_group(logGroupName=group)
    account.logs.create_log_stream(logGroupName=group, logStreamName="a")
    event = {"timestamp": int(time.time() * 1000), "message": str(draw.random())}
    account.logs.put_log_events(logGroupName=group, logStreamName="a", logEvents=[event])  # type: ignore[list-item]


def _bucket(account: Account, name: str, draw: random.Random) -> None:
    """Make a bucket that is called as our stack's would be, perhaps with our tag, and its own or another stack's name."""
    bucket = f"{name.lower()}-bucket-{draw.randrange(10**9)}"
    account.s3.create_bucket(Bucket=bucket)
    account.s3.put_object(Bucket=bucket, Key="gradsharding/x", Body=draw.randbytes(50))
    if draw.random() < 0.7:
        account.s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": TAG, "Value": f"{name}{draw.choice(['', 'x'])}"}]})


def _data(account: Account, name: str, draw: random.Random) -> None:
    """Make a stack of another name with buckets that carry our tag, as CloudFormation gives a stack's tags to them."""
    foreign(account, f"{name}-data", tags={TAG: name})
    for bucket in account.buckets(account.look_up(f"{name}-data") or pytest.fail("there is no stack")):
        account.s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": TAG, "Value": name}]})
        account.s3.put_object(Bucket=bucket, Key="gradsharding/x", Body=draw.randbytes(50))


def _brought(account: Account, name: str, draw: random.Random) -> None:
    """Leave a bucket behind, and give it to another stack of ours, which is up: both are the user's."""
    bucket = put(account, name).outputs["Bucket"]
    account.s3.put_object(Bucket=bucket, Key="gradsharding/x", Body=draw.randbytes(50))
    down(account, name)
    put(account, f"{name}-again", parameters={"ExistingBucket": bucket})


def add_bucket(account: Account, name: str, bucket: str) -> None:
    """Add a bucket to a stack of ours, as its owner may: it is to stay."""
    body = str(account.template(account.find(name) or pytest.fail("there is no stack")))
    added = f"\nResources:\n  Precious:\n    Type: AWS::S3::Bucket\n    DeletionPolicy: Retain\n    Properties: {{BucketName: {bucket}}}\n"
    account.formation.update_stack(
        StackName=name, TemplateBody=body.replace("\nResources:\n", added, 1), Tags=[{"Key": TAG, "Value": name}],
        Capabilities=["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"],
    )  # fmt: skip
    account.formation.get_waiter("stack_update_complete").wait(StackName=name, WaiterConfig={"Delay": 1})


def _added(account: Account, name: str, draw: random.Random) -> None:
    """Put up a stack of ours, and add a bucket to it: only that is the user's."""
    put(account, name)
    add_bucket(account, name, bucket := f"{ADDED}{draw.randrange(10**12)}")
    account.s3.put_object(Bucket=bucket, Key="gradsharding/x", Body=draw.randbytes(50))


def _outside_code(account: Account, name: str, draw: random.Random) -> None:
    """Put other things than code where our code would lie."""
    with contextlib.suppress(account.s3.exceptions.BucketAlreadyOwnedByYou):
        account.s3.create_bucket(Bucket=own_bucket(account))
    account.s3.put_object(Bucket=own_bucket(account), Key=f"{name}/notes", Body=draw.randbytes(50))
    account.s3.put_object(Bucket=own_bucket(account), Key=f"{name}x/{'0' * 64}.zip", Body=draw.randbytes(50))


def _is_of(thing: str, name: str) -> bool:
    """Whether what ``everything`` calls so is our stack's of that name, or the bucket of our code, which goes with the last stack."""
    return bool(re.search(rf"[ /]{name}(?=$|/|-Role-)|[ /]{name.lower()}-bucket-| gradsharding-code-\d+-[^/]*$", thing))


@pytest.mark.slow
def test_nothing_foreign_is_lost(enter: Callable[[], Account]) -> None:  # noqa: C901 - one story
    """Of the things that others have under 100 random names, in random states, none is changed or lost by deploy and destroy."""
    seed = random.randrange(1 << 32)
    draw, thief = random.Random(seed), enter()
    thief.s3.create_bucket(Bucket="taken-by-another")
    accounts = [enter() for _ in range(5)]
    squatted = own_bucket(accounts[0])
    enter_again(thief)
    everybody = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [f"arn:aws:s3:::{squatted}", f"arn:aws:s3:::{squatted}/*"],
    }
    thief.s3.create_bucket(Bucket=squatted)
    thief.s3.put_bucket_policy(Bucket=squatted, Policy=json.dumps({"Version": "2012-10-17", "Statement": [everybody]}))
    thief.s3.put_object(Bucket=squatted, Key="x", Body=b"bait")
    kinds: dict[str, Callable[[Account, str, random.Random], None]] = {
        "stack": _stack,
        "stack with our tag": lambda account, name, draw: _stack(account, name, draw, **{TAG: name}),
        "stack with another's tag": lambda account, name, draw: _stack(account, name, draw, **{TAG: f"{name}x"}),
        "failed stack": _failed, "prepared stack": _prepared, "function": _function, "log": _log, "bucket": _bucket, "code": _outside_code,
        "stack with tagged data": _data, "brought bucket": _brought, "bucket in our stack": _added,
    }  # fmt: skip
    cases = list[tuple[Account, str, str]]()
    for account in accounts:
        enter_again(account)
        account.s3.create_bucket(Bucket=f"precious-{account.number}")
        account.s3.put_object(Bucket=f"precious-{account.number}", Key="x", Body=b"precious")
        for i in range(CASES // len(accounts)):
            name = draw.choice("abcdXYZ") + "".join(draw.choices("abcXYZ019-", k=draw.randrange(1, 30))) + str(i)
            kind = draw.choice(
                [one for one in kinds if one not in ("code", "brought bucket", "bucket in our stack") or account is not accounts[0]]
            )
            kinds[kind](account, name, draw)
            cases.append((account, name, kind))
    before = {account: everything(enter_again(account)) for account in (*accounts, thief)}
    ours = {name for _, name, kind in cases if kind == "bucket in our stack"}
    for account in accounts:
        was = before[account]
        for thing in [one for one in was if ADDED not in one and any(_is_of(one, name) for name in ours)]:
            del was[thing]

    draw.shuffle(cases)
    ended = Counter[tuple[str, str]]()
    for account, name, kind in cases:
        enter_again(account)
        for doing in draw.sample(["up", "down", "down with data"], 3):
            try:
                if doing == "up":
                    up(account, name, adopt=draw.random() < 0.5, agree=lambda _: draw.random() < 0.7)
                else:
                    down(account, name, data="data" in doing)
            except UserError:
                ended[kind, "refused"] += 1
            else:
                ended[kind, "done"] += 1
    for account, name, _ in cases:  # what could be put up beside foreign things is ours, and goes again
        enter_again(account)
        with contextlib.suppress(UserError):
            down(account, name, data=True)
            down(account, name, data=True)
    losses, left = list[str](), list[str]()
    for account, was in before.items():
        now = everything(enter_again(account))
        losses += [name for name, value in was.items() if now.get(name) != value]
        left += now.keys() - was.keys()
    print(f"{len(cases)} names, {sum(map(len, before.values()))} foreign things, {len(losses)} losses; seed {seed}; {dict(ended)}")  # noqa: T201 - pytest -s
    assert [] == losses, seed
    assert [] == [one for one in left if own_bucket(accounts[0])[:17] not in one]
    assert {kind for _, _, kind in cases} == {kind for kind, _ in ended}
    assert not {("stack", "done"), ("stack with our tag", "done"), ("stack with another's tag", "done"), ("prepared stack", "done")} & {
        *ended
    }


# --- interrupted -----------------------------------------------------------------------------------------------------------------------

HERE = {
    "Architecture": {"aarch64": "arm64"}.get(os.uname().machine, os.uname().machine),
    "Runtime": f"python{sys.version_info.major}.{sys.version_info.minor}",
}
"""What functions of this machine run on."""

INTERRUPTED = {
    "deploy": (["deploy", "--name", "one", "--yes", "--architecture", HERE["Architecture"], "--runtime", HERE["Runtime"]], 6),
    "smoke": (["smoke", "--name", "one"], 1),
    "aggregate": (["aggregate", "{store}/in/a.safetensors:120", "{store}/in/b.safetensors:80", "-o", "{store}/results/mean.safetensors",
                   "--executor", "lambda:one"], 1),
    "change": (["deploy", "--name", "one", "--yes", "--memory", "1024"], 4),
    "second": (["deploy", "--name", "two", "--yes", "--architecture", HERE["Architecture"], "--runtime", HERE["Runtime"]], 2),
    "destroy": (["destroy", "--name", "one", "--yes"], 3),
    "destroy with data": (["destroy", "--name", "one", "--yes", "--delete-data"], 3),
}  # fmt: skip
"""Commands, and at how many of their requests each is interrupted: 20 in all."""

UPDATES = {"a": ({"w": np.array([1, 2], "f4")}, 120), "b": ({"w": np.array([5, 7], "f4")}, 80)}


@pytest.fixture
def built(doing: str) -> bytes:
    """Give the code that a command deploys: the real one where functions run, elsewhere one that is soon uploaded."""
    return _real_code() if doing in ("smoke", "aggregate") else CODE


@cache
def _real_code() -> bytes:
    return build_zip(HERE["Architecture"], HERE["Runtime"], lambda _: None)


class Run(NamedTuple):
    """A command that was run: how it ended, what it said, and how many requests it made."""

    status: int
    said: str
    requests: int


def run(door: FrontDoor, account: Account, code: Path, words: list[str], stop: Callable[[int], Stop] | None = None) -> Run:
    """Run a command in an account, perhaps up to a certain request."""
    environment = {**os.environ, **door.environment(account.number)}
    before = len(door.seen)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, code, *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    door.stop = stop(process.pid) if stop else None
    said, _ = process.communicate(timeout=300)
    door.stop = None
    return Run(process.returncode, said, sum(one.account == account.number for one in door.seen[before:]))


def prepared(enter: Callable[[], Account], doing: str, built: bytes) -> tuple[Account, str]:
    """Enter an account in which a command finds what it needs; give the store, too."""
    account = enter()
    if doing == "deploy":
        return account, ""
    stack = put(account, code=built, parameters=HERE)
    for client, (arrays, _) in UPDATES.items():
        account.s3.put_object(Bucket=stack.outputs["Bucket"], Key=f"gradsharding/in/{client}.safetensors", Body=b"".join(encode(arrays)[1]))
    return account, stack.outputs["Store"]


def check_done(account: Account, doing: str, store: str) -> None:
    """See that all is as an uninterrupted command leaves it."""
    there = everything(account)
    if doing == "destroy with data":
        assert {} == there
        return
    if doing == "destroy":
        assert {"bucket", "object", "get_bucket_tagging", "get_bucket_policy"} >= {name.split()[0] for name in there}
        assert 1 == sum(name.startswith("bucket ") for name in there)
        assert 2 == sum("/gradsharding/in/" in name for name in there)
        return
    stack = account.find("two" if doing == "second" else "one")
    assert stack
    assert [] == drift(account, stack)
    assert stack.parameters["Memory"] == ("1024" if doing == "change" else "512")
    names = {"one", "two"} if doing == "second" else {"one"}
    assert names == {name.split("/")[1] for name in there if name.startswith("stack ")}
    assert names == {name.split()[1] for name in there if name.startswith("function ")}
    assert len(names) == sum(name.startswith(f"object {own_bucket(account)}/") for name in there)
    if doing == "aggregate":
        assert_same(reference_mean(UPDATES), load("results/mean.safetensors", open_store(store)))


@pytest.mark.slow
@pytest.mark.parametrize("doing", INTERRUPTED)
def test_interrupted(door: FrontDoor, enter: Callable[[], Account], built: bytes, tmp_path: Path, doing: str) -> None:
    """However a command is interrupted, by Ctrl-C or kill -9, running it again does what it was to do; Ctrl-C says so."""
    code = tmp_path / "code.zip"
    code.write_bytes(built)
    command, points = INTERRUPTED[doing]
    account, store = prepared(enter, doing, built)
    whole = run(door, account, code, [word.format(store=store) for word in command])
    assert 0 == whole.status, whole.said
    check_done(account, doing, store)
    for i in range(points):
        account, store = prepared(enter, doing, built)
        words = [word.format(store=store) for word in command]
        number = 1 + (whole.requests - 1) * (i + 1) // (points + 1)
        how = (signal.SIGINT, signal.SIGKILL)[(i + (doing == "aggregate")) % 2]
        stopped = run(door, account, code, words, lambda pid: Stop(pid, number, how, answered=i % 4 > 1))  # noqa: B023 - called at once
        print(f"{doing}: {how.name} at request {number} of {whole.requests}: {stopped.said.splitlines()[-3:-1]}")  # noqa: T201 - pytest -s
        assert {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how] == stopped.status, stopped.said
        if how == signal.SIGINT and doing not in ("smoke", "aggregate"):
            assert "; run the same command again to go on" in stopped.said
        before = len(door.seen)
        again = run(door, account, code, words)
        assert 0 == again.status, again.said
        if doing == "smoke":
            assert {account.number} == {one.owner for one in door.seen[before:] if one.service == "s3" and one.account == account.number}
        check_done(account, doing, store)
