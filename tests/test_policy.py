"""What the function's role may do: read what lies below the project's prefix, write results there, and no more."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from botocore.exceptions import ClientError

from gradsharding.aws.deploy.commands import ALARMS
from gradsharding.aws.deploy.stack import template
from gradsharding.aws.functions.executor import LambdaExecutor
from gradsharding.aws.refusals import code_of
from gradsharding.aws.s3.store import S3Store
from gradsharding.cli.main import main
from gradsharding.errors import MissingObject, StoreRefused
from gradsharding.format.encode import encode
from gradsharding.rounds.aggregate import aggregate
from gradsharding.rounds.round import Round
from gradsharding.running import worker
from gradsharding.stores.memory import MemoryStore
from gradsharding.testing import assert_same, reference_mean
from gradsharding.testing.executors import Started
from rigs.lambdas import LocalFunction, LocalLambda
from rigs.s3 import Ceph, S3Server, ceph_missing, ceph_server
from rigs.template import read_template, resolved

PREFIX = "some prefix"

BELOW = "arn:aws:s3:::${Bucket}/some_prefix"
"""What lies below it, in the resolved template: its parameter takes no space."""

WRITES = ("rounds/*/partials/*", "rounds/*/result.safetensors", "results/*", ".gradsharding/*")
"""Where the function may write, below the prefix."""


def resources() -> Any:
    """The template's resources, where nothing is asked for."""
    return resolved(read_template(template()), Prefix=PREFIX.replace(" ", "_"))["Resources"]


def statements() -> list[Any]:
    """What the function's role is allowed and denied."""
    policies = resources()["Role"]["Properties"]["Policies"]
    return [statement for policy in policies for statement in policy["PolicyDocument"]["Statement"]]


def several(value: Any) -> list[str]:
    """One or many, as a list."""
    return value if isinstance(value, list) else [value]


def test_text() -> None:
    """The role names single actions, on objects below the prefix alone: nothing lists, nothing deletes, nothing is a wildcard action."""
    allowed = {(action, place) for one in statements() if one["Effect"] == "Allow" for action in several(one["Action"])
               for place in several(one["Resource"])}  # fmt: skip
    below = {f"{BELOW}/{place}" for place in WRITES}

    assert {
        ("s3:GetObject", f"{BELOW}/*"),
        *(("s3:PutObject", place) for place in below),
        *(("s3:ListMultipartUploadParts", place) for place in below),
        ("logs:CreateLogStream", "${Log.Arn}"),
        ("logs:PutLogEvents", "${Log.Arn}"),
    } == allowed
    assert [f"{BELOW}/rounds/*/updates/*"] == [one["Resource"] for one in statements() if one["Effect"] == "Deny"]
    assert "ManagedPolicyArns" not in resources()["Role"]["Properties"]


def test_bucket() -> None:
    """The bucket is encrypted, closed to the public, open to TLS alone, and forgets rounds and what they left unfinished."""
    bucket, policy = resources()["Bucket"]["Properties"], resources()["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    (denied,) = policy

    assert {"BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"} == {
        name for name, value in bucket["PublicAccessBlockConfiguration"].items() if value
    }
    assert "BucketEncryption" in bucket
    assert ("Deny", "s3:*", {"Bool": {"aws:SecureTransport": "false"}}) == (denied["Effect"], denied["Action"], denied["Condition"])
    rules = {rule["Id"]: rule for rule in bucket["LifecycleConfiguration"]["Rules"]}
    assert {"rounds", "unfinished", "uploads", "versions"} == {name for name, rule in rules.items() if rule["Status"] == "Enabled"}
    assert "DaysAfterInitiation" in rules["uploads"]["AbortIncompleteMultipartUpload"]
    assert not [rule["Id"] for rule in rules.values() if "ExpirationInDays" in rule and "results" in str(rule.get("Prefix", "results"))]
    assert "Prefix" not in rules["uploads"]  # of the whole bucket: results are written in parts, too


@pytest.fixture
def function(ceph: Ceph, ceph_store: S3Store) -> S3Server:
    """Give a user whom Ceph allows on the bucket what the role is allowed."""
    name = f"function-{ceph_store.bucket}"
    user = ceph.user(name)
    arn = f"arn:aws:s3:::{ceph_store.bucket}"
    policy = [
        {
            "Effect": one["Effect"],
            "Principal": {"AWS": [f"arn:aws:iam:::user/{name}"]},
            "Action": several(one["Action"]),
            "Resource": [place.replace(BELOW, f"{arn}/{PREFIX}") for place in several(one["Resource"])],
        }
        for one in statements()
        if not one["Sid"].startswith("Log")
    ]
    # On AWS the bucket owns what the function writes (BucketOwnerEnforced); a user of Ceph keeps it, but for this:
    everything = {"Action": ["s3:*"], "Resource": [arn, f"{arn}/*"]}
    policy.append({"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/tester"]}, **everything})
    ceph_store.client.put_bucket_policy(Bucket=ceph_store.bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": policy}))
    return user


def test_enough(ceph_store: S3Store, function: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With these rights all tasks of a round run: those that write parts, and those whose parts are kept."""
    updates = {client: ({"w": np.full(6 << 20, weight, "f4")}, weight) for client, weight in (("a", 1), ("b", 2))}
    started = Started.of(ceph_store, updates, shards=3)
    with monkeypatch.context() as patch:
        for name, value in function.environment().items():
            patch.setenv(name, value)
        for task in started.plan.tasks:
            worker.run(task, started.job, S3Store(ceph_store.url))

    assert_same(reference_mean(updates), started.complete())


@pytest.fixture
def on_lambda(function: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a function that has the role's rights, and no more; the environment leads there."""
    with LocalLambda(LocalFunction(environment=function.environment()), concurrency=1) as front:
        for name, value in front.environment().items():
            monkeypatch.setenv(name, value)
        yield


def sealed(store: S3Store) -> Round:
    """Give a sealed round of two clients."""
    round_ = Round.create(store, "r")
    for weight, client in enumerate("ab", 1):
        round_.submit(client, {"w": np.full(1 << 10, weight, "f4")}, weight)
    round_.seal()
    return round_


@pytest.mark.usefixtures("emulator", "on_lambda")
def test_deleted_is_not_denied(ceph_store: S3Store) -> None:
    """A function may not list, so that S3 denies it what is not there; the caller looks, and says that an update was deleted, and whose."""
    round_ = sealed(ceph_store)
    ceph_store.delete([round_.update_key("b")])
    with pytest.raises(MissingObject, match=r"^client b: s3://.*/updates/b\.safetensors is gone: .* after it was sealed; ") as caught:
        aggregate(round_, executor=LambdaExecutor("gradsharding"))
    assert ({"b"}, "b") == ({*caught.value.details["clients"]}, caught.value.details["client"])
    assert caught.value.usage["s3"].gets > 0
    assert round_.result() is None


@pytest.mark.usefixtures("emulator", "on_lambda")
def test_denied_is_not_deleted(ceph_store: S3Store) -> None:
    """An update that the caller sees, and the function's role may not read, is told as such, with the right that it lacks."""
    outside = S3Store(f"s3://{ceph_store.bucket}/another")
    round_ = Round.create(ceph_store, "r")
    outside.put("b", encode({"w": np.ones(1 << 10, "f4")})[1])
    round_.submit("a", {"w": np.ones(1 << 10, "f4")}, 1)
    round_.refer("b", f"{outside.url}/b", 1)
    with pytest.raises(StoreRefused, match=r"^client b: s3://.*/another/b is there, .* may not read it \(AccessDenied\); .* s3:GetObj"):
        aggregate(round_, executor=LambdaExecutor("gradsharding"))


@pytest.mark.usefixtures("emulator", "on_lambda")
def test_denied_write_is_the_functions(ceph_store: S3Store) -> None:
    """A function that its role does not let write the result is named with it, since it is not the caller's rights that lack."""
    round_ = Round.create(ceph_store, "r", output=f"s3://{ceph_store.bucket}/another/mean.safetensors")
    round_.submit("a", {"w": np.ones(1 << 10, "f4")}, 1)
    said = r"^function gradsharding, under its role: .*/another/.*: access is denied \(AccessDenied\); allow the caller this action there"
    with pytest.raises(StoreRefused, match=said) as caught:
        aggregate(round_, executor=LambdaExecutor("gradsharding"))
    assert ("AccessDenied", True) == (caught.value.details["code"], caught.value.details["denied"])


def test_denied_to_both(ceph_store: S3Store, function: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may not list either says that it may be denied, or not be there."""
    round_ = sealed(ceph_store)
    started = Started.of(ceph_store, {c: ({"w": np.ones(1 << 10, "f4")}, 1) for c in "ab"}, shards=1, name="other")
    ceph_store.delete([round_.update_key("b"), started.round.update_key("b")])
    for name, value in function.environment().items():
        monkeypatch.setenv(name, value)
    denied = r"^client b: GetObject of s3://.*: access is denied .* denies access also to an object that does not exist$"
    with pytest.raises(StoreRefused, match=denied):
        worker.run(started.plan.tasks[0], started.job, S3Store(ceph_store.url))


def test_no_more(ceph_store: S3Store, function: S3Server) -> None:
    """Ceph refuses it to list, to delete, to change an update or a record of a round, to write elsewhere, and to reach another prefix."""
    bucket, owner, theirs = ceph_store.bucket, ceph_store.client, function.client()
    update, result = (f"{PREFIX}/rounds/r/{name}.safetensors" for name in ("updates/a", "result"))
    for key in (update, "another/x"):
        owner.put_object(Bucket=bucket, Key=key, Body=b"x")
    upload = owner.create_multipart_upload(Bucket=bucket, Key="another/y")["UploadId"]
    assert b"x" == theirs.get_object(Bucket=bucket, Key=update)["Body"].read()
    theirs.put_object(Bucket=bucket, Key=result, Body=b"x")
    for name in ("rounds/r/partials/u/level-0.1", "results/r.safetensors", ".gradsharding/uploads/u/00001"):
        theirs.put_object(Bucket=bucket, Key=f"{PREFIX}/{name}", Body=b"x")
    records = ("round.json", "manifest.json", "result.json", "receipts/a.json", "updates/result.safetensors", "partials")

    refused: dict[str, Any] = {
        "list": lambda: theirs.list_objects_v2(Bucket=bucket),
        "list the prefix": lambda: theirs.list_objects_v2(Bucket=bucket, Prefix=f"{PREFIX}/"),
        "list uploads": lambda: theirs.list_multipart_uploads(Bucket=bucket),
        "delete": lambda: theirs.delete_object(Bucket=bucket, Key=result),
        "delete several": lambda: theirs.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": update}]}),
        "change an update": lambda: theirs.put_object(Bucket=bucket, Key=update, Body=b"y"),
        "write beside": lambda: theirs.put_object(Bucket=bucket, Key=f"{PREFIX}/x", Body=b"y"),
        "read another prefix": lambda: theirs.get_object(Bucket=bucket, Key="another/x"),
        "write to another prefix": lambda: theirs.put_object(Bucket=bucket, Key="another/z", Body=b"y"),
        "write a part there": lambda: theirs.upload_part(Bucket=bucket, Key="another/y", UploadId=upload, PartNumber=1, Body=b"y"),
        "change the policy": lambda: theirs.put_bucket_policy(Bucket=bucket, Policy="{}"),
    }
    for name in records:
        refused[f"write {name}"] = lambda name=name: theirs.put_object(Bucket=bucket, Key=f"{PREFIX}/rounds/r/{name}", Body=b"y")
    for what, ask in refused.items():
        with pytest.raises(ClientError) as caught:
            ask()
        assert "AccessDenied" == code_of(caught.value), what


def test_alarms_are_as_many_as_are_billed() -> None:
    """What ``deploy`` says of the cost of leaving it up counts the template's alarms."""
    assert ALARMS == sum(one["Type"] == "AWS::CloudWatch::Alarm" for one in resources().values())


def test_no_rule_deletes_results() -> None:
    """A round's result lies below no prefix that a rule of the template expires; its records and updates do."""
    round_ = Round.create(MemoryStore(), "r")
    expiring = _expiring()

    assert not round_.output.startswith(expiring)
    assert all(key.startswith(expiring) for key in (round_.key("round.json"), round_.update_key("a")))


OUTPUTS = {
    "in results": ("results/mean.safetensors", ()),
    "deeper in results": ("results/2026/11/mean.safetensors", ("--topology", "lambda-fl", "--fan-in", "1")),
    "below the prefix": ("mean.safetensors", ("--topology", "sharded-tree", "--fan-in", "1", "--shards", "2")),
    "in results, with a store": ("results/mean.safetensors", ("--store", "STORE")),
}
"""Where people write results to below the prefix, and how."""


@pytest.mark.parametrize("name", OUTPUTS)
def test_all_that_is_written_is_cleared_away_or_is_the_result(name: str, ceph: Ceph, ceph_store: S3Store) -> None:
    """Ceph's own log of what ``aggregate`` writes has the result, uploads, and below the prefix what a rule of the template expires."""
    output, words = OUTPUTS[name]
    inputs = _inputs(ceph_store)
    before = len(ceph.server.seen())
    assert 0 == main(["aggregate", *inputs, "-o", f"{ceph_store.url}/{output}", "--executor", "inline", *_placed(words, ceph_store)])
    asked = [request for request in ceph.server.seen()[before:] if request.method in ("PUT", "POST")]
    keys = {unquote(urlsplit(request.target).path).removeprefix(f"/{ceph_store.bucket}/{PREFIX}/") for request in asked}
    written = {key for key in keys if not key.startswith(f"/{ceph_store.bucket}")}  # else, it is a request to the bucket: a list of deletes

    assert output in written
    assert [] == [key for key in written - {output} if not key.startswith(_expiring())]
    assert {".gradsharding", "rounds"} == {key.split("/")[0] for key in written - {output}}


@pytest.mark.slow
@pytest.mark.rig
@pytest.mark.parametrize(("name", "versioned"), [("in results", False), ("deeper in results", True)])
def test_lifecycle(name: str, monkeypatch: pytest.MonkeyPatch, *, versioned: bool) -> None:
    """Under the template's rules, on a server whose days are short, what a killed ``aggregate`` leaves goes; updates and results stay."""
    if why := ceph_missing():
        pytest.skip(why)
    rules = resources()["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"]

    def for_s3(rule: Any) -> Any:
        found = {"ID": rule["Id"], "Status": rule["Status"], "Filter": {"Prefix": rule.get("Prefix", "").replace("some_prefix", PREFIX)}}
        if "ExpirationInDays" in rule:
            return found | {"Expiration": {"Days": 1}}
        if "NoncurrentVersionExpiration" in rule:
            return found | {"NoncurrentVersionExpiration": {"NoncurrentDays": 1}, "Expiration": {"ExpiredObjectDeleteMarker": True}}
        return found | {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}}

    with ceph_server(day=3) as ceph:
        for variable, value in ceph.server.environment().items():
            monkeypatch.setenv(variable, value)
        store = S3Store(f"s3://{ceph.server.make_bucket()}/{PREFIX}")
        output, words = OUTPUTS[name]
        inputs = _inputs(store)
        _kill_midway(store, ["aggregate", *inputs, "-o", f"{store.url}/{output}", "--executor", "processes:1", *_placed(words, store)])
        if versioned:  # from now on: with versions, Ceph 16 replaces what it is asked to create, and no round begins there
            store.client.put_bucket_versioning(Bucket=store.bucket, VersioningConfiguration={"Status": "Enabled"})
        for data in (b"old", b"new"):  # a result that was written twice has a version that is not current
            store.client.put_object(Bucket=store.bucket, Key=store.place("results/earlier"), Body=data)
        left = {place.removeprefix(f"{PREFIX}/") for place in _versions(store)}
        assert {".gradsharding", "rounds"} <= {key.split("/")[0] for key in left}
        assert _uploads(store)

        store.client.put_bucket_lifecycle_configuration(
            Bucket=store.bucket, LifecycleConfiguration={"Rules": [for_s3(rule) for rule in rules]}
        )
        end = time.monotonic() + 90
        while time.monotonic() < end and (len(_versions(store)) > 3 or _uploads(store)):
            time.sleep(0.5)

        assert [f"{PREFIX}/{key}" for key in ("in/a.safetensors", "in/b.safetensors", "results/earlier")] == _versions(store)
        assert not _uploads(store)
        assert b"new" == store.client.get_object(Bucket=store.bucket, Key=store.place("results/earlier"))["Body"].read()


def _expiring() -> tuple[str, ...]:
    """Prefixes, below the project's, whose objects the template's rules delete."""
    rules = [rule for rule in resources()["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"] if "ExpirationInDays" in rule]
    return tuple(rule["Prefix"].removeprefix("some_prefix/") for rule in rules)


def _inputs(store: S3Store) -> list[str]:
    """Put two updates into a store, so large that they have many slices; give their URLs."""
    for client in ("a", "b"):
        store.put(f"in/{client}.safetensors", encode({"w": np.full(4 << 20, ord(client), "f4")})[1])
    return [f"{store.url}/in/{client}.safetensors" for client in ("a", "b")]


def _placed(words: Sequence[str], store: S3Store) -> list[str]:
    return [store.url if word == "STORE" else word for word in words]


def _kill_midway(store: S3Store, words: list[str]) -> None:
    """Start a command, and kill it and its workers as soon as it has kept a part of its result in a store."""
    process = subprocess.Popen([sys.executable, "-m", "gradsharding", *words], start_new_session=True)
    end = time.monotonic() + 60
    while time.monotonic() < end and not [*store._list(f"{PREFIX}/.gradsharding/")]:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert -signal.SIGKILL == process.wait()


def _versions(store: S3Store) -> list[str]:
    """Keys of all versions and delete markers of a bucket."""
    found = store.client.list_object_versions(Bucket=store.bucket)
    return [one["Key"] for one in (*found.get("Versions", []), *found.get("DeleteMarkers", []))]


def _uploads(store: S3Store) -> list[Any]:
    return [*store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])]
