"""What a Flower server holds: 1,000 clients of 2,000 tensors, and hostile headers, in a fresh process. Run it to print the figures.

``python tests/test_flower_memory.py clients`` or ``... headers`` prints the server's peak over its start, in bytes.
"""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

MIB = 1 << 20
TENSORS = 2_000
HOSTILE = 10_000_000
"""Bytes of a hostile header."""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "most"), [("clients", 100 * MIB), ("headers", 300 * MIB)])
def test_peak(what: str, most: int, tmp_path: Path) -> None:
    """A server takes less than 100 MiB for 1,000 clients, and less than 300 MiB with 16 hostile headers of 10 MB."""
    command = [sys.executable, __file__, what, str(tmp_path)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    peak, averaged, left_out = map(int, ended.stdout.split()[-3:])
    assert ((1_000, 0) if what == "clients" else (4, 16)) == (averaged, left_out)
    assert 0 < peak < most


def main(what: str, directory: Path) -> None:
    """Run a server whose nodes' updates are files that were there before; print its peak, and how many nodes were averaged and left out."""
    import numpy as np  # noqa: PLC0415 - the process that measures begins here
    from flwr.app import Message, MetricRecord, RecordDict  # noqa: PLC0415
    from flwr.serverapp.strategy import FedAvg  # noqa: PLC0415

    from gradsharding import DirectoryStore  # noqa: PLC0415
    from gradsharding.format.encode import Raw, encode  # noqa: PLC0415
    from gradsharding.stores.updates import inspect  # noqa: PLC0415
    from gradsharding_flower import GradSharding  # noqa: PLC0415
    from gradsharding_flower.arrays import to_record  # noqa: PLC0415
    from gradsharding_flower.mod import ORDERS  # noqa: PLC0415
    from gradsharding_flower.reference import Reference, client_id  # noqa: PLC0415
    from gradsharding_flower.testing import LocalGrid  # noqa: PLC0415

    clients, hostile = (1_000, 0) if what == "clients" else (20, 16)
    model = {f"model.layers.{i}.self_attn.q_proj.weight": np.zeros(16, np.float32) for i in range(TENSORS)}
    store = DirectoryStore(directory / "store")
    store.put("honest", encode(model)[1])
    first = to_record({name: Raw("F32", array.shape, array.tobytes()) for name, array in model.items()})
    update = Reference.to("", inspect("honest", store), tuple(model))
    for node in range(hostile):
        names = {f"{node}-{i:06d}": ("U8", (0,)) for i in range(HOSTILE // 60)}
        text = "{" + ",".join(f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for name in names)
        header = (text + "}").encode().ljust(HOSTILE)
        store.put(f"hostile-{node}", [len(header).to_bytes(8, "little"), header])

    class Prepared(LocalGrid):
        """Nodes whose updates are copies of files, made when they are asked."""

        def _answer(self, message: Message) -> Message:
            node = message.metadata.dst_node_id
            round_id = str(message.content.config_records[ORDERS]["round"])
            source = f"rounds/{round_id}/updates/{client_id(node)}.safetensors"
            path = store.root / source
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.root / (f"hostile-{node}" if node < hostile else "honest"), path)
            receipt = update.model_copy(update={"source": source, "version": store.head(source).version})
            return Message(RecordDict({"arrays": receipt.record(), "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    logging.disable(logging.CRITICAL)
    strategy = GradSharding(FedAvg(fraction_evaluate=0.0), store=store, executor="processes:1")
    before = reset()
    strategy.start(Prepared(dict.fromkeys(range(clients))), first, num_rounds=1)  # type: ignore[arg-type]
    report = strategy.history[0]
    print(_status("VmHWM") - before, len(report.clients), len(report.left_out))  # noqa: T201 - this is what it is for


def reset() -> int:
    """Give freed memory back, and begin the kernel's high-water mark anew; give what is held now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines: Iterable[str] = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        main(sys.argv[1], Path((sys.argv[2:] or [own])[0]))
