"""``aggregate --exact`` and ``verify``: one result for all topologies, which can be checked."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import safetensors.numpy
import safetensors.torch

from rigs.command import everything, flowing, model


def test_exact_is_verified(narrow: list[str], call: Callable[..., str], refuse: Callable[..., str], tmp_path: Path) -> None:
    """With --exact every topology makes one file; the command says how to verify it, which tells what was checked, or is wrong."""
    made = set()
    for i, topology in enumerate(("sharded", "lambda-fl", "lifl")):
        said = call("aggregate", *narrow, "-o", "out", "--exact", "--store", f"kept{i}", "--topology", topology, "--executor", "inline")
        made.add((tmp_path / "out").read_bytes())
    verify = re.findall(r"  check it  gradsharding (verify kept2 r-[0-9a-f]{32})\n", said)[0].split()
    found = call(*verify, "--sample", "1000")

    assert 1 == len(made)
    (data,) = made
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert f"  SHA-256   {digest}\n" in said
    assert f"round {verify[2]}: exact-mean of 3 clients, 0.1 MiB SHA-256 {digest}, as published recomputed " in flowing(found)
    assert ", from the sealed updates: the same bits" in flowing(found)

    safetensors.torch.save_file(model(9), tmp_path / "cyd.safetensors")
    assert "client cyd: 'cyd.safetensors' is at version" in refuse(*verify, "--sample", "1000", status=1)


def test_exact_is_another_round(narrow: list[str], call: Callable[..., str], refuse: Callable[..., str], tmp_path: Path) -> None:
    """With --store, --exact is another round than without, and says so when it cannot be verified."""
    call("aggregate", *narrow, "-o", "out", "--store", "kept")
    call("aggregate", *narrow, "-o", "exact", "--store", "kept", "--exact")
    exact, plain = sorted(
        (json.loads(path.read_text())["rule"], path.parent.name) for path in (tmp_path / "kept/rounds").glob("*/result.json")
    )

    assert ("mean", "exact-mean") == (plain[0], exact[0])
    refused = refuse("verify", "kept", plain[1])
    assert "was made by the rule mean, whose last bits depend on the path, so that they cannot be verified" in refused
    assert f"round r-1 has no result in {(tmp_path / 'kept').as_uri()}" in refuse("verify", "kept", "r-1")


def test_exact_float64_is_refused(updates: list[str], refuse: Callable[..., str], tmp_path: Path) -> None:
    """A float64 tensor is refused by its name, with what to do, and nothing is left behind."""
    before = everything(tmp_path)
    refused = refuse("aggregate", *updates, "-o", "out", "--exact")

    assert "tensor 'head.weight' is F64, and exact sums are of F32, F16 and BF16: convert it to F32, or use another rule" in refused
    assert before == everything(tmp_path)
