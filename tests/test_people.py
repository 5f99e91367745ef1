"""The policies for people hold what they need and no more: against what the commands ask, what CloudFormation asks, and Ceph."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import Any

import boto3
import click
import numpy as np
import pytest
from botocore.exceptions import ClientError

from gradsharding.aws.deploy.commands import deploy, destroy, status
from gradsharding.aws.deploy.stack import kinds, template
from gradsharding.aws.refusals import code_of
from gradsharding.aws.s3.store import S3Store
from gradsharding.aws.smoke import smoke
from gradsharding.cli.main import main
from gradsharding.errors import ObjectExists
from gradsharding.format.encode import encode
from gradsharding.rounds.round import Round
from gradsharding.stores.updates import inspect
from rigs.policies import Need, actions, allows, needs, recorded
from rigs.s3 import Ceph, S3Server
from rigs.stack import account_missing, local_account
from rigs.template import read_template, resolved

POLICIES = Path(__file__).parent.parent / "deploy/policies"
PREFIX = "some prefix"
BOUNDARY = "arn:aws:iam::000000000000:policy/boundary"
LARGEST = 6_144
"""Characters of a managed policy, without blanks (https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html)."""

UNASKED = {
    "cloudformation:(GetTemplateSummary|ListChangeSets)": "deploy asks for a stack to adopt, or one that was left half prepared",
    "cloudformation:TagResource": "CloudFormation asks for it when a change set has tags",
    "cloudformation:DetectStackResourceDrift": "CloudFormation asks for it when it detects a stack's drift",
    "s3:GetBucketLocation": "Lambda asks for it when it takes code from a bucket",
}
"""What no command asks, and no type's handlers: the reasons why it is allowed all the same."""

UNUSED = {
    "s3tables:.*|s3:.*MetadataTable.*|s3:UpdateBucketMetadata.*|s3:.*Metadata(Annotation|Inventory|Journal).*": "no metadata tables",
    "s3:Put(Accelerate|Analytics|IntelligentTiering|Inventory|Metrics|Replication)Configuration|s3:Put.*ObjectLockConfiguration|"
    "s3:Put(Bucket|Object)Acl|s3:GetBucketAcl|s3:PutBucket(Abac|CORS|Notification|Replication|Website)|"
    "s3:DeleteBucket(Analytics.*|Cors|Metrics.*|Replication|Website|Encryption|Lifecycle)": "what it never sets, or always",
    "elasticfilesystem:.*|s3files:.*": "no file systems",
    "kms:.*": "no key for the function's variables, which hold no secret",
    "codedeploy:.*|lambda:.*Provisioned.*": "no weighted aliases, and no provisioned concurrency",
    "lambda:(Put|Delete).*(CodeSigning|Recursion|Scaling|Runtime).*|lambda:(GetCodeSigningConfig|GetLayerVersion|AssociateRuntimeAlias|"
    "PassCapacityProvider)|lambda:GetFunctionScalingConfig": "no layers, signatures, capacity providers or pinned runtimes",
    "firehose:.*|s3:REST.*|logs:(CreateLogDelivery|.*BearerToken.*|.*DeletionProtection|(Put|Delete)(DataProtection|Index|Resource)Policy)":
    "no delivery, no masks and no policies of logs",
    "iam:(Attach|Detach)RolePolicy": "the role has a policy of its own",
}  # fmt: skip
"""What the handlers of our resources' types may ask, and not for this template: the reasons."""


def policy(name: str, **filled: str) -> Any:
    """Give a policy with its placeholders filled."""
    place = {"Partition": "aws", "Account": "000000000000", "Region": "us-east-1"}
    known = place | {"Name": "one", "Bucket": "one-bucket-*", "Prefix": "gradsharding", "Boundary": BOUNDARY} | filled
    return json.loads(Template((POLICIES / f"{name}.json").read_text()).substitute(known))


@pytest.fixture(scope="module")
def asked() -> Mapping[str, set[Need]]:
    """What each command asks of an account: when all goes well, and when it finds nothing, or leftovers."""
    if why := account_missing():
        pytest.skip(why)
    machine = {"aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    runtime = f"python{sys.version_info.major}.{sys.version_info.minor}"
    with local_account() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        found: dict[str, set[Need]] = {}

        def run(command: click.Command, *words: str) -> None:
            with recorded() as sent:
                command.main([*words, "--name", "one"], standalone_mode=False)
            found.setdefault(str(command.name), set()).update(needs(sent, "000000000000", "us-east-1"))

        run(deploy, "--yes", "--architecture", machine, "--runtime", runtime, "--dashboard", "--termination-protection")
        run(deploy, "--yes", "--memory", "1024", "--tag", "team=fl", "--no-termination-protection")
        run(deploy, "--yes")  # which finds nothing to change
        run(status)
        run(smoke)
        bucket = next(
            one["Name"] for one in boto3.Session().client("s3").list_buckets()["Buckets"] if one["Name"].startswith("one-bucket-")
        )
        boto3.Session().client("s3").create_multipart_upload(Bucket=bucket, Key="gradsharding/results/unfinished")
        boto3.Session().client("s3").put_object(Bucket=bucket, Key="gradsharding/results/old", Body=b"x")
        run(destroy, "--yes")
        run(destroy, "--yes", "--delete-data")
    return found


@pytest.fixture(scope="module")
def handled(sam: Path) -> set[str]:
    """Actions that CloudFormation takes, in the deployer's name, for the types of the template, as their registered schemas say."""
    (schemas,) = sam.parents[1].glob("lib/python3*/site-packages/cfnlint/data/schemas")
    files = json.loads((schemas / "providers/us-east-1.json").read_text())
    found = [json.loads((schemas / f"resources/{files[kind]}.json").read_text())["handlers"] for _, kind in sorted(kinds(template()))]
    return {action for handlers in found for kind in ("create", "read", "update", "delete") for action in handlers[kind]["permissions"]}


@pytest.mark.slow
@pytest.mark.rig
def test_deployer_may_do_what_the_commands_ask(asked: Mapping[str, set[Need]]) -> None:
    """Each request of deploy, status and destroy is allowed on the very resource that it names; smoke also needs what an aggregator may."""
    deployer, aggregator = policy("deployer"), policy("aggregator")

    assert {"deploy", "status", "smoke", "destroy"} == asked.keys()
    for command, wanted in asked.items():
        policies = [deployer, aggregator] if command == "smoke" else [deployer]
        assert [] == [need for need in sorted(wanted) if not allows(policies, need)], command


@pytest.mark.slow
@pytest.mark.rig
def test_deployer_may_do_no_more(asked: Mapping[str, set[Need]], handled: set[str]) -> None:
    """Each action is one that a command asks, or CloudFormation for our types, or has its reason; none of those is missing."""
    commands = {need.action for command, wanted in asked.items() if command != "smoke" for need in wanted}
    used = {action for action in handled if not any(re.fullmatch(pattern, action) for pattern in UNUSED)}
    allowed = actions(policy("deployer"))
    extra = allowed - commands - used

    assert [] == sorted((commands | used) - allowed)
    assert [] == sorted(action for action in extra if not any(re.fullmatch(pattern, action) for pattern in UNASKED))
    assert [] == [pattern for pattern in UNASKED if not any(re.fullmatch(pattern, action) for action in extra)]
    assert [] == [pattern for pattern in UNUSED if not any(re.fullmatch(pattern, action) for action in handled)]


def test_deployer_reaches_one_stack() -> None:
    """What belongs to other stacks is out of reach, be their names alike; and no role is passed to any service but Lambda."""
    deployer = policy("deployer")
    where = "us-east-1:000000000000"
    others = [
        Need("cloudformation:DeleteStack", f"arn:aws:cloudformation:{where}:stack/one-more/id"),
        Need("s3:DeleteBucket", "arn:aws:s3:::another"),
        Need("s3:DeleteObjectVersion", "arn:aws:s3:::another/x"),
        Need("s3:DeleteObjectVersion", f"arn:aws:s3:::gradsharding-code-{where.replace(':', '-')}/another/x.zip"),
        Need("lambda:UpdateFunctionCode", f"arn:aws:lambda:{where}:function:one-more"),
        Need("iam:PutRolePolicy", "arn:aws:iam::000000000000:role/admin"),
        Need("logs:DeleteLogGroup", f"arn:aws:logs:{where}:log-group:/aws/lambda/another"),
        Need("iam:UpdateAssumeRolePolicy", "arn:aws:iam::000000000000:role/admin"),
        Need("iam:CreateUser", "arn:aws:iam::000000000000:user/me"),
        Need("iam:CreatePolicyVersion", BOUNDARY),
    ]
    (passing,) = (one for one in deployer["Statement"] if "iam:PassRole" in one["Action"])

    assert [] == [need for need in others if allows([deployer], need)]
    assert {"StringEquals": {"iam:PassedToService": "lambda.amazonaws.com"}} == passing["Condition"]


def test_bounded_deployer() -> None:
    """It may do what a deployer may, but makes, bounds and changes the rights of a role only with the boundary, and takes it off none."""
    deployer, bounded = policy("deployer"), policy("deployer-bounded")
    of_rights = {"iam:CreateRole", "iam:DeleteRolePolicy", "iam:PutRolePermissionsBoundary", "iam:PutRolePolicy"}
    plain, held = ([one for one in bounded["Statement"] if (one["Sid"] == "BoundedRole") == is_held] for is_held in (False, True))
    (role,) = (one for one in deployer["Statement"] if one["Sid"] == "Role")
    rest = {**role, "Action": [one for one in role["Action"] if one not in of_rights | {"iam:DeleteRolePermissionsBoundary"}]}

    assert [rest if one is role else one for one in deployer["Statement"]] == plain
    assert [
        {
            "Sid": "BoundedRole",
            "Effect": "Allow",
            "Action": sorted(of_rights),
            "Resource": role["Resource"],
            "Condition": {"StringEquals": {"iam:PermissionsBoundary": BOUNDARY}},
        }
    ] == held
    conditional = {  # of IAM's actions on roles, those that the condition key is for
        "iam:AttachRolePolicy", "iam:CreateRole", "iam:DeleteRolePermissionsBoundary", "iam:DeleteRolePolicy", "iam:DetachRolePolicy",
        "iam:PutRolePermissionsBoundary", "iam:PutRolePolicy",
    }  # fmt: skip
    assert set() == conditional & actions({"Statement": plain})


def test_partition_is_asked_for() -> None:
    """Each ARN of the policies has the partition for a placeholder, so that they can be filled in for China and GovCloud as well."""
    for path in POLICIES.glob("*.json"):
        for one in policy(path.stem, Partition="aws-cn", Node="*", Boundary="arn:aws-cn:iam::000000000000:policy/boundary")["Statement"]:
            assert [] == [place for place in one["Resource"] if place != "*" and not place.startswith("arn:aws-cn:")]


@pytest.mark.parametrize("path", sorted(POLICIES.glob("*.json")), ids=lambda path: path.stem)
def test_policies_are_such_as_iam_takes(path: Path) -> None:
    """A policy is small enough for IAM, allows no action by a wildcard, and has no placeholder but those that the page names."""
    text = path.read_text()
    found = json.loads(text)
    page = (POLICIES.parent / "README.md").read_text()

    assert len(re.sub(r"\s", "", text)) + 400 < LARGEST  # names may be longer than their placeholders
    assert [] == [action for action in actions(found) if "*" in action]
    assert {*re.findall(r"\$\{(\w+)\}", text)} <= {*re.findall(r"`\$\{(\w+)\}`", page)}
    assert all(re.fullmatch("[A-Za-z0-9]+", one["Sid"]) for one in found["Statement"])


def test_page_has_the_rules_of_the_template() -> None:
    """The rules that the page gives for a bucket of one's own are those of the template, held to the prefix."""
    (block,) = re.findall(r"```json\n(\{\"Rules\".*?)```", (POLICIES.parent / "README.md").read_text(), re.DOTALL)
    bucket = resolved(read_template(template()))["Resources"]["Bucket"]["Properties"]

    def of_page(rule: Any) -> Any:
        expiration = rule.get("Expiration", {})
        return {
            "Prefix": rule["Filter"]["Prefix"],
            **({"ExpirationInDays": str(expiration["Days"])} if "Days" in expiration else {}),
            **({"ExpiredObjectDeleteMarker": True} if expiration.get("ExpiredObjectDeleteMarker") else {}),
            **{key: {name: str(days) for name, days in rule[key].items()} for key in rule if key.endswith(("Upload", "VersionExpiration"))},
        }

    rules = bucket["LifecycleConfiguration"]["Rules"]
    ours = {rule["Id"]: {"Prefix": "gradsharding/", **{key: rule[key] for key in rule if key not in ("Id", "Status")}} for rule in rules}
    assert ours == {rule["ID"]: of_page(rule) for rule in json.loads(block)["Rules"] if rule["Status"] == "Enabled"}


@pytest.fixture
def person(ceph: Ceph, ceph_store: S3Store) -> Callable[..., S3Server]:
    """Give what makes a user whom Ceph allows on the bucket what a policy does."""

    def make(name: str, **filled: str) -> S3Server:
        uid = f"{name}-{ceph_store.bucket}"
        user = ceph.user(uid)
        arn = f"arn:aws:s3:::{ceph_store.bucket}"
        held = [
            {**one, "Principal": {"AWS": [f"arn:aws:iam:::user/{uid}"]}}
            for one in policy(name, Bucket=ceph_store.bucket, Prefix=PREFIX, **filled)["Statement"]
            if one["Action"][0].startswith("s3:")
        ]
        for one in held:  # Ceph 16 asks for the bucket, too, where several objects are deleted at once
            one["Resource"] += [arn] if "s3:DeleteObject" in one["Action"] else []
        owner: Any = {"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/tester"]}, "Action": ["s3:*"]}
        document = {"Version": "2012-10-17", "Statement": [*held, {**owner, "Resource": [arn, f"{arn}/*"]}]}
        ceph_store.client.put_bucket_policy(Bucket=ceph_store.bucket, Policy=json.dumps(document))
        return user

    return make


def test_aggregator(ceph_store: S3Store, person: Callable[..., S3Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """With an aggregator's rights whole rounds run on Ceph, with and without a store, and leave nothing; what is outside is refused."""
    user = person("aggregator")
    for client in ("a", "b"):
        ceph_store.put(f"in/{client}.safetensors", encode({"w": np.full(3 << 20, ord(client), "f4")})[1])
    ceph_store.client.put_object(Bucket=ceph_store.bucket, Key="another/x", Body=b"x")
    for name, value in user.environment().items():
        monkeypatch.setenv(name, value)
    url, theirs = ceph_store.url, user.client()
    inputs = [f"{url}/in/{client}.safetensors" for client in ("a", "b")]
    for words in ([], ["--store", url], ["--topology", "lambda-fl", "--fan-in", "1"]):
        assert 0 == main(["aggregate", *inputs, "-o", f"{url}/results/{len(words)}.safetensors", "--executor", "inline", *words])
    left = {place.split("/")[1] for place, _ in S3Store(url)._list(f"{PREFIX}/")}

    assert {"in", "results", "rounds"} == left
    bucket = ceph_store.bucket
    refused: dict[str, Callable[[], Any]] = {
        "read another prefix": lambda: theirs.get_object(Bucket=bucket, Key="another/x"),
        "write another prefix": lambda: theirs.put_object(Bucket=bucket, Key="another/y", Body=b"y"),
        "delete there": lambda: theirs.delete_object(Bucket=bucket, Key="another/x"),
        "change the policy": lambda: theirs.put_bucket_policy(Bucket=bucket, Policy="{}"),
        "change the rules": lambda: theirs.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": []}),
        "delete the bucket": lambda: theirs.delete_bucket(Bucket=bucket),
        "list old versions": lambda: theirs.list_object_versions(Bucket=bucket),
    }
    _refused(refused)


def test_node(ceph_store: S3Store, person: Callable[..., S3Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a node's rights a model is read and one's own update written and described; the others' updates, and results, are closed."""
    user = person("node", Node="00000000000000000007")
    round_, arrays = Round.create(ceph_store, "r1"), {"w": np.ones(3, "f4")}
    model, own, others = "results/r0.safetensors", round_.update_key("00000000000000000007"), round_.update_key("00000000000000000008")
    for key in (model, others):
        ceph_store.put(key, encode(arrays)[1])
    for name, value in user.environment().items():
        monkeypatch.setenv(name, value)
    store, theirs = S3Store(ceph_store.url), user.client()
    store.put(own, encode(arrays)[1])
    with pytest.raises(ObjectExists):  # a message may be delivered twice
        store.put(own, encode(arrays)[1])
    assert inspect(model, store).layout == inspect(own, store).layout
    bucket = ceph_store.bucket
    refused: dict[str, Callable[[], Any]] = {
        "read another's update": lambda: theirs.get_object(Bucket=bucket, Key=f"{PREFIX}/{others}"),
        "write another's update": lambda: theirs.put_object(Bucket=bucket, Key=f"{PREFIX}/{others}", Body=b"y"),
        "change a model": lambda: theirs.put_object(Bucket=bucket, Key=f"{PREFIX}/{model}", Body=b"y"),
        "change a record": lambda: theirs.put_object(Bucket=bucket, Key=f"{PREFIX}/{round_.key('manifest.json')}", Body=b"y"),
        "list": lambda: theirs.list_objects_v2(Bucket=bucket),
        "delete": lambda: theirs.delete_object(Bucket=bucket, Key=f"{PREFIX}/{own}"),
    }
    _refused(refused)


def _refused(refused: Mapping[str, Callable[[], Any]]) -> None:
    for what, ask in refused.items():
        with pytest.raises(ClientError) as caught:
            ask()
        assert "AccessDenied" == code_of(caught.value), what
