"""The template is sound, builds, goes up on an account that executes it, works there, and comes down without a rest."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import boto3
import click
import numpy as np
import pytest

from gradsharding.aws.deploy.account import Account
from gradsharding.aws.deploy.bundle import WANTED, Bundle, probe
from gradsharding.aws.deploy.commands import deploy
from gradsharding.format.encode import encode
from gradsharding.planning.platform import DEPLOYED_TIMEOUT, MEMORY, TIMEOUT
from gradsharding.stores.updates import load
from gradsharding.stores.urls import open_store
from gradsharding.testing import assert_same, reference_mean
from rigs.stack import as_account

DEPLOY = Path(__file__).parent.parent / "deploy"
HERE = {"aarch64": "arm64"}.get(os.uname().machine, os.uname().machine), f"{sys.version_info.major}.{sys.version_info.minor}"
ACCOUNT = "200000000001"
OFFLINE = {"SAM_CLI_TELEMETRY": "0", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


def _gradsharding(*words: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("gradsharding")), *words]
    return subprocess.run(command, input=answer, capture_output=True, text=True, check=False, timeout=300)


def _run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **OFFLINE, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("option", "default", "most"), [("memory", 512, MEMORY[-1] >> 20), ("timeout", DEPLOYED_TIMEOUT, TIMEOUT)])
def test_template_allows_what_plans_count_on(option: str, default: int, most: int) -> None:
    """The template, the command line and the planner have one default and one maximum."""
    section = re.search(rf"^  {option.capitalize()}:\n((?:    .*\n)*)", (DEPLOY / "template.yaml").read_text(), re.MULTILINE)
    assert section
    said = dict(re.findall(r"(Default|MinValue|MaxValue): (\d+)", section[1]))
    (offered,) = (one for one in deploy.params if one.name == option)

    assert {"Default": default, "MaxValue": most} == {name: int(said[name]) for name in ("Default", "MaxValue")}
    assert isinstance(offered.type, click.IntRange)
    assert (int(said["MinValue"]), most) == (offered.type.min, offered.type.max)
    assert f"[default: {default}]" in (getattr(offered, "help", None) or "")


@pytest.mark.parametrize("command", [["cfn-lint"], ["sam", "validate", "--lint", "--template"]], ids=" ".join)
def test_template_is_sound(sam: Path, command: list[str]) -> None:
    """CloudFormation's linter and SAM's validator find nothing to say."""
    ended = _run(sam.with_name(command[0]), *command[1:], DEPLOY / "template.yaml", cwd=DEPLOY)
    assert 0 == ended.returncode, ended.stdout + ended.stderr


def test_sam_builds_it(sam: Path, tmp_path: Path) -> None:
    """``sam build`` makes the same bundle as ``deploy`` does."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    overrides = f"Architecture={HERE[0]} Runtime=python{HERE[1]}"
    env = {"PATH": path, "GRADSHARDING_ARCHITECTURE": HERE[0], "GRADSHARDING_PYTHON": HERE[1]}
    ended = _run(sam, "build", "--parameter-overrides", overrides, cwd=tmp_path / "deploy", **env)
    built = tmp_path / "deploy/.aws-sam/build/Function"

    assert 0 == ended.returncode, ended.stdout + ended.stderr
    assert WANTED <= {path.name.removesuffix(".py") for path in built.iterdir()}
    assert not (built / "gradsharding/cli").exists()
    probe(Bundle(built, 0))


@pytest.fixture
def command(ministack: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line on an account of its own."""
    for name, value in as_account(ministack, ACCOUNT).items():
        monkeypatch.setenv(name, value)

    return _gradsharding


@pytest.mark.slow
def test_deploy_smoke_destroy(command: Any) -> None:
    """A stack goes up, averages with every element right, changes when it is told to, and leaves nothing behind."""
    ours = ["--architecture", HERE[0], "--runtime", f"python{HERE[1]}"]
    up = command("deploy", "--name", "one", *ours, "--memory", "512", "--yes")
    assert 0 == up.returncode, up.stderr
    assert "executor: lambda:one" in up.stdout
    assert f"pydantic {metadata.version('pydantic')}" in up.stderr
    assert "it costs $0.20 a month for 2 alarms" in up.stdout
    smoked = command("smoke", "--name", "one")
    assert 0 == smoked.returncode, smoked.stderr
    assert 2 == smoked.stdout.count("every element is right")
    assert "\n4 slices: 4 functions, " in smoked.stdout
    assert "\n2 slices in a tree of fan-in 2: 6 functions, " in smoked.stdout
    assert "MiB projected" in smoked.stdout
    assert "invocations: Lambda reported no figures" in smoked.stdout  # ministack writes none into an invocation's log
    assert "list prices of us-east-1" in smoked.stdout

    store = open_store(next(line.split()[1] for line in up.stdout.splitlines() if line.startswith("store:")))
    updates = {"a": ({"w": np.array([1, 2], "f4")}, 120), "b": ({"w": np.array([5, 7], "f4")}, 80)}
    given = [f"{store.url}/in/{client}.safetensors" for client in updates]
    for client, (arrays, _) in updates.items():
        store.put(f"in/{client}.safetensors", encode(arrays)[1])
    mean = f"{store.url}/results/mean.safetensors"
    used = command("aggregate", f"{given[0]}:120", f"{given[1]}:80", "-o", mean, "--executor", "lambda:one")
    assert 0 == used.returncode, used.stderr
    assert_same(reference_mean(updates), load("results/mean.safetensors", store))

    assert 0 == command("deploy", "--name", "one", "--memory", "1024", "--yes").returncode
    configured = boto3.client("lambda").get_function_configuration(FunctionName="one")
    assert (1024, f"python{HERE[1]}", [HERE[0]]) == (configured["MemorySize"], configured["Runtime"], configured["Architectures"])
    assert 0 == command("deploy", "--name", "two", *ours, "--yes").returncode

    refused = command("destroy", "--name", "one")
    assert 2 == refused.returncode
    assert "there is no terminal to ask at; run it again with --yes" in refused.stderr
    gone = command("destroy", "--name", "one", "--yes", "--delete-data")
    assert 0 == gone.returncode, gone.stderr
    assert "nothing that is billed is left" in gone.stdout
    assert Account().find("one") is None
    assert 0 == command("smoke", "--name", "two").returncode  # a stack beside it lives on

    assert 0 == command("destroy", "--name", "two", "--yes", "--delete-data").returncode
    assert [] == boto3.client("s3").list_buckets()["Buckets"]
    assert [] == boto3.client("lambda").list_functions()["Functions"]
    groups = [group["logGroupName"] for group in boto3.client("logs").describe_log_groups()["logGroups"]]
    assert not {"/aws/lambda/one", "/aws/lambda/two"} & {*groups}


def test_what_is_not_there(command: Any) -> None:
    """Trying what was never put up says how to put it up; taking it down finds nothing to do."""
    missing = command("smoke", "--name", "nothing")
    assert 2 == missing.returncode
    assert "deploy it with: gradsharding deploy --name nothing" in missing.stderr
    gone = command("destroy", "--name", "nothing", "--yes")
    assert 2 == gone.returncode
    assert f"there is no stack nothing in account {ACCOUNT}, region us-east-1" in gone.stderr
    named = command("deploy", "--name", "a b", "--yes")
    assert 2 == named.returncode
    assert "'a b' cannot name a stack" in named.stderr


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, ministack: Mapping[str, str]) -> None:
    """Without credentials, each command ends in one line that says which variables to set."""
    for name, value in ministack.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    ended = _gradsharding("smoke")
    assert 2 == ended.returncode
    assert "there are no AWS credentials; set AWS_ACCESS_KEY_ID" in ended.stderr
