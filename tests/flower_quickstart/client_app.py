"""The client, as in Flower's quickstart."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_quickstart.task import Net, load_data, train

# Flower ClientApp
app = ClientApp()


@app.train()
def fit(msg: Message, context: Context) -> Message:
    """Train the model on local data."""
    model = Net()
    model.load_state_dict(msg.content.array_records["arrays"].to_torch_state_dict())
    data = load_data(context.node_id % 3, 3)
    lr = msg.content.config_records["config"]["lr"]
    assert isinstance(lr, float)
    arrays = train(model, data, lr)
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": len(data[1])})}), reply_to=msg)
