"""While a command builds, waits and asks, others change the same account: what is acted on is what is there now, and what was agreed to."""

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from gradsharding.aws.deploy.account import TAG, Account
from gradsharding.aws.deploy.code import own_bucket
from gradsharding.aws.deploy.drift import checked, drift, missing
from gradsharding.aws.deploy.stack import Change, Order, put_up
from gradsharding.errors import GradShardingError, StackFailed, UserError
from test_stack import CODE, OTHERS, account, door, down, enter, everything, foreign, put, up, yes, zipped

__all__ = ["account", "door", "enter"]  # pytest finds fixtures by their names here


def prepare(account: Account, name: str, change: str = "theirs", **tags: str) -> str:
    """Prepare a stack as others do; give the ARN of the change set."""
    made = account.formation.create_change_set(
        StackName=name,
        ChangeSetName=change,
        ChangeSetType="CREATE",
        TemplateBody=json.dumps(OTHERS),
        Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
    )
    return made["Id"]


def test_no_leaves_what_a_colleague_has_run(account: Account) -> None:
    """Who answers no, after a colleague has run the very change set that is asked about, leaves the stack that is live by then."""

    def colleague(_: list[Change]) -> bool:
        (change,) = account.formation.list_change_sets(StackName="one")["Summaries"]
        account.formation.execute_change_set(ChangeSetName=change["ChangeSetId"])
        account.formation.get_waiter("stack_create_complete").wait(StackName="one", WaiterConfig={"Delay": 1})
        return False

    assert up(account, agree=colleague) is None
    stack = account.find("one")
    assert stack
    assert ("CREATE_COMPLETE", "one") == (stack.status, account.functions.get_function_configuration(FunctionName="one")["FunctionName"])


@pytest.mark.parametrize("answer", [True, False])
def test_change_set_beside_ours(account: Account, answer: bool) -> None:
    """A stack that others prepare while the code is built, or while the question stands, is theirs whatever the answer is."""

    def build(*_: Any) -> bytes:
        prepare(account, "one")
        return CODE

    with pytest.raises(UserError, match=r"stack one in .* is not one of ours \(others have prepared it\)"):
        put_up(account, Order("one"), lambda _: answer, lambda _: None, build)
    assert ["theirs"] == [one["ChangeSetName"] for one in account.formation.list_change_sets(StackName="one")["Summaries"]]

    def beside(_: list[Change]) -> bool:
        prepare(account, "two")
        return False

    assert up(account, "two", agree=beside) is None
    assert ["theirs"] == [one["ChangeSetName"] for one in account.formation.list_change_sets(StackName="two")["Summaries"]]


def test_change_set_between_check_and_ours(account: Account) -> None:
    """A stack that others prepare right before our change set is refused before the question, and stays as they have left it."""

    def first(**_: Any) -> None:
        account.formation.meta.events.unregister("before-call.cloudformation.CreateChangeSet", first)
        prepare(account, "one")

    account.formation.meta.events.register("before-call.cloudformation.CreateChangeSet", first)
    with pytest.raises(UserError, match=r"stack one in .* is not ours alone: others have prepared it"):
        up(account, agree=lambda _: pytest.fail("it asks"))
    assert ["theirs"] == [one["ChangeSetName"] for one in account.formation.list_change_sets(StackName="one")["Summaries"]]


def test_stack_changed_while_code_is_built(account: Account) -> None:
    """What was found is looked at again before changes are prepared: a stack made anew, or taken by others, meanwhile, is refused."""
    put(account)

    def lose(*_: Any) -> bytes:
        account.formation.delete_stack(StackName="one")
        account.formation.get_waiter("stack_delete_complete").wait(StackName="one", WaiterConfig={"Delay": 1})
        return CODE

    with pytest.raises(StackFailed, match=r"stack one in .* was changed by another command: it is not there"):
        put_up(account, Order("one"), yes, lambda _: None, lose)

    def squat(*_: Any) -> bytes:
        foreign(account, "one")
        return CODE

    with pytest.raises(UserError, match=r"stack one in .* is not one of ours"):
        put_up(account, Order("one"), yes, lambda _: None, squat)


def test_change_sets_called_as_ours(account: Account) -> None:
    """A change set that is called as ours are is others' all the same, unless it has the stack's tag."""
    prepare(account, "one", "gradsharding-plans")
    prepare(account, "two", f"gradsharding-{uuid.uuid4().hex}")
    prepare(account, "three", f"gradsharding-{uuid.uuid4().hex}", **{TAG: "two"})
    before = everything(account)
    for name in ("one", "two", "three"):
        with pytest.raises(UserError, match=rf"stack {name} in .* is not one of ours"):
            up(account, name)
    assert before == everything(account)


def test_protection_is_asked_for(account: Account) -> None:
    """Termination protection goes on or off only if that is agreed to, also where nothing else changes."""
    shown = list[Change]()

    def refuse(changes: list[Change]) -> bool:
        shown[:] = changes
        return False

    put(account, protected=True)
    assert up(account, agree=refuse, protected=False) is None
    assert [("turn off", "termination protection")] == [one[:2] for one in shown]
    stack = account.find("one")
    assert stack
    assert stack.protected
    assert not put(account, protected=False).protected


def test_failed_stack_is_asked_for(account: Account) -> None:
    """What is left of a stack that could not be made is deleted only if that is agreed to."""
    body = {
        "Metadata": {"Gradsharding": {"Format": 1}},
        "Resources": {"Taken": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": f"taken-{account.number}"}}},
    }  # fmt: skip
    account.s3.create_bucket(Bucket=f"taken-{account.number}")
    tags: Any = [{"Key": TAG, "Value": "one"}]
    made = account.formation.create_stack(StackName="one", TemplateBody=json.dumps(body), Tags=tags, Capabilities=["CAPABILITY_IAM"])
    failed = account.settled(account.look_up(made["StackId"]) or pytest.fail("there is no stack"), lambda _: None)
    assert "ROLLBACK_COMPLETE" == failed.status
    asked = list[list[Change]]()

    def note(changes: list[Change]) -> bool:
        asked.append(changes)
        return len(asked) > 1

    assert up(account, agree=note) is None
    assert [("delete", "the failed stack")] == [one[:2] for one in asked[0]][-1:]
    assert failed == account.look_up("one")
    assert put(account, agree=note, code=zipped("newer")).works
    assert 3 == len(asked)


def test_interrupt_while_nothing_can_be_taken_back(account: Account) -> None:
    """An interrupt at the question is what is heard of, also where CloudFormation does not take back what was prepared."""

    def throttle(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "Throttling", "Message": "Rate exceeded"}}, "DeleteChangeSet")

    def interrupt(_: list[Change]) -> bool:
        raise KeyboardInterrupt

    account.formation.meta.events.register("before-call.cloudformation.DeleteChangeSet", throttle)
    said = list[str]()
    with pytest.raises(KeyboardInterrupt):
        put_up(account, Order("one"), interrupt, said.append, lambda *_: CODE)
    (line,) = [line for line in said if "Rate exceeded" in line]
    assert line.startswith("what was prepared for stack one could not be withdrawn: ")


def test_change_of_the_stack_alone(account: Account) -> None:
    """A change set that can be run, and changes no resource, is asked about and run: what it changes is the stack's own."""
    put(account)

    def bare(parsed: dict[str, Any], **_: Any) -> None:
        parsed["Changes"] = []

    account.formation.meta.events.register("after-call.cloudformation.DescribeChangeSet", bare)
    shown = list[Change]()

    def note(changes: list[Change]) -> bool:
        shown[:] = changes
        return True

    assert "blue" == put(account, agree=note, tags={"team": "blue"}).tags["team"]
    assert [("change", "tags or outputs")] == [one[:2] for one in shown]


def other_code_in_its_place(account: Account, bucket: str) -> Any:
    """Give an agreement that replaces the code right before it says yes."""

    def agree(_: list[Change]) -> bool:
        (one,) = account.s3.list_objects_v2(Bucket=bucket)["Contents"]
        account.s3.put_object(Bucket=bucket, Key=one["Key"], Body=zipped("evil"))
        return True

    return agree


def test_code_is_what_was_compared(account: Account) -> None:
    """Code that is replaced in its bucket between the comparison and the answer is not what is deployed."""
    stack = put(account, agree=other_code_in_its_place(account, own_bucket(account)))
    checked(account, stack)
    with pytest.raises(UserError, match="holds other code"):
        up(account)
    (one,) = account.s3.list_objects_v2(Bucket=own_bucket(account))["Contents"]
    account.s3.delete_object(Bucket=own_bucket(account), Key=one["Key"])
    checked(account, put(account))
    put(account, agree=lambda _: pytest.fail("something is to be changed"))


def test_other_code_is_replaced(account: Account) -> None:
    """A function whose code was changed by hand gets its own again by the same deploy; the alias leads to it, and then nothing is to do."""
    stack = put(account)
    account.functions.update_function_code(FunctionName="one", ZipFile=zipped("evil"))
    (wrong,) = missing(account, stack)
    assert "replace it: gradsharding deploy with the same options" in wrong.remedy
    checked(account, put(account))
    put(account, agree=lambda _: pytest.fail("something is to be changed"))


def test_code_bucket_without_versions(account: Account) -> None:
    """In a bucket without versions, other code is found out after it was deployed; once versions are kept, the same deploy replaces it."""
    bucket = f"mine-{account.number}"
    account.s3.create_bucket(Bucket=bucket)
    stack = put(account, agree=other_code_in_its_place(account, bucket), code_bucket=bucket)
    with pytest.raises(GradShardingError, match=r"runs other code .*turn that on first") as found:
        checked(account, stack)
    assert f"versioning is on for bucket {bucket}" in found.value.message
    (one,) = account.s3.list_objects_v2(Bucket=bucket)["Contents"]
    account.s3.delete_object(Bucket=bucket, Key=one["Key"])
    account.s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    checked(account, put(account))


def test_bucket_for_code_keeps_what_others_added(account: Account) -> None:
    """Statements and tags that others add to the bucket for code stay, whatever is deployed."""
    put(account)
    bucket = own_bucket(account)
    policy = json.loads(account.s3.get_bucket_policy(Bucket=bucket)["Policy"])
    policy["Statement"].append({**policy["Statement"][0], "Sid": "Theirs", "Condition": {"NumericLessThan": {"s3:TlsVersion": 1.3}}})
    account.s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    tags = [{"Key": "team", "Value": "blue"}, {"Key": TAG, "Value": "code"}]
    account.s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": tags})  # type: ignore[typeddict-item]
    put(account, code=zipped("newer"))
    assert policy == json.loads(account.s3.get_bucket_policy(Bucket=bucket)["Policy"])
    account.s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": tags[:1]})  # type: ignore[typeddict-item]
    put(account, code=zipped("newest"))
    assert {"team": "blue", TAG: "code"} == {one["Key"]: one["Value"] for one in account.s3.get_bucket_tagging(Bucket=bucket)["TagSet"]}
    assert "Enabled" == account.s3.get_bucket_versioning(Bucket=bucket)["Status"]


def test_bucket_that_is_brought_is_looked_at_first(enter: Callable[[], Account]) -> None:
    """A bucket that is not there, or is another account's than is said, is refused before anything is made."""
    other = enter()
    other.s3.create_bucket(Bucket=f"theirs-{other.number}")
    account = enter()
    account.s3.create_bucket(Bucket=f"mine-{account.number}")
    before = everything(account)
    for bucket, owner, said in (
        ("no-such-bucket", "", "there is no bucket no-such-bucket"),
        (f"theirs-{other.number}", "", f"bucket theirs-{other.number} is not account {account.number}'s.*--bucket-owner"),
        (f"mine-{account.number}", other.number, f"bucket mine-{account.number} is not account {other.number}'s.*--bucket-owner"),
    ):
        with pytest.raises(UserError, match=said):
            up(account, parameters={"ExistingBucket": bucket, "BucketOwner": owner})
    assert before == everything(account)


def test_what_cannot_be_seen_is_not_well(account: Account) -> None:
    """Where CloudFormation's detection is refused or fails, that is said; nothing that was not looked at counts as it was deployed."""
    stack = put(account)

    def deny(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": "not authorized to perform DetectStackDrift"}}, "DetectStackDrift")

    for action in ("DetectStackDrift", "DescribeStackDriftDetectionStatus", "DescribeStackResourceDrifts"):
        account.formation.meta.events.register(f"before-call.cloudformation.{action}", deny)
        unseen = list[str]()
        assert [] == drift(account, stack, unseen.append)
        (said,) = unseen
        assert said.startswith("changes by hand could not be detected: ")
        account.formation.meta.events.unregister(f"before-call.cloudformation.{action}", deny)

    def fail(parsed: dict[str, Any], **_: Any) -> None:
        parsed.update(DetectionStatus="DETECTION_FAILED", DetectionStatusReason="Failed to detect drift on resource [Role]")

    account.formation.meta.events.register("after-call.cloudformation.DescribeStackDriftDetectionStatus", fail)
    failed = list[str]()
    drift(account, stack, failed.append)
    assert ["changes by hand could not be detected everywhere: Failed to detect drift on resource [Role]"] == failed


def test_bucket_that_was_opened(account: Account) -> None:
    """A bucket that was opened by hand, or lost the policy that asks for TLS, is found out."""
    stack = put(account)
    bucket = stack.outputs["Bucket"]
    assert [] == drift(account, stack)
    account.s3.delete_public_access_block(Bucket=bucket)
    account.s3.delete_bucket_policy(Bucket=bucket)
    said = {one.problem.partition(" ")[0]: str(one) for one in drift(account, stack)}
    assert {"Bucket", "BucketPolicy"} == said.keys()
    assert f"put-public-access-block --bucket {bucket} --public-access-block-configuration BlockPublicAcls=true," in said["Bucket"]


def test_bucket_stays_closed(account: Account) -> None:
    """The bucket that outlives its stack keeps the policy that refuses requests without TLS."""
    bucket = put(account).outputs["Bucket"]
    before = account.s3.get_bucket_policy(Bucket=bucket)["Policy"]
    down(account)
    assert before == account.s3.get_bucket_policy(Bucket=bucket)["Policy"]


def test_change_by_hand(account: Account) -> None:
    """Of what was changed by hand, the advice is one that works: a deploy sees nothing to change."""
    stack = put(account, parameters={"Memory": "512"})
    account.functions.update_function_configuration(FunctionName="one", MemorySize=1024)
    (wrong,) = drift(account, stack)
    assert wrong.problem.startswith("Function (AWS::Lambda::Function one) was changed by hand: ")
    assert "set it back by hand" in wrong.remedy
    put(account, agree=lambda _: pytest.fail("something is to be changed"), parameters={"Memory": "512"})


def test_dashboard_of_a_region(account: Account) -> None:
    """A dashboard is called after its stack and region, as an account has one of a name; one that was deleted is found out."""
    stack = put(account, parameters={"Dashboard": "true"})
    assert ["one-us-east-1"] == [one["DashboardName"] for one in account.alarms.list_dashboards()["DashboardEntries"]]
    account.alarms.delete_dashboards(DashboardNames=["one-us-east-1"])
    (lost,) = missing(account, stack)
    assert lost.problem.startswith("Board (AWS::CloudWatch::Dashboard one-us-east-1) is gone")


def test_demands_are_met(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bucket's owner demands of each request is sent with the function's code, too, and the owner is still expected."""
    monkeypatch.setenv("GRADSHARDING_S3_SSE", "AES256")
    monkeypatch.setenv("GRADSHARDING_S3_ACL", "bucket-owner-full-control")
    demanding, sent = Account(), dict[str, dict[str, str]]()

    def note(model: Any, params: dict[str, Any], **_: Any) -> None:
        sent[model.name] = params["headers"]

    demanding.s3.meta.events.register("before-call.s3", note)
    put(demanding)
    written = {name: sent["PutObject"].get(f"x-amz-{name}") for name in ("server-side-encryption", "acl", "expected-bucket-owner")}
    assert {
        "server-side-encryption": "AES256",
        "acl": "bucket-owner-full-control",
        "expected-bucket-owner": account.number,
    } == written
    assert "x-amz-acl" not in sent["CreateBucket"]


def test_bucket_for_code_that_is_still_being_deleted(account: Account) -> None:
    """A name that is not free yet, as its bucket was deleted a moment ago, is explained, and nothing is made."""

    def busy(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "OperationAborted", "Message": "A conflicting conditional operation"}}, "CreateBucket")

    account.s3.meta.events.register("before-call.s3.CreateBucket", busy)
    with pytest.raises(StackFailed, match=r"S3 is still at work on a bucket of that name .*; run this again in a few minutes"):
        up(account)
    assert {} == everything(account)
