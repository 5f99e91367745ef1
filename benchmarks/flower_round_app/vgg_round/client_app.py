"""Both rivals' client: it changes every weight a little, as training would, and returns them all."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from gradsharding_flower import upload_mod

app = ClientApp(mods=[upload_mod])  # lets messages of plain FedAvg pass untouched


@app.train()
def train(message: Message, context: Context) -> Message:
    """Scale the model by a factor of this client's own, so that no two clients send equal bytes."""
    factor = np.float32(1 + 0.001 * (1 + int(str(context.node_config["partition-id"]))))
    changed = {name: Array(array.numpy() * factor) for name, array in message.content.array_records["arrays"].items()}
    metrics = MetricRecord({"num-examples": 100 + int(str(context.node_config["partition-id"]))})
    return Message(RecordDict({"arrays": ArrayRecord(changed), "metrics": metrics}), reply_to=message)
