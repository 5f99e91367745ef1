"""A stack is deployed by a change set that is shown first, and nothing is changed without consent.

After any interruption, the same call continues from what it finds in the account.
"""

import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError

from gradsharding.aws.client import explained
from gradsharding.aws.deploy.account import TAG, Account, Stack, Tell, is_marked, remedy
from gradsharding.aws.deploy.code import Code, Zipped, code_of_template, forget_code, own_bucket, put_code, zipped
from gradsharding.aws.deploy.drift import check_brought, others_code
from gradsharding.aws.deploy.options import NAMED, require_consistent
from gradsharding.aws.deploy.teardown import disown
from gradsharding.aws.deploy.template import RELEASE, filled
from gradsharding.aws.refusals import code_of
from gradsharding.errors import GradShardingError, StackFailed, UserError

TEMPLATES = (Path(__file__).with_name("template.yaml"), Path(__file__).parents[3] / "deploy/template.yaml")
"""Paths of the template: in an installed package, and in a checkout."""

_BUILT = {"AWS::Serverless::Function": ("AWS::Lambda::Function", "AWS::Lambda::Version", "AWS::Lambda::Alias")}
"""The types into which SAM expands its own."""


class Order(NamedTuple):
    """The desired settings of a stack. Those that are left out stay unchanged, or have the template's default."""

    name: str
    parameters: Mapping[str, str] = {}
    tags: Mapping[str, str] = {}
    """Tags to add to those of the stack, beside ours."""
    role: str | None = None
    """ARN of CloudFormation's role, if it is not to use the caller's rights."""
    protected: bool | None = None
    """Termination protection."""
    code_bucket: str | None = None
    """Bucket for the function's code, if it is not to be one of ours."""
    adopt: bool = False
    """Whether to take over a stack that a release without tag and marker has deployed."""


class Change(NamedTuple):
    """A change to a resource."""

    action: str
    """As the table shows it: make, change, replace (the old one is deleted), delete; or leave: it stays, outside the stack."""
    logical: str
    type: str
    physical: str


Agree = Callable[[list[Change]], bool]
"""Shows the changes; returns whether they may be made."""


def put_up(account: Account, order: Order, agree: Agree, tell: Tell, make: Zipped = zipped) -> Stack | None:
    """Create or update the stack; return None if ``agree`` refuses, with nothing left behind.

    Raise UserError for a stack that is not ours, or must be repaired first; StackFailed with CloudFormation's reason.
    """
    found, name = _ready(account, order, tell), order.name
    if found and found.status == "ROLLBACK_COMPLETE":  # its creation failed, and CloudFormation accepts no changes for it
        if not agree(_remains(account, found)):
            return None
        _clear(account, found, tell)
        found = None
    old = code_of_template(account.template(found)) if found else None
    request, code = _request(account, order, found, old, tell, make)
    _check_same(account, order, found)
    try:
        agreed = _prepare_and_run(account, order, request, (old, code), agree, tell)
    except (BotoCoreError, ClientError) as error:
        if code_of(error) in ("ChangeSetNotFound", "InvalidChangeSetStatus"):
            raise StackFailed(f"stack {name} was changed by another command since its changes were shown; run this again") from error
        raise explained(error, f"stack {name} in {account}") from error
    return account.find(name) if agreed else None


def _prepare_and_run(
    account: Account, order: Order, request: dict[str, Any], codes: tuple[Code | None, Code], agree: Agree, tell: Tell
) -> bool:
    """Create a change set, show it, and run it; return False if it is refused."""
    token, (old, code) = f"gradsharding-{uuid.uuid4().hex}", codes
    made = account.formation.create_change_set(ChangeSetName=token, **request)
    stack, change = _known(account, made["StackId"]), made["Id"]
    try:
        _check_alone(account, stack)
        changes = _changes(account, stack, change)
        shown = [*_shown(stack, changes), *_protection(stack, order)]
        agreed = bool(shown) and agree(shown)
    except BaseException:  # it cannot be created, or nobody can be asked, or the user interrupted
        try:
            _withdraw(account, stack, change, codes, old, tell)
        except (BotoCoreError, ClientError, GradShardingError) as error:  # the first error is the one to raise
            tell(f"what was prepared for stack {stack.name} could not be withdrawn: {error}")
        raise
    if changes is None or not agreed:
        _withdraw(account, stack, change, codes, old if shown and not agreed else code, tell)
    else:
        if bucket := order.parameters.get("ExistingBucket"):
            disown(account, bucket)
        _run(account, stack, change, token, tell)
        _tidy(account, stack.name, old, code, code, tell)
    if agreed and _protection(stack, order):
        account.formation.update_termination_protection(StackName=stack.id, EnableTerminationProtection=bool(order.protected))
    if not shown:
        tell(f"stack {stack.name} is as it should be: no change")
    return agreed or not shown


def _run(account: Account, stack: Stack, change: str, token: str, tell: Tell) -> None:
    """Run a change set; raise StackFailed with CloudFormation's reason if that fails."""
    account.formation.execute_change_set(ChangeSetName=change, ClientRequestToken=token)
    stack = account.done(stack, token, tell)
    if not stack.works or stack.status == "UPDATE_ROLLBACK_COMPLETE":
        why = account.failure(stack, token) or "its events give no reason"
        raise StackFailed(f"stack {stack.name} in {account} is {stack.status}: {why}; {remedy(stack)}")


def _shown(stack: Stack, changes: list[Change] | None) -> list[Change]:
    """Return the changes of a change set as they are shown; if no resource changes, the stack itself does."""
    return [Change("change", "tags or outputs", "AWS::CloudFormation::Stack", stack.name)] if changes == [] else changes or []


def _protection(stack: Stack, order: Order) -> list[Change]:
    """Return the change of a stack's termination protection, which no change set has."""
    if order.protected is None or order.protected == stack.protected:
        return []
    return [Change("turn on" if order.protected else "turn off", "termination protection", "AWS::CloudFormation::Stack", stack.name)]


def _remains(account: Account, stack: Stack) -> list[Change]:
    """Return what is deleted with a stack whose creation failed."""
    held = [Change("delete", resource.logical, resource.type, resource.physical) for resource in account.resources(stack)]
    return [*held, Change("delete", "the failed stack", "AWS::CloudFormation::Stack", stack.name)]


def _clear(account: Account, stack: Stack, tell: Tell) -> None:
    """Delete a stack whose creation failed; no other stack can have its ARN."""
    tell(f"deleting stack {stack.name}, whose creation failed")
    try:
        account.formation.delete_stack(StackName=stack.id, ClientRequestToken=(token := f"gradsharding-{uuid.uuid4().hex}"))
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"deleting stack {stack.name}") from error
    gone = account.done(stack, token, tell)
    if gone.status != "DELETE_COMPLETE":
        raise UserError(f"stack {stack.name} in {account} is {gone.status}; {remedy(gone)}")


def _withdraw(account: Account, stack: Stack, change: str, codes: tuple[Code | None, Code], keep: Code | None, tell: Tell) -> None:
    """Delete a change set, and the code that was uploaded for it."""
    if _take_back(account, stack, change):
        _tidy(account, stack.name, *codes, keep, tell)
    else:
        tell(f"stack {stack.name} stays: another command has prepared or changed it meanwhile")


def _tidy(account: Account, name: str, old: Code | None, new: Code, keep: Code | None, tell: Tell) -> None:
    """Delete code that the stack no longer needs; if that fails, the stack is intact nevertheless."""
    for bucket in {new.bucket, *({old.bucket} if old else ())}:
        try:
            forget_code(account, name, bucket, keep=keep)
        except GradShardingError as error:
            tell(f"old code stays: {error}")


def _request(
    account: Account, order: Order, found: Stack | None, old: Code | None, tell: Tell, make: Zipped
) -> tuple[dict[str, Any], Code]:
    """Upload the function's code; return the parameters of the request for a change set, with the template, and the code."""
    text = template()
    takes, given = defaults(text), dict(order.parameters)
    if unknown := given.keys() - takes.keys():
        raise UserError(f"the template has no parameters {', '.join(sorted(unknown))}")
    kept = found.parameters.keys() & takes.keys() - given.keys() if found else frozenset[str]()
    known = {**takes, **{key: found.parameters[key] for key in kept if found}, **given}
    require_consistent(known, given, found.parameters if found else None, account.region)
    if known["ExistingBucket"] and given.keys() & {"ExistingBucket", "BucketOwner"}:
        check_brought(account, known["ExistingBucket"], known["BucketOwner"], tell)
    bucket = order.code_bucket or (old.bucket if old and old.bucket != own_bucket(account) else None)
    stale = old.version if old and found and any(others_code(account, account.resources(found), old)) else ""
    code = put_code(account, order.name, bucket, make(known["Architecture"], known["Runtime"], tell), stale)
    tags = {**(found.tags if found else {}), **order.tags, TAG: order.name}
    return {
        "StackName": found.id if found else order.name,  # the ARN makes sure that it is the stack that was looked up
        "ChangeSetType": "UPDATE" if found else "CREATE",
        "TemplateBody": filled(text, code.uri, known, order.role or (found.role if found else "")),
        "Capabilities": ["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"],
        "Parameters": [
            *({"ParameterKey": key, "UsePreviousValue": True} for key in sorted(kept)),
            *({"ParameterKey": key, "ParameterValue": value} for key, value in given.items()),
        ],
        "Tags": [{"Key": key, "Value": value} for key, value in tags.items() if not key.startswith("aws:")],
        **({"RoleARN": order.role} if order.role else {}),
    }, code


def template() -> str:
    """Return the text of our template."""
    return next(path for path in TEMPLATES if path.exists()).read_text()


def defaults(text: str) -> dict[str, str]:
    """Return the default of each parameter of our template, except the release, which is filled in."""
    section = re.search(r"^Parameters:\n((?:[ ].*\n|\n)*)", text, re.MULTILINE)
    assert section
    found: dict[str, str] = {}
    for name, section_of in re.findall(r"^  (\w+):\n((?:    .*\n|\n)*)", section[1], re.MULTILINE):
        default = re.search(r"^    Default: *(.*?) *(?:#.*)?$", section_of, re.MULTILINE)
        if name != RELEASE:
            found[name] = default[1].strip("'\"") if default else ""
    return found


def kinds(text: str) -> set[tuple[str, str]]:
    """Return logical id and type of each resource of our template, as CloudFormation names them."""
    section = re.search(r"^Resources:\n((?:[ ].*\n|\n)*)", text, re.MULTILINE)
    assert section
    found = re.findall(r"^  (\w+):[^\n]*\n(?:    .*\n|\n)*?    Type: (\S+)", section[1], re.MULTILINE)
    return {(logical, built) for logical, kind in found for built in _BUILT.get(kind, (kind,))}


def _ready(account: Account, order: Order, tell: Tell) -> Stack | None:
    """Find our stack if it works, or if its creation failed; None if there is none. Raise UserError if it must be repaired first."""
    found = account.look_up(order.name)
    if found and (why := account.foreign(found)):
        if not order.adopt or found.empty:  # an empty stack has nothing to take over
            account.find(order.name)  # refuses
        _check_old(account, found, why)
    found = account.settled(found, tell) if found else None
    if not found or found.empty or found.status == "DELETE_COMPLETE":
        _check_free(account, order.name)
        return None
    if found.status == "ROLLBACK_COMPLETE":
        return found
    if not found.works:
        raise UserError(f"stack {order.name} in {account} is {found.status}; {remedy(found)}")
    return found


def _check_free(account: Account, name: str) -> None:
    """Raise UserError if a name of the stack's resources is in use, or would be too long."""
    if len(name) > NAMED:
        raise UserError(
            f"{name} has {len(name)} characters, and a new stack's name {NAMED} at most, as AWS would shorten what it makes of it; "
            "choose a shorter one with --name"
        )
    try:
        with suppress(account.functions.exceptions.ResourceNotFoundException):
            account.functions.get_function_configuration(FunctionName=name)
            raise UserError(f"a function {name} is in {account} already, and no stack {name} is; choose another name with --name")
        group = f"/aws/lambda/{name}"
        groups = account.logs.describe_log_groups(logGroupNamePrefix=group)["logGroups"]
    except (BotoCoreError, ClientError) as error:
        raise explained(error, f"looking for what is called {name} in {account}") from error
    if group in {existing["logGroupName"] for existing in groups}:
        raise UserError(
            f"a log group {group} is in {account} already, and no stack {name} is; choose another name with --name, or, if nobody needs "
            f"that log: aws logs delete-log-group --log-group-name {group}"
        )


def _check_old(account: Account, stack: Stack, why: str) -> None:
    """Raise UserError unless a stack without tag or marker was deployed by an older release of ours."""
    others = [resource for resource in account.resources(stack) if not _is_known(resource.logical, resource.type)]
    says = account.description(stack)
    ours = says.startswith("gradsharding - ") and not others and TAG not in stack.tags
    if not ours and not (stack.tags.get(TAG) == stack.name and is_marked(account.template(stack))):
        held = (
            f"it has {', '.join(f'{resource.logical} ({resource.type})' for resource in others[:3])}"
            if others
            else f"it says {says[:60]!r} of itself"
        )
        raise UserError(f"stack {stack.name} in {account} cannot be taken over: {why}, and {held}; choose another name with --name")


def _is_known(logical: str, kind: str) -> bool:
    """Whether our template has a resource; SAM appends a digest to a version's name, and the alias's name to the function's."""
    return any(
        kind == known and (logical == name or (kind != "AWS::Lambda::Function" and logical.startswith(name)))
        for name, known in kinds(template())
    )


def _changes(account: Account, stack: Stack, change: str) -> list[Change] | None:
    """Wait for a change set; return its changes to resources, None if there are none. Raise StackFailed if it cannot be created."""
    pause = 0.1
    while True:
        pages = account.formation.get_paginator("describe_change_set").paginate(ChangeSetName=change)
        described = [*pages]
        state, why = described[0]["Status"], described[0].get("StatusReason", "")
        if state not in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
            break
        time.sleep(pause)
        pause = min(2.0, pause * 1.5)
    if state != "CREATE_COMPLETE":
        if "didn't contain changes" in why or "No updates" in why:
            return None
        raise StackFailed(f"stack {stack.name} in {account} was not changed: {why or state}")
    return [_change(entry["ResourceChange"]) for page in described for entry in page.get("Changes", []) if "ResourceChange" in entry]


def _change(change: Any) -> Change:
    kept = change.get("PolicyAction", "").endswith("Retain")
    match change["Action"], change.get("Replacement"):
        case "Add", _:
            action = "make"
        case "Modify", "True":
            action = "replace, keep the old one" if kept else "replace"
        case "Modify", "Conditional":
            action = "change or replace"
        case "Modify", _:
            action = "change"
        case "Remove", _:
            action = "leave" if kept else "delete"
        case other, _:
            action = str(other).lower()
    return Change(action, change["LogicalResourceId"], change["ResourceType"], change.get("PhysicalResourceId", ""))


def _known(account: Account, arn: str) -> Stack:
    """Look up a stack that existed a moment ago."""
    if found := account.look_up(arn):
        return found
    raise StackFailed(f"{arn} was deleted by another command; run this again")


def _take_back(account: Account, stack: Stack, change: str) -> bool:
    """Delete a change set that will not be run, and the stack if it has nothing else; return False if another command uses the stack.

    The stack is looked up again: since the question, another command may have filled it.
    """
    try:
        account.formation.delete_change_set(ChangeSetName=change)
    except ClientError as error:
        if code_of(error) not in ("ChangeSetNotFound", "InvalidChangeSetStatus"):  # another command has run it, or one beside it
            raise
    if not stack.empty:
        return True
    now = account.look_up(stack.id)
    if now and now.empty and not account.change_sets(now):
        account.formation.delete_stack(StackName=now.id)
        return True
    return not now or now.status == "DELETE_COMPLETE"


def _check_same(account: Account, order: Order, found: Stack | None) -> None:
    """Raise UserError or StackFailed if the stack has changed since it was looked up, before the code was built and uploaded."""
    now = account.look_up(order.name)
    if now and (why := account.foreign(now)):
        if not order.adopt or now.empty:
            account.find(order.name)  # refuses
        _check_old(account, now, why)
    if now and now.empty and not found:
        return
    if (now and (now.id, now.status, now.parameters, now.tags)) != (found and (found.id, found.status, found.parameters, found.tags)):
        is_now, was = (f"is {stack.status} ({stack.id})" if stack else "is not there" for stack in (now, found))
        raise StackFailed(
            f"stack {order.name} in {account} was changed by another command: it {is_now}, and it {was} before; run this again"
        )


def _check_alone(account: Account, stack: Stack) -> None:
    """Raise UserError if others have prepared the same stack meanwhile; the caller deletes what we have prepared."""
    if stack.empty and (why := account.foreign(stack)):
        raise UserError(f"stack {stack.name} in {account} is not ours alone: {why}; choose another name with --name")


def interrupted(account: Account, name: str) -> str:
    """Say what exists after a command was interrupted, and how to continue."""
    try:
        stack = account.look_up(name)
    except GradShardingError as error:
        return f"what is left cannot be seen now: {error}"
    if not stack:
        return (
            f"there is no stack {name} in {account}; code in {own_bucket(account)}/{name}/ and buckets with its tag may be there; "
            "run the same command again to go on"
        )
    if stack.empty:
        return f"changes are prepared for stack {name} in {account}, and nothing was changed; run the same command again to go on"
    going = "CloudFormation goes on with it by itself" if stack.changing else "nothing is under way"
    return f"stack {name} in {account} is {stack.status}, and {going}; run the same command again to go on"
