"""Destroy empties the bucket that our template made, and no other: not one that was brought, added, or tagged as ours are."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from gradsharding.aws.deploy.account import TAG, Account
from gradsharding.aws.deploy.drift import missing
from gradsharding.aws.deploy.teardown import doomed, take_down
from gradsharding.errors import StackFailed, UserError
from rigs.frontdoor import FrontDoor
from test_stack import CODE, OTHERS, account, add_bucket, command, door, down, enter, enter_again, everything, foreign, put, zipped

__all__ = ["account", "command", "door", "enter"]


def fill(account: Account, *buckets: str) -> None:
    """Put something precious into buckets."""
    for bucket in buckets:
        account.s3.put_object(Bucket=bucket, Key="gradsharding/x", Body=b"precious")


def tagged(account: Account, bucket: str) -> dict[str, str]:
    """Give the tags of a bucket."""
    try:
        return {tag["Key"]: tag["Value"] for tag in account.s3.get_bucket_tagging(Bucket=bucket)["TagSet"]}
    except account.s3.exceptions.ClientError:
        return {}


def test_bucket_that_is_brought_back(account: Account, command: Any) -> None:
    """A bucket that a destroyed stack left, and another stack was given, is the user's: no destroy of either deletes it."""
    bucket = put(account).outputs["Bucket"]
    fill(account, bucket)
    down(account)
    put(account, "two", parameters={"ExistingBucket": bucket})
    assert TAG not in tagged(account, bucket)

    for name in ("one", "two", "one", "two"):
        assert 0 == command("destroy", "--name", name, "--delete-data", "--yes").returncode
    put(account, parameters={"ExistingBucket": bucket})
    for _ in range(2):
        assert 0 == command("destroy", "--name", "one", "--delete-data", "--yes").returncode
    assert b"precious" == account.s3.get_object(Bucket=bucket, Key="gradsharding/x")["Body"].read()


def test_bucket_that_a_live_stack_was_given(account: Account) -> None:
    """A bucket that a stack of the region has been given is not taken for a leftover, even if it carries our tag."""
    bucket = put(account).outputs["Bucket"]
    fill(account, bucket)
    down(account)
    body = {**OTHERS, "Parameters": {"ExistingBucket": {"Type": "String", "Default": bucket}}}
    foreign(account, "theirs", body)
    before = everything(account)
    assert [] == doomed(account, "one", lambda _: None).buckets
    down(account, data=True)
    assert before == everything(account)


@pytest.mark.parametrize("by", ["hand", "their stack", "another of our stacks"])
def test_bucket_with_our_tag(account: Account, by: str) -> None:
    """A bucket that carries our tag, but was not made by our template for a stack of that name, is never deleted."""
    tag: Any = {"TagSet": [{"Key": TAG, "Value": "one"}, {"Key": "team", "Value": "blue"}]}
    match by:
        case "hand":
            account.s3.create_bucket(Bucket=(bucket := f"one-bucket-{account.number}"))
        case "their stack":
            foreign(account, "one-data", tags={TAG: "one"})
            (bucket,) = account.buckets(account.look_up("one-data") or pytest.fail("there is no stack"))
        case _:
            bucket = put(account, "one-more").outputs["Bucket"]
    account.s3.put_bucket_tagging(Bucket=bucket, Tagging=tag)  # CloudFormation gives a stack's tags to its buckets; ministack does not
    fill(account, bucket)
    put(account)
    assert [] == doomed(account, "one", lambda _: None).earlier
    for _ in range(2):
        down(account, data=True)
    assert b"precious" == account.s3.get_object(Bucket=bucket, Key="gradsharding/x")["Body"].read()
    assert {"team": "blue", TAG: "one"} == tagged(account, bucket)


@pytest.mark.parametrize(("stack", "logical", "ours"), [("one", "Bucket", True), ("one-data", "Bucket", False), ("one", "Precious", False)])
def test_tags_of_cloudformation(account: Account, *, stack: str, logical: str, ours: bool) -> None:
    """Where CloudFormation's own tags are on a bucket, they say which stack and resource it was, also when the stack is forgotten."""
    account.s3.create_bucket(Bucket=(bucket := f"one-bucket-{account.number}"))
    tags = {TAG: "one", "aws:cloudformation:stack-name": stack, "aws:cloudformation:logical-id": logical}
    account.s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": key, "Value": value} for key, value in tags.items()]})
    assert ([bucket] if ours else []) == [one.name for one in doomed(account, "one", lambda _: None).buckets]


def test_bucket_that_was_added(account: Account, command: Any) -> None:
    """A bucket that was added to our stack is what the stack does with it: it is neither emptied nor tagged nor counted as data."""
    put(account)
    add_bucket(account, "one", bucket := f"precious-{account.number}")
    fill(account, bucket)
    what = doomed(account, "one", lambda _: None)
    assert [True] == [one.name.startswith("one-bucket-") for one in what.buckets]
    assert bucket in [one.physical for one in what.resources]
    gone = command("destroy", "--name", "one", "--delete-data", "--yes")
    assert f" keep Precious AWS::S3::Bucket {bucket} " in " ".join(gone.stdout.split())
    assert "delete  Log " in gone.stdout
    assert {f"bucket {bucket}", f"object {bucket}/gradsharding/x null"} == {*everything(account)}
    assert {} == tagged(account, bucket)


@pytest.mark.parametrize("change", ["add", "replace"])
def test_stack_that_changes_at_the_question(account: Account, change: str) -> None:
    """What was added to a stack, or took its name, after it was shown, is not deleted: nobody has agreed to that."""
    put(account)
    what = doomed(account, "one", lambda _: None)
    if change == "add":
        add_bucket(account, "one", f"precious-{account.number}")
    else:
        down(account)
        put(account)
    before = everything(account)
    with pytest.raises(StackFailed, match="was changed by another command since it was shown; nothing was deleted, run this again"):
        take_down(account, "one", what, data=True, tell=lambda _: None)
    assert before == everything(account)


@pytest.mark.parametrize(("closed", "stands"), [("HEAD /{}", True), ("GET /{}?tagging", True), ("GET /{}?tagging", False)])
def test_bucket_that_cannot_be_looked_into(account: Account, door: FrontDoor, command: Any, closed: str, *, stands: bool) -> None:
    """A bucket that is there, and closed to these credentials, is named as left; with --delete-data nothing is deleted at all."""
    bucket = put(account).outputs["Bucket"]
    fill(account, bucket)
    if not stands:
        down(account)
    before = everything(account)
    door.closed.add(closed.format(bucket))
    refused = command("destroy", "--name", "one", "--delete-data", "--yes")
    assert 2 == refused.returncode
    assert f"bucket {bucket} may hold data of stack one, and these credentials may not read it; nothing was deleted" in refused.stderr
    door.closed.clear()
    assert before == everything(account)

    door.closed.add(closed.format(bucket))
    gone = command("destroy", "--name", "one", "--yes")
    door.closed.clear()
    assert 0 == gone.returncode, gone.stderr
    assert f"left: bucket {bucket}, which these credentials may not read: it may hold data of this stack" in gone.stdout
    assert "nothing that is billed is left" not in gone.stdout
    assert b"precious" == account.s3.get_object(Bucket=bucket, Key="gradsharding/x")["Body"].read()


def test_brought_bucket_is_named_as_left(account: Account, command: Any) -> None:
    """Destroy says that a bucket which was brought is left, with all that lies in it."""
    account.s3.create_bucket(Bucket=f"mine-{account.number}")
    put(account, parameters={"ExistingBucket": f"mine-{account.number}"})
    for _ in range(2):
        gone = command("destroy", "--name", "one", "--delete-data", "--yes")
        assert f"left: bucket mine-{account.number}, which the stack was given, with its objects" in gone.stdout
        assert "nothing that is billed is left" not in gone.stdout


def test_s3_of_another_server(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where S3 is asked on another server than CloudFormation, no bucket counts as gone: the account refuses, with both names."""
    assert account.find("one") is None
    for elsewhere in ("http://minio.example:9000", "https://s3.us-east-1.amazonaws.com"):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", elsewhere)
        with pytest.raises(UserError, match=f"S3 requests go to {elsewhere.split('/')[2].split(':')[0]}, and CloudFormation at 127.0.0.1"):
            Account()


def test_code_bucket_that_is_lost(enter: Callable[[], Account], command: Any) -> None:
    """Destroy ends although the bucket of the code is another account's by now, and says that code was left there."""
    account = enter()
    account.s3.create_bucket(Bucket=(bucket := f"mine-{account.number}"))
    put(account, code_bucket=bucket)
    for one in account.s3.list_objects_v2(Bucket=bucket)["Contents"]:
        account.s3.delete_object(Bucket=bucket, Key=one["Key"])
    account.s3.delete_bucket(Bucket=bucket)
    thief = enter()
    thief.s3.create_bucket(Bucket=bucket)
    before = everything(thief)
    enter_again(account)
    for _ in range(2):
        gone = command("destroy", "--name", "one", "--yes", "--delete-data")
        assert 0 == gone.returncode, gone.stderr
        assert "stack one in account" in gone.stdout
        assert f"left: code in bucket {bucket}, which is another account's by now, or closed to these credentials (" in gone.stdout
    assert {} == everything(account)
    assert before == everything(enter_again(thief))


@pytest.mark.parametrize("versioned", [False, True])
def test_code_of_others_in_a_brought_bucket(account: Account, *, versioned: bool) -> None:
    """What is called as our code is, in a bucket that was brought, is the user's unless we wrote it: no version of it is deleted."""
    account.s3.create_bucket(Bucket=(bucket := f"mine-{account.number}"))
    if versioned:
        account.s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for text in ("older", "newer"):
        account.s3.put_object(Bucket=bucket, Key=f"one/{'0' * 64}.zip", Body=text.encode())
    same = f"one/{hashlib.sha256(CODE).hexdigest()}.zip"
    account.s3.put_object(Bucket=bucket, Key=same, Body=CODE)
    before = everything(account)
    put(account, code_bucket=bucket)
    put(account, code=zipped("newer"))
    put(account, code=zipped("newest"))
    down(account, data=True)
    assert before == everything(account)


def test_code_that_a_foreign_deleted_stack_names(account: Account) -> None:
    """What the template of a deleted stack names is deleted only if that stack was ours, by tag and by marker."""
    account.s3.create_bucket(Bucket=(bucket := f"mine-{account.number}"))
    key = f"one/{'0' * 64}.zip"
    account.s3.put_object(Bucket=bucket, Key=key, Body=b"precious", Metadata={TAG: "one"})
    foreign(
        account, "one", {"Resources": {"Log": {"Type": "AWS::Logs::LogGroup"}}, "Metadata": {"Code": f"s3://{bucket}/{key}"}}, {TAG: "one"}
    )
    account.formation.delete_stack(StackName="one")
    account.formation.get_waiter("stack_delete_complete").wait(StackName="one", WaiterConfig={"Delay": 1})
    before = everything(account)
    assert 0 == down(account, data=True)
    assert before == everything(account)


@pytest.mark.parametrize("case", ["made", "brought", "lost"])
def test_advice_keeps_the_data_in_sight(account: Account, command: Any, case: str) -> None:
    """What is gone comes back by a destroy and a deploy that are given with the bucket's name, so that the stack goes on with its data."""
    brought = f"mine-{account.number}"
    if case == "brought":
        account.s3.create_bucket(Bucket=brought)
    stack = put(account, parameters={"ExistingBucket": brought} if case == "brought" else {})
    bucket = brought if case == "brought" else stack.outputs["Bucket"]
    account.alarms.delete_alarms(AlarmNames=[one.physical for one in account.resources(stack) if one.logical == "ErrorsAlarm"])
    if case == "lost":
        account.s3.delete_bucket(Bucket=bucket)
    else:
        fill(account, bucket)
    said = {one.problem.split()[0]: one.remedy for one in missing(account, stack)}["ErrorsAlarm"]
    assert said.startswith("rounds run without it; ")
    assert (case != "lost") == (f"gradsharding deploy --name one --bucket {bucket} " in said)
    if case == "lost":
        return
    assert 0 == command("destroy", "--name", "one", "--yes").returncode
    assert 0 == command("deploy", "--name", "one", "--bucket", bucket, "--yes").returncode
    assert [] == missing(account, account.find("one") or pytest.fail("there is no stack"))
    down(account, data=True)
    down(account, data=True)
    assert b"precious" == account.s3.get_object(Bucket=bucket, Key="gradsharding/x")["Body"].read()
