"""Nodes open what lies in their own store, and what their owner allows; what else a server names stays shut, and untold."""

from pathlib import Path

import pytest
import safetensors.numpy
from flwr.serverapp.strategy import FedAvg

from flower_federation import NODES, averaged, grid_of, initial, record, sharding, state_of
from gradsharding import DirectoryStore, MemoryStore
from gradsharding.errors import ChangedObject, UserError
from gradsharding.testing import assert_same
from gradsharding_flower import refer
from gradsharding_flower.reference import Reference, find_reference, write_arrays
from gradsharding_flower.trust import ALLOW_KEY, load_model, load_pinned
from rigs.opens import opens


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """Give a file that a node's user can read, and no server is to."""
    path = tmp_path / "home" / "private.safetensors"
    path.parent.mkdir()
    safetensors.numpy.save_file(initial(), path)
    return path


def named(path: Path) -> Reference:
    """Make a reference that is right in all: source, version, names."""
    found = find_reference(refer(path, MemoryStore()))
    assert found
    return found


@pytest.mark.parametrize(
    "dots", ["{shared}/../home/private.safetensors", "{shared}/%2e%2e/home/private.safetensors", "{home}x/../private.safetensors"]
)
@pytest.mark.parametrize("allowed", ["", "{shared}", "file:///", "{home}/private"])
def test_a_foreign_file_is_not_opened(tmp_path: Path, private: Path, dots: str, allowed: str) -> None:
    """A file outside the node's store and its allow-list is refused before it is opened, whatever its URL looks like."""
    shared, home = (tmp_path / "shared").as_uri(), private.parent.as_uri()
    reference = named(private)
    with opens(private.parent) as opened:
        for source in (reference.source, dots.format(shared=shared, home=home)):
            config = {ALLOW_KEY: allowed.format(shared=shared, home=home)}
            with pytest.raises(UserError, match=r"this node reads only its own store; .*--node-config 'gradsharding-allow"):
                load_model(reference.model_copy(update={"source": source}), DirectoryStore(tmp_path / "shared"), config)
        assert [] == opened()
        assert private.read_bytes()
        assert [private.name] == opened()


@pytest.mark.parametrize("allowed", ["{home}", "s3://bucket/models {home}/ file:///elsewhere"])
def test_an_allowed_file_is_opened(tmp_path: Path, private: Path, allowed: str) -> None:
    """A model below one of the URLs that the node's owner allows is read."""
    config = {ALLOW_KEY: allowed.format(home=private.parent.as_uri())}
    assert_same(initial(), state_of(load_model(named(private), DirectoryStore(tmp_path / "shared"), config)))


def test_a_model_in_the_store_needs_no_leave(tmp_path: Path) -> None:
    """A first model that lies in the store which nodes upload to is read by its URL, without any setting on a node."""
    (tmp_path / "store").mkdir()
    safetensors.numpy.save_file(initial(), path := tmp_path / "store" / "first.safetensors")
    store = DirectoryStore(tmp_path / "store")
    result = sharding(store).start(grid_of(), refer(path, store), num_rounds=1)
    assert_same(averaged(NODES, 1, initial()), state_of(result.arrays))


@pytest.mark.parametrize("version", ["?", ""])
def test_errors_tell_no_version(private: Path, version: str) -> None:
    """A node's error for a model at another version, or for a file that is none, tells neither the version nor what is in the file."""
    store = DirectoryStore(private.parent)
    (private.parent / "shadow").write_bytes(b"root:secret")
    messages = []
    for key in (private.name, "shadow", "missing"):
        with pytest.raises(ChangedObject) as caught:
            load_model(Reference(source=key, version=version, nbytes=4, names=("w",)), store, {})
        messages.append(caught.value.message.removeprefix(key))
    assert 1 == len({*messages})
    assert store.head(private.name).version not in messages[0]


def test_a_lent_url_leads_to_keys_only(private: Path) -> None:
    """A node that reads by signed URLs opens no file that the reference beside the URL names."""
    with pytest.raises(UserError, match="this node reads only by URLs that the server lends"):
        load_pinned(reference := named(private), MemoryStore(), reference.source)


def test_nodes_without_leave_are_left_out(tmp_path: Path, private: Path, flower_log: pytest.LogCaptureFixture) -> None:
    """A federation whose first model lies elsewhere says what each node's owner has to allow, and trains nothing."""
    store = DirectoryStore(tmp_path / "shared")
    result = sharding(store, FedAvg(fraction_evaluate=0.0)).start(grid_of(), refer(private, store), num_rounds=1)
    assert len(NODES) == flower_log.text.count("gradsharding-allow=")
    assert_same(initial(), state_of(result.arrays))


def test_keys_are_read_from_the_nodes_store(tmp_path: Path) -> None:
    """A plain key is a key of the node's store."""
    store = DirectoryStore(tmp_path)
    assert_same(initial(), state_of(load_model(write_arrays("a/model", record(initial()), store), store, {})))
